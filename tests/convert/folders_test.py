"""paras2s convert and export, end to end on releases that transformers wrote and reads."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from paras2s_jax import cli
from paras2s_jax.convert import families, folders, from_pretrained
from paras2s_jax.convert.rules import Checkpoint, ConversionError, write_checkpoint
from paras2s_jax.convert.stored import load_params, released_names

CLASSES = {
    "qwen2": transformers.Qwen2ForCausalLM,
    "whisper": transformers.WhisperForConditionalGeneration,
}


def call(*args):
    return cli.main(["paras2s", *map(str, args)])


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_there_and_back(release, tmp_path, capsys, name):
    folder, hf = release(name)
    there, back = tmp_path / "there", tmp_path / "back"
    assert call("convert", f"--from={folder}", f"--to={there}") == 0
    bar = capsys.readouterr().err
    assert "convert: 100%" in bar and "B/s" in bar
    assert call("export", f"--from={there}", f"--to={back}") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "there"]
    kept = {p.name for p in folder.iterdir()} - {"model.safetensors"}
    assert kept == {p.name for p in there.iterdir()} - {"params"}
    assert kept == {p.name for p in back.iterdir()} - {"model.safetensors"}
    again = CLASSES[name].from_pretrained(back)
    for key, value in hf.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    released, exported = Checkpoint(folder), Checkpoint(back)
    for key, value in exported.items():
        assert value.tobytes() == released[key].tobytes() and value.dtype == released[key].dtype


def test_shards_and_type(release, tmp_path):
    folder, _ = release("qwen2", shards=True)
    there = tmp_path / "there"
    assert call("convert", f"--from={folder}", f"--to={there}", "--dtype=bfloat16") == 0
    assert not (there / "model.safetensors.index.json").exists()
    variables, meta = load_params(there / "params")
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jax.numpy.dtype(jax.numpy.bfloat16)}
    assert meta["family"] == "qwen2" and meta["released"] == sorted(Checkpoint(folder))
    _, wide, _ = from_pretrained(folder)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), variables["params"], wide
    )


def test_a_table_that_is_tied_is_stored_once(release, tmp_path):
    folder, hf = release("qwen2", tie_word_embeddings=True)
    folders.convert(str(folder), str(tmp_path / "there"))
    folders.export(str(tmp_path / "there"), str(tmp_path / "back"))
    assert "lm_head.weight" not in Checkpoint(tmp_path / "back")
    again = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "back")
    assert torch.equal(again.lm_head.weight, hf.model.embed_tokens.weight)


WRONG = [
    (lambda folder: [], "--dtype=int8", "unknown dtype 'int8'; known are float32"),
    (lambda folder: (folder / "config.json").unlink(), "", "config.json is missing"),
    (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-8]
        ),
        "",
        "truncated",
    ),
    (lambda folder: (folder / "model.safetensors").unlink(), "", "no .safetensors file here"),
]


@pytest.mark.parametrize(("spoil", "flag", "message"), WRONG)
def test_what_is_wrong_is_said_and_nothing_is_written(
    release, tmp_path, capsys, spoil, flag, message
):
    shutil.copytree(release("qwen2")[0], tmp_path / "from")
    spoil(tmp_path / "from")
    flags = [f"--from={tmp_path / 'from'}", f"--to={tmp_path / 'to'}", *([flag] if flag else [])]
    assert call("convert", *flags) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_folders_of_the_wrong_kind(release, tmp_path, capsys):
    folder, _ = release("qwen2")
    (tmp_path / "there").mkdir()
    assert call("convert", f"--from={folder}", f"--to={tmp_path / 'there'}") == 2
    assert "is there already; delete it, or give another --to" in capsys.readouterr().err
    assert call("export", f"--from={folder}", f"--to={tmp_path / 'back'}") == 2
    assert "was not made by `paras2s convert`" in capsys.readouterr().err
    folders.convert(str(folder), str(tmp_path / "c"))
    with pytest.raises(ConversionError, match="is converted already"):
        folders.convert(str(tmp_path / "c"), str(tmp_path / "d"))


def test_an_error_while_writing_leaves_nothing(release, tmp_path, monkeypatch):
    folder, _ = release("qwen2")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(folders, "_copy_beside", fail)
    with pytest.raises(OSError, match="disk full"):
        folders.convert(str(folder), str(tmp_path / "to"))
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_no_target_and_is_swept(release, tmp_path):
    folder, _ = release("qwen2")
    # Stops for good once parameters are being written.
    script = (
        "import sys, time\n"
        "from paras2s_jax.convert import folders\n"
        "folders._copy_beside = lambda *a: (print('written', flush=True), time.sleep(600))\n"
        "folders.convert(sys.argv[1], sys.argv[2])\n"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "to")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["to.partial"]
    folders.convert(str(folder), str(tmp_path / "to"))
    assert [path.name for path in tmp_path.iterdir()] == ["to"]
    from_pretrained(tmp_path / "to")


def test_a_torch_file(release, tmp_path):
    folder, hf = release("qwen2")
    (tmp_path / "from").mkdir()
    config = (folder / "config.json").read_text()
    (tmp_path / "from" / "config.json").write_text(config)
    torch.save({"state_dict": hf.state_dict()}, tmp_path / "from" / "model.pt")
    for number, source in enumerate(("from", "from/model.pt")):
        target = tmp_path / f"to{number}"
        folders.convert(str(tmp_path / source), str(target))
        folders.export(str(target), str(tmp_path / f"back{number}"))
        exported = load_file(tmp_path / f"back{number}" / "model.safetensors")
        assert {k: v.tobytes() for k, v in exported.items()} == {
            k: v.numpy().tobytes() for k, v in hf.state_dict().items()
        }
    torch.save(hf.state_dict(), tmp_path / "from" / "other.pt")
    with pytest.raises(ConversionError, match=r"several torch files \(model.pt, other.pt\); give"):
        folders.convert(str(tmp_path / "from"), str(tmp_path / "x"))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"from", "to0", "to1", "back0", "back1"}


def test_parts_of_a_release_come_along(release, tmp_path, monkeypatch):
    folder, hf = release("qwen2")
    shutil.copytree(folder, tmp_path / "from")
    part = tmp_path / "from" / "decoder"
    part.mkdir()
    shutil.copyfile(folder / "config.json", part / "config.json")
    torch.save({"generator": hf.state_dict()}, part / "model.pt")
    family = families.load("qwen2")
    monkeypatch.setattr(family, "PARTS", ("decoder", "encoder"), raising=False)
    with pytest.raises(ConversionError, match=r"convert it once with paras2s convert"):
        from_pretrained(part)
    folders.convert(str(tmp_path / "from"), str(tmp_path / "to"))
    assert {path.name for path in (tmp_path / "to" / "decoder").iterdir()} == {
        "config.json",
        "params",
    }
    params = [from_pretrained(tmp_path / "to" / name)[1] for name in (".", "decoder")]
    jax.tree.map(np.testing.assert_array_equal, *params)
    folders.export(str(tmp_path / "to"), str(tmp_path / "back"))
    again = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path / "back" / "decoder")
    assert torch.equal(again.lm_head.weight, hf.lm_head.weight)
    # A part that does not fit stops the whole.
    torch.save({"generator": {"x": torch.ones(1)}}, part / "model.pt")
    with pytest.raises(ConversionError, match=r"decoder/model\.pt does not match the model"):
        folders.convert(str(tmp_path / "from"), str(tmp_path / "to2"))
    assert not any(path.name.startswith("to2") for path in tmp_path.iterdir())


def test_names_of_the_release_are_known_in_every_form(release, tmp_path):
    folder, hf = release("qwen2", shards=True)
    assert released_names(folder) == set(hf.state_dict())
    folders.convert(str(folder), str(tmp_path / "to"))
    assert released_names(tmp_path / "to") == set(hf.state_dict())
    assert released_names(tmp_path) == set()


def test_a_value_outside_of_the_type_stops_the_whole(release, tmp_path, capsys):
    shutil.copytree(release("qwen2")[0], tmp_path / "from")
    path = tmp_path / "from" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    write_checkpoint(tmp_path / "from", tensors)
    flags = [f"--from={tmp_path / 'from'}", f"--to={tmp_path / 'to'}", "--dtype=float16"]
    assert call("convert", *flags) == 2
    message = "paras2s: model.layers.1.mlp.up_proj.weight exceeds the range of float16; use"
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["from"]
