"""What a finished run leaves for people: pictures in its folder, and, for loggers that take them, tables and pictures beside the curves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger

from featherlight.commands.run_pictures import label_counts, labels_figure, progress_figure, save, stages_figure, timeline_figure
from featherlight.plugins import Plugin
from featherlight.plugins.cost_table import FIELDS, CostTable

if TYPE_CHECKING:
    from featherlight.commands.parsing import Parts
    from featherlight.fed_loop import Federation, Result

COLUMNS = ("stage", "rounds", *FIELDS)


def draw_run(parts: Parts, federation: Federation, data: Any, result: Result) -> tuple[list[Path], list[str]]:
    """Draw ``labels.png``, ``timeline.png`` and, where something was evaluated, ``progress.png`` into the run's folder.

    Returns:
        What was drawn, and a line for each picture, or part of one, that was not, with why.
    """
    from featherlight.fed_loop.timeline import timeline

    assert federation.folder is not None
    drawn, untold = [], []
    if counts := label_counts(data):
        drawn.append(save(labels_figure(counts), federation.folder / "labels.png"))
    else:
        untold.append("labels.png is not drawn: the data have no labels")
    told = None
    try:
        told = timeline(federation, parts.module, data.num_clients, parts.plugins())
        if told is None:
            untold.append("timeline.png shows what travels alone: rounds divide the model between devices and server")
    except Exception as error:  # a model, or a method of a user's own, that tensors without values do not go through; the run is done
        untold.append(f"timeline.png shows what travels alone: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    if result.history:
        drawn.append(save(timeline_figure(told, result.history, result.cost), federation.folder / "timeline.png"))
        if (progress := progress_figure(result.history, result.cost, result.metrics)) is not None:
            drawn.append(save(progress, federation.folder / "progress.png"))
    return drawn, untold


def draw_stages(make_module: Callable[[], Any], plugins: Sequence[Plugin], cost: CostTable, path: Path) -> tuple[list[Path], list[str]]:
    """Draw a Trainer's run; what is returned is as of :func:`draw_run`.

    Args:
        plugins: attached to nothing.
    """
    from featherlight.fed_loop import Federation
    from featherlight.fed_loop.timeline import timeline

    epochs, told, untold = int(cost.total()["rounds"]), None, []
    if not epochs:
        return [], []
    try:
        told = timeline(Federation(rounds=epochs, seed=0), make_module, 1, plugins)
    except Exception as error:  # as above
        untold.append(f"{path.name} shows cost alone: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return [save(stages_figure(told, cost), path)], untold


def log_end(loggers: Iterable[Logger], cost: CostTable, pictures: Sequence[Path], step: int) -> None:
    """The cost table, its total as ``cost_total/…``, and pictures, for every logger that has ``log_table`` and ``log_image``."""
    for logger in takers(loggers):
        logger.log_metrics({f"cost_total/{name}": float(cost.total()[name]) for name in FIELDS}, step=step)
        log_table(logger, "cost_table", COLUMNS, cost.rows(), step)
        if cost.server is not None:
            log_table(logger, "server_cost_table", COLUMNS, cost.server.rows(), step)
        log_pictures(logger, pictures, step)


def takers(loggers: Iterable[Logger]) -> list[Any]:
    """Those that take tables and pictures, in the way of Lightning's ``WandbLogger``."""
    return [logger for logger in loggers if hasattr(logger, "log_table") and hasattr(logger, "log_image")]


def log_table(logger: Any, name: str, columns: Sequence[str], rows: Iterable[dict[str, Any]], step: int) -> None:
    logger.log_table(name, columns=[*columns], data=[[row.get(column) for column in columns] for row in rows], step=step)


def log_pictures(logger: Any, pictures: Sequence[Path], step: int) -> None:
    for path in pictures:
        logger.log_image(path.stem, [str(path)], step=step)
