"""Files that are written whole or not at all: beside the one they replace, flushed to disk, renamed over it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast


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
        with partial.open("wb") as raw:
            file = _Noting(raw)
            try:
                write(cast(IO[bytes], file))
            except Exception as error:
                if file.failed is not None and error is not file.failed:  # what torch.save says of it is where it was in its own code
                    raise file.failed from error
                raise
            raw.flush()
            os.fsync(raw.fileno())
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


def append(path: Path, text: str) -> None:
    """Add ``text`` at the end of a log; its folder is made where it is not there.

    Raises:
        OSError: names the file; some of ``text`` may be in it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise OSError(f"cannot add to {path} ({error}); what stands before that is as it was") from error


def as_before(path: Path) -> str:
    """The end of a message about a file that could not be written."""
    return f"; {path} is as it was before" if path.exists() else ""


class _Noting:
    """A file that remembers what the system refused: some writers say of it only that they failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.failed: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failed = error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
