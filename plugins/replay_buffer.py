"""What a server keeps of what clients sent it: the newest message of each, up to so many bytes, in memory or on disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from featherlight.plugins.message_store import InMemory, OnDisk


class ReplayBuffer:
    """One message a client; where the limit is reached, those go that came in the earliest round.

    What comes in a round is set aside, and replaces what was there once the round counts (:meth:`commit`): until then there are up to
    ``limit`` bytes of it beside as many that are kept.

    Args:
        limit: bytes of all messages together.
        folder: files in a folder of this process's own there; in memory if left out. Files are a store, not a record: a run goes on from
            a checkpoint's content, and they are gone when it ends.

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
        self._index: dict[int, tuple[int, int]] = {}
        self._aside: dict[int, int] = {}
        self.no_room_up_to = -1
        """The highest number of a client whose message was let go for want of room, of what came in this round."""
        self._store = InMemory() if folder is None else OnDisk(folder)

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
        self._note(client, round, len(message))
        self._store.write(_kept(client), message)

    def get(self, client: int) -> bytes:
        """The client's message."""
        return self._store.read(_kept(client))

    def drop(self, client: int) -> None:
        """Forget the client's message, if there is one."""
        if self._index.pop(client, None) is not None:
            self._store.delete(_kept(client))

    def note(self, client: int, round: int, size: int) -> list[int]:
        """Account for a message of ``size`` bytes; returns the clients whose messages must go for it. Enough for a prediction, which has no
        messages, and must not touch those of a run."""
        self.check(client, size)
        self._index.pop(client, None)
        gone = []
        while self.nbytes + size > self.limit:
            gone.append(min(self._index, key=lambda other: (self._index[other][0], other)))
            del self._index[gone[-1]]
        self._index[client] = round, size
        return gone

    def check(self, client: int, size: int) -> None:
        """Refuse a message that is too large.

        Raises:
            ValueError: it alone is beyond the limit.
        """
        if size > self.limit:
            raise ValueError(f"client {client} sends {size} bytes, but buffer_bytes={self.limit} is all there is: give {size} or more")

    # -- a round's messages, before the round counts ------------------------------------------------------------------
    @property
    def aside(self) -> Mapping[int, int]:
        """Bytes of what is set aside, by client."""
        return self._aside

    def set_aside(self, client: int, message: bytes, bounded: bool = True) -> None:
        """Hold ``message`` until :meth:`commit`.

        Args:
            bounded: let go at once, of what is set aside, what the limit will have no room for.
        """
        if bounded and client <= self.no_room_up_to:  # those above it have taken what there is
            return
        self._aside[client] = len(message)
        self._store.write(_new(client), message)
        if bounded:
            fit = fitting(self._aside, self.limit)
            self.no_room_up_to = max([self.no_room_up_to, *(other for other in self._aside if other not in fit)])
            self.keep_aside(fit)

    def get_aside(self, client: int) -> bytes:
        """What is set aside of ``client``."""
        return self._store.read(_new(client))

    def keep_aside(self, clients: Collection[int]) -> None:
        """Let go what is set aside of others."""
        for client in [client for client in self._aside if client not in clients]:
            del self._aside[client]
            self._store.delete(_new(client))

    def begin_round(self) -> None:
        """Let everything go that is set aside: of a round that did not come to its end."""
        self.keep_aside(())
        self.no_room_up_to = -1

    def commit(self, round: int) -> None:
        """What is set aside came in ``round``, and takes the place of what the same clients sent before."""
        self.keep_aside(fitting(self._aside, self.limit))
        for client, size in sorted(self._aside.items()):
            self._note(client, round, size)
            self._store.move(_new(client), _kept(client))
        self._aside.clear()

    # -- what a checkpoint holds --------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Everything, the content too: messages as uint8 tensors, from disk without reading them into memory."""
        return {
            str(client): {"round": round, "message": self._store.tensor(_kept(client), size)}
            for client, (round, size) in sorted(self._index.items())
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for client in self.clients:
            self.drop(client)
        for number, kept in state.items():
            self.put(int(number), kept["round"], kept["message"].numpy().tobytes())

    def close(self) -> None:
        """Forget everything, and leave no file."""
        self._index.clear()
        self._aside.clear()
        self._store.close()

    def _note(self, client: int, round: int, size: int) -> None:
        for other in self.note(client, round, size):
            self._store.delete(_kept(other))


def fitting(sizes: Mapping[int, int], limit: int) -> list[int]:
    """Of messages of one round, the clients whose fit into ``limit`` bytes, the highest numbers first: as if each came in order, and the
    lowest went for it.

    Example:
        >>> fitting({3: 4, 5: 4, 8: 4}, limit=10)
        [5, 8]
    """
    fit: list[int] = []
    for client in sorted(sizes, reverse=True):
        limit -= sizes[client]
        if limit < 0:
            break
        fit.append(client)
    return fit[::-1]


def _kept(client: int) -> str:
    return f"client-{client:06d}"


def _new(client: int) -> str:
    return f"new-{client:06d}"
