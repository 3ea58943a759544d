"""The server's own training (calibration): once a round, behind the mean, on data that no client has."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from featherlight.fed_loop.aggregate import check_magnitude
from featherlight.fed_loop.local_step import LocalStep
from featherlight.fed_loop.meters import Meters
from featherlight.fed_loop.plan import Plan, make_plan
from featherlight.fed_loop.trainees import Trainee
from featherlight.fed_loop.turn import LocalTraining, Turn
from featherlight.plugins import SERVER, Calibration, Chain, Clock, Visit
from featherlight.plugins.cost_table import TurnCost
from featherlight.plugins.optimizer_state import check_covered, clear


class ServerTraining:
    """Trains the server's module, or prices it.

    Args:
        own: the server's module, its plugins attached.
        step: a local step without plugins.
        data: has the server's own batches.
        seed: the run's.
    """

    def __init__(self, own: Trainee, step: LocalStep, data: Any, seed: int) -> None:
        self._own, self._step, self._data, self._seed = own, step, data, seed
        self._meters = Meters()
        self._calibration: Calibration | None = None
        self.plan: Plan | None = None

    def check(self) -> None:
        """What would fail behind the first round's mean is better found now.

        Raises:
            ValueError: a method trains on the server, and the server has no data, not enough, or none with labels for a model
                that learns from them (which says so: ``learns_from_labels``).
        """
        calibration = self._own.chain.calibration(Clock(0, 0))
        if calibration is None:
            return
        if not hasattr(self._data, "server_batches"):
            raise ValueError(
                f"a plugin trains the model on the server's own data, and {type(self._data).__name__} has none: "
                "give it server_batches(visit, epochs) and server_batch_sizes(epochs)"
            )
        if not self._data.server_batch_sizes(calibration.epochs):
            hint = "it sets none aside; choose data that do, or leave the plugin out"
            if hasattr(self._data, "server_fraction"):
                hint = "set server_fraction (a part of the training images that no client gets) or server_root (a folder of images)"
            raise ValueError(
                f"a plugin trains the model on the server's own data, of which {type(self._data).__name__} has not one batch: {hint}"
            )
        if getattr(self._own.module, "learns_from_labels", False) and hasattr(self._data, "check_server_labels"):
            self._data.check_server_labels()

    def begin(self, clock: Clock) -> None:
        """Behind a round's ``advance``, when nothing is left out for one client: :attr:`plan` is what the server will train, or None."""
        self._calibration, self.plan = self._own.chain.calibration(clock), None
        if self._calibration is None:
            return
        own = self._own
        with self._calibration.opened(own.module):
            self.plan = make_plan(own.module, Chain(), own.targets, Visit(clock.period, SERVER, self._seed))
            check_covered(own.module, [own.optimizer])

    def train(self, round: int, training: LocalTraining, check: Callable[[], None]) -> Turn:
        """Train what the module holds, the server's weights of ``round``; they end as the new ones, unless the turn is rejected.

        Args:
            check: called before each step; may raise to stop there.
        """
        assert self.plan is not None
        visit, turn, started = Visit(round, SERVER, self._seed), Turn(SERVER), time.perf_counter()
        with self._begun() as calibration:
            batches = self._data.server_batches(visit, calibration.epochs)
            samples = training.steps(self._own, self._step, self._meters, visit, _checked(batches, check), self.plan, turn)
        try:
            for name, value in self.plan.sent.items():
                check_magnitude(f'entry "{name}"', value)
        except ValueError as error:  # clients would train from it, and could not send what comes of it
            turn.reject(error)
        turn.cost = self._meters.turn_cost(self.plan, samples, 0, 0, time.perf_counter() - started)
        return turn

    def predict(self, round: int) -> TurnCost:
        """What :meth:`train` costs, on tensors without data."""
        assert self.plan is not None
        with self._begun() as calibration:
            sizes = self._data.server_batch_sizes(calibration.epochs)
            for place, samples in enumerate(sizes[:2]):
                if self._meters.wants(self.plan.structure, place, samples):
                    batch = self._data.example_batch(samples)
                    with warnings.catch_warnings():
                        warnings.filterwarnings("ignore", message=".*self.log.*")  # nothing is logged of a step that is only counted
                        _, cost = self._step.metered(self._own.module, self._own.optimizer, batch, Clock(round, place))
                    self._meters.note(cost)
        return self._meters.turn_cost(self.plan, sum(sizes), 0, 0)

    @contextmanager
    def _begun(self) -> Iterator[Calibration]:
        """Around the steps: the model open, its optimizer as new, before and after."""
        assert self._calibration is not None
        own = self._own
        with self._calibration.opened(own.module), _slowed(own.optimizer, self._calibration.lr_factor):
            clear([own.optimizer])
            yield self._calibration
        clear([own.optimizer])


@contextmanager
def _slowed(optimizer: Optimizer, factor: float) -> Iterator[None]:
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, lr in zip(optimizer.param_groups, before):
            group["lr"] = lr


def _checked(batches: Iterable[Any], check: Callable[[], None]) -> Iterator[Any]:
    for batch in batches:
        check()
        yield batch
