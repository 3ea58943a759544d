"""FetchSGD: clients send count sketches of their changes; momentum and error are the server's, in the sketch (arXiv 2007.07682)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from featherlight.plugins.base import Clock, Message, Plugin, Visit
from featherlight.plugins.catch_up import CatchUp
from featherlight.plugins.seeds import derive
from featherlight.plugins.sketch import CountSketch
from featherlight.plugins.trainable import refuse_more

PREFIX = "fetchsgd"


class FetchSGD(Plugin):
    """A client sends a count sketch of its change of all parameters that train. The server, on the mean sketch S and with two sketches
    of its own: U ← ρ·U + S, E ← E + U, Δ = the k elements of E's estimate that are largest in magnitude; it adds Δ to the weights and
    takes it out of E. (Changes hold the clients' learning rate already, which the paper multiplies U by.)

    A client is sent what changed since its last visit, with indices (int32), or all where that is smaller. What is no parameter (running
    statistics) travels as it is. Clients have no memory but a copy of the model that they received; client and server hold the sketch's
    columns and signs. Where other parameters begin to train, the sketches begin anew.

    Args:
        columns, rows: of the sketch: 4·rows·columns bytes go up; rows: odd.
        k: elements that a round changes.
        momentum: ρ.
        masking: E and U are set to 0 wherever Δ is added up, as in the authors' experiments; otherwise the sketch of Δ is
            subtracted from E alone (their algorithm 1).
        known_start: clients have the first round's model (drawn from a seed, or pre-trained); otherwise a client's first visit sends it.

    Raises:
        ValueError: sizes out of range, even rows, or more elements than train.
    """

    same_for_all = True
    renames = True
    only_adds = "clients send sketches, each cell of which is a sum of many elements"
    at_once = True

    def __init__(
        self, columns: int, rows: int = 5, k: int = 1000, momentum: float = 0.9, masking: bool = True, known_start: bool = True
    ) -> None:
        for name, value in (("columns", columns), ("rows", rows), ("k", k)):
            if value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        if rows % 2 == 0:
            raise ValueError(f"rows={rows}: give an odd number, which has one in the middle: estimates are medians over rows")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: give 0 <= momentum < 1")
        self.columns = columns
        self.rows = rows
        self.k = k
        self.momentum = momentum
        self.masking = masking
        self.known_start = known_start

    def attach(self, model: nn.Module) -> None:
        self._model = model
        self._server = CatchUp(model, PREFIX, self.known_start)
        self._begun = 0
        self._sketch: CountSketch | None = None
        self._momentum = self._error = torch.zeros(self.rows, self.columns, dtype=torch.float64)

    def check(self, stage: int) -> None:
        self._server.check("k", self.k, stage)

    # -- a client ---------------------------------------------------------------------------------------------------
    def encode(self, message: Message, visit: Visit) -> Message:
        self._begin_round(visit)
        return {f"{PREFIX}.sketch": self._code(visit.seed).of(self._server.flat(message)), **self._server.others(message)}

    # -- the server -------------------------------------------------------------------------------------------------
    def encode_down(self, message: Message, visit: Visit, kept: Collection[str] = ()) -> Message:
        self._begin_round(visit)
        message = self._server.encode_down(message, visit, kept, self.k, together=True)
        if self._begun:  # a client that was not there when the sketches began anew draws the same ones
            message[f"{PREFIX}.since{self._begun}@{visit.round}.{visit.client}"] = next(iter(message.values())).new_zeros(0)
        return message

    def decode_down(self, message: Message, visit: Visit) -> Message:
        return self._server.decode_down(message)

    def rebuild(self, message: Message, before: Message, visit: Visit) -> Message:
        self._seed, self._sketch = visit.seed, None
        self._server.begin(visit)
        since = (name.partition("@")[0].removeprefix(f"{PREFIX}.since") for name in message if name.startswith(f"{PREFIX}.since"))
        self._begun = int(next(since, 0))
        return self._server.rebuild(message, before)

    def lift(self, total: Mapping[str, Any], clock: Clock) -> Mapping[str, Any]:
        self._server.told(clock.period)
        total = dict(total)
        mean = total.pop(f"{PREFIX}.sketch", None)
        if mean is None:
            return total
        sketch = self._code(self._seed)
        self._momentum = self.momentum * self._momentum.to(mean) + mean
        self._error = self._error.to(mean) + self._momentum
        estimate = sketch.estimate(self._error)
        indices = estimate.abs().sort(descending=True, stable=True).indices[: self.k]  # elements of one cell tie: the first ones go
        step = torch.zeros_like(estimate).index_put((indices,), estimate[indices])
        if self.masking:
            touched = sketch.touched(indices)
            self._error, self._momentum = (table.masked_fill(touched, 0.0) for table in (self._error, self._momentum))
        else:
            self._error = self._error - sketch.of(step)
        return {**total, **self._server.split(step)}

    def arrive(self, visits: Sequence[Visit], everywhere: bool = False) -> None:
        if everywhere:  # of a round that nobody came to, too, some are the largest
            self._server.changes(self.k)

    # -- state ------------------------------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        return {"begun": self._begun, "momentum": self._momentum, "error": self._error, "server": self._server.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._begun, self._momentum, self._error = state["begun"], state["momentum"], state["error"]
        self._server.load_state_dict(state["server"])
        self._sketch = None

    # -- helpers ----------------------------------------------------------------------------------------------------
    def _begin_round(self, visit: Visit) -> None:
        self._seed = visit.seed
        if not self._server.begin(visit):
            return
        refuse_more("k", self.k, self._server.size)
        self._begun, self._sketch = visit.round, None
        self._momentum, self._error = (torch.zeros_like(table) for table in (self._momentum, self._error))

    def _code(self, seed: int) -> CountSketch:
        if self._sketch is None:
            device = next(self._model.parameters()).device
            self._sketch = CountSketch(self._server.size, self.rows, self.columns, derive(seed, PREFIX, self._begun), device)
        return self._sketch
