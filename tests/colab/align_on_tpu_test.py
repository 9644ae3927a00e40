"""The pod recipe's notebook from top to bottom, on a mesh of two devices that a CPU plays."""

import json
import re

from tests.colab.conftest import LEAST, overrides


def test_it_trains_on_all_devices_stops_and_goes_on(run, tmp_path, monkeypatch):
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    monkeypatch.setenv("XLA_FLAGS", flags)
    workdir = tmp_path / "mesh"
    done = run(
        "align_on_tpu", WORKDIR=str(workdir), OVERRIDES=overrides(LEAST), STOP_AT=1, EXTRAS="colab"
    )
    assert "2 x cpu (cpu)" in done.printed
    assert "stopped by SIGTERM; what was done is saved" in done.printed
    rows = (workdir / "grpo" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]
    assert len(done.shown("image/png")) == 1
    (chart,) = done.shown("image/svg+xml")
    assert "h100-8" in chart
    # The plan's tables: a row for the update, with its memory in GiB.
    assert re.search(r"update\W+\d+\.\d\d", done.printed)
    assert json.loads((workdir / "h100-8" / "plan" / "grpo" / "summary.json").read_text())
