"""``featherlight federate``: one federated run, from a configuration to a table."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.console import Console

from featherlight.commands.folders import folder_for
from featherlight.commands.logging_ends import ended
from featherlight.commands.parsing import Parts, federated_parser, parse
from featherlight.commands.run_logs import draw_run, log_end
from featherlight.commands.tables import cost_table, metrics_line, privacy_line, server_table
from featherlight.fed_loop import Federation, Result
from featherlight.fed_loop.away import Carrier, SumCarrier
from featherlight.fed_loop.whole_files import write_text


def run(command: str, arguments: list[str]) -> None:
    """Run ``featherlight federate ARGUMENTS``.

    Raises:
        ValueError: nothing was learned; what was measured is told and written first.
    """
    resume = "--resume" in arguments
    arguments = [argument for argument in arguments if argument != "--resume"]
    result, folder, first = federate(arguments, resume=resume)
    if first:
        tell(result, folder)


def tell(result: Result, folder: Path | None) -> None:
    """Print what a run comes to.

    Raises:
        ValueError: nothing was learned.
    """
    console = Console()
    console.print(cost_table(result.cost, "cost of one client in one round, by stage; total: of a client in every round"))
    if result.cost.server is not None:
        console.print(server_table(result.cost.server))
    learned = result.rejected < result.turns
    if learned:
        console.print(metrics_line(result.metrics))
    if result.privacy is not None:
        console.print(privacy_line(result.privacy))
    if result.rejected and learned:
        console.print(f"[yellow]{result.rejected} of {result.turns} updates rejected[/]; metrics.jsonl tells in which rounds")
    console.print(f"written to {folder}", highlight=False)
    check_learned(result.turns, result.rejected)


def check_learned(turns: int, rejected: int) -> None:
    """Figures of a model that no update has changed are figures of its initial weights.

    Raises:
        ValueError: every update was rejected.
    """
    if turns and rejected == turns:
        raise ValueError(
            f"all {turns} updates were rejected, so nothing was learned; why is told above "
            "(where a loss was not finite: lower the learning rate, or clip gradients)"
        )


Away = Callable[[Federation, Any, str], tuple[Any, Carrier | SumCarrier]]
"""Settings, data and the configuration as text → the data of a server whose clients live elsewhere, and who carries turns to them."""


def federate(
    arguments: list[str], resume: bool = False, folder: Path | None = None, away: Away | None = None
) -> tuple[Result, Path | None, bool]:
    """Run a federated configuration.

    Args:
        arguments: as on the command line.
        resume: go on from the newest checkpoint.
        folder: where to write, if the configuration does not say.
        away: finds the clients, where they live elsewhere.

    Returns:
        The result, the folder written to, and whether this process is the one that tells.
    """
    parser = federated_parser()
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run's folder")
    config = parse(parser, arguments)
    given = config.federation.folder is not None or folder is not None
    if config.federation.folder is None:
        name = Path(str(config.config[-1])).stem if config.config else "federation"
        config.federation.folder = str(folder if folder is not None else folder_for(name, resume))
    parts = Parts(parser, config)
    federation = parts.federation()
    module, data, plugins, probes, loggers = parts.module(), parts.data(), parts.plugins(), parts.probes(), parts.loggers()
    text = parser.dump(config, skip_none=False, skip_check=True)
    carrier = None
    if away is not None:
        data, carrier = away(federation, data, text)
    with _told_before(federation, text, given), ended(loggers):
        result = federation.run(module, data, plugins, probes, loggers, resume=resume, configuration=yaml.safe_load(text), carrier=carrier)
        if federation.folder is not None and federation.is_first:
            write_text(federation.folder / "config.yaml", text)
            pictures, untold = draw_run(parts, federation, data, result)
            log_end(loggers, result.cost, pictures, result.rounds - 1)
            for line in untold:
                print(line, file=sys.stderr)
    return result, federation.folder, federation.is_first


@contextmanager
def _told_before(federation: Federation, text: str, given: bool) -> Iterator[None]:
    """``config.yaml`` is there from before the first round, and goes again if the run comes to nothing."""
    path = None if federation.folder is None else federation.folder / "config.yaml"
    several = federation.compute["devices"] not in (1, "1") or federation.compute["num_nodes"] > 1
    first = rank_zero_only.rank == 0 and os.environ.get("NODE_RANK", "0") == "0"  # type: ignore[attr-defined]  # ranks are a host's own
    if path is None or path.exists() or not first or (several and not given):
        yield  # several processes each number their folder: it must not be there before all of them have
        return
    write_text(path, text)
    try:
        yield
    except BaseException:
        if [*path.parent.iterdir()] == [path]:
            path.unlink(missing_ok=True)
            path.parent.rmdir()
        raise
