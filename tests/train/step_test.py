import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax import numpy as jnp

from paras2s_jax.train import sharding, step
from paras2s_jax.train import state as state_lib

RULES = (("act_batch", ("data", "fsdp")), ("embed", "fsdp"), ("hidden", "tensor"))


class Net(nn.Module):
    """Two dense layers with logical axes, as the models have them."""

    hidden: int = 24

    @nn.compact
    def __call__(self, x):
        up = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "hidden"))
        down = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("hidden", "embed"))
        y = nn.Dense(self.hidden, kernel_init=up, name="up")(x)
        y = nn.with_logical_constraint(nn.tanh(y), ("act_batch", "hidden"))
        return nn.Dense(16, kernel_init=down, name="down")(y)


def net_loss(variables, batch, rng):
    y = Net().apply(variables, batch["x"])
    weight = batch["mask"].astype(jnp.float32)
    loss = jnp.square(y - batch["y"]).sum(-1)
    right = (y.argmax(-1) == batch["y"].argmax(-1)) * weight
    total = weight.sum()
    return step.Sums((loss * weight).sum(), total, {"accuracy": (right.sum(), total)})


def net_batch(seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, 16, 16)).astype(np.float32)
    # Microbatches of very different weight, so that a mean of means would show.
    return {"x": x, "y": y, "mask": np.arange(16) % 8 != 3 * (np.arange(16) < 9)}


def new_state(optimizer, mesh=None, loss_seed=0):
    mesh = mesh or sharding.make_mesh({"data": 1})
    variables, _ = sharding.init_sharded(
        Net(), mesh, RULES, jax.random.key(loss_seed), np.ones((1, 16), np.float32)
    )
    return state_lib.TrainState.create(variables, optimizer, jax.random.key(1))


def train(update, state, num_steps=3, make_batch=lambda b: b):
    history = []
    for seed in range(num_steps):
        state, metrics = update(state, make_batch(net_batch(seed)))
        history.append(metrics)
    return jax.device_get((state.params, history))


def assert_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=atol), a, b)


def linear_loss(variables, batch, rng):
    w = variables["params"]["w"]
    weight = batch["weight"]
    return step.Sums((w * batch["x"] * weight).sum(), weight.sum(), {"x": (batch["x"].sum(), 2.0)})


def linear_state(optimizer):
    return state_lib.TrainState.create(
        {"params": {"w": jnp.float32(2.0)}, "extra": {"v": jnp.ones(3)}},
        optimizer,
        jax.random.key(0),
        trainable="^params/",
    )


def test_one_step_by_hand():
    opt = optax.sgd(0.5)
    batch = {"x": np.float32([1.0, 3.0]), "weight": np.float32([1.0, 3.0])}
    state, metrics = step.make_update(linear_loss, opt)(linear_state(opt), batch)
    # Sum of w x weight = 2 * (1 + 9) = 20 over weight 4; gradient (1 + 9) / 4 = 2.5.
    assert float(metrics["loss"]) == pytest.approx(5.0)
    assert float(metrics["grad_norm"]) == pytest.approx(2.5)
    assert float(metrics["x"]) == pytest.approx(2.0)
    assert float(state.params["params"]["w"]) == pytest.approx(2.0 - 0.5 * 2.5)
    assert int(state.step) == 1


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_no_weight_means_no_gradient(accum_steps):
    opt = optax.sgd(0.5)
    batch = {"x": np.float32([1.0, 3.0]), "weight": np.zeros(2, np.float32)}
    update = step.make_update(linear_loss, opt, accum_steps=accum_steps)
    state, metrics = update(linear_state(opt), batch)
    assert float(state.params["params"]["w"]) == 2.0
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0.0


@pytest.mark.parametrize("mesh", [None, {"fsdp": 4, "tensor": 2}])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing_but_the_step(broken, mesh):
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))

    def loss(variables, batch, rng):
        sums = net_loss(variables, batch, rng)
        extra = jnp.where(batch["spike"], jnp.nan, 0.0)
        if broken == "gradient":
            kernel = variables["params"]["up"]["kernel"]
            # At 0 the square root has a value, but no gradient.
            extra = jnp.sqrt(jnp.square(kernel - kernel).sum() + jnp.where(batch["spike"], 0, 1))
        return sums._replace(loss_sum=sums.loss_sum + extra)

    mesh = sharding.make_mesh(mesh) if mesh else None
    update, state = step.make_update(loss, opt), new_state(opt, mesh)
    placed = jax.tree.map(lambda x: x.sharding, state)
    history = []
    for seed, spike in enumerate([False, True, False]):
        before = jax.device_get((state.params, state.opt_state))
        state, metrics = update(state, net_batch(seed) | {"spike": np.bool_(spike)})
        after = jax.device_get((state.params, state.opt_state))
        same = [np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, after)))]
        history.append((float(metrics["skipped"]), all(same)))
        assert jax.tree.map(lambda x: x.sharding, state) == placed
        assert np.isfinite(metrics["accuracy"])
    assert history == [(0.0, False), (1.0, True), (0.0, False)]
    assert int(state.step) == 3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))


def test_accumulation_is_exact():
    opt = optax.adam(1e-2)
    runs = [
        train(step.make_update(net_loss, opt, accum_steps=accum_steps), new_state(opt))
        for accum_steps in (1, 2, 4)
    ]
    assert_close(runs[1], runs[0], 1e-6)
    assert_close(runs[2], runs[0], 1e-6)


def test_accumulation_passes_scalars_and_refuses_a_remainder():
    opt = optax.sgd(0.5)

    def scaled_loss(variables, batch, rng):
        sums = linear_loss(variables, batch, rng)
        return sums._replace(loss_sum=sums.loss_sum * batch["scale"])

    update = step.make_update(scaled_loss, opt, accum_steps=2)
    batch = {"x": np.float32([1.0, 3.0]), "weight": np.float32([1.0, 3.0]), "scale": np.float32(2)}
    _, metrics = update(linear_state(opt), batch)
    assert float(metrics["grad_norm"]) == pytest.approx(5.0)
    with pytest.raises(ValueError, match=r"\['x'\]: 3 rows do not divide into 2"):
        update(linear_state(opt), {"x": np.ones(3, np.float32)} | batch | {"x": np.ones(3)})


@pytest.mark.parametrize(
    "sizes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4}]
)
def test_eight_devices_equal_one(sizes):
    opt = optax.adam(1e-2)
    single = train(step.make_update(net_loss, opt), new_state(opt))
    mesh = sharding.make_mesh(sizes)
    with sharding.activate(mesh, RULES):
        state = new_state(opt, mesh)
        update = step.make_update(net_loss, opt, accum_steps=2)
        spread = train(
            update, state, make_batch=lambda b: sharding.Layout(mesh, RULES).place_batch(b)
        )
    assert_close(spread, single, 1e-5)


def test_state_keeps_its_shardings():
    opt = optax.adam(1e-2)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with sharding.activate(mesh, RULES):
        state = new_state(opt, mesh)
        before = jax.tree.map(lambda x: x.sharding, state)
        update = step.make_update(net_loss, opt)
        state, _ = update(state, sharding.Layout(mesh, RULES).place_batch(net_batch()))
    assert before == jax.tree.map(lambda x: x.sharding, state)
    kernel = state.params["params"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 12)
    assert state.opt_state[0].mu["params"]["up"]["kernel"].sharding == kernel.sharding


def test_an_update_compiles_ahead_of_time_without_arrays():
    opt = optax.adam(1e-2)
    mesh = sharding.make_mesh({"fsdp": 8})
    state = new_state(opt, mesh)
    batch = sharding.Layout(mesh, RULES).place_batch(net_batch())
    shapes = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    abstract = state_lib.TrainState.abstract(shapes(state.variables), opt)
    assert abstract == shapes(state)
    lowered = step.make_update(net_loss, opt).lower(abstract, shapes(batch))
    assert lowered.compile().memory_analysis() is not None


def test_donation_consumes_params_and_spares_frozen():
    opt = optax.sgd(0.5)
    batch = {"x": np.ones(2, np.float32), "weight": np.ones(2, np.float32)}
    for donate in (True, False):
        state = linear_state(opt)
        new, _ = step.make_update(linear_loss, opt, donate=donate)(state, batch)
        assert state.params["params"]["w"].is_deleted() == donate
        assert new.frozen["extra"]["v"] is state.frozen["extra"]["v"]
        assert not state.frozen["extra"]["v"].is_deleted()


def test_randomness_differs_between_steps_and_repeats_between_runs():
    opt = optax.sgd(0.0)

    def noise_loss(variables, batch, rng):
        noise = jax.random.normal(rng, ())
        return step.Sums(variables["params"]["w"], 1.0, {"noise": (noise, 1.0)})

    def draw():
        state, seen = linear_state(opt), []
        update = step.make_update(noise_loss, opt)
        for _ in range(3):
            state, metrics = update(state, {})
            seen.append(float(metrics["noise"]))
        return seen

    assert len(set(draw())) == 3
    assert draw() == draw()


@pytest.mark.parametrize("mesh_shape", [None, {"data": 2, "fsdp": 2}])
def test_one_batch_shape_is_compiled_once(mesh_shape):
    mesh = sharding.make_mesh(mesh_shape or {"data": 1})
    variables, _ = sharding.init_sharded(
        Net(), mesh, RULES, jax.random.key(0), np.ones((1, 16), np.float32)
    )
    if mesh_shape is None:  # As they come from a checkpoint: bound to a device, on no mesh.
        variables = jax.device_put(jax.device_get(variables), jax.devices()[0])
    state = state_lib.TrainState.create(variables, optax.adamw(1e-2), jax.random.key(1))
    update = step.make_update(net_loss, optax.adamw(1e-2))
    state, _ = update(state, net_batch(0))
    compiled = []

    def note(name, *_, **__):
        compiled.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        update(state, net_batch(1))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not [name for name in compiled if "compile" in name]
