import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from paras2s_jax.train import state as state_lib

VARIABLES = {
    "params": {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}},
    "lora": {"dense": {"a": jnp.ones((2, 1)), "b": jnp.zeros((1, 3))}},
}


def test_split_by_name_and_merge():
    trainable, frozen = state_lib.split_trainable(VARIABLES, "^lora/|bias$")
    assert sorted(trainable) == ["lora", "params"]
    assert list(trainable["params"]["dense"]) == ["bias"]
    assert list(frozen) == ["params"] and list(frozen["params"]["dense"]) == ["kernel"]
    merged = state_lib.merge_variables(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(VARIABLES)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match=r"no variable matches '.?lorra'.*lora/dense/a"):
        state_lib.split_trainable(VARIABLES, "^lorra")
    with pytest.raises(ValueError, match=r"both trainable and frozen.*lora/dense/a"):
        state_lib.merge_variables(VARIABLES, VARIABLES)


def test_create_copies_what_it_trains():
    state = state_lib.TrainState.create(
        VARIABLES, optax.adam(1e-3), jax.random.key(0), trainable="^lora/"
    )
    assert state.params["lora"]["dense"]["a"] is not VARIABLES["lora"]["dense"]["a"]
    kept, given = (x["params"]["dense"]["kernel"] for x in (state.frozen, VARIABLES))
    assert kept.unsafe_buffer_pointer() == given.unsafe_buffer_pointer()
    # Moments exist for what is trained only: a [2, 1] and b [1, 3], twice, and a count.
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * (2 + 3) + 1
    assert state.variables.keys() == VARIABLES.keys()


def test_step_rng_is_a_function_of_key_and_step():
    state = state_lib.TrainState.create(VARIABLES, optax.sgd(1.0), jax.random.key(3))
    for step in (0, 7):
        expected = jax.random.fold_in(jax.random.key(3), step)
        found = state_lib.step_rng(state.replace(step=jnp.int32(step)))
        assert jnp.array_equal(jax.random.key_data(found), jax.random.key_data(expected))
    raw = state_lib.TrainState.create(VARIABLES, optax.sgd(1.0), jax.random.PRNGKey(3))
    np.testing.assert_array_equal(raw.rng, state.rng)


def test_variables_are_what_apply_takes():
    model = nn.Dense(3)
    variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
    state = state_lib.TrainState.create(variables, optax.sgd(1.0), jax.random.key(0))
    x = jnp.arange(4.0).reshape(2, 2)
    np.testing.assert_array_equal(model.apply(state.variables, x), model.apply(variables, x))
