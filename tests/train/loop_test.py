"""Run as a program (`loop_test.py DIR`), this file is the run that the tests kill."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from paras2s_jax.audio import wave
from paras2s_jax.data import batches
from paras2s_jax.train import checkpoint, loop, metrics, optimizer, preemption, sharding, step
from paras2s_jax.train import state as state_lib

NUM_STEPS = 40
# Neither divides the other: checkpoints fall between rows of metrics.
SAVE_EVERY, LOG_EVERY = 9, 4


class Counter:
    """A source of numbered batches with the interface of `data.batches.Batches`."""

    def __init__(self, broken_at: tuple[int, ...] = (), end: int | None = None):
        self.position, self.broken_at, self.end = 0, broken_at, end

    def __iter__(self):
        return self

    def __next__(self):
        if self.position == self.end:
            raise StopIteration
        self.position += 1
        x = np.random.default_rng(self.position).normal(size=(4, 6)).astype(np.float32)
        if self.position in self.broken_at:
            x[2] = np.nan
        return {"x": x, "row": np.arange(4, dtype=np.int32) + 4 * self.position}

    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]


def loss_fn(variables, batch, rng):
    hidden = jnp.tanh(batch["x"] @ variables["params"]["kernel"])
    hidden *= jax.random.bernoulli(rng, 0.8, hidden.shape)
    loss = jnp.square(hidden.sum(-1) - 1.0)
    weight = jnp.float32(len(loss))
    # Counts nothing on most steps, so that means over NaN have to be exact as well.
    large = (loss > 4.0).astype(jnp.float32)
    return step.Sums(loss.sum(), weight, {"large_loss": ((loss * large).sum(), large.sum())})


def new_state():
    opt = optimizer.make_optimizer(1e-2, warmup_steps=5, total_steps=NUM_STEPS)
    kernel = jax.random.normal(jax.random.key(0), (6, 5))
    state = state_lib.TrainState.create({"params": {"kernel": kernel}}, opt, jax.random.key(1))
    return state, step.make_update(loss_fn, opt)


def run(directory, source, **changes):
    state, update = new_state()
    settings = {
        "update": lambda state, batch: update(state, {"x": batch["x"]}),
        "num_steps": NUM_STEPS,
        "checkpointer": checkpoint.Checkpointer(directory / "checkpoints"),
        "save_every": SAVE_EVERY,
        "writer": metrics.MetricWriter(directory),
        "log_every": LOG_EVERY,
    }
    return loop.fit(state, batches=source, **(settings | changes))


def outcome(directory, state):
    return (directory / "metrics.jsonl").read_bytes(), jax.tree.map(
        lambda x: np.asarray(x).tobytes(), (state.params, state.opt_state, state.step)
    )


def main():
    _, update = new_state()

    def slow_update(state, batch):
        time.sleep(0.02)
        return update(state, {"x": batch["x"]})

    run(pathlib.Path(sys.argv[1]), Counter(), update=slow_update)


def test_a_run_killed_at_any_time_ends_like_an_unbroken_one(tmp_path):
    whole = tmp_path / "whole"
    expected = outcome(whole, run(whole, Counter()))
    broken = tmp_path / "broken"
    seed = time.time_ns()
    delays = random.Random(seed)
    before = -1
    for attempt in range(2):
        process = subprocess.Popen(
            [sys.executable, __file__, str(broken)],
            env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
            stderr=subprocess.PIPE,
            text=True,
        )
        # Killed some time after it has got further than the last attempt: in a step, while
        # logging or while saving.
        while process.poll() is None and latest(broken) <= before:
            time.sleep(0.005)
        time.sleep(delays.uniform(0.0, 0.25))
        process.kill()
        _, log = process.communicate()
        assert process.returncode == -9, f"attempt {attempt}, seed {seed}: not killed\n{log}"
        before = latest(broken)
        assert 0 < before < NUM_STEPS
    state = run(broken, Counter())
    assert outcome(broken, state) == expected, f"seed {seed}"


def latest(directory):
    """Last complete checkpoint; -1 if none."""
    found = (directory / "checkpoints").glob("*")
    return max((int(path.name) for path in found if path.name.isdecimal()), default=-1)


class Killed(BaseException):
    pass


def run_until(directory, last_step, source=None, **changes):
    """Runs and dies in the step after `last_step`."""
    _, update = new_state()
    done = 0

    def mortal_update(state, batch):
        nonlocal done
        if int(state.step) == last_step:
            raise Killed
        done += 1
        return update(state, {"x": batch["x"]})

    with pytest.raises(Killed):
        run(directory, source or Counter(), update=mortal_update, **changes)
    return done


def test_checkpoints_carry_metrics_that_have_no_row_yet(tmp_path):
    whole = run(tmp_path / "whole", Counter())
    # Checkpoint 9 comes one step after row 8; rows 12 and 16 are written in vain at first.
    assert run_until(tmp_path / "parts", 17) == 17
    _, extra = checkpoint.Checkpointer(tmp_path / "parts" / "checkpoints").restore_latest(whole)
    assert extra["batches"] == {"position": 9}
    assert [step for step, _ in extra["log"]["fetched"]] == [9]
    # Dies again before it has saved anything new, then right after checkpoint 18.
    assert run_until(tmp_path / "parts", 10) == 1
    assert run_until(tmp_path / "parts", 18) == 9
    parts = run(tmp_path / "parts", Counter())
    assert outcome(tmp_path / "parts", parts) == outcome(tmp_path / "whole", whole)


def test_resumes_with_real_batches(tmp_path):
    rng = np.random.default_rng(0)
    rows = []
    for n in range(11):
        samples = rng.normal(size=400 + 40 * n).astype(np.float32) * 0.1
        wave.save(tmp_path / f"{n}.wav", samples, wave.RATE_HZ)
        rows.append({"wav": f"{n}.wav"})

    def source():
        return batches.Batches(
            rows,
            root=tmp_path,
            audio_keys=("wav",),
            batch_size=4,
            len_buckets_s=(0.04, 0.06),
            seed=3,
            shuffle=True,
            repeat=True,
        )

    seen = []

    def make_batch(batch):
        seen.append(batch["row"].tolist())
        return {"x": batch["wav"][:, :6]}

    whole = run(tmp_path / "whole", source(), num_steps=12, make_batch=make_batch)
    expected, seen[:] = seen[:], []
    run(tmp_path / "parts", source(), num_steps=5, make_batch=make_batch, log_every=5)
    # The last checkpoint holds what a kill at step 5 would have left.
    parts = run(tmp_path / "parts", source(), num_steps=12, make_batch=make_batch)
    assert seen == expected
    params = [outcome(tmp_path / name, s)[1] for name, s in (("whole", whole), ("parts", parts))]
    assert params[0] == params[1]


def test_resumes_on_eight_devices_and_back_on_one(tmp_path):
    """One run, moved from one device to a mesh of eight in its middle, and back."""
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    layout = sharding.Layout(mesh, (("act_batch", "fsdp"),))

    def part(num_steps, placed):
        state, update = new_state()
        if placed:
            kernel = jax.device_put(
                state.params["params"]["kernel"], NamedSharding(mesh, PartitionSpec("tensor"))
            )
            opt = optimizer.make_optimizer(1e-2, warmup_steps=5, total_steps=NUM_STEPS)
            state = state_lib.TrainState.create(
                {"params": {"kernel": kernel}}, opt, jax.random.key(1)
            )
        make_batch = lambda batch: {"x": batch["x"]}
        if placed:
            make_batch = lambda batch: layout.place_batch({"x": batch["x"]})
        return loop.fit(
            state,
            update,
            Counter(),
            num_steps=num_steps,
            checkpointer=checkpoint.Checkpointer(tmp_path / "checkpoints"),
            writer=metrics.MetricWriter(tmp_path),
            log_every=LOG_EVERY,
            make_batch=make_batch,
        )

    whole = run(tmp_path / "whole", Counter())
    part(12, placed=False)
    moved = part(24, placed=True)
    assert moved.params["params"]["kernel"].sharding.spec == PartitionSpec("tensor")
    final = part(NUM_STEPS, placed=False)
    assert len(final.params["params"]["kernel"].devices()) == 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        (final.params, final.opt_state),
        (whole.params, whole.opt_state),
    )
    rows = [
        metrics.read_metrics(folder / "metrics.jsonl") for folder in (tmp_path, tmp_path / "whole")
    ]
    for row, expected in zip(*rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_rows_are_means_over_the_steps_since_the_last(tmp_path):
    values = iter([1.0, 3.0, 2.0, 2.0, np.nan, 5.0])

    def update(state, batch):
        value = next(values)
        return state, {"loss": jnp.float32(0.5), "tone": jnp.float32(value)}

    state, _ = new_state()
    writer = metrics.MetricWriter(tmp_path)
    loop.fit(state, update, Counter(), num_steps=5, writer=writer, log_every=2)
    rows = metrics.read_metrics(writer.path)
    # (1 + 3) / 2, (2 + 2) / 2, and a last row that knows no value.
    assert [(row["step"], row["tone"]) for row in rows] == [(2, 2.0), (4, 2.0), (5, None)]


def test_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path, capfd):
    states = []

    def update(state, batch):
        new, values = new_state()[1](state, {"x": batch["x"]})
        states.append(jax.device_get((new.params, new.opt_state)))
        return new, values

    run(tmp_path, Counter(broken_at=(6,)), update=update, num_steps=12)
    # Step 6 leaves what step 5 left, step 7 goes on from there.
    jax.tree.map(np.testing.assert_array_equal, states[5], states[4])
    assert outcome_of(states[6]) != outcome_of(states[5])
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["skipped"]) for row in rows] == [(4, 0.0), (8, 0.25), (12, 0.0)]
    # The mean is over the three steps that had a loss.
    assert rows[1]["loss"] > 0
    assert "step 6: loss is nan (rows [24, 25, 26, 27]): skipped" in capfd.readouterr().err


def outcome_of(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_too_many_skipped_in_a_row_end_the_run_at_the_last_checkpoint(tmp_path):
    source = Counter(broken_at=(2, 4, 5, 10, 11, 12))
    message = (
        r"step 12: loss is nan .rows .48, 49, 50, 51.., 3 steps in a row.*"
        rf"last good checkpoint is that of step 9 in {tmp_path}/checkpoints"
    )
    with pytest.raises(loop.TrainingError, match=message):
        run(tmp_path, source, max_skipped=3)
    assert latest(tmp_path) == 9
    assert metrics.read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 8


def test_skips_are_counted_across_a_restart(tmp_path):
    broken = {"broken_at": (8, 9, 10, 11)}
    assert run_until(tmp_path, 9, source=Counter(**broken), max_skipped=4) == 9
    with pytest.raises(loop.TrainingError, match=r"step 11: .* 4 steps in a row"):
        run(tmp_path, Counter(**broken), max_skipped=4)


class Watching:
    """A monitor that counts rows and ends the run at one of them."""

    def __init__(self, last=None):
        self.rows, self.last = [], last

    def start(self, step, state):
        self.rows = [] if state is None else list(state["rows"])

    def check(self, step, row):
        self.rows.append(step)
        if step == self.last:
            raise loop.TrainingError(f"step {step}: enough")
        return {"rows_seen": float(len(self.rows))}

    def state(self):
        return {"rows": self.rows}


def test_a_monitor_sees_rows_adds_to_them_and_is_resumed(tmp_path):
    run(tmp_path / "whole", Counter(), monitor=Watching())
    assert run_until(tmp_path / "parts", 21, monitor=Watching()) == 21
    run(tmp_path / "parts", Counter(), monitor=Watching())
    rows = [metrics.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert [row["rows_seen"] for row in rows[0]] == list(range(1, 11))


def test_a_monitor_ends_the_run_before_anything_later_is_saved(tmp_path):
    # Row 36 and checkpoint 36 fall together: the row comes first.
    message = r"step 36: enough; the last good checkpoint is that of step 27 in "
    with pytest.raises(loop.TrainingError, match=message):
        run(tmp_path, Counter(), monitor=Watching(last=36))
    assert latest(tmp_path) == 27
    with pytest.raises(loop.TrainingError, match="step 4: enough; there is no checkpoint"):
        run(tmp_path / "none", Counter(), monitor=Watching(last=4), checkpointer=None)


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGTERM, preemption.Preempted), (signal.SIGINT, KeyboardInterrupt)],
)
def test_told_to_stop_it_ends_the_step_saves_and_continues(tmp_path, number, raised):
    whole = run(tmp_path / "whole", Counter())
    _, update = new_state()

    def signalled(state, batch):
        if int(state.step) == 13:
            os.kill(os.getpid(), number)
        return update(state, {"x": batch["x"]})

    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with pytest.raises(raised):
        run(tmp_path / "parts", Counter(), update=signalled)
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    # The step under way is in the checkpoint: nothing is lost.
    assert latest(tmp_path / "parts") == 14
    parts = run(tmp_path / "parts", Counter())
    assert outcome(tmp_path / "parts", parts) == outcome(tmp_path / "whole", whole)


def test_a_signal_in_the_last_step_is_not_swallowed(tmp_path):
    _, update = new_state()

    def signalled(state, batch):
        if int(state.step) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(state, {"x": batch["x"]})

    with pytest.raises(preemption.Preempted):
        run(tmp_path, Counter(), update=signalled, num_steps=8)
    assert latest(tmp_path) == 8


def test_data_that_end_are_an_error(tmp_path):
    with pytest.raises(loop.TrainingError, match=r"after step 9.*repeat=True"):
        run(tmp_path, Counter(end=9))


def test_a_finished_run_does_nothing(tmp_path):
    first = run(tmp_path, Counter(), num_steps=8)
    again = run(tmp_path, Counter(end=0), num_steps=8)
    assert outcome(tmp_path, again) == outcome(tmp_path, first)


if __name__ == "__main__":
    main()
