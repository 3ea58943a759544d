"""Aggregates that a few hostile clients cannot move far: the median and the trimmed mean of each coordinate (arXiv 1803.01498).

They need all of a round's updates beside one another, in every process, where the exact mean needs its sums: (clients of a cohort) × (what
one sends). Each client counts alike, however many samples it says that it has: that is one more thing to lie about.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from featherlight.fed_loop.aggregate import Entries, Means, check_update
from featherlight.fed_loop.processes import Processes


class Median:
    """Of each coordinate the median over clients; of an even number of them the mean of the two in the middle."""

    def share(self) -> float:
        """How much of the order is cut off at each end; what is left is averaged. Of 1/2, one or two are left."""
        return 0.5

    def over(self, like: Mapping[str, Tensor], dense_weights: bool = False) -> Ordered:
        """What adds up one round, as :class:`~featherlight.fed_loop.aggregate.Mean` does."""
        return Ordered(like, self.share())

    def describe(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class TrimmedMean(Median):
    """Of each coordinate the mean over clients without the largest and the smallest ``trim`` of them, each rounded down.

    Args:
        trim: share of the clients that is cut off at each end, in [0, 0.5): at least that of the hostile ones.

    Raises:
        ValueError: it is out of its range.
    """

    def __init__(self, trim: float = 0.2) -> None:
        if not 0 <= trim < 0.5:
            raise ValueError(f"trim={trim}: give the share that is cut off at each end, at least 0 and below 0.5 (of 0.5 use Median)")
        self.trim = trim

    def share(self) -> float:
        return self.trim


class Ordered:
    """One round's updates, of which each coordinate is put in order. The same bits in any order and on any number of processes.

    Args:
        like: name → tensor whose shape the entries have.
        trim: share that is cut off at each end; but one or two always stay.

    Example:
        >>> three = Ordered({"w": torch.zeros(1)}, trim=0.5)
        >>> for value in (1.0, 3.0, 1000.0):
        ...     three.add({"w": torch.tensor([value])}, 1 / 3)
        >>> three.result()["w"]
        tensor([3.], dtype=torch.float64)
    """

    def __init__(self, like: Mapping[str, Tensor], trim: float) -> None:
        self._shapes = {name: value.shape for name, value in like.items()}
        self._trim = trim
        self._values: dict[str, list[Tensor]] = {}

    def add(self, update: Entries, weight: float) -> None:
        """Keep one client's entries. Of elements that it held nothing of (their weight is 0) it has no say.

        Args:
            update: name → value, or (value, weight of each element).
            weight: does not count.

        Raises:
            ValueError: as for the mean.
        """
        check_update(update, self._shapes)
        for name, entry in update.items():
            value, own = entry if isinstance(entry, tuple) else (entry, None)
            value = value.detach().double()
            held = value.clone() if own is None else value.masked_fill(own <= 0, torch.nan)  # no value that was let in is NaN
            self._values.setdefault(name, []).append(held)

    def collect(self, processes: Processes) -> None:
        """Bring all processes' updates to each of them."""
        mine = {f"{processes.rank}.{place}:{name}": value for name, values in self._values.items() for place, value in enumerate(values)}
        self._values = {}
        for full, value in processes.share(mine).items():
            self._values.setdefault(full.partition(":")[2], []).append(value)

    def result(self) -> Means:
        """As the mean's: name → float64, or ``(value, held)`` where only some elements were held."""
        found: Means = {}
        for name in self._shapes:
            if name not in self._values:
                continue
            ordered = torch.stack(self._values[name]).sort(0).values  # NaN, which nobody held, comes last
            count = (~ordered.isnan()).sum(0)
            if not bool((count > 0).any()):
                continue
            cut = (self._trim * count).floor().long().clamp(max=(count - 1).clamp(min=0) // 2)
            place = torch.arange(len(ordered), device=ordered.device).view(-1, *[1] * (ordered.ndim - 1))
            inside = (place >= cut) & (place < count - cut)
            value = ordered.where(inside, 0.0).sum(0) / inside.sum(0).clamp(min=1)
            found[name] = value if bool((count > 0).all()) else (value, count > 0)
        return found
