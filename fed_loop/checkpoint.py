"""Checkpoints that survive being written: a new file is whole and on disk before an old one goes."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from featherlight.fed_loop.whole_files import write_whole

KEEP = 2
"""How many checkpoints stay: the newest, and the one before it in case the newest proves unreadable."""


def path_of(folder: Path, round: int) -> Path:
    return folder / f"round-{round:06d}.ckpt"


def write(folder: Path, round: int, state: dict[str, Any]) -> Path:
    """Write ``state`` (tensors and plain data) as the checkpoint after ``round`` rounds; keep the newest :data:`KEEP`.

    Raises:
        OSError: the disk is full or cannot be written; earlier checkpoints are as they were.
    """
    final = path_of(folder, round)
    try:
        write_whole(final, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:
        last = newest(folder)
        left = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise OSError(f"cannot write checkpoint {final} ({error}); {left}") from error
    for old in existing(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return final


def existing(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(folder.glob("round-*.ckpt"))


def newest(folder: Path) -> Path | None:
    """The newest finished checkpoint, if any."""
    found = existing(folder)
    return found[-1] if found else None


def read_newest(folder: Path) -> tuple[Path, dict[str, Any], dict[Path, str]] | None:
    """The newest checkpoint that can be read.

    Returns:
        Its path, what it holds, and the newer ones that cannot be read, with why; None where there is no checkpoint at all.

    Raises:
        ValueError: there are checkpoints, and none of them can be read.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(existing(folder)):
        try:
            return path, read(path), damaged
        except ValueError as error:
            damaged[path] = str(error)
    if damaged:
        raise ValueError("; ".join(damaged.values()) + "; no other checkpoint is there: start anew in another folder")
    return None


def set_aside(path: Path) -> Path:
    """Take a damaged checkpoint out of the way of the one that will be written in its place; its bytes are kept."""
    return path.replace(path.with_name(f"{path.name}.damaged"))


def read(path: Path) -> dict[str, Any]:
    """Load a federation's checkpoint.

    Raises:
        ValueError: as for :func:`read_plain`, or it is not a federation's.
    """
    state = read_plain(path)
    if not isinstance(state, dict) or "round" not in state:
        raise ValueError(f"{path} is not a checkpoint of a federation")
    return state


def read_plain(path: Path) -> Any:
    """Load what ``torch.save`` wrote; only tensors and plain data, never code.

    Raises:
        ValueError: the file is missing, damaged, or holds something else (a malicious pickle, for one).
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare checksums
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {path} does not exist") from error
    except Exception as error:  # whatever damaged bytes make of an unpickler
        reason = _reason(error)
        raise ValueError(f"checkpoint {path} cannot be read: damaged, or not tensors and plain data alone ({reason})") from error


def _reason(error: Exception) -> str:
    """In our words where it is code that torch refuses: torch's own go on to say how to run it."""
    if isinstance(error, pickle.UnpicklingError):
        named = re.search(r"GLOBAL (\S+)", str(error))
        return f"it asks for {named[1]}, which is code" if named else "its pickle holds something else"
    return (str(error).splitlines() or [type(error).__name__])[0]
