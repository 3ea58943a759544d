"""Where messages lie: in memory, or as files in a folder that one process has for itself."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

PREFIX = "featherlight-replay-"
_OURS = re.compile(r"[a-z]+-\d+\.safetensors")


class InMemory:
    """Messages by name."""

    def __init__(self) -> None:
        self._messages: dict[str, bytes] = {}

    def write(self, name: str, message: bytes) -> None:
        self._messages[name] = message

    def read(self, name: str) -> bytes:
        return self._messages[name]

    def tensor(self, name: str, size: int) -> Tensor:
        """The message as uint8."""
        return torch.frombuffer(bytearray(self._messages[name]), dtype=torch.uint8)

    def move(self, name: str, to: str) -> None:
        """In place of what has the name ``to``."""
        self._messages[to] = self._messages.pop(name)

    def delete(self, name: str) -> None:
        self._messages.pop(name, None)

    def close(self) -> None:
        self._messages.clear()


class OnDisk:
    """Files in a folder below ``folder`` that is this process's alone, made with the first message and gone with :meth:`close`.

    Every process has one, so several runs, and several processes of a run, may be given the same ``folder``. The process holds a lock on
    its own (``flock``, which ends with the process): what one that was killed left behind is cleared by the next. Nothing else in
    ``folder`` is read, counted or touched.

    Args:
        folder: need not be there yet.

    Raises:
        OSError: the disk is full or cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: Path | None = None
        self._lock = -1

    def write(self, name: str, message: bytes) -> None:
        path = self._path(name)
        path.unlink(missing_ok=True)  # whoever has the old one mapped keeps it, and there are never both
        path.write_bytes(message)

    def read(self, name: str) -> bytes:
        return self._path(name).read_bytes()

    def tensor(self, name: str, size: int) -> Tensor:
        """The message as uint8, without reading it into memory."""
        return torch.from_file(str(self._path(name)), size=size, dtype=torch.uint8)

    def move(self, name: str, to: str) -> None:
        """In place of what has the name ``to``."""
        self._path(name).replace(self._path(to))

    def delete(self, name: str) -> None:
        if self._own is not None:
            self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        if self._own is not None:
            with _locked(self._folder, wait=True):
                _clear(self._own)
                os.close(self._lock)
                self._clear_left()
        self._own, self._lock = None, -1

    def _path(self, name: str) -> Path:
        if self._own is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _locked(self._folder, wait=True):  # or another process would clear a folder that is not locked yet
                self._clear_left()
                self._own = Path(tempfile.mkdtemp(prefix=PREFIX, dir=self._folder))
                self._lock = _hold(self._own)
        return self._own / f"{name}.safetensors"

    def _clear_left(self) -> None:
        for left in self._folder.glob(f"{PREFIX}*"):
            with _locked(left) as free:
                if free:
                    _clear(left)


def _clear(folder: Path) -> None:
    """Remove a folder of messages; one that holds anything else is somebody's, and stays."""
    files = list(folder.iterdir())
    if all(_OURS.fullmatch(path.name) for path in files):
        for path in files:
            path.unlink(missing_ok=True)
        folder.rmdir()


def _hold(folder: Path, wait: bool = False) -> int:
    """A descriptor that locks ``folder`` until it is closed.

    Raises:
        BlockingIOError: another process has it.
    """
    import fcntl  # not everywhere; messages in memory need none

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Whether the lock could be had: not of a folder that a living process has, or that is none."""
    try:
        descriptor = _hold(folder, wait)
    except (BlockingIOError, NotADirectoryError, FileNotFoundError, PermissionError):  # the last: another user's
        yield False
        return
    try:
        yield True
    finally:
        os.close(descriptor)
