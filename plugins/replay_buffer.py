"""What a server keeps of what clients sent it: the newest message of each, up to so many bytes, in memory or on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


class ReplayBuffer:
    """One message a client; where the limit is reached, those go that came in the earliest round.

    Args:
        limit: bytes of all messages together.
        folder: a file a client there; in memory if left out. Files are a store, not a record: a run goes on from a checkpoint's content.

    Example:
        >>> buffer = ReplayBuffer(limit=10)
        >>> for client in (4, 2, 7):
        ...     buffer.put(client, round=0 if client == 2 else 1, message=b"four")
        >>> buffer.clients, buffer.nbytes
        ([4, 7], 8)
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        if limit < 1:
            raise ValueError(f"buffer_bytes={limit}: give 1 or more")
        if folder is not None and folder.exists() and not folder.is_dir():
            raise ValueError(f'buffer="{folder}" is a file: give a folder, or "memory"')
        self.limit = limit
        self._folder = folder
        self._index: dict[int, tuple[int, int]] = {}
        self._messages: dict[int, bytes] = {}

    @property
    def clients(self) -> list[int]:
        """Who has a message here, ascending."""
        return sorted(self._index)

    @property
    def nbytes(self) -> int:
        return sum(size for _, size in self._index.values())

    def round_of(self, client: int) -> int:
        """The round in which ``client``'s message came."""
        return self._index[client][0]

    def put(self, client: int, round: int, message: bytes) -> None:
        """Keep ``message`` in place of the client's last.

        Raises:
            ValueError: it alone is beyond the limit.
        """
        gone = self.note(client, round, len(message))
        for other in gone:
            self._discard(other)
        if self._folder is None:
            self._messages[client] = message
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            part = self._path(client).with_suffix(f".{os.getpid()}")  # several processes may write the same at once
            part.write_bytes(message)
            part.replace(self._path(client))

    def get(self, client: int) -> bytes:
        """The client's message."""
        return self._messages[client] if self._folder is None else self._path(client).read_bytes()

    def note(self, client: int, round: int, size: int) -> list[int]:
        """Account for a message of ``size`` bytes; returns the clients whose messages must go for it. Enough for a prediction, which has no
        messages, and must not touch those of a run."""
        if size > self.limit:
            raise ValueError(f"client {client} sends {size} bytes, but buffer_bytes={self.limit} is all there is: give {size} or more")
        self._index.pop(client, None)
        gone = []
        while self.nbytes + size > self.limit:
            gone.append(min(self._index, key=lambda other: (self._index[other][0], other)))
            del self._index[gone[-1]]
        self._index[client] = round, size
        return gone

    def state_dict(self) -> dict[str, Any]:
        """Everything, the content too: messages as uint8 tensors, from disk without reading them into memory."""
        return {str(client): {"round": self.round_of(client), "message": self._tensor(client)} for client in self.clients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for client in self.clients:
            del self._index[client]
            self._discard(client)
        for number, kept in state.items():
            self.put(int(number), kept["round"], kept["message"].numpy().tobytes())

    def _tensor(self, client: int) -> torch.Tensor:
        if self._folder is None:
            return torch.frombuffer(bytearray(self._messages[client]), dtype=torch.uint8)
        return torch.from_file(str(self._path(client)), size=self._index[client][1], dtype=torch.uint8)

    def _discard(self, client: int) -> None:
        self._messages.pop(client, None)
        if self._folder is not None:
            self._path(client).unlink(missing_ok=True)

    def _path(self, client: int) -> Path:
        assert self._folder is not None
        return self._folder / f"client-{client:06d}.safetensors"
