"""Programs that the launch scripts call, replaced by ones that only note how they were called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
STAGE = ("--", "grpo", "--config=configs/kimi_audio_7b.py:v5e-8x8", "--workdir=/shared/a run")

# Notes its arguments and, for kubectl, its input; says what FAKE_SAYS holds.
FAKE = f"""#!{sys.executable}
import json, os, sys
call = {{"argv": [os.path.basename(sys.argv[0]), *sys.argv[1:]]}}
if "apply" in sys.argv:
    call["input"] = sys.stdin.read()
with open(os.environ["FAKE_LOG"], "a") as log:
    log.write(json.dumps(call) + "\\n")
print(os.environ.get("FAKE_SAYS", "ACTIVE"))
sys.exit(int(os.environ.get("FAKE_STATUS", 0)))
"""
FAKED = ("gcloud", "kubectl", "xpk", "srun", "scontrol", "git")


class Shell:
    """Runs scripts where only fake programs can be reached."""

    def __init__(self, folder: Path):
        self.log = folder / "log"
        programs = folder / "bin"
        programs.mkdir()
        for name in FAKED:
            (programs / name).write_text(FAKE)
            (programs / name).chmod(0o755)
        self.env = {
            "PATH": f"{programs}:/usr/bin:/bin",
            "FAKE_LOG": str(self.log),
            "TMPDIR": str(folder),
            "HOME": str(folder),
        }

    def run(self, *command: object, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, command)),
            env=self.env | env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> list[dict]:
        """What was called since the last time."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines()
        os.remove(self.log)
        return [json.loads(line) for line in lines]


@pytest.fixture
def shell(tmp_path) -> Shell:
    return Shell(tmp_path)
