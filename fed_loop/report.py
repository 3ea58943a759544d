"""What a run tells: a progress bar, a line per round in ``metrics.jsonl``, rows for Lightning's loggers, and notes a person must see."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from featherlight.fed_loop.result import Result
from featherlight.fed_loop.turn import Turn
from featherlight.fed_loop.whole_files import append, write_text
from featherlight.plugins import SERVER

if TYPE_CHECKING:
    from featherlight.fed_loop.federation import Federation


class Report:
    """Tells of one run; only its first process does."""

    def __init__(self, settings: Federation, loggers: Sequence[Logger] = (), configuration: Mapping[str, Any] | None = None) -> None:
        self._settings = settings
        self._loggers = list(loggers)
        self._configuration = configuration
        self._untold = list(loggers)
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._first = False

    @contextmanager
    def rounds(self, done: int, first: bool) -> Iterator[None]:
        """Around all rounds; ``first`` says whether this process tells."""
        self._first = first
        with _full_disks_told_once():
            if not (first and self._settings.progress):
                yield
                return
            with self._bar(done):
                yield

    @contextmanager
    def _bar(self, done: int) -> Iterator[None]:
        columns = ["[progress.description]{task.description}", "{task.fields[note]}"]
        with Progress(
            TextColumn(columns[0]),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn(columns[1]),
            console=self._console,
            transient=True,
        ) as self._progress:
            self._task = self._progress.add_task("rounds", total=self._settings.rounds, completed=done, note="")
            yield
        self._progress = None

    def client_is_done(self, number: int, of: int) -> None:
        self.doing(f"client {number}/{of}")

    def doing(self, what: str) -> None:
        """Show what goes on within a round."""
        if self._progress is not None:
            self._progress.update(self._task, note=what)

    def round_is_done(self, row: dict[str, float], turns: Sequence[Turn], result: Result) -> None:
        """One round's figures."""
        if not self._first:
            return
        for turn in turns:
            if turn.rejected:
                whose = "the server's own training" if turn.client == SERVER else f"update of client {turn.client}"
                self.say(f"[yellow]round {row['round']}: {whose} rejected: {turn.rejected}")
        if self._progress is not None:
            self._progress.update(self._task, completed=row["round"] + 1, note=_note(row))
        if self._folder is not None:
            append(self._folder / "metrics.jsonl", _line(row))
        self._log(row)
        if row["round"] + 1 == self._settings.rounds:
            self._finish(result)

    def configured(self, configuration: Mapping[str, Any]) -> None:
        """What loggers are told of the run, with its first row, if nobody has said it otherwise."""
        if self._configuration is None:
            self._configuration = configuration

    def resumed(self, path: Path | None, result: Result) -> None:
        """A run goes on: what was written after the checkpoint, or after no checkpoint, is forgotten."""
        if path is not None:
            self._console.print(f"resuming after {result.rounds} rounds from {path}")
        folder = self._settings.folder
        if folder is not None and (result.history or (folder / "metrics.jsonl").exists()):
            write_text(folder / "metrics.jsonl", "".join(map(_line, result.history)))
        for logger in self._loggers:
            if isinstance(logger, TensorBoardLogger) and Path(logger.log_dir).exists():
                _forget(logger, result.rounds)
                if result.rounds:  # the configuration stands at step 0
                    self._untold.remove(logger)

    def saved(self, path: Path, interrupted: bool) -> None:
        if interrupted:
            self.say(f"[yellow]interrupted; saved {path}. Start again with --resume to go on.")

    def lost(self, round: int) -> None:
        """The run was stopped where the server's state is half old and half new, of which there is no checkpoint."""
        if self._settings.folder is not None and self._first:
            self.say(f"[yellow]interrupted at the end of round {round}: start again with --resume to go on from the last checkpoint.")

    @property
    def _folder(self) -> Path | None:
        folder = self._settings.folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _finish(self, result: Result) -> None:
        if self._folder is not None:
            write_text(self._folder / "cost.json", json.dumps(result.cost.to_json(), indent=2))
            told = {
                "metrics": valid(result.metrics),
                "rounds": result.rounds,
                "turns": result.turns,
                "rejected": result.rejected,
                "rejected_by": result.rejected_by,
                **({} if result.privacy is None else {"privacy": valid(result.privacy)}),
            }
            write_text(self._folder / "result.json", json.dumps(told, indent=2))
        for logger in self._loggers:
            with _named(logger):
                logger.finalize("success")

    def _log(self, row: dict[str, Any]) -> None:
        while self._untold:
            self._untold.pop().log_hyperparams(dict(self._configuration or {}))
        for logger in self._loggers:
            with _named(logger):
                logger.log_metrics({name: value for name, value in row.items() if name != "round"}, step=int(row["round"]))
                logger.save()

    def say(self, text: str) -> None:
        """A line that a person must see."""
        (self._progress.console if self._progress is not None else self._console).print(text, highlight=False)


@contextmanager
def _named(logger: Logger) -> Iterator[None]:
    """Around what a logger does: where it cannot write, say which one it is.

    Raises:
        OSError: as the logger's own.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{type(logger).__name__} cannot write ({error}); the last checkpoint is as it was") from error


@contextmanager
def _full_disks_told_once() -> Iterator[None]:
    """TensorBoard writes in a thread, and raises what that thread met at the next row: the thread's own traceback tells nobody more."""
    before = threading.excepthook

    def hook(told: threading.ExceptHookArgs) -> None:
        if not issubclass(told.exc_type, OSError):
            before(told)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _note(row: Mapping[str, Any]) -> str:
    told = f"loss {row['loss']:.3f}" if row["clients"] else "all rejected"
    return f"stage {row['stage']} {told}"


def valid(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON knows it, which has no NaN and no infinity: null in their place."""
    return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(valid(row), allow_nan=False) + "\n"


def _forget(logger: TensorBoardLogger, rounds: int) -> None:
    """Have TensorBoard leave out what an earlier process logged from step ``rounds`` on: its writer's ``purge_step``.

    The writer takes it when it opens a file, and the logger has made it before we know where to go on: so it opens another.
    """
    writer = logger.experiment
    writer.close()
    writer.purge_step = rounds


def added(rows: Sequence[Mapping[str, float]]) -> dict[str, int]:
    """Rejected and dropped out in all ``rows``, by reason."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update({name: int(value) for name, value in row.items() if name.startswith("rejected_") or name == "dropped_out"})
    return {name: number for name, number in sorted(total.items()) if number}


def of_server(turns: Sequence[Turn], own_turn: Turn | None) -> dict[str, float]:
    """What the server computed, in clients' places or on data of its own, where it did."""
    costs = [turn.server for turn in turns if turn.server is not None] + ([] if own_turn is None else [own_turn.cost])
    flops = sum(cost.flops_forward + cost.flops_backward for cost in costs)
    told = {"server_flops": flops, "server_seconds": sum(cost.seconds for cost in costs)} if costs else {}
    return told if own_turn is None else {**told, "server_loss": own_turn.loss, "calibration_rejected": int(bool(own_turn.rejected))}
