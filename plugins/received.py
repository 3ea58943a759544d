"""What methods share that hold the model under training against what its machine received."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from featherlight.plugins.base import Change, Clock, Plugin, Visit
from featherlight.plugins.present import trained
from featherlight.plugins.targets import find_targets


class Received(Plugin):
    """Keeps a copy of the weights that train, as they were when they came, until the turn is over.

    What does not train is what was received, and needs no copy. A client of a federation receives the server's model at the start of its
    turn; under a Trainer the copy is of the weights with which the epoch began, and it is in checkpoints written within an epoch.
    """

    def attach(self, model: nn.Module) -> None:
        self._model = model
        self._targets = tuple(find_targets(model))
        self._received: dict[str, nn.Parameter] = {}

    def advance(self, clock: Clock) -> Change:
        for name, value in self._received.items():  # one that came from a checkpoint came before the model had its device
            value.data = value.data.to(self._model.get_parameter(name).device)
        return Change()

    def receive(self, visit: Visit) -> None:
        self._received = {name: copy_of(value) for name, value in self.compared().items()} if self.compares() else {}

    def copies(self) -> Sequence[Tensor]:
        return tuple(self._received.values())

    def settle(self, server: nn.Module, clock: Clock) -> None:
        self._received = {}  # the next to train receives anew

    def state_dict(self) -> dict[str, Any]:
        return {"received": {name: value.data for name, value in self._received.items()}} if self._received else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._received = {name: copy_of(value) for name, value in state["received"].items()}

    # -- what a method says ---------------------------------------------------------------------------------------
    def compares(self) -> bool:
        """Whether the method does anything: with a weight of 0 it does not."""
        return True

    def compared(self) -> dict[str, nn.Parameter]:
        """The weights that are to be copied: all that train, by name."""
        return {name: value for name, value in trained(self._model, self._targets).items() if isinstance(value, nn.Parameter)}


def copy_of(value: Tensor) -> nn.Parameter:
    """A weight's copy, which does not train."""
    return nn.Parameter(value.detach().clone(), requires_grad=False)


def check_strength(name: str, value: float) -> None:
    """Refuse a factor of a loss that is below 0 or not finite.

    Raises:
        ValueError: it is.
    """
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value}: give 0 (the method then does nothing) or more")
