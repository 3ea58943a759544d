"""Which steps are metered, and what a turn costs by them: a turn's first two steps, once for all turns that begin alike.

The second step finds optimizer state in place. Turns begin alike where their models have one structure and their first two batches the
same sizes: what a turn costs is then the same whoever trained before it, in this process or before an interruption.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from featherlight.fed_loop.plan import Plan
from featherlight.plugins.cost_table import TurnCost
from featherlight.plugins.step_cost import StepCost


class Meters:
    """Step costs by structure and sizes of batches. Each turn asks :meth:`wants` at its first two steps, from step 0 on."""

    def __init__(self) -> None:
        self._costs: dict[Hashable, StepCost] = {}
        self._keys: list[Hashable] = []  # of the turn under way, a key for each of its first two steps
        self._first_samples = 1

    def wants(self, structure: Hashable, step: int, samples: int) -> bool:
        """Whether this step is to be metered: no turn that began alike has been."""
        if step > 1:
            return False
        if step == 0:
            self._keys, self._first_samples = [(structure, samples)], samples
        else:
            self._keys.append((*self._keys[:1], samples))
        return self._keys[-1] not in self._costs

    def knows(self, structure: Hashable, samples: Sequence[int]) -> bool:
        """Begin a turn whose first two steps are over so many ``samples``; whether neither is to be metered."""
        wanted = [self.wants(structure, step, size) for step, size in enumerate(samples[:2])]
        return not any(wanted)

    def note(self, cost: StepCost) -> None:
        """Keep the cost of the step last asked about."""
        self._costs[self._keys[-1]] = cost

    def turn_cost(self, plan: Plan, samples: int, bytes_down: int, bytes_up: int, seconds: float = 0.0) -> TurnCost:
        """The turn under way, over ``samples``: peaks are the larger of its two steps', FLOPs those of the first, in proportion."""
        steps = [self._costs[key] for key in self._keys]
        share = samples / self._first_samples
        return TurnCost(
            plan.params_held,
            plan.params_trained,
            max(step.saved_bytes for step in steps),
            max(step.peak_bytes for step in steps),
            steps[0].flops_forward * share,
            steps[0].flops_backward * share,
            bytes_down,
            bytes_up,
            seconds,
        )
