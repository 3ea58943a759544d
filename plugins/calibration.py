"""What a server trains on data of its own, behind a round's mean: how a method says so, and how the model is opened for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from featherlight.plugins.bypass import none_frozen


@dataclass(frozen=True)
class Calibration:
    """Training of the server's model on the server's data.

    Args:
        epochs: passes over these data.
        lr_factor: what the round's learning rates are multiplied by.
        parameters: those that train, where they are there, whatever clients had frozen of them.
    """

    epochs: int
    lr_factor: float
    parameters: Sequence[nn.Parameter]

    @contextmanager
    def opened(self, model: nn.Module) -> Iterator[None]:
        """Within, :attr:`parameters` train, and all of ``model`` is in training mode; then everything is as it was."""
        before = [parameter.requires_grad for parameter in self.parameters]
        modes = [(module, module.training) for module in model.modules()]
        model.train()
        try:
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            with none_frozen(model):
                yield
        finally:
            for parameter, trained in zip(self.parameters, before):
                parameter.requires_grad_(trained)
            for module, training in modes:
                module.training = training
