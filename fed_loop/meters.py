"""Which steps are metered, and what a turn costs by them: two steps for each structure of the model, not every step.

Turns whose models have the same structure cost the same per sample. The first two steps are metered (the second finds optimizer
state in place, the first may have the larger batch), again only if a later turn brings a larger batch.
"""

from __future__ import annotations

from collections.abc import Hashable

from featherlight.fed_loop.plan import Plan
from featherlight.plugins.cost_table import TurnCost
from featherlight.plugins.step_cost import StepCost


class Meters:
    """Step costs by structure."""

    def __init__(self) -> None:
        self._costs: dict[Hashable, StepCost] = {}
        self._samples: dict[Hashable, int] = {}
        self._following: Hashable = None

    def wants(self, structure: Hashable, step: int, samples: int) -> bool:
        """Whether this step is to be metered: the first of a larger batch than any so far, and the one after it."""
        if step == 0:
            self._following = structure if samples > self._samples.get(structure, 0) else None
        return step <= 1 and self._following == structure

    def note(self, structure: Hashable, step: int, samples: int, cost: StepCost) -> None:
        """Keep a metered step: peaks are the larger of the two, FLOPs those of the first."""
        if step == 0:
            self._costs[structure], self._samples[structure] = cost, samples
        else:
            first = self._costs[structure]
            peaks = {name: max(getattr(first, name), getattr(cost, name)) for name in ("saved_bytes", "peak_bytes")}
            self._costs[structure] = first._replace(**peaks)

    def turn_cost(self, plan: Plan, samples: int, bytes_down: int, bytes_up: int, seconds: float = 0.0) -> TurnCost:
        """A turn over ``samples``: FLOPs in proportion to them, peaks those of a step."""
        cost = self._costs.get(plan.structure, StepCost(0, 0, 0, 0))
        share = samples / self._samples.get(plan.structure, 1)
        return TurnCost(
            plan.params_held,
            plan.params_trained,
            cost.saved_bytes,
            cost.peak_bytes,
            cost.flops_forward * share,
            cost.flops_backward * share,
            bytes_down,
            bytes_up,
            seconds,
        )
