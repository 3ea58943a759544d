"""Server-side calibration: after each mean, the server trains what clients trained in parts as a whole, on a few images of its own."""

from __future__ import annotations

from torch import nn

from featherlight.plugins.base import Clock, Plugin
from featherlight.plugins.calibration import Calibration


class ServerCalibration(Plugin):
    """After each round's mean the server trains the model, as far as it has grown, on its own data, which need no labels (LW-FedSSL and
    Prog-FedSSL, arXiv 2401.11647, versions 1 to 3).

    All of it trains: stem, every block up to the stage's newest, norms and heads, whatever clients have frozen; but for momentum
    copies and what was frozen when the plugin was attached. The loss is the module's own ``training_step``, without terms of other
    plugins; the optimizer is the one of ``configure_optimizers``, begun anew each time, at the round's learning rate. As any block may have
    changed, clients are sent the whole sub-model in the next round; what they send is what they train.

    Data with ``server_batches`` are needed (:class:`featherlight.ssl_models.ImageData` has ``server_fraction`` and ``server_root``). A
    calibration that ends in numbers that would be refused of a client (not finite, or too large to add) is left out, as is one behind a
    round of which no client's update could be used. For federations only.

    Args:
        epochs: passes over the server's data after each round; 0: none, as if it were left out.
        lr_factor: what the round's learning rate is multiplied by on the server (1: a choice of this project).

    Raises:
        ValueError: arguments out of range; in a run, data without a part of the server's own, or a method beside it whose server holds no
            ordinary model between rounds.
    """

    def __init__(self, epochs: int = 1, lr_factor: float = 1.0) -> None:
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 0:
            raise ValueError(f"epochs={epochs}: give a whole number, 0 for no calibration")
        if not 0 < lr_factor < float("inf"):
            raise ValueError(f"lr_factor={lr_factor}: give a number above 0")
        self.epochs = epochs
        self.lr_factor = lr_factor

    def attach(self, model: nn.Module) -> None:
        self._model = model
        self._fixed = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}

    def calibration(self, clock: Clock) -> Calibration | None:
        if not self.epochs:
            return None
        own = tuple(parameter for parameter in self._model.parameters() if id(parameter) not in self._fixed)
        return Calibration(self.epochs, self.lr_factor, own)
