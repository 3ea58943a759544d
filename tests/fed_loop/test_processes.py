"""One process and two give the same weights, history and cost, bit for bit."""

import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from featherlight.fed_loop import checkpoint

SCRIPT = Path(__file__).parent / "on_processes.py"


@pytest.fixture(scope="module")
def runs():
    spec = importlib.util.spec_from_file_location("on_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LAUNCHERS = {
    "devices=2": [sys.executable, "-W", "ignore", SCRIPT],
    "torchrun": [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT],
}


@pytest.mark.parametrize(
    ("launcher", "names"),
    [
        ("devices=2", ["growing"]),
        (
            "torchrun",
            [
                *("layerwise", "growing", "sampled", "turned", "projected", "remembered", "sketched", "held_near"),
                *("replayed", "jointly", "queued", "lockstep", "calibrated", "medians", "voided", "private"),
            ],
        ),
    ],
)
def test_two_processes_are_one(launcher, names, runs, same, tmp_path):
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # threads are the run's own to choose
    done = subprocess.run([*LAUNCHERS[launcher], tmp_path, "2", *names], capture_output=True, text=True, timeout=300, env=free)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        weights, figures = runs.run(name)
        same(torch.load(tmp_path / name / "done.pt"), weights)
        assert json.loads((tmp_path / name / "figures.json").read_text()) == json.loads(json.dumps(figures))
        resumed, _ = runs.run(name, tmp_path / name, resume=True)  # one process goes on from what two have written
        same(resumed, weights)
        rejected = {
            "growing": 4,
            "projected": 4,
            "remembered": 4,
            "replayed": 3,
            "held_near": 5,
            "private": 2,
            "voided": 2,
        }  # one client, each time
        if name != "medians":  # there the client is now and then among those that drop out
            assert sum(row["rejected"] for row in figures[0]) == rejected.get(name, 0)


def test_two_processes_stop_where_too_few_clients_are_left(runs, same, tmp_path):
    """Said once, by both; nothing has changed, and the run can go on with clients that were seen to."""
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [*LAUNCHERS["devices=2"], tmp_path, "2", "hopeless"], capture_output=True, text=True, timeout=300, check=False, env=free
    )
    assert done.returncode
    told = r"ValueError: in 3 rounds in a row, up to round 2, fewer than min_clients=2 updates could be used \(not_finite 9\)"
    assert len(re.findall(told, done.stderr)) == 1
    state = checkpoint.read(checkpoint.newest(tmp_path / "hopeless"))
    assert state["round"] == 3
    assert [row["void"] for row in state["history"]] == [1, 1, 1]
    same(state["server"], runs.load("conftest").Net().state_dict())


def test_two_processes_killed_at_a_random_moment(runs, same, tmp_path):
    """Replay from two buffers in one folder: what is resumed, in one process, ends as what nobody killed, in memory, and leaves no file."""
    seed = os.environ.get("PYTEST_SEED", str(random.randrange(10**6)))
    print(f"PYTEST_SEED={seed}")
    folder = tmp_path / "slowly"
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with (tmp_path / "said").open("w") as said:
        command = [*LAUNCHERS["devices=2"], tmp_path, "2", "slowly"]
        process = subprocess.Popen(command, stdout=said, stderr=said, env=free, start_new_session=True)
        until = time.time() + 200
        while not (folder / "round-000001.ckpt").exists() and process.poll() is None and time.time() < until:
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 0.5))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "said").read_text()[-3000:]
    assert (folder / "round-000001.ckpt").exists()
    assert not (folder / "done.pt").exists()
    assert len([*(folder / "buffer").iterdir()]) == 2  # the other process may not even have ended yet
    resumed, _ = runs.run("slowly", folder, resume=True)
    weights, figures = runs.run("slowly")
    same(resumed, weights)
    assert json.loads((folder / "figures.json").read_text()) == json.loads(json.dumps(figures))
    assert not [*(folder / "buffer").iterdir()]
