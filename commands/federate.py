"""``featherlight federate``: one federated run, from a configuration to a table."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from featherlight.commands.folders import folder_for
from featherlight.commands.parsing import Parts, federated_parser, parse
from featherlight.commands.tables import cost_table, metrics_line
from featherlight.fed_loop import Result


def run(command: str, arguments: list[str]) -> None:
    """Run ``featherlight federate ARGUMENTS``."""
    resume = "--resume" in arguments
    arguments = [argument for argument in arguments if argument != "--resume"]
    result, folder, first = federate(arguments, resume=resume)
    if first:
        console = Console()
        console.print(cost_table(result.cost, "cost of one client in one round, by stage; total: of a client in every round"))
        console.print(metrics_line(result.metrics))
        console.print(f"written to {folder}", highlight=False)


def federate(arguments: list[str], resume: bool = False, folder: Path | None = None) -> tuple[Result, Path | None, bool]:
    """Run a federated configuration.

    Args:
        arguments: as on the command line.
        resume: go on from the newest checkpoint.
        folder: where to write, if the configuration does not say.

    Returns:
        The result, the folder written to, and whether this process is the one that tells.
    """
    parser = federated_parser()
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run's folder")
    config = parse(parser, arguments)
    if config.federation.folder is None:
        name = Path(str(config.config[-1])).stem if config.config else "federation"
        config.federation.folder = str(folder if folder is not None else folder_for(name, resume))
    parts = Parts(parser, config)
    federation = parts.federation()
    module, data = parts.module(), parts.data()
    result = federation.run(module, data, parts.plugins(), parts.probes(), parts.loggers(), resume=resume)
    if federation.folder is not None and federation.is_first:
        parser.save(config, federation.folder / "config.yaml", overwrite=True, skip_check=True)
    return result, federation.folder, federation.is_first
