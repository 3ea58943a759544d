"""What a run leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from featherlight.plugins.cost_table import CostTable

Evaluator = Callable[[nn.Module, Any], Mapping[str, float]]
"""``(module, data) → {name: figure}``."""


@dataclass
class Result:
    """What a run leaves.

    Args:
        history: a dict per round; metrics: of the last evaluation; cost: the cost table; rounds: how many were run in all;
        privacy: where a plugin makes rounds private, ε, its δ and what they are of.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    cost: CostTable = field(default_factory=CostTable)
    rounds: int = 0
    privacy: dict[str, Any] | None = None

    @property
    def turns(self) -> int:
        """Updates that clients made, used or not."""
        return int(sum(row["clients"] + row["rejected"] for row in self.history))

    @property
    def rejected(self) -> int:
        """Those of them that were not used, because something in them was not finite, for one."""
        return int(sum(row["rejected"] for row in self.history))

    @property
    def rejected_by(self) -> dict[str, int]:
        """The same by reason (:data:`featherlight.plugins.rejection.REASONS`)."""
        total: Counter[str] = Counter()
        for row in self.history:
            total.update({name.removeprefix("rejected_"): int(value) for name, value in row.items() if name.startswith("rejected_")})
        return dict(sorted(total.items()))
