"""Settings of glibc's allocator for a process that takes and returns large buffers at every step.

XLA on a CPU asks for its buffers anew in every call. With glibc's defaults each comes from the
kernel in pages of 4 kB, zeroed one fault at a time: up to half of a training step.
"""

import os
import platform
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"  # Read once, before the program's first instruction.
TUNABLES = {
    # Large buffers lie on huge pages where the kernel allows it (glibc 2.35 and newer).
    "glibc.malloc.hugetlb": "1",
    # Heaps grow by whole huge pages; setting it also stops glibc from moving its own thresholds.
    "glibc.malloc.top_pad": str(64 << 20),
}


def tuned(environ: Mapping[str, str]) -> dict[str, str] | None:
    """The environment with TUNABLES, or None where nothing is to be done.

    That is where the C library is not glibc, and where the user has set tunables of their own.
    """
    if VARIABLE in environ or platform.libc_ver()[0] != "glibc":
        return None
    return {**environ, VARIABLE: ":".join(f"{key}={value}" for key, value in TUNABLES.items())}


def restart_tuned() -> None:
    """Replaces the process by itself with TUNABLES set; returns if there is nothing to set."""
    environ = tuned(os.environ)
    if environ is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environ)
