"""Train in a random subspace of the parameters, under a Trainer."""

from __future__ import annotations

from typing import Literal

from featherlight import plugins
from featherlight.callbacks.host import PluginCallback


class IntrinsicProjection(PluginCallback):
    """Train in a subspace of ``dim`` dimensions, whatever the optimizer; a period is an epoch.

    The smallest ``dim`` that reaches nine tenths of the full model's accuracy is the task's intrinsic dimension (arXiv 1804.08838). With
    weights in half precision (``precision="bf16-true"``) θ₀ is kept in float32 besides, and weights are θ₀ + A·Σ rounded. With
    ``periods_per_span`` the optimizer begins anew in every new subspace.

    Args:
        dim: d, at most the number of parameters that train.
        periods_per_span: epochs after which a new subspace is drawn; None: never.
        projection, gain: as for :class:`featherlight.plugins.IntrinsicProjection`.
        seed: of the subspaces; by default the one of ``seed_everything``, or 0.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=20, logger=False, enable_checkpointing=False, callbacks=[IntrinsicProjection(dim=750, seed=0)])
    """

    def __init__(
        self,
        dim: int = 65536,
        periods_per_span: int | None = None,
        projection: Literal["fastfood", "sparse_signs"] = "fastfood",
        gain: float | Literal["length", "projection", "unbiased"] = "length",
        seed: int | None = None,
    ) -> None:
        plugin = plugins.IntrinsicProjection(dim, periods_per_span=periods_per_span, projection=projection, gain=gain)
        super().__init__(plugin.in_place(), seed)
