"""Runs of a federation, forked from one interpreter: whole, and stopped by a signal and resumed. Arguments: folder, seed."""

import importlib.util
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from featherlight.fed_loop import Adam, Federation
from featherlight.plugins import DepthDropout, LayerFreezing, PartitionedTraining, Plugin

STEPS = 50  # 6 rounds of 3 of 4 clients of 2 to 4 batches have more


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Say(Plugin):
    """Tells of every step, so that a signal can be sent at one."""

    def __init__(self, said):
        self._said = said

    def after_step(self, clock):
        self._said.send("step")
        time.sleep(0.003)


def train(folder, every, said):
    toys = load("conftest")
    if not folder.name.endswith("whole"):
        sys.stderr = (folder.parent / f"{folder.name}.err").open("a")
    plugins = [LayerFreezing(blocks="blocks.*", periods_per_stage=2, init="copy_previous"), DepthDropout(blocks="blocks.*")]
    if folder.name.startswith("replay"):
        buffer = str(folder / "buffer") if "on disk" in folder.name else "memory"
        plugins = [PartitionedTraining("blocks.1", replay_period=3, buffer=buffer)]
    plugins.append(Say(said))
    federation = Federation(6, cohort=3, seed=4, server=Adam(0.1), folder=folder, checkpoint_every=every, accelerator="cpu", progress=False)
    module = toys.Net(dropout=0.3)
    result = federation.run(module, toys.Points([10, 14, 8, 11]), plugins, resume=True)
    torch.save(module.state_dict(), folder / "done.pt")
    (folder / "figures.json").write_text(json.dumps(toys.timeless(result)))


def run(folder, every=1, number=None, after=None):
    fork = multiprocessing.get_context("fork")
    hear, say = fork.Pipe(duplex=False)
    process = fork.Process(target=train, args=(folder, every, say))
    process.start()
    if number is not None:
        for _ in range(int(after)):
            hear.recv()
        time.sleep(0.005 * (after % 1))
        os.kill(process.pid, number)
        stopped = time.time()
        while process.is_alive() and time.time() < stopped + 60:  # or the pipe would fill
            if hear.poll(0.01):
                hear.recv()
    process.join()
    return process.exitcode


if __name__ == "__main__":
    folder, moments = Path(sys.argv[1]), random.Random(sys.argv[2])
    multiprocessing.set_start_method("fork")
    run(folder / "whole")
    run(folder / "replay whole")
    for name, number, every in (
        ("killed", signal.SIGKILL, 1),
        ("replay killed", signal.SIGKILL, 1),
        ("replay on disk killed", signal.SIGKILL, 1),
        ("interrupted", signal.SIGINT, 1),
        ("seldom saved", signal.SIGTERM, 100),
    ):
        (folder / f"{name}.err").touch()
        code = run(folder / name, every, number, moments.uniform(1, STEPS))
        (folder / f"{name}.code").write_text(str(code))
        run(folder / name, every)
