"""Where runs are written: a folder a run, numbered so that no run writes over another."""

from __future__ import annotations

import os
from pathlib import Path

RUNS = Path("runs")


def folder_for(name: str, resume: bool, base: Path = RUNS) -> Path:
    """``base/name``, ``base/name-2``, …: the first that does not exist, or, to resume, the last that does."""
    number = 1
    while _numbered(base, name, number).exists():
        number += 1
    return _numbered(base, name, max(number - 1, 1) if resume else number)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none: under another name first, then renamed over ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _numbered(base: Path, name: str, number: int) -> Path:
    return base / (name if number == 1 else f"{name}-{number}")
