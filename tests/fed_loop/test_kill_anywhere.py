"""A few of the faults of ``benchmarks/kill_anywhere.py``, which tries many: nothing is lost."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[2] / "benchmarks" / "kill_anywhere.py"
TRIED = {
    "intrinsic": ["killed", "flipped"],
    "EcoFed, disk": ["killed", "cut"],
}


@pytest.mark.parametrize("method", TRIED)
def test_nothing_is_lost(method):
    seed = os.environ.get("PYTEST_SEED", str(random.randrange(10**6)))
    print(f"PYTEST_SEED={seed}")
    command = [sys.executable, "-W", "ignore", HARNESS, "--times", "1", "--seed", seed, "--methods", method, "--faults", *TRIED[method]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    tried, lost = map(int, re.search(r"(\d+) faults, (\d+) lost", done.stdout).groups())
    assert tried >= len(TRIED[method]) - 1  # a moment behind a run's end strikes nothing
    assert lost == 0
