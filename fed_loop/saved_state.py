"""What of a run is on disk: where it begins, from which checkpoint it goes on, and when one is written."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from featherlight.fed_loop import checkpoint
from featherlight.fed_loop.same_run import check_same_run, digest

if TYPE_CHECKING:
    from featherlight.fed_loop.run import Run


class SavedState:
    """The checkpoints of one run, in its folder."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._settings = run.settings

    def fingerprint(self) -> dict[str, str]:
        """What must be the same for a run to go on; the number of rounds may grow."""
        run, settings = self._run, self._settings
        shapes = {name: tuple(value.shape) for name, value in run.server.items()}
        later = {  # not in checkpoints of earlier versions
            "dropout": settings.dropout or None,
            "over_select": settings.over_select if settings.over_select > 1 else None,
            "deadline": settings.deadline,
            "min_clients": settings.min_clients or None,
            "aggregate": settings.aggregate and f"{type(settings.aggregate).__name__}({settings.aggregate.describe()})",
            "sampling": settings.sampling if settings.sampling != "fixed" else None,
            "client_batch": settings.client_batch if settings.client_batch > 1 else None,
        }
        return {
            **{name: str(value) for name, value in later.items() if value is not None},
            "model": f"{type(run.module).__name__}({dict(getattr(run.module, 'hparams', {}))})",
            "entries": digest(shapes),
            "plugins": str(run.chain.describe()),
            "clients": self._clients,
            "cohort": str(settings.cohort),
            "local_epochs": str(settings.local_epochs),
            "server": f"{type(settings.server).__name__}({settings.server.describe()})",
            "seed": str(settings.seed),
            "resend": str(settings.resend),
            "clip": str(settings.clip),
            "precision": str(settings.compute["precision"]),
            "threads": str(settings.compute["threads"]),
            "data": str(run.data.describe() if hasattr(run.data, "describe") else type(run.data).__name__),
        }

    @cached_property
    def _clients(self) -> str:
        """How many, and of which sizes: worked out once, since there may be very many."""
        return f"{self._run.data.num_clients} with {digest(list(self._run.sizes))}"

    def start_clean(self) -> None:
        """A new run, in a folder where no other has left anything.

        Raises:
            ValueError: one has.
        """
        folder = self._settings.folder
        if folder is not None and (last := checkpoint.newest(folder)) is not None:
            raise ValueError(f"{last} is there already; go on from it with resume=True (--resume), or use another folder")
        if folder is not None and (folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder} holds another run's metrics.jsonl; use another folder")

    def resume(self) -> int | None:
        """Give the run the state of the newest checkpoint that can be read; returns how many rounds are done, None where there is none.

        Raises:
            ValueError: no folder, no checkpoint that can be read, one of another run, or more rounds done than asked for.
        """
        run, folder = self._run, self._settings.folder
        if folder is None:
            raise ValueError("to resume, give the folder in which the run's checkpoints are")
        found = checkpoint.read_newest(folder)
        self._check_all_see(0 if found is None else found[1]["round"], folder)
        first = run.processes.rank == 0
        if found is None:
            if first:
                run.report.say(f"there is no checkpoint in {folder}: starting from the first round")
                run.report.resumed(None, run.result)
            return None
        path, state, damaged = found
        check_same_run(path, state["fingerprint"], self.fingerprint())
        if self._settings.rounds < state["round"]:
            raise ValueError(
                f"rounds={self._settings.rounds}, but {state['round']} are done in {path}: give {state['round']} or more, or another folder"
            )
        for other, why in damaged.items() if first else ():
            aside = checkpoint.set_aside(other).name
            run.report.say(f"[yellow]{escape(why)}; set aside as {aside}; going on from the newest that can be read, {path.name}")
        for name, value in state["server"].items():
            run.server[name].copy_(value)
        run.optimizer_of_server.load_state_dict(state["server_optimizer"])
        run.ledger.load_state_dict(state["ledger"])
        run.memories = {int(client): dict(memory) for client, memory in state["memories"].items()}
        run.chain.load_state_dict(state["plugins"])
        run.result.cost.load_state_dict(state["cost"])
        run.result.history, run.result.metrics = state["history"], state["metrics"]
        run.result.rounds = state["round"]
        if first:
            run.report.resumed(path, run.result)
        return int(state["round"])

    def _check_all_see(self, round: int, folder: Path) -> None:
        """All processes read the folder for themselves, and must go on from one checkpoint.

        Raises:
            ValueError: they do not: hosts that share no disk.
        """
        rounds = self._run.processes.gather(round)
        if len(set(rounds)) > 1:
            raise ValueError(
                f"processes find different checkpoints in {folder} (after {', '.join(map(str, rounds))} rounds, by rank): "
                "give a folder that all hosts share"
            )

    def write(self, round: int, interrupted: bool = False) -> None:
        """After ``round`` rounds. The state between rounds is whole, so a run that is interrupted loses at most the round it was in."""
        run, settings = self._run, self._settings
        if settings.folder is None or not settings.checkpoint_every or run.processes.rank != 0:
            return
        due = round % settings.checkpoint_every == 0 or round == settings.rounds
        if not (due or interrupted):
            return
        if (path := checkpoint.path_of(settings.folder, round)).exists():
            run.report.saved(path, interrupted)
            return
        state = {
            "round": round,
            "fingerprint": self.fingerprint(),
            "server": run.server,
            "server_optimizer": run.optimizer_of_server.state_dict(),
            "ledger": run.ledger.state_dict(),
            "memories": {str(client): memory for client, memory in run.memories.items()},
            "plugins": run.chain.state_dict(),
            "cost": run.result.cost.state_dict(),
            "history": run.result.history,
            "metrics": run.result.metrics,
        }
        run.report.saved(checkpoint.write(settings.folder, round, state), interrupted)
