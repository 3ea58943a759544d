"""What one client's turn holds, trains, receives and sends: read off the model, before any training. Prediction and training share it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from featherlight.plugins import Chain, Clock, Visit, held
from featherlight.plugins.present import count, entries, select_trained


class Plan(NamedTuple):
    """One client's turn.

    Args:
        received: live entries that the client must have as the server has them; targets are made on the spot from their twins.
        sent: live entries that training may change, and that go up.
        params_held, params_trained: numbers of parameters, targets counted as held.
        structure: equal for turns whose steps cost the same.
    """

    received: dict[str, Tensor]
    sent: dict[str, Tensor]
    params_held: int
    params_trained: int
    structure: Hashable

    def beside(self, copies: Sequence[Tensor]) -> Plan:
        """The same turn, with ``copies`` of weights that plugins keep beside the model."""
        shapes = tuple(tuple(value.shape) for value in copies)
        held = self.params_held + sum(value.numel() for value in copies)
        return self._replace(params_held=held, structure=(self.structure, shapes)) if copies else self


def shareable(model: nn.Module, targets: dict[str, str]) -> dict[str, Tensor]:
    """All live entries that a server keeps: the ``state_dict`` but for targets."""
    skip = tuple(f"{path}." for path in targets)
    return {name: value for name, value in held(model).items() if not name.startswith(skip)}


def may_travel(model: nn.Module, live: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``live`` that some client may change in the round that has begun, whatever of the model each of them leaves out."""
    learning = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if module.training
        for name, _ in module.named_buffers(recurse=False)
    }
    return {name: value for name, value in live.items() if name in learning or (isinstance(value, nn.Parameter) and value.requires_grad)}


def make_plan(model: nn.Module, chain: Chain, targets: dict[str, str], visit: Visit) -> Plan:
    """Begin ``visit`` on ``model`` and read off what it takes."""
    clock = Clock(visit.round, 0)
    chain.visit(visit)
    if not model.training:
        model.train()
    chain.before_forward(clock)  # puts frozen norms back to eval mode, by which their statistics do not count as trained
    present = entries(model)
    sent = select_trained(present, ignore=tuple(targets))
    chain.after_step(clock)
    skip = tuple(f"{path}." for path in targets)
    received = {name: value for name, (value, _) in present.items() if not name.startswith(skip)}
    structure = tuple((tuple(value.shape), name in sent) for name, (value, _) in present.items())
    params = sum(value.numel() for value, _ in present.values() if isinstance(value, nn.Parameter))
    return Plan(received, sent, params, count(sent), structure)
