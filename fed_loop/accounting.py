"""What a run's results tell of any one client, (ε, δ), counted by Google's dp-accounting (``featherlight[privacy]``).

Three ways for a client to come into rounds, and what neighbouring federations are under each:

- ``sampling="poisson"``: every client with probability cohort / clients, by itself. One client is there or is not (add or remove one).
- a cohort of fixed size, drawn without replacement: one client's data are others (replace one), so that the sum moves by 2·C.
- all in every round, or others know who: one client's updates are all 0 or are not (zero out, arXiv 2103.00039), no matter of chance.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from featherlight.fed_loop.cohort import asked
from featherlight.plugins import Chain, Mechanism

if TYPE_CHECKING:
    from featherlight.fed_loop.federation import Federation

FEW_ORDERS = [*range(2, 64), 128, 256, 512, 1024]
"""Of Rényi divergences, where noise is looked for: with fewer of them ε is no smaller, and each takes time."""

POISSON, FIXED, KNOWN = "add or remove one", "replace one", "zero out"


class Account:
    """ε of a run of ``settings`` over ``clients`` clients, after any number of rounds, by Rényi differential privacy.

    Args:
        remembers: whether clients keep something from turn to turn: what they send tells then of earlier cohorts, and who was drawn is no
            secret that could be counted on.
    """

    def __init__(self, mechanism: Mechanism, settings: Federation, clients: int, remembers: bool = False) -> None:
        self.mechanism, self._settings, self._clients = mechanism, settings, clients
        self._cohort = settings.cohort or clients
        drawn = self._cohort < clients and not (mechanism.known_cohorts or remembers)
        self.adjacency = KNOWN if not drawn else POISSON if settings.sampling == "poisson" else FIXED
        self._turns: Counter[int] = Counter()
        self._counted = 0

    @property
    def rounds(self) -> int:
        """All of the settings'."""
        return self._settings.rounds

    def epsilon(self, rounds: int) -> float:
        """ε at the mechanism's δ, after ``rounds`` rounds; infinite without noise."""
        if not self.mechanism.noise_multiplier:
            return math.inf
        from dp_accounting import rdp

        orders, once = _of_a_round(self.adjacency, self.mechanism.noise_multiplier, self._cohort, self._clients)
        times = rounds if self.adjacency != KNOWN else self._most_turns(rounds)
        return float(rdp.compute_epsilon(orders, times * once, self.mechanism.delta)[0]) if times else 0.0

    def told(self, rounds: int) -> dict[str, Any]:
        """What a person must know of a run's ε."""
        own = self.mechanism
        named = {"noise_multiplier": own.noise_multiplier, "clip": own.clip, "adjacency": self.adjacency}
        return {"epsilon": self.epsilon(rounds), "delta": own.delta, **named}

    def _most_turns(self, rounds: int) -> int:
        """In how many of the first ``rounds`` rounds that client was asked which was asked most often."""
        if self._cohort == self._clients:
            return rounds
        if rounds < self._counted:
            self._turns, self._counted = Counter(), 0
        for round in range(self._counted, rounds):
            self._turns.update(asked(self._settings, self._clients, round))
        self._counted = rounds
        return max(self._turns.values(), default=0)

    def noise_for(self, epsilon: float) -> float:
        """The least σ (to a thousandth) by which all rounds of the settings come to at most ``epsilon``.

        Raises:
            ValueError: none up to 2¹⁰ does.
        """
        import dp_accounting as dp
        from dp_accounting import rdp

        orders = None if self.adjacency == KNOWN else FEW_ORDERS
        rounds = self._settings.rounds
        times = rounds if self.adjacency != KNOWN else self._most_turns(rounds)
        try:
            with _quiet():
                found = dp.calibrate_dp_mechanism(
                    lambda: rdp.RdpAccountant(orders, _relation(self.adjacency)),
                    lambda sigma: dp.SelfComposedDpEvent(_event(self.adjacency, sigma, self._cohort, self._clients), times),
                    epsilon,
                    self.mechanism.delta,
                    dp.ExplicitBracketInterval(0.05, 1024.0),
                    tol=1e-4,
                )
        except ValueError as error:
            raise ValueError(f"epsilon={epsilon} over {rounds} rounds: no noise multiplier from 0.05 to 1024 gives it") from error
        return math.ceil(found * 1000) / 1000


def noise_for(
    epsilon: float, settings: Federation, clients: int, delta: float = 1e-5, known_cohorts: bool = False, remembers: bool = False
) -> float:
    """The noise multiplier with which a run of ``settings`` ends at ``epsilon``.

    Args:
        settings: its rounds, cohort and sampling count; clients: how many there are; delta, known_cohorts: as of
            :class:`~featherlight.plugins.Mechanism`.
        remembers: whether clients keep something from one of their turns to the next (a plugin has ``remember``).

    Raises:
        ValueError: dp-accounting is not installed, or nothing gives that ε.
    """
    _check_installed()
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon}: give a number above 0")
    return Account(Mechanism(1.0, 1.0, delta, known_cohorts), settings, clients, remembers).noise_for(epsilon)


def account_of(settings: Federation, chain: Chain, clients: int) -> Account | None:
    """Who counts ε, where a plugin makes rounds private.

    Raises:
        ValueError: settings by which what it counts would not be so, or dp-accounting is not installed.
    """
    mechanism = chain.mechanism()
    if mechanism is None:
        return None
    name = next(type(plugin).__name__ for plugin in chain.plugins if plugin.mechanism() is not None)
    if settings.min_clients:
        raise ValueError(
            f"min_clients={settings.min_clients}: whether a round counts would hang on one client, which no noise hides; {name} divides "
            "by the size that cohorts are to have, however few come: leave min_clients out"
        )
    if not mechanism.delta < 1 / clients:
        raise ValueError(f"delta={mechanism.delta:g} of {name}, with {clients} clients: give far less than 1 / clients = {1 / clients:.2g}")
    if mechanism.noise_multiplier:
        _check_installed()
    return Account(mechanism, settings, clients, chain.remembers)


@lru_cache
def _of_a_round(adjacency: str, noise_multiplier: float, cohort: int, clients: int) -> tuple[Any, Any]:
    """Orders, and what one round costs at each: a second's work, which many rounds and runs share."""
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(neighboring_relation=_relation(adjacency))
    with _quiet():
        accountant.compose(_event(adjacency, noise_multiplier, cohort, clients))
    return accountant._orders, accountant._rdp  # the library has no other way to them; a test holds ε to composing in its own way


def _relation(adjacency: str) -> Any:
    from dp_accounting import NeighboringRelation as Relation

    return {POISSON: Relation.ADD_OR_REMOVE_ONE, FIXED: Relation.REPLACE_ONE, KNOWN: Relation.REPLACE_SPECIAL}[adjacency]


def _event(adjacency: str, noise_multiplier: float, cohort: int, clients: int) -> Any:
    """One round; noise over what one neighbour's sum differs from the other's."""
    import dp_accounting as dp

    if adjacency == POISSON:
        return dp.PoissonSampledDpEvent(cohort / clients, dp.GaussianDpEvent(noise_multiplier))
    if adjacency == FIXED:
        return dp.SampledWithoutReplacementDpEvent(clients, cohort, dp.GaussianDpEvent(noise_multiplier / 2))
    return dp.GaussianDpEvent(noise_multiplier)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning for each order that costs more than another."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _check_installed() -> None:
    try:
        import dp_accounting  # noqa: F401
    except ImportError as error:
        raise ValueError('ε is counted by dp-accounting, which is not installed: pip install "featherlight[privacy]"') from error
