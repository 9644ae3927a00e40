"""GRPO end to end on a tiny random policy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paras2s_jax.align import grpo, losses, rollout
from paras2s_jax.models import decode
from paras2s_jax.models.lora import LoRA
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.train.checkpoint import Checkpointer
from paras2s_jax.train.loop import fit
from paras2s_jax.train.metrics import MetricWriter
from paras2s_jax.train.state import TrainState, step_rng
from paras2s_jax.train.step import make_update

FAVOURED = 3  # The audio code that the bandit's reward wants to hear.
SETTINGS = grpo.Settings(group_size=4)
SGD = optax.sgd(0.1)
REWARD = {"scale": jnp.float32(1.0)}


def mean_code(reward_variables, query, query_len, answers):
    """Mean code number of an answer, and a little of the query's loudness."""
    total = answers.codes.sum(axis=-1) + jnp.abs(query).sum(axis=-1)[:, None] / 1e4
    return reward_variables["scale"] * total / jnp.maximum(answers.len_codes, 1)


def favour_code(reward_variables, query, query_len, answers):
    """Share of an answer's codes that are FAVOURED."""
    real = jnp.arange(answers.codes.shape[-1]) < answers.len_codes[..., None]
    hits = (real & (answers.codes == FAVOURED)).sum(axis=-1)
    return reward_variables["scale"] * hits / jnp.maximum(answers.len_codes, 1)


def _update(tiny, optimizer, settings=SETTINGS, reward_fn=mean_code, **kwargs):
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
def sgd_update(tiny):
    """One compiled update for the tests that need no other settings; audits every second step."""
    audit = grpo.Audit(_mishear, tiny.tokenizer, every=2, num_prompts=3)
    return _update(tiny, SGD, audit=audit, held_out=grpo.HeldOut(_gap, every=2))


def _gap(step, variables):
    """Stands for a measurement with the policy of the moment."""
    return float(sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(variables)))


def _mishear(waves):
    return [f"nothing {len(wave)}" for wave in waves]


@pytest.fixture(scope="module")
def collect(tiny, queries):
    """scale of the reward -> (experience, metrics); reference and policy differ."""
    other = jax.tree.map(lambda x: x * 1.02, tiny.variables)
    policy = tiny.policy

    @jax.jit
    def jitted(variables, reference, frontend, batch, scale):
        prompt = policy.prompt(frontend, batch["query"], batch["query_len"])
        sampled = policy.rollout(variables, prompt, jax.random.key(0), SETTINGS.group_size)
        answers = policy.speak(frontend, sampled, None)
        advantages, metrics = rollout.reward_answers(
            mean_code, {"scale": scale}, batch, sampled, answers
        )
        streams = decode.rollout_streams(policy.model.config, sampled)
        ref_logp, old_logp = (
            rollout.logp_in_chunks(policy, v, prompt, streams, num_chunks=2)
            for v in (reference, variables)
        )
        return rollout.Experience(prompt, streams, ref_logp, old_logp, advantages), metrics

    return lambda scale: jitted(tiny.variables, other, tiny.frontend, queries, scale)


@pytest.fixture(scope="module")
def experience(collect):
    return collect(1.0)


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
    assert (np.asarray(found.advantages)[~speechless] != 0.0).any()


def test_unscorable_rewards_move_nothing(collect):
    found, metrics = collect(np.nan)
    assert float(metrics["reward/unscorable"]) == 8 * SETTINGS.group_size
    assert (np.asarray(found.advantages) == 0.0).all()


def test_accumulation_does_not_change_the_update(tiny, experience):
    results = []
    for accum_steps in (1, 2, 4):
        settings = grpo.Settings(group_size=4, accum_steps=accum_steps)
        update = make_update(grpo.make_loss(tiny.policy, settings), SGD, accum_steps=accum_steps)
        results.append(update(_state(tiny, SGD), experience[0]))
    (want, want_metrics), *others = results
    for state, metrics in others:
        for name, value in want_metrics.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            state.params,
            want.params,
        )


def test_on_policy_the_ratio_is_exactly_one(tiny, experience, monkeypatch):
    seen, policy_loss = {}, losses.policy_loss

    def look(logp, old_logp, *others, **settings):
        seen["ratios"] = {name: jnp.exp(logp[name] - old_logp[name]) for name in logp}
        return policy_loss(logp, old_logp, *others, **settings)

    monkeypatch.setattr(grpo.losses, "policy_loss", look)
    losses_of = grpo.make_loss(tiny.policy, SETTINGS)

    @jax.jit
    def ratios(variables, experience):
        losses_of(variables, experience, None)
        return seen["ratios"]

    found = ratios(tiny.variables, experience[0].replace(old_logp=None))
    for stream, ratio in found.items():
        np.testing.assert_array_equal(ratio, 1.0, err_msg=stream)


def test_adapters_need_no_second_copy_of_the_reference(tiny_of, queries):
    adapted = tiny_of(4, lora=LoRA(rank=2))
    variables = adapted.variables
    # Fresh adapters change nothing; these do, so that the reference differs from the policy.
    variables["lora"] = jax.tree.map(lambda x: x + 0.05, variables["lora"])
    results = []
    for reference in (None, {"params": variables["params"]}):
        update = grpo.GrpoUpdate(
            adapted.policy, reference, adapted.frontend, mean_code, REWARD, SGD, SETTINGS
        )
        state = TrainState.create(variables, SGD, jax.random.key(7), trainable="^lora/")
        new, metrics = update(state, queries)
        given = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(variables["params"])]
        assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(new.frozen)] == given
        results.append((metrics, new.params))
    assert float(results[0][0]["kl/text"]) > 1e-5
    jax.tree.map(np.testing.assert_array_equal, *results)
    whole = TrainState.create(variables, SGD, jax.random.key(7))
    update = grpo.GrpoUpdate(
        adapted.policy, None, adapted.frontend, mean_code, REWARD, SGD, SETTINGS
    )
    with pytest.raises(ValueError, match="trainable"):
        update(whole, queries)


def test_nothing_is_compiled_after_the_second_step(tiny, queries, sgd_update):
    state = _state(tiny, SGD)
    for _ in range(2):
        state, _ = sgd_update(state, queries)
    compiled = []

    def note(name, *_, **__):
        compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for _ in range(2):
            state, _ = sgd_update(state, queries)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not [name for name in compiled if "compile" in name]


def test_one_step_on_policy(tiny, queries, sgd_update):
    before = jax.tree.map(np.array, tiny.variables)
    state, metrics = sgd_update(_state(tiny, SGD), queries)
    metrics = {name: float(value) for name, value in metrics.items()}
    assert int(state.step) == 1
    # The policy is its own reference and its own old policy: no divergence, nothing clipped.
    for stream in ("text", "audio"):
        assert metrics[f"kl/{stream}"] == pytest.approx(0.0, abs=1e-6)
        assert metrics[f"clip_share/{stream}"] == 0.0
        assert 0.0 < metrics[f"entropy/{stream}"] < np.log(132 + 40)
        assert 0.0 < metrics[f"len/{stream}"] <= tiny.policy.max_steps
    assert 0.0 < metrics["reward/mean"] < 40.0
    assert metrics["reward/std"] > 0.0
    assert metrics["grad_norm"] > 0.0
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, state.variables)
    assert max(jax.tree.leaves(moved)) > 0.0
    # The caller's variables are not consumed: they are the reference.
    jax.tree.map(np.testing.assert_array_equal, before, tiny.variables)
    # Step 0 is audited, step 1 is not; no word of these answers is heard right.
    assert metrics["asr/wer"] >= 1.0
    assert metrics["judge/gap"] == pytest.approx(_gap(0, before))
    later = sgd_update(state, queries)[1]
    assert "asr/wer" not in later and "judge/gap" not in later


def _train(tiny, source, num_steps, writer, variables, **kwargs):
    return grpo.train(
        tiny.policy,
        variables,
        variables,
        tiny.frontend,
        mean_code,
        REWARD,
        source,
        optimizer=SGD,
        settings=SETTINGS,
        num_steps=num_steps,
        rng=jax.random.key(7),
        writer=writer,
        **kwargs,
    )


def test_a_stopped_run_continues_to_the_same_numbers(tiny, queries, sgd_update, repeat, tmp_path):
    others = {name: value[::-1].copy() for name, value in queries.items()}

    class Killed(Exception):
        pass

    class Dying(repeat):
        die_at = None

        def __next__(self):
            if self.at == self.die_at:
                raise Killed
            return super().__next__()

    def run(folder, die_at=None):
        source = Dying([queries, others, queries])
        source.die_at = die_at
        writer = MetricWriter(folder / "metrics")
        checkpointer = Checkpointer(folder / "checkpoints")
        try:
            return fit(
                _state(tiny, SGD),
                sgd_update,
                source,
                num_steps=4,
                checkpointer=checkpointer,
                save_every=2,
                writer=writer,
                log_every=1,
            )
        finally:
            writer.close()
            checkpointer.close()

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", die_at=3)
    resumed = run(tmp_path / "killed")
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole.variables)
    paths = [tmp_path / name / "metrics" / "metrics.jsonl" for name in ("whole", "killed")]
    rows = [path.read_text() for path in paths]
    assert rows[0] == rows[1] and rows[0].count("\n") == 4


def test_rewarded_code_becomes_likely_over_inner_epochs(tiny, queries):
    # A bandit: only the share of one code is rewarded, and there is no KL to hold it back.
    optimizer = optax.adam(1e-2)
    settings = grpo.Settings(group_size=8, beta=0.0, num_epochs=2)
    update = _update(tiny, optimizer, settings, reward_fn=favour_code)
    state, rows = _state(tiny, optimizer), []
    for _ in range(15):
        state, metrics = update(state, queries)
        rows.append({name: float(value) for name, value in metrics.items()})
    means = [row["reward/mean"] for row in rows]
    assert np.mean(means[-3:]) > 3 * np.mean(means[:3]), means
    # A step is one rollout. Its first epoch moves the policy, which the second one's ratio and
    # reference see.
    assert int(state.step) == 15
    assert rows[0]["kl/text"] > 1e-5
    assert max(row["clip_share/audio"] for row in rows) > 0.0


def test_impossible_settings_are_refused(tiny):
    with pytest.raises(ValueError, match="group_size 1"):
        grpo.Settings(group_size=1)
    with pytest.raises(ValueError, match="ppo"):
        grpo.Settings(loss_type="ppo")
    with pytest.raises(ValueError, match="k9"):
        grpo.Settings(kl_estimator="k9")
    policy = dataclasses.replace(tiny.policy, text=Sampling(temperature=0.0))
    greedy = dataclasses.replace(tiny, policy=policy)
    with pytest.raises(ValueError, match="temperature"):
        _update(greedy, SGD)


def test_each_step_draws_anew(tiny):
    state = _state(tiny, SGD)
    keys = [step_rng(state.replace(step=jnp.int32(step))) for step in (0, 1)]
    assert not np.array_equal(*(jax.random.key_data(key) for key in keys))
