"""GRPO end to end on a tiny random policy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paras2s_jax.align import grpo, rollout
from paras2s_jax.align.policy import on_mesh
from paras2s_jax.models import decode
from paras2s_jax.train import sharding
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.state import TrainState, step_rng
from paras2s_jax.train.step import make_update

FAVOURED = 3  # The audio code that the bandit's reward wants to hear.
SETTINGS = grpo.Settings(group_size=4)


def favour_code(reward_variables, query, query_len, answers):
    """Share of an answer's codes that are FAVOURED, and something that tells queries apart."""
    del query, query_len
    real = jnp.arange(answers.codes.shape[-1]) < answers.len_codes[..., None]
    hits = (real & (answers.codes == FAVOURED)).sum(axis=-1)
    return reward_variables["scale"] * hits / jnp.maximum(answers.len_codes, 1)


REWARD = {"scale": jnp.float32(1.0)}


def _update(tiny, optimizer, settings=SETTINGS, reward_fn=favour_code, **kwargs):
    return grpo.GrpoUpdate(
        tiny.policy,
        tiny.variables,
        tiny.frontend,
        reward_fn,
        REWARD,
        optimizer,
        settings,
        **kwargs,
    )


def _state(tiny, optimizer, variables=None):
    return TrainState.create(variables or tiny.variables, optimizer, jax.random.key(7))


@pytest.fixture(scope="module")
def experience(tiny, queries):
    """One batch of experience whose reference and old policy differ from the policy now."""
    other = jax.tree.map(lambda x: x * 1.02, tiny.variables)

    @jax.jit
    def collect(variables, reference, frontend, batch):
        return rollout.collect(
            tiny.policy,
            favour_code,
            variables,
            reference,
            frontend,
            REWARD,
            batch,
            jax.random.key(0),
            group_size=SETTINGS.group_size,
            num_epochs=2,
            num_chunks=2,
        )

    found, metrics, _ = collect(tiny.variables, other, tiny.frontend, queries)
    return found, metrics


def test_experience_is_consistent(tiny, experience):
    found, metrics = experience
    assert found.advantages.shape == (8, SETTINGS.group_size)
    # The chunked log-probabilities are those of the whole batch.
    whole = tiny.policy.logp(tiny.variables, found.prompt, found.streams, at_temperature=True)
    for stream in ("text", "audio"):
        np.testing.assert_allclose(whole["logp"][stream], found.old_logp[stream], atol=1e-4)
        assert np.abs(found.ref_logp[stream] - found.old_logp[stream]).max() > 1e-3
    # Answers without codes have no reward: their number is what the metrics say.
    config = tiny.policy.model.config
    codes = found.streams["audio_out"] >= config.kimia_token_offset
    speechless = ~np.asarray((codes & found.streams["audio_mask"]).any(axis=-1))
    assert float(metrics["reward/unscorable"]) == speechless.sum() > 0
    assert (np.asarray(found.advantages)[speechless] == 0.0).all()


def test_accumulation_does_not_change_the_update(tiny, experience):
    optimizer = optax.sgd(0.1)
    results = []
    for accum_steps in (1, 2, 4):
        settings = grpo.Settings(group_size=4, accum_steps=accum_steps)
        update = make_update(
            grpo.make_loss(tiny.policy, settings), optimizer, accum_steps=accum_steps
        )
        results.append(update(_state(tiny, optimizer), experience[0]))
    (want, want_metrics), *others = results
    for state, metrics in others:
        for name, value in want_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            state.params,
            want.params,
        )


def test_one_step_on_policy(tiny, queries):
    optimizer = optax.sgd(0.1)
    update = _update(tiny, optimizer)
    before = jax.tree.map(np.asarray, tiny.variables)
    state, metrics = update(_state(tiny, optimizer), queries)
    metrics = {name: float(value) for name, value in metrics.items()}
    assert int(state.step) == 1
    # The policy is its own reference and its own old policy: no divergence, nothing clipped.
    for stream in ("text", "audio"):
        assert metrics[f"kl/{stream}"] == pytest.approx(0.0, abs=1e-6)
        assert metrics[f"clip_share/{stream}"] == 0.0
        assert 0.0 < metrics[f"entropy/{stream}"] < np.log(400)
        assert 0.0 < metrics[f"len/{stream}"] <= tiny.policy.max_steps
    assert 0.0 < metrics["reward/mean"] < 1.0
    assert metrics["reward/std"] > 0.0
    assert metrics["grad_norm"] > 0.0
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, state.variables)
    assert max(jax.tree.leaves(moved)) > 0.0
    # The caller's variables are not consumed: they are the reference.
    jax.tree.map(np.testing.assert_array_equal, before, tiny.variables)


def test_inner_epochs_count_as_one_step_and_leave_the_old_policy(tiny, queries):
    optimizer = optax.sgd(2.0)
    audited = []

    def hear(waves):
        audited.append(len(waves))
        return ["nothing"] * len(waves)

    update = _update(
        tiny,
        optimizer,
        grpo.Settings(group_size=4, num_epochs=2),
        audit=grpo.Audit(hear, tiny.tokenizer, every=2, num_prompts=3),
    )
    state, first = update(_state(tiny, optimizer), queries)
    state, second = update(state, queries)
    assert int(state.step) == 2
    assert float(first["kl/text"]) > 1e-5  # Moved by the first epoch, seen in the second.
    assert float(first["clip_share/text"]) > 0.0
    # Every second step, the answers to three prompts are heard; no word of them is right.
    assert audited == [3 * 4]
    assert first["asr/wer"] >= 1.0 and "asr/wer" not in second


def test_unscorable_rewards_do_not_move_the_policy(tiny, queries):
    optimizer = optax.sgd(0.1)

    def deaf(reward_variables, query, query_len, answers):
        return jnp.full(answers.lens.shape, jnp.nan)

    update = _update(tiny, optimizer, reward_fn=deaf)
    state, metrics = update(_state(tiny, optimizer), queries)
    assert float(metrics["reward/unscorable"]) == 8 * 4
    assert float(metrics["grad_norm"]) == pytest.approx(0.0, abs=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.variables, tiny.variables
    )


def test_eight_devices_give_what_one_gives(tiny, queries):
    optimizer = optax.sgd(0.1)
    assert len(jax.devices()) >= 8
    alone = _update(tiny, optimizer)
    one, one_metrics = alone(_state(tiny, optimizer), queries)
    mesh = sharding.make_mesh({"data": 4, "fsdp": 2})
    with sharding.activate(mesh, ()):
        spread = _update(tiny, optimizer, mesh=mesh)
        start = _state(tiny, optimizer, on_mesh(tiny.variables, mesh))
        many, many_metrics = spread(start, sharding.shard_batch(queries, mesh))
    for name, value in one_metrics.items():
        np.testing.assert_allclose(many_metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        many.params,
        one.params,
    )


def test_a_stopped_run_continues_to_the_same_numbers(tiny, queries, repeat, tmp_path):
    optimizer = optax.adam(1e-3)
    others = {name: value[::-1].copy() for name, value in queries.items()}

    class Killed(Exception):
        pass

    def run(folder, die_at=None):
        source = repeat([queries, others, queries])

        class Dying(type(source)):
            def __next__(self):
                if self.at == die_at:
                    raise Killed
                return super().__next__()

        writer = MetricWriter(folder / "metrics")
        checkpointer = Checkpointer(folder / "checkpoints")
        try:
            return grpo.train(
                tiny.policy,
                tiny.variables,
                tiny.variables,
                tiny.frontend,
                favour_code,
                REWARD,
                Dying(source.batches),
                optimizer=optimizer,
                settings=SETTINGS,
                num_steps=4,
                rng=jax.random.key(1),
                checkpointer=checkpointer,
                save_every=2,
                writer=writer,
            )
        finally:
            writer.close()
            checkpointer.close()

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", die_at=3)
    resumed = run(tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    rows = [
        (tmp_path / name / "metrics" / "metrics.jsonl").read_text() for name in ("whole", "killed")
    ]
    assert rows[0] == rows[1]


def test_rewarded_code_becomes_likely(tiny, queries):
    # A bandit: only the share of one code is rewarded, and there is no KL to hold it back.
    optimizer = optax.adam(1e-2)
    update = _update(tiny, optimizer, grpo.Settings(group_size=8, beta=0.0))
    state, means = _state(tiny, optimizer), []
    for _ in range(25):
        state, metrics = update(state, queries)
        means.append(float(metrics["reward/mean"]))
    assert np.mean(means[-3:]) > 3 * np.mean(means[:3]), means


def test_impossible_settings_are_refused(tiny):
    with pytest.raises(ValueError, match="group_size 1"):
        grpo.Settings(group_size=1)
    with pytest.raises(ValueError, match="ppo"):
        grpo.Settings(loss_type="ppo")
    with pytest.raises(ValueError, match="k9"):
        grpo.Settings(kl_estimator="k9")
    greedy = type(tiny)(
        policy=tiny.policy.__class__(
            tiny.policy.model,
            tiny.policy.encoder,
            max_steps=4,
            text=decode.Sampling(temperature=0.0),
            audio=tiny.policy.audio,
        ),
        variables=tiny.variables,
        frontend=tiny.frontend,
        tokenizer=tiny.tokenizer,
    )
    with pytest.raises(ValueError, match="temperature"):
        _update(greedy, optax.sgd(0.1))


def test_each_step_draws_anew(tiny):
    optimizer = optax.sgd(0.1)
    state = _state(tiny, optimizer)
    keys = [step_rng(state.replace(step=jnp.int32(step))) for step in (0, 1)]
    assert not np.array_equal(*(jax.random.key_data(key) for key in keys))
