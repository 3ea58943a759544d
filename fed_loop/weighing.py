"""How much each client of a round counts, and what adds their updates up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from featherlight.fed_loop.aggregate import Aggregate, Entries, Mean, Means, check_update, weigh
from featherlight.fed_loop.exact_sums import COARSE
from featherlight.plugins import Chain
from featherlight.plugins.rejection import Rejection

if TYPE_CHECKING:
    from featherlight.fed_loop.federation import Federation


class FixedMean(Mean):
    """The sum of clients' changes over a number that does not depend on who came. Of what a client does not hold, its change is 0.

    Args:
        like: name → tensor whose shape the entries have.
        over: what the sum is divided by.

    Example:
        >>> mean = FixedMean({"w": torch.zeros(1)}, over=4)
        >>> for value in (1.0, 3.0):
        ...     mean.add({"w": torch.tensor([value])}, 0.25)
        >>> mean.result()["w"]
        tensor([1.], dtype=torch.float64)
    """

    def __init__(self, like: Mapping[str, Tensor], over: int) -> None:
        super().__init__(like)
        self._over = over

    def add(self, update: Entries, weight: float = 0.0) -> None:
        """Add one client's entries.

        Args:
            update: name → value, or (value, weight of each element, at most 1).
            weight: does not count: all clients count alike.

        Raises:
            ValueError: as for the mean; a weight above 1, or what is not floating, whose length nobody has bounded.
        """
        check_update(update, self._shapes)
        plain: dict[str, Tensor] = {}
        for name, entry in update.items():
            value, own = entry if isinstance(entry, tuple) else (entry, None)
            if not value.is_floating_point():
                raise Rejection("dtype", f'entry "{name}" is of {value.dtype}, and only floating numbers are bounded')
            if own is not None and not bool((own <= 1).all()):
                raise Rejection("other", f'entry "{name}" has weights above 1')
            plain[name] = value if own is None else value * own
        super().add(plain, 1 / self._over)

    def result(self) -> Means:
        """name → float64, of every entry, whether or not somebody sent it."""
        total = self._sums.totals().div_(round(COARSE / self._over) * self._over / COARSE)
        return {name: total[self._at[name]].reshape(shape) for name, shape in self._shapes.items()}


class Weighing:
    """One round's.

    Args:
        sizes: samples of each client of the federation.
        cohort: who is asked.
    """

    def __init__(self, settings: Federation, chain: Chain, sizes: Sequence[int], cohort: Sequence[int]) -> None:
        self._settings, self._chain = settings, chain
        self._weights = weigh([sizes[client] for client in cohort], cohort)
        self._over = settings.cohort or len(sizes)

    def aggregate(self, like: Mapping[str, Tensor]) -> Aggregate:
        """What adds up one round's updates, of which none is there yet."""
        if self._chain.counts_alike:
            return FixedMean(like, self._over)
        return (self._settings.aggregate or Mean).over(like, self._chain.decodes)

    def of(self, client: int) -> float:
        """A client's weight."""
        return 1 / self._over if self._chain.counts_alike else self._weights.get(client, 0.0)

    def done(self, counted: int) -> None:
        """Tell plugins of a sum that is made alike."""
        if self._chain.counts_alike:
            self._chain.summed(self._over, counted)
