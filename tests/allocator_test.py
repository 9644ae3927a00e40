"""The allocator's settings reach the process, once, and never replace a user's own."""

import json
import os
import platform
import subprocess
import sys

import pytest

from paras2s_jax import allocator

PROGRAM = """
import json, os, sys
from paras2s_jax import allocator
allocator.restart_tuned()
print(json.dumps([sys.argv, os.environ.get(allocator.VARIABLE)]))
"""


def run(tmp_path, **environ):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    clean = {key: value for key, value in os.environ.items() if key != allocator.VARIABLE}
    root = os.path.dirname(os.path.dirname(allocator.__file__))
    done = subprocess.run(
        [sys.executable, str(script), "a b", "--c=1"],
        env={**clean, "PYTHONPATH": root, **environ},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_a_program_goes_on_with_its_arguments_and_the_settings(tmp_path):
    argv, value = run(tmp_path)
    assert argv[1:] == ["a b", "--c=1"]
    assert value == "glibc.malloc.hugetlb=1:glibc.malloc.top_pad=67108864"


def test_settings_of_the_user_stay(tmp_path):
    _, value = run(tmp_path, GLIBC_TUNABLES="glibc.malloc.check=0")
    assert value == "glibc.malloc.check=0"


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", "1.2"))
    assert allocator.tuned({}) is None
