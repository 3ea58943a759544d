"""Where runs are written: a folder a run, numbered so that no run writes over another."""

from __future__ import annotations

import os
from pathlib import Path

RUNS = Path("runs")


def folder_for(name: str, resume: bool, base: Path = RUNS) -> Path:
    """``base/name``, ``base/name-2``, …: the first that does not exist, or, to resume, the last that does.

    A run that an agent of a W&B sweep has started goes to ``base/sweep-SWEEP/name-RUN``, whatever other agents start beside it.
    """
    sweep, run = (os.environ.get(f"WANDB_{name}_ID") for name in ("SWEEP", "RUN"))
    if sweep and run:
        base, name = base / f"sweep-{sweep}", f"{name}-{run}"
    number = 1
    while _numbered(base, name, number).exists():
        number += 1
    return _numbered(base, name, max(number - 1, 1) if resume else number)


def _numbered(base: Path, name: str, number: int) -> Path:
    return base / (name if number == 1 else f"{name}-{number}")
