"""What a run tells: a progress bar, a line per round in ``metrics.jsonl``, rows for Lightning's loggers, and notes a person must see."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from featherlight.fed_loop.result import Result
from featherlight.fed_loop.turn import Turn
from featherlight.fed_loop.whole_files import write_text

if TYPE_CHECKING:
    from featherlight.fed_loop.federation import Federation


class Report:
    """Tells of one run; only its first process does."""

    def __init__(self, settings: Federation, loggers: Sequence[Logger] = ()) -> None:
        self._settings = settings
        self._loggers = list(loggers)
        self._console = Console(stderr=True)
        self._progress: Progress | None = None
        self._first = False

    @contextmanager
    def rounds(self, done: int, first: bool) -> Iterator[None]:
        """Around all rounds; ``first`` says whether this process tells."""
        self._first = first
        if not (first and self._settings.progress):
            yield
            return
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
                self.say(f"[yellow]round {row['round']}: update of client {turn.client} rejected: {turn.rejected}")
        if self._progress is not None:
            self._progress.update(self._task, completed=row["round"] + 1, note=f"stage {row['stage']} loss {row['loss']:.3f}")
        if self._folder is not None:
            with (self._folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        self._log(row)
        if row["round"] + 1 == self._settings.rounds:
            self._finish(result)

    def resumed(self, path: Path, result: Result) -> None:
        """A run goes on: what was written after the checkpoint is forgotten."""
        self._console.print(f"resuming after {result.rounds} rounds from {path}")
        if self._folder is not None:
            lines = "".join(json.dumps(row) + "\n" for row in result.history)
            write_text(self._folder / "metrics.jsonl", lines)

    def saved(self, path: Path, interrupted: bool) -> None:
        if interrupted:
            self.say(f"[yellow]interrupted; saved {path}. Start again with --resume to go on.")

    @property
    def _folder(self) -> Path | None:
        folder = self._settings.folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _finish(self, result: Result) -> None:
        if self._folder is not None:
            write_text(self._folder / "cost.json", json.dumps(result.cost.to_json(), indent=2))
            write_text(self._folder / "result.json", json.dumps({"metrics": result.metrics, "rounds": result.rounds}, indent=2))
        for logger in self._loggers:
            logger.finalize("success")

    def _log(self, row: dict[str, Any]) -> None:
        for logger in self._loggers:
            logger.log_metrics({name: value for name, value in row.items() if name != "round"}, step=int(row["round"]))
            logger.save()

    def say(self, text: str) -> None:
        """A line that a person must see."""
        (self._progress.console if self._progress is not None else self._console).print(text, highlight=False)
