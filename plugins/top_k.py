"""Local top-k: of its change a client sends the k largest elements and adds the others to its next one (arXiv 1809.07599)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from featherlight.plugins.base import Clock, Message, Plugin, Visit
from featherlight.plugins.catch_up import CatchUp
from featherlight.plugins.trainable import refuse_more

PREFIX = "topk"


class TopK(Plugin):
    """A client sends the k elements of its change that are largest in magnitude, out of all parameters that train, and their indices
    (int32); the server takes the others as 0. What is not sent is not lost: the client adds it to its change of the next turn
    (error feedback).

    A client is sent what changed since its last visit, again with indices, or all where that is smaller. What is no parameter (running
    statistics) travels as it is. Between turns a client keeps one copy of the model that it received, and with error feedback another of
    what it has not sent; a client whose update is rejected keeps what it had before.

    Args:
        k: elements that a client sends; or
        share: of the elements that train, in (0, 1].
        error_feedback: keep what is not sent.
        known_start: clients have the first round's model (drawn from a seed, or pre-trained); otherwise a client's first visit sends it.

    Raises:
        ValueError: both or none of ``k`` and ``share``, one out of its range, or more elements than train.
    """

    same_for_all = True
    keeps_norm = True
    only_adds = "a client sends few elements, and most of what is read of it are zeros that it did not send"
    at_once = True

    def __init__(self, k: int | None = None, share: float | None = None, error_feedback: bool = True, known_start: bool = True) -> None:
        if (k is None) == (share is None):
            raise ValueError(f"k={k}, share={share}: give one of them")
        if k is not None and k < 1:
            raise ValueError(f"k={k}: give 1 or more")
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"share={share}: give a part above 0 and up to 1")
        self.k = k
        self.share = share
        self.error_feedback = error_feedback
        self.known_start = known_start

    @property
    def sends_parts(self) -> bool:
        return True

    def attach(self, model: nn.Module) -> None:
        self._model = model
        self._server = CatchUp(model, PREFIX, self.known_start)
        self._memory: Message = {}
        self._left: Message = {}

    def check(self, stage: int) -> None:
        if self.k is not None:
            self._server.check("k", self.k, stage)

    # -- a client ---------------------------------------------------------------------------------------------------
    def recall(self, memory: Message, visit: Visit) -> None:
        self._memory = memory

    def encode(self, message: Message, visit: Visit) -> Message:
        self._server.begin(visit)
        change = self._server.flat(message)
        if self.error_feedback and self._memory:
            change = change + self._server.flat(self._server.trains(self._memory))
        indices = change.abs().topk(self._count(len(change)), sorted=False).indices.sort().values
        values = change[indices]
        self._left = self._server.split(change.index_fill(0, indices, 0.0))
        return {f"{PREFIX}.indices": indices.int(), f"{PREFIX}.values": values, **self._server.others(message)}

    def remember(self, visit: Visit) -> Message:
        left, self._left, self._memory = self._left, {}, {}
        return left if self.error_feedback else {}

    # -- the server -------------------------------------------------------------------------------------------------
    def encode_down(self, message: Message, visit: Visit, kept: Collection[str] = ()) -> Message:
        self._server.begin(visit)
        return self._server.encode_down(message, visit, kept, self._count(self._server.size))

    def decode_down(self, message: Message, visit: Visit) -> Message:
        return self._server.decode_down(message)

    def rebuild(self, message: Message, before: Message, visit: Visit) -> Message:
        self._server.begin(visit)
        return self._server.rebuild(message, before)

    def decode(self, message: Message, visit: Visit) -> Mapping[str, Any]:
        """As if the client had sent zeros for the rest.

        Raises:
            ValueError: indices that are no elements' of the model.
        """
        message = dict(message)
        indices, values = message.pop(f"{PREFIX}.indices").long(), message.pop(f"{PREFIX}.values")
        size = self._server.size
        if indices.shape != values.shape or not bool(((indices >= 0) & (indices < size)).all()):
            raise ValueError(f"the indices of {tuple(values.shape)} values must be as many, from 0 to {size - 1}")
        return {**message, **self._server.split(values.new_zeros(size).index_put((indices,), values))}

    def lift(self, total: Mapping[str, Any], clock: Clock) -> Mapping[str, Any]:
        self._server.told(clock.period)
        return total

    def arrive(self, visits: Sequence[Visit], everywhere: bool = False) -> None:
        if everywhere:
            self._server.changes(self._server.size)

    def state_dict(self) -> dict[str, Any]:
        return self._server.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._server.load_state_dict(state)

    def _count(self, size: int) -> int:
        """k, of ``size`` elements."""
        if self.k is None:
            return max(1, round((self.share or 1.0) * size))
        refuse_more("k", self.k, size)
        return self.k
