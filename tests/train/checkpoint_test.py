import errno
import re
import shutil

import jax
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from paras2s_jax.train import checkpoint, sharding
from paras2s_jax.train import state as state_lib

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def new_state(value=1.0, width=4, mesh=None):
    kernel = jnp.full((8, width), value) + jnp.arange(8.0)[:, None]
    if mesh is not None:
        kernel = jax.device_put(kernel, NamedSharding(mesh, P("fsdp")))
    variables = {"params": {"kernel": kernel}, "base": {"table": jnp.full(3, value)}}
    return state_lib.TrainState.create(
        variables, OPTIMIZER, jax.random.key(int(value)), trainable="^params/"
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_state_and_extra_come_back(tmp_path):
    saved = new_state(3.0).replace(step=jnp.int32(7))
    checkpointer = checkpoint.Checkpointer(tmp_path / "ck")
    assert checkpointer.restore_latest(saved) is None
    extra = {"batches": {"epoch": 1}, "pending": [[6, {"loss": 0.1, "nan": float("nan")}]]}
    checkpointer.save(7, saved, extra)
    checkpointer.close()
    template = new_state(1.0)
    restored, found = checkpoint.Checkpointer(tmp_path / "ck").restore_latest(template)
    for field in ("step", "params", "opt_state", "rng"):
        assert_same(getattr(restored, field), getattr(saved, field))
    # The frozen part is the template's: it is not in the checkpoint.
    assert restored.frozen is template.frozen
    assert found["batches"] == extra["batches"]
    assert found["pending"][0][1]["loss"] == 0.1
    assert np.isnan(found["pending"][0][1]["nan"])


def steps_in(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def test_keeps_the_last_few(tmp_path):
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=2)
    for step in (2, 4, 6):
        checkpointer.save(step, new_state(float(step)), {})
    assert checkpointer.latest_step() == 6
    assert steps_in(tmp_path) == [4, 6]
    # Saving a step again changes nothing.
    checkpointer.save(6, new_state(9.0), {})
    restored, _ = checkpointer.restore_latest(new_state())
    assert_same(restored.params, new_state(6.0).params)


def test_keeps_some_for_ever(tmp_path):
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=1, keep_every=4)
    for step in (2, 4, 6, 8, 10, 11):
        checkpointer.save(step, new_state(), {})
    checkpointer.close()
    assert steps_in(tmp_path) == [4, 8, 11]


def test_a_save_holds_what_was_there_when_it_was_called(tmp_path):
    """The write goes on while the next updates overwrite the buffers that it was given."""
    state = new_state(2.0, width=200_000)
    expected = jax.tree.map(np.array, state.params)
    extra = {"rows": [1]}
    overwrite = jax.jit(lambda x: jax.tree.map(lambda leaf: -leaf, x), donate_argnums=0)
    checkpointer = checkpoint.Checkpointer(tmp_path)
    checkpointer.save(1, state, extra)
    params = state.params
    for _ in range(3):
        params = jax.block_until_ready(overwrite(params))
    extra["rows"].append(2)
    restored, found = checkpointer.restore_latest(new_state(1.0, width=200_000))
    assert_same(restored.params, expected)
    assert found == {"rows": [1]}


def test_an_interrupted_save_is_invisible_and_swept(tmp_path):
    checkpointer = checkpoint.Checkpointer(tmp_path)
    checkpointer.save(2, new_state(2.0), {"n": 2})
    checkpointer.close()
    partial = tmp_path / "4.orbax-checkpoint-tmp"
    (partial / "state").mkdir(parents=True)
    again = checkpoint.Checkpointer(tmp_path)
    assert again.latest_step() == 2
    assert again.restore_latest(new_state())[1] == {"n": 2}
    assert not partial.exists()
    again.save(4, new_state(4.0), {})
    assert again.latest_step() == 4


def data_of(folder):
    return max((folder / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def cut(folder):
    path = data_of(folder)
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder):
    path = data_of(folder)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


DAMAGES = {
    "has .* bytes instead of": cut,
    "holds other bytes than were written": flip,
    "extra/metadata is missing": lambda folder: (folder / "extra" / "metadata").unlink(),
    "it has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is cut off": lambda folder: (folder / "manifest.json").write_text('{"fil'),
    # A kill in the middle of a deletion.
    "state/.* is missing": lambda folder: shutil.rmtree(folder / "state"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_torn_checkpoint_is_passed_over(tmp_path, capsys, message):
    checkpointer = checkpoint.Checkpointer(tmp_path, keep=3)
    for step in (2, 4, 6):
        checkpointer.save(step, new_state(float(step)), {"n": step})
    checkpointer.close()
    DAMAGES[message](tmp_path / "6")
    again = checkpoint.Checkpointer(tmp_path, keep=2)
    restored, extra = again.restore_latest(new_state())
    assert extra == {"n": 4}
    assert_same(restored.params, new_state(4.0).params)
    said = capsys.readouterr().out
    assert re.search(rf"checkpoint {tmp_path}/6 is torn \(.*{message}.*\): passed over", said)
    # Its number is free again, and it does not count among those kept.
    assert again.latest_step() == 4
    again.save(6, new_state(6.0), {"n": 66})
    assert again.restore_latest(new_state())[1] == {"n": 66}
    assert steps_in(tmp_path) == [4, 6]
    assert (tmp_path / "6.torn").is_dir()


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    checkpointer = checkpoint.Checkpointer(tmp_path)
    for step in (2, 4):
        checkpointer.save(step, new_state(), {})
    checkpointer.close()
    for step in (2, 4):
        cut(tmp_path / str(step))
    # Asked twice: the first answer must not clear the way for a fresh start.
    for _ in range(2):
        again = checkpoint.Checkpointer(tmp_path)
        message = f"{tmp_path}: every checkpoint is torn.*delete the folder"
        with pytest.raises(checkpoint.CheckpointError, match=message):
            again.restore_latest(new_state())


@pytest.mark.parametrize("failure", ["disk", "shape"])
def test_a_save_that_fails_is_an_error_and_leaves_the_last_one(tmp_path, monkeypatch, failure):
    checkpointer = checkpoint.Checkpointer(tmp_path)
    checkpointer.save(2, new_state(2.0), {})
    checkpointer.wait()
    if failure == "disk":

        def full(folder):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoint.manifest, "write", full)
    else:
        other = checkpoint._saved_part(new_state(width=5))
        monkeypatch.setattr(checkpoint, "saved_shapes", lambda folder: other)
    checkpointer.save(4, new_state(4.0), {})
    reason = {"disk": "No space left", "shape": r"read back, .*kernel is \(8, 5\), wanted \(8, 4\)"}
    message = f"checkpoint 4 could not be written to {tmp_path} .*{reason[failure]}.*same command"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpointer.save(6, new_state(6.0), {})
    monkeypatch.undo()
    again = checkpoint.Checkpointer(tmp_path)
    assert_same(again.restore_latest(new_state())[0].params, new_state(2.0).params)
    assert steps_in(tmp_path) == [2]


def test_restores_onto_another_mesh_and_back(tmp_path):
    meshes = [
        sharding.make_mesh(sizes) if sizes else None
        for sizes in (None, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 4}, None)
    ]
    checkpointer = checkpoint.Checkpointer(tmp_path)
    saved = new_state(5.0)
    for step, mesh in enumerate(meshes):
        checkpointer.save(step, saved, {})
        checkpointer.wait()
        template = new_state(1.0, mesh=mesh)
        restored, _ = checkpoint.Checkpointer(tmp_path).restore_latest(template)
        assert_same((restored.params, restored.opt_state), (saved.params, saved.opt_state))
        placed = lambda s: jax.tree.map(lambda x: x.sharding, s)
        assert placed(restored) == placed(template)
        saved = restored


def test_another_shape_is_an_error_that_names_it(tmp_path):
    checkpointer = checkpoint.Checkpointer(tmp_path)
    checkpointer.save(1, new_state(width=4), {})
    message = r"/1 does not fit.*params/params/kernel is \(8, 4\), wanted \(8, 5\)"
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpointer.restore_latest(new_state(width=5))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_parts(tmp_path, dtype):
    part = {"lora": {"q": {"a": np.float32([[0.1, 2.0]]), "count": np.int32([3])}}}
    checkpoint.save_part(tmp_path / "x" / "part.safetensors", part, {"rank": 1}, dtype)
    loaded, meta = checkpoint.load_part(tmp_path / "x" / "part.safetensors")
    assert meta == {"rank": 1}
    kinds = {"bfloat16": ml_dtypes.bfloat16}
    expected = part["lora"]["q"]["a"].astype(kinds.get(dtype, dtype))
    assert loaded["lora"]["q"]["a"].dtype == expected.dtype
    np.testing.assert_array_equal(loaded["lora"]["q"]["a"], expected)
    np.testing.assert_array_equal(loaded["lora"]["q"]["count"], [3])
    wide, _ = checkpoint.load_part(tmp_path / "x" / "part.safetensors", "float32")
    assert wide["lora"]["q"]["a"].dtype == np.float32
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["part.safetensors"]


def test_bad_parts_are_errors(tmp_path):
    path = tmp_path / "part.safetensors"
    with pytest.raises(checkpoint.CheckpointError, match="a/b exceeds the range of float16"):
        checkpoint.save_part(path, {"a": {"b": np.float32([1e6])}}, {}, "float16")
    with pytest.raises(checkpoint.CheckpointError, match="no such file"):
        checkpoint.load_part(path)
    checkpoint.save_part(path, {"a": np.ones(100, np.float32)}, {})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(checkpoint.CheckpointError, match="not a whole safetensors file"):
        checkpoint.load_part(path)
    with pytest.raises(ValueError, match="'int8'"):
        checkpoint.save_part(path, {"a": np.ones(1)}, {}, "int8")
