import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from paras2s_jax.align.phases import Call
from paras2s_jax.plan.programs import Programs, device_bytes
from paras2s_jax.train.sharding import ONE_DEVICE, Program, make_mesh


def leaf(*shape, axes=()):
    sharding = NamedSharding(make_mesh({"fsdp": 4, "tensor": 2}), PartitionSpec(*axes))
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def test_bytes_of_one_device():
    # 16 x 6 numbers of 4 bytes: 16 over four, 6 over two.
    assert device_bytes(leaf(16, 6, axes=("fsdp", "tensor"))) == 4 * 3 * 4
    assert device_bytes(leaf(16, 6)) == 16 * 6 * 4
    assert device_bytes(jax.ShapeDtypeStruct((5,), jnp.bfloat16)) == 10


@pytest.fixture
def programs() -> Programs:
    """A reference that shares one of the policy's two arrays."""
    shared, trained, moments = leaf(10), leaf(20), leaf(40)
    resident = {"policy": (shared, trained), "optimizer": moments, "reference": (shared, leaf(30))}
    phase = Program("update", lambda *args: args, ONE_DEVICE)
    return Programs([Call(phase, ((shared, trained), leaf(7)))], resident, 20)


def test_what_is_given_and_what_lies_beside(programs):
    (call,) = programs.calls
    assert programs.call("update") is call
    assert programs.arguments(call) == {"policy": 30 * 4, "inputs": 7 * 4}
    # What the reference shares with the policy is on the device once.
    assert programs.others(call) == {"optimizer": 40 * 4, "reference": 30 * 4}
    total = sum((programs.arguments(call) | programs.others(call)).values())
    assert total == np.sum([10, 20, 40, 30, 7]) * 4
