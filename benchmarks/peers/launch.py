"""Runs a job on ours, on the bare loop and on peers, each peer in a virtual environment of its own, made here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers.job import Job
from torch import Tensor

HERE = Path(__file__).parent
VENVS = Path("~/.cache/featherlight-benchmarks").expanduser()
NEEDED = {
    "pfl": (["pfl[pytorch]==0.6.*"], ["pfl", "torch"]),
    "flower": (["flwr[simulation]>=1.40,<2"], ["flwr", "ray", "torch"]),
}
"""Of each peer: what is installed, and by which modules one sees that it is."""
THREADS = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def environment(peer: str, folder: Path) -> str:
    """The interpreter of ``peer``'s environment below ``folder``; made, by uv or pip, where it is not there, with the torch that we have.

    Raises:
        RuntimeError: it cannot be installed, with the installer's last line.
    """
    wanted, modules = NEEDED[peer]
    python = folder / peer / "bin" / "python"
    look = "import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))"
    if python.exists() and subprocess.run([python, "-c", look, *modules]).returncode == 0:
        return str(python)
    packages = [*wanted, f"torch=={torch.__version__.partition('+')[0]}", "numpy"]
    uv = shutil.which("uv")
    make = [uv, "venv", "--python", sys.executable] if uv else [sys.executable, "-m", "venv"]
    install = [uv, "pip", "install", "--python", str(python)] if uv else [str(python), "-m", "pip", "install"]
    for command in ([*make, str(folder / peer)], [*install, *packages]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{peer} cannot be installed: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return str(python)


@dataclass(frozen=True)
class Answer:
    """Of one run: seconds of each round after the first, by the job's clock; MiB at the peak; the server's last weights."""

    seconds: list[float]
    mib: float
    weights: list[Tensor]


def run(peer: str, job: Job, python: str = sys.executable, settings: dict[str, Any] | None = None) -> Answer:
    """Let ``peer`` (``"our"``, ``"bare"``, ``"pfl"``, ``"flower"``) do the job in a process of its own.

    Args:
        settings: of our federation, beside the job's.

    Raises:
        RuntimeError: it ended without an answer.
    """
    benchmarks = str(HERE.parent)
    ours = [] if peer in NEEDED else [os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        path, answer = Path(folder, "job.npz"), Path(folder, "answer.npz")
        job.save(path)
        command = [python, str(HERE / f"{peer}_peer.py"), str(path), str(answer), json.dumps(settings or {})]
        variables = {**os.environ, **THREADS, "PFL_PYTORCH_DEVICE": "cpu", "PYTHONPATH": os.pathsep.join([benchmarks, *filter(None, ours)])}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=folder)
        if not answer.exists():
            raise RuntimeError(f"{peer} ended with {done.returncode} and no answer:\n{done.stderr[-3000:]}")
        with np.load(answer) as file:
            laps, mib = file["at"].tolist(), float(file["mib"])
            weights = [torch.from_numpy(file[name]) for name in sorted(file.files) if name.isdigit()]
    rounds = [after - before for before, after in pairwise(laps[1:])]
    return Answer(rounds, mib, weights)


def on(job: Job, **changed: Any) -> Job:
    """The same job with other settings."""
    return replace(job, settings=replace(job.settings, **changed))
