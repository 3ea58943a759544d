"""What a client that was away must be sent where an update changes few elements: those that changed since it last took part."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featherlight.plugins.base import Message, Visit
from featherlight.plugins.targets import find_targets
from featherlight.plugins.trainable import check_stage, outside


class CatchUp:
    """The server's parameters as the flat vector of those that train now, and the round in which each element last changed.

    A client is sent the new values of what changed since its last visit, with indices, or all values, whichever is smaller. It is
    assumed to keep the model that it received (not the one that it trained) from visit to visit, blocks that it leaves out included.

    Args:
        model: the server's.
        prefix: of names of entries.
        known_start: clients have the first round's model (drawn from a seed, or pre-trained).
    """

    def __init__(self, model: nn.Module, prefix: str, known_start: bool) -> None:
        self._model, self._prefix, self._known_start = model, prefix, known_start
        self._targets = find_targets(model)
        self._round = -1
        self._told = -1
        self._names: list[str] = []
        self._before: dict[str, Tensor] = {}
        self._changed: dict[str, Tensor] = {}
        self._asked: dict[int, int] = {}

    def begin(self, visit: Visit) -> bool:
        """Of a round: note what the one before changed. Whether other parameters train now than in the last round; to be called by
        every process while the model holds the server's weights; a second call does nothing.
        """
        if self._round == visit.round:
            return False
        before, self._round = self._round, visit.round
        parameters = {name: value.detach() for name, value in outside(self._model, self._targets).items()}
        if not self._before:
            self._changed = {name: torch.full_like(value, -1, dtype=torch.int32) for name, value in parameters.items()}
        else:
            for name, value in parameters.items():
                self._changed[name].masked_fill_(value != self._before[name], before)
        self._before = {name: value.clone() for name, value in parameters.items()}
        last, self._names = self._names, [name for name in parameters if self._model.get_parameter(name).requires_grad]
        return last != self._names

    def told(self, round: int) -> None:
        """The round's update is known: in a prediction it never is."""
        self._told = round

    def changes(self, most: int) -> None:
        """In a prediction: the round under way changes so many elements, whoever was asked."""
        self._asked[self._round] = most

    def check(self, argument: str, given: int, stage: int) -> None:
        """
        Raises:
            ValueError: ``given`` is more than train in ``stage``.
        """
        check_stage(argument, given, self._model, self._targets, stage)

    @property
    def size(self) -> int:
        """D, how many numbers train now."""
        return sum(self._before[name].numel() for name in self._names)

    def encode_down(self, message: Message, visit: Visit, kept: Collection[str], most: int, together: bool = False) -> Message:
        """In place of the parameters that train now, what of them a client lacks.

        Args:
            most: elements that each client's visit can change, or (``together``) all of a round's. Where updates are not known, as in
                a prediction, that many are counted.

        Raises:
            ValueError: another plugin changed these entries before.
        """
        foreign = [name for name in self._names if name not in message]
        if foreign:
            raise ValueError(
                f"{self._prefix} sends changes of the server's own entries, and another plugin took {foreign[0]} away: leave one out"
            )
        self._asked[visit.round] = most if together else self._asked.get(visit.round, 0) + most
        here = f"{visit.round}.{visit.client}"  # in names that are never used again: what they bring is for this visit alone
        marks = [int(name.rpartition("@")[2]) for name in kept if name.startswith(f"{self._prefix}.at@")]
        last = max(marks, default=-1)
        changed = torch.cat([self._changed[name].flatten() for name in self._names])
        values = torch.cat([message[name].flatten() for name in self._names])
        if not marks and not self._known_start:
            indices = None
        elif visit.round == 0 or self._told < visit.round - 1:
            count = sum(asked for round, asked in self._asked.items() if last <= round < visit.round)
            indices = changed.new_zeros(min(count, self.size))
        else:
            indices = (changed >= max(last, 0)).nonzero()[:, 0].int()
        rest = {name: value for name, value in message.items() if name not in set(self._names)}
        rest[f"{self._prefix}.at@{visit.round}"] = values.new_zeros(0)
        if indices is None or len(indices) * (4 + values.element_size()) >= values.numel() * values.element_size():
            return {**rest, f"{self._prefix}.all@{here}": values}
        if not len(indices):
            return rest
        return {**rest, f"{self._prefix}.changed@{here}": indices, f"{self._prefix}.new@{here}": values[indices]}

    def decode_down(self, message: Message) -> Message:
        """Without what was brought up to date: every client's copy of it is the server's."""
        return {name: value for name, value in message.items() if not name.startswith(f"{self._prefix}.")}

    def rebuild(self, message: Message, before: Mapping[str, Tensor]) -> Message:
        """What a client makes of a message that knows nothing of the server: the model that it had ``before``, brought up to date."""
        rest, news = self.decode_down(message), {name.partition("@")[0]: value for name, value in message.items()}
        values = torch.cat([before[name].flatten() for name in self._names])
        values = news.get(f"{self._prefix}.all", values)
        if f"{self._prefix}.changed" in news:
            indices, new = news[f"{self._prefix}.changed"].long(), news[f"{self._prefix}.new"]
            values = values.index_put((indices.to(values.device),), new.to(values))
        return {**rest, **self.split(values)}

    # -- changes, flat ----------------------------------------------------------------------------------------------
    def flat(self, message: Mapping[str, Tensor]) -> Tensor:
        """Changes of what trains now, (D,); 0 for what this client leaves out.

        Raises:
            ValueError: an entry is neither a parameter that trains now nor one of the model's buffers.
        """
        known = self._model.state_dict(keep_vars=True)
        strangers = [name for name in message if name not in self._names and isinstance(known.get(name), nn.Parameter | None)]
        if strangers:
            raise ValueError(
                f"{strangers[0]} is not a parameter of the server's model that trains in this round: {self._prefix} goes before plugins "
                "that change what clients send, and beside none that gives them parameters of their own; leave one of them out"
            )
        return torch.cat([(message[name] if name in message else torch.zeros_like(self._before[name])).flatten() for name in self._names])

    def split(self, flat: Tensor) -> Message:
        """(D,) as entries."""
        shapes = [self._before[name].shape for name in self._names]
        return {name: part.view(shape) for name, shape, part in zip(self._names, shapes, flat.split([shape.numel() for shape in shapes]))}

    def trains(self, message: Mapping[str, Tensor]) -> Message:
        """What of a message is a parameter that trains now."""
        return {name: message[name] for name in self._names if name in message}

    def others(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """What of a message is no parameter that trains now."""
        return {name: value for name, value in message.items() if name not in set(self._names)}

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """As of the last round's beginning, from which the next round's follows."""
        return {"round": self._round, "told": self._told, "names": self._names, "before": self._before, "changed": self._changed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        device = next(self._model.parameters()).device
        self._round, self._told, self._names = state["round"], state["told"], list(state["names"])
        self._before = {name: value.to(device) for name, value in state["before"].items()}
        self._changed = {name: value.to(device, copy=True) for name, value in state["changed"].items()}
