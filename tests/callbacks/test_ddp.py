"""Two processes end with equal weights, and with those of one process that sees both halves of each batch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "ddp_runs.py"


def names():
    spec = importlib.util.spec_from_file_location("ddp_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.RUNS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    subprocess.run([sys.executable, "-W", "ignore", SCRIPT, folder], check=True, timeout=300)
    return folder


@pytest.mark.parametrize("name", names())
def test_ranks_agree(name, folder, same_state):
    (first, _), (second, _) = (torch.load(folder / f"{name}-2-{rank}.pt") for rank in (0, 1))
    parameters = [key for key in first if "running" not in key]  # DDP hands rank 0's statistics on at the next forward pass
    same_state({key: first[key] for key in parameters}, {key: second[key] for key in parameters})


@pytest.mark.parametrize("name", [name for name in names() if name != "batch norm and target"])
def test_two_processes_are_one(name, folder):
    (two, _), (one, _) = (torch.load(folder / f"{name}-{size}-0.pt") for size in (2, 1))
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6)


def test_costs_are_a_rank_s_own(folder):
    (_, two), (_, one) = (torch.load(folder / f"freezing-{size}-0.pt") for size in (2, 1))
    for half, whole in zip(two, one, strict=True):
        assert half["flops_forward"] * 2 == whole["flops_forward"]
        assert half["flops_backward"] * 2 == whole["flops_backward"]
        assert half["params_held"] == whole["params_held"]


def test_a_step_without_a_training_block_is_refused_and_not_hung(folder):
    message = (folder / "refused.txt").read_text()
    assert 'leaves out block "encoder.' in message
    assert "once an epoch rather than in every batch" in message
    assert "ddp_find_unused_parameters_true" in message
