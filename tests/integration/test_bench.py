"""`make bench` measures and prints; what the figures are is nobody's business here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(300)
def test_ours_stands_beside_the_floor() -> None:
    done = bench("--only", "provision", "--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    (cold,) = [line for line in done.stdout.splitlines() if "cold provision" in line]
    (wake,) = [line for line in done.stdout.splitlines() if "wake from frozen" in line]
    for row in (cold, wake):
        assert row.count(" ms") >= 3, row  # floor, ours, difference


def test_a_measurement_that_there_is_not() -> None:
    done = bench("--only", "nonsense")
    assert done.returncode == 2
    assert "admit, provision, docker, fleet" in done.stderr
    assert "Traceback" not in done.stderr
