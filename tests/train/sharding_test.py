import flax.linen as nn
import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P

from paras2s_jax.train import sharding

RULES = (("embed", "fsdp"), ("hidden", "tensor"), ("act_batch", ("data", "fsdp")))


class Net(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x, scale=1.0):
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "hidden"))
        return nn.Dense(self.hidden, kernel_init=init)(x) * scale


def test_sizes_of_a_mesh():
    assert dict(sharding.make_mesh({}).shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    filled = sharding.make_mesh({"fsdp": -1, "tensor": 2})
    assert dict(filled.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert sharding.make_mesh({"data": 2}).size == 2


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"model": 2}, r"\['model'\].*'tensor'"),
        ({"data": 16}, "needs 16 devices, but there are 8"),
        ({"data": 3, "fsdp": -1}, "8 devices do not fill"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "must be positive"),
    ],
)
def test_impossible_meshes_are_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes)


def test_variables_start_where_they_live():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    x = np.ones((2, 8), np.float32)
    variables, shardings = sharding.init_sharded(Net(6), mesh, RULES, jax.random.key(0), x)
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert isinstance(kernel, jax.Array)
    assert kernel.sharding.spec == P("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 3)
    assert jax.tree.map(lambda v: v.sharding, variables) == shardings
    # The same numbers as without a mesh.
    plain = sharding.unbox(Net(6).init(jax.random.key(0), x))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), variables, plain)


def test_dimensions_that_do_not_divide_are_replicated():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    x = np.ones((2, 8), np.float32)
    variables, _ = sharding.init_sharded(Net(5), mesh, RULES, jax.random.key(0), x, scale=2.0)
    assert variables["params"]["Dense_0"]["kernel"].sharding.spec == P("fsdp", None)


def test_batches_are_spread_by_rows():
    layout = sharding.Layout(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), RULES)
    batch = layout.place_batch({"x": np.arange(8.0).reshape(4, 2), "c": np.float32(3)})
    assert batch["x"].addressable_shards[0].data.shape == (1, 2)
    assert batch["c"].sharding.spec == P()
    np.testing.assert_array_equal(batch["x"], np.arange(8.0).reshape(4, 2))
    with pytest.raises(ValueError, match=r"batch\['x'\]: 6 rows do not divide over 4"):
        layout.place_batch({"x": np.zeros((6, 2))})


def test_counters_join_the_mesh_of_the_parameters():
    mesh = sharding.make_mesh({"fsdp": 2})
    spread = jax.device_put(jnp.zeros(4), jax.NamedSharding(mesh, P("fsdp")))
    out = sharding.replicate_rest({"w": spread, "count": jnp.int32(0)})
    assert out["w"] is spread
    assert out["count"].sharding == jax.NamedSharding(mesh, P())
    alone = sharding.replicate_rest({"w": jnp.zeros(4), "count": jnp.int32(3)})
    assert all(x.committed and len(x.devices()) == 1 for x in alone.values())
    assert int(alone["count"]) == 3
