"""Two local processes form one mesh. Run as a program, this file is one of them."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from paras2s_jax.train import checkpoint, loop, metrics, preemption, sharding, step
from paras2s_jax.train import state as state_lib


class Shard:
    """Rows of this process of a global batch of four."""

    def __init__(self, index, count):
        self.index, self.count, self.position = index, count, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        x = np.random.default_rng(self.position).normal(size=(4, 8)).astype(np.float32)
        local = 4 // self.count
        return {"x": x[self.index * local : (self.index + 1) * local]}

    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]


def loss_fn(variables, batch, rng):
    y = jnp.square(batch["x"] @ variables["params"]["kernel"]).sum(-1)
    return step.Sums(y.sum(), jnp.float32(len(y)), {})


def train(directory, num_steps, before_step=lambda step: None):
    mesh = sharding.make_mesh({"fsdp": 2})
    placed = NamedSharding(mesh, P("fsdp"))
    kernel = jax.make_array_from_callback(
        (8, 3), placed, lambda index: np.arange(24, dtype=np.float32).reshape(8, 3)[index] / 24
    )
    opt = optax.adam(0.1)
    jitted = step.make_update(loss_fn, opt)

    def update(state, batch):
        before_step(int(state.step))
        return jitted(state, batch)

    return loop.fit(
        state_lib.TrainState.create({"params": {"kernel": kernel}}, opt, jax.random.key(0)),
        update,
        Shard(jax.process_index(), jax.process_count()),
        num_steps=num_steps,
        checkpointer=checkpoint.Checkpointer(directory / "checkpoints"),
        save_every=2,
        writer=metrics.MetricWriter(directory),
        log_every=1,
        make_batch=sharding.Layout(mesh, (("act_batch", ("data", "fsdp")),)).place_batch,
    )


def main(directory, address, index):
    jax.distributed.initialize(address, num_processes=2, process_id=index)
    train(directory, 3)

    # Restores what both wrote, then goes on until the second process alone is told to stop.
    def signal_one(step):
        if (index, step) == (1, 6):
            os.kill(os.getpid(), signal.SIGTERM)

    stopped = None
    try:
        train(directory, 50, signal_one)
    except preemption.Preempted:
        stopped = checkpoint.Checkpointer(directory / "checkpoints").latest_step()
    state = train(directory, 12)
    (shard,) = state.params["params"]["kernel"].addressable_shards
    rows = np.asarray(shard.data).tolist()
    out = {"start": shard.index[0].start, "rows": rows, "stopped": stopped}
    (directory / f"{index}.json").write_text(json.dumps(out))


def test_two_processes_equal_one(tmp_path):
    single = train(tmp_path / "one", 12)
    expected = np.asarray(single.params["params"]["kernel"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = tmp_path / "both"
    both.mkdir()
    root = str(pathlib.Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(both), address, str(index)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        logs = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(logs)
    parts = [json.loads((both / f"{index}.json").read_text()) for index in range(2)]
    # Told in step 7, one process lets the other know by the end of step 8.
    assert [part["stopped"] for part in parts] == [8, 8]
    parts.sort(key=lambda part: part["start"])
    found = np.concatenate([part["rows"] for part in parts])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    rows = [metrics.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "both")]
    assert [row["step"] for row in rows[1]] == list(range(1, 13))
    for one, two in zip(*rows, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
