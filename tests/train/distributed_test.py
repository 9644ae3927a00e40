"""What one process can tell of its part; two real ones are in multihost_test.py."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from paras2s_jax.train import distributed, sharding
from paras2s_jax.train.distributed import DistributedError, Settings


@pytest.fixture(autouse=True)
def run(monkeypatch):
    """A run of its own for every test."""
    monkeypatch.setattr(distributed, "_run", distributed._Run())


@pytest.fixture
def initialize(monkeypatch):
    """Stands in for jax.distributed.initialize; lists its calls, or raises what is put in."""
    calls, errors = [], []

    def stand_in(*args, **kwargs):
        calls.append((args, kwargs))
        if errors:
            raise errors[0]

    monkeypatch.setattr(jax.distributed, "initialize", stand_in)
    return calls, errors


def test_nothing_is_started_where_nothing_is_said(initialize):
    calls, errors = initialize
    errors.append(ValueError("coordinator_address should be defined."))
    distributed.start(Settings(), {})
    assert len(calls) == 1
    assert distributed.count() == 1 and distributed.is_main()
    # A program that has used JAX already, such as a notebook, goes on alone too.
    errors[0] = RuntimeError("jax.distributed.initialize() must be called before any JAX calls")
    distributed.start(Settings(), {})


@pytest.mark.parametrize(
    "settings, environ",
    [(Settings("off", "host:1", 2, 0), {}), (Settings(), {"SLURM_NTASKS": "1"})],
)
def test_neither_off_nor_a_lone_task_asks_jax(initialize, settings, environ):
    distributed.start(settings, environ)
    assert initialize[0] == []


def test_given_addresses_reach_jax_and_no_cluster_is_looked_for(initialize):
    calls, errors = initialize
    errors.append(RuntimeError("cannot listen\nand more"))
    with pytest.raises(DistributedError, match=r"cannot start: cannot listen$"):
        distributed.start(Settings("auto", "host:1", 2, 1, heartbeat_s=7), {"SLURM_NTASKS": "1"})
    ((args, kwargs),) = calls
    assert args == ("host:1", 2, 1)
    assert kwargs["cluster_detection_method"] == "deactivate"
    assert kwargs["heartbeat_timeout_seconds"] == 7


@pytest.mark.parametrize("given", [{"coordinator": "h:1"}, {"num_processes": 2, "process_id": 0}])
def test_half_an_address_is_an_error(initialize, given):
    with pytest.raises(DistributedError, match="all of --coordinator, --num_processes and"):
        distributed.start(Settings(**given), {})


def test_on_insists(initialize):
    initialize[1].append(ValueError("coordinator_address should be defined."))
    with pytest.raises(DistributedError, match="finds no cluster here"):
        distributed.start(Settings("on"), {})


def test_a_lone_process_waits_for_nobody():
    distributed.barrier("alone", 0.0)
    assert distributed.on_main("work", lambda: {"x": 1}) == {"x": 1}
    distributed.finish()


def test_missing_processes_are_read_from_the_service(monkeypatch):
    monkeypatch.setattr(distributed, "_named", lambda number: f"process {number}")
    message = (
        "DEADLINE_EXCEEDED: Barrier timed out. Id: hello::0. This usually happens …\n"
        "# of tasks that reached the barrier: 1/3.\n"
        "The first task at the barrier: 0. Some timed out task names:\n1\n2\n\n\nRPC: /xla.c"
    )
    assert distributed._missing(message) == "process 1 and process 2 did not come"
    assert distributed._missing("UNAVAILABLE: gone\nx") == "not reached (UNAVAILABLE: gone)"


@pytest.mark.parametrize("spec", [("fsdp", "data"), ("data",), ()])
def test_blocks_cover_an_array_once(spec):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    values = np.arange(4 * 2 * 3).reshape(4, 2, 3)
    array = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
    found, times = np.zeros_like(values), np.zeros_like(values)
    for index, block in distributed.own_blocks(array):
        found[index] = block
        times[index] += 1
    np.testing.assert_array_equal(found, values)
    assert (times == 1).all()
    np.testing.assert_array_equal(distributed.gather({"x": array})["x"], values)
