"""Runs before any test module is imported: what JAX and TensorFlow read when they start."""

import atexit
import gc
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads of the CPU client: with as few as there are devices, collectives of one program that do
# not wait for each other can take them all, and then none goes on.
os.environ.setdefault("NPROC", "64")
# Eight devices for the meshes; little optimisation, because tests compile far longer than they run.
_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    "--xla_backend_optimization_level": "0",
}
_given = os.environ.get("XLA_FLAGS", "")
_added = [f"{name}={value}" for name, value in _FLAGS.items() if name not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_added]).strip()

# Many tests compile the same programs; all workers and the programs they start share them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.mkdtemp(prefix="paras2s-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax  # noqa: E402
import pytest  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps():
    """Frees compiled programs before a process has as many memory maps as Linux allows, 65530."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()
