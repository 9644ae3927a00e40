"""A step of GRPO on eight devices in four meshes, against one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paras2s_jax.align import grpo, phases, rewards
from paras2s_jax.models import axes
from paras2s_jax.models.sampling import Sampling
from paras2s_jax.train import sharding
from paras2s_jax.train.state import TrainState

SETTINGS = grpo.Settings(group_size=4, num_epochs=2)
# A step of size 1 shows the gradient; the first of two epochs moves little enough for the second.
SGD = optax.sgd(1e-2)
MESHES = {
    "8x1x1": ({"data": 8}, {"fsdp": 4, "tensor": 2}),
    "2x2x2": ({"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}),
    "1x4x2": ({"fsdp": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4}),
    "1x1x8": ({"tensor": 8}, {"tensor": 8}),
}


def layouts_of(name):
    mesh, decode_mesh = MESHES[name]
    return sharding.make_layouts(mesh, axes.TRAIN_RULES, decode_mesh, axes.DECODE_RULES)


@pytest.fixture(scope="module")
def small(tiny_of):
    """All dimensions divide over eight devices but the key heads."""
    return tiny_of(6, num_codes=44, hidden_size=32, num_attention_heads=8, num_key_value_heads=2)


@pytest.fixture(scope="module")
def scorer(reward_model):
    variables = reward_model.init(jax.random.key(2))
    # Scores of fresh weights hardly differ; these do.
    return jax.tree.map(lambda x: x * 5.0 if x.ndim > 1 else x, variables)


@pytest.fixture(scope="module")
def run(small, reward_model, scorer, queries):
    """layouts, accum_steps -> what a step gives: params, metrics, experience, greedy answers."""
    policy = small.policy
    greedy = dataclasses.replace(policy, text=Sampling(0.0), audio=Sampling(0.0))

    def step(layouts=sharding.ONE_DEVICE_LAYOUTS, accum_steps=1):
        train, boxed = layouts.train, policy.boxed()
        variables = train.place(small.variables, boxed)
        frontend = train.place(small.frontend, policy.boxed_frontend(small.frontend))
        batch = train.place_batch(queries, SETTINGS.group_size)
        update = Recording(
            policy,
            jax.tree.map(lambda x: x * 1.01, variables),
            frontend,
            reward_of(reward_model),
            train.place(scorer, reward_model.boxed()),
            SGD,
            dataclasses.replace(SETTINGS, accum_steps=accum_steps),
            layouts=layouts,
        )
        state = TrainState.create(variables, SGD, jax.random.key(7))
        state, metrics = update(state, batch)
        responder = phases.Responder(greedy, layouts)
        written = responder.rollout(
            responder.reshard({}, variables), responder.hear(frontend, batch), jax.random.key(0)
        )
        return jax.device_get((state.params, metrics, update.experience, written))

    return step


def reward_of(reward_model):
    """The reward model's score, and what makes answers differ clearly: their mean code."""
    score = rewards.make_reward_fn(reward_model)

    def reward_fn(variables, query, query_len, answers):
        mean_code = answers.codes.sum(axis=-1) / jnp.maximum(answers.len_codes, 1)
        return score(variables, query, query_len, answers) + mean_code / 10.0

    return reward_fn


class Recording(grpo.GrpoUpdate):
    """Keeps the experience of the last step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        inner = self._update

        def update(state, experience):
            self.experience = experience
            return inner(state, experience)

        self._update = update


@pytest.fixture(scope="module")
def alone(run):
    return run()


@pytest.mark.parametrize("name", MESHES)
def test_meshes_give_what_one_device_gives(name, run, alone):
    # Microbatches come on one of them, so that they are seen on a mesh as well.
    assert_same(run(layouts_of(name), accum_steps=2 if name == "2x2x2" else 1), alone)


def assert_same(found, wanted):
    params, metrics, experience, written = found
    for stream in ("text", "audio"):
        ids = f"{stream}_ids"
        np.testing.assert_array_equal(getattr(written, ids), getattr(wanted[3], ids))
        out = f"{stream}_out"
        np.testing.assert_array_equal(experience.streams[out], wanted[2].streams[out])
    assert np.abs(wanted[2].advantages).max() > 0.5
    np.testing.assert_allclose(experience.advantages, wanted[2].advantages, atol=1e-5)
    for kind in ("ref_logp", "old_logp"):
        a, b = (getattr(x, kind) for x in (experience, wanted[2]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), a, b)
    for name, value in wanted[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), params, wanted[0]
    )


def test_what_is_compiled_ahead_is_what_runs(small, reward_model, scorer, queries):
    layouts = layouts_of("1x4x2")
    train, policy = layouts.train, small.policy
    boxed = policy.boxed()
    variables = train.abstract(boxed)
    update = grpo.GrpoUpdate(
        policy,
        train.abstract(boxed, jnp.bfloat16),
        train.abstract(policy.boxed_frontend(small.frontend)),
        rewards.make_reward_fn(reward_model),
        train.abstract(reward_model.boxed()),
        SGD,
        SETTINGS,
        layouts=layouts,
        rollout_dtype=jnp.bfloat16,
    )
    batch = train.take(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), queries))
    calls = update.calls(TrainState.abstract(variables, SGD), batch)
    names = ["hear", "reshard", "rollout", "speak", "reward", "reference", "update"]
    assert [call.name for call in calls] == names
    for call in calls:
        given = [x.sharding for x in jax.tree.leaves(call.args)]
        assert all(isinstance(x, jax.NamedSharding) for x in given), call.name
        assert call.lower().as_text()
    by_name = dict(zip(names, calls, strict=True))
    kernel = by_name["rollout"].args[0]["params"]["text_head"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and kernel.sharding.spec[1] == "tensor"
    # What a program gives lies where its abstract result says.
    frontend = train.place(small.frontend, policy.boxed_frontend(small.frontend))
    responder = phases.Responder(policy, layouts, group_size=SETTINGS.group_size)
    prompt = responder.hear(frontend, train.place_batch(queries, SETTINGS.group_size))
    wanted = by_name["hear"].outputs()
    same = jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), prompt, wanted
    )
    assert all(jax.tree.leaves(same))
