"""A run's cost as one table: a row per stage, figures per client and round, and a total. States are kept as sums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PEAKS = ("params_held", "params_trained", "saved_bytes", "peak_bytes")
SUMS = ("flops_forward", "flops_backward", "bytes_down", "bytes_up", "seconds")
FIELDS = PEAKS + SUMS


@dataclass
class TurnCost:
    """What one client's turn in one round (one epoch, under a Trainer) cost.

    Args:
        params_held: parameters in memory, momentum copies included; params_trained: those that receive gradients.
        saved_bytes: bytes kept for backward in one step; peak_bytes: peak memory of one step.
        flops_forward: of all its steps; a multiply-add is 2; flops_backward: likewise.
        bytes_down: length of what was serialised and received; bytes_up: of what was serialised and sent.
        seconds: wall-clock time of the turn.
    """

    params_held: int = 0
    params_trained: int = 0
    saved_bytes: int = 0
    peak_bytes: int = 0
    flops_forward: float = 0
    flops_backward: float = 0
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0

    def and_then(self, other: TurnCost) -> TurnCost:
        """What both cost in one turn, one after the other."""
        one, two = asdict(self), asdict(other)
        return TurnCost(**{name: max(one[name], two[name]) if name in PEAKS else one[name] + two[name] for name in FIELDS})


@dataclass
class _Stage:
    rounds: set[int] = field(default_factory=set)
    turns: int = 0
    peaks: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PEAKS, 0))
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0))


class CostTable:
    """Collects turns, gives rows.

    Example:
        >>> table = CostTable()
        >>> for client in (0, 1):
        ...     table.add(0, 0, TurnCost(params_held=10, bytes_up=40))
        >>> table.add(0, 1, TurnCost(params_held=12, bytes_up=40))
        >>> table.rows()[0]["bytes_up"], table.total()["bytes_up"], table.total()["params_held"]
        (40, 80, 12)
    """

    def __init__(self) -> None:
        self._stages: dict[int, _Stage] = {}
        self.server: CostTable | None = None
        """What the server computed: in clients' places, a row being the mean over clients, as theirs is; or on data of its own, the mean
        over rounds."""

    def add_server(self, stage: int, round: int, turn: TurnCost) -> None:
        """Add what the server computed for one client's turn, or in a turn of its own."""
        self.server = self.server or CostTable()
        self.server.add(stage, round, turn)

    def add(self, stage: int, round: int, turn: TurnCost) -> None:
        """Add one client's turn in ``round``, which belongs to ``stage`` (counted from 0)."""
        entry = self._stages.setdefault(stage, _Stage())
        entry.rounds.add(round)
        entry.turns += 1
        for name in PEAKS:
            entry.peaks[name] = max(entry.peaks[name], getattr(turn, name))
        for name in SUMS:
            entry.sums[name] += getattr(turn, name)

    def rows(self) -> list[dict[str, float]]:
        """A row per stage: sums are means over the turns of the stage, peaks stay peaks; stages counted from 1."""
        rows = []
        for stage, entry in sorted(self._stages.items()):
            means = {name: _whole(value / entry.turns) for name, value in entry.sums.items()}
            rows.append({"stage": stage + 1, "rounds": len(entry.rounds), **entry.peaks, **means})
        return rows

    def total(self) -> dict[str, float]:
        """Over the run, for a client that takes part in every round: sums add up, peaks stay the largest."""
        rows = self.rows()
        total: dict[str, float] = {"rounds": sum(row["rounds"] for row in rows)}
        total |= {name: max((row[name] for row in rows), default=0) for name in PEAKS}
        total |= {name: _whole(sum(row["rounds"] * row[name] for row in rows)) for name in SUMS}
        return total

    def to_json(self) -> dict[str, Any]:
        """``{"rows": […], "total": {…}}``, and ``"server"`` likewise if there is one, as ``featherlight cost --json`` writes it."""
        return {"rows": self.rows(), "total": self.total(), **({} if self.server is None else {"server": self.server.to_json()})}

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, for a checkpoint."""
        own: dict[str, Any] = {
            str(stage): {"rounds": sorted(entry.rounds), "turns": entry.turns, "peaks": dict(entry.peaks), "sums": dict(entry.sums)}
            for stage, entry in self._stages.items()
        }
        return own if self.server is None else {**own, "server": self.server.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self._stages = {
            int(stage): _Stage(set(entry["rounds"]), entry["turns"], dict(entry["peaks"]), dict(entry["sums"]))
            for stage, entry in state.items()
            if stage != "server"
        }
        self.server = None
        if "server" in state:
            self.server = CostTable()
            self.server.load_state_dict(state["server"])


def _whole(value: float) -> float:
    return int(value) if float(value).is_integer() else value


HEADINGS = {
    "stage": "stage",
    "rounds": "rounds",
    "params_held": "held",
    "params_trained": "trained",
    "saved_bytes": "saved",
    "peak_bytes": "peak",
    "flops_forward": "FLOPs fwd",
    "flops_backward": "FLOPs bwd",
    "bytes_down": "down",
    "bytes_up": "up",
    "seconds": "s",
}


def readable(name: str, value: float) -> str:
    """A figure as a person reads it, in few columns: bytes in KiB to TiB, counts in k to P."""
    if name in ("stage", "rounds"):
        return str(int(value))
    if name == "seconds":
        return f"{value:.2f}"
    if "bytes" in name:
        return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if abs(value) < base:
            return f"{value:.3g}{unit}" if value < 100 else f"{value:.0f}{unit}"
        value /= base
    return f"{value:.3g}{units[-1]}"


def text_rows(table: CostTable, names: Iterable[str] = HEADINGS) -> list[list[str]]:
    """Heading, rows and total as text, for whoever prints a table."""
    names = list(names)
    lines = [[HEADINGS[name] for name in names]]
    for row in table.rows():
        lines.append([readable(name, row[name]) for name in names])
    total = table.total()
    lines.append(["total" if name == "stage" else readable(name, total[name]) for name in names])
    return lines
