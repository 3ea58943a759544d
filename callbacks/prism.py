"""Train in random principal sub-models, a new one each epoch, under a Trainer."""

from __future__ import annotations

from typing import Any

from featherlight import plugins
from featherlight.callbacks.host import PluginCallback


class PrismSampling(PluginCallback):
    """Train each epoch in another principal sub-model, and end with an ordinary model; a period is an epoch.

    Layers hold their whole weight besides, so what is saved is activations, compute and the optimizer's state. Between steps, for
    evaluation and in checkpoints, the model is whole. In a momentum copy, the layers that are taken apart become their online twins' again
    at every epoch's start, since averages of factors need one basis; the rest of it goes on. Optimizers' momentum of factors starts anew.

    Args:
        seed: of the method's draws; by default the one of ``seed_everything``, or 0.
        **kwargs: as for :class:`featherlight.plugins.PrismSampling`; ``keep`` is one share.
    """

    def __init__(self, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(plugins.PrismSampling(**kwargs).in_place(), seed)
