"""A run that goes on for long needs no more as it goes on: a short version of ``benchmarks/long_run.py``."""

import importlib.util
import itertools
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("long_run", Path(__file__).parents[2] / "benchmarks" / "long_run.py")
long_run = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(long_run)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["averaging", "intrinsic", "EcoFed", "top-k"])
def test_files_tensors_and_the_log_stay(method, tmp_path):
    rows = long_run.measure(method, 60, tmp_path / "run", looks=6)[2:]
    for name in ("open files", "tensors", "files in the folder"):
        assert max(row[name] for row in rows) - min(row[name] for row in rows) <= 4, name  # a tensor or two is on its way
    for before, after in itertools.pairwise(rows):
        assert after["log, bytes a round"] < before["log, bytes a round"] + 5
