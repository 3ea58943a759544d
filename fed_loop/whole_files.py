"""Files that are written whole or not at all: beside the one they replace, flushed to disk, renamed over it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Give ``path`` the content that ``write`` puts into the file it is given; its folder is made where it is not there.

    A full disk, an error or a kill leaves what was there before. An unfinished file is hidden, ``.NAME.partial``, and
    the next attempt writes over it.

    Raises:
        OSError: the disk is full or cannot be written.
        Exception: whatever else ``write`` raises.
    """
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As :func:`write_whole`, of ``text`` in UTF-8.

    Raises:
        OSError: names the file.
    """
    try:
        write_whole(path, lambda file: file.write(text.encode()))
    except OSError as error:
        raise OSError(f"cannot write {path} ({error}){as_before(path)}") from error


def as_before(path: Path) -> str:
    """The end of a message about a file that could not be written."""
    return f"; {path} is as it was before" if path.exists() else ""


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
