"""A federated run as pictures: who has which labels, which parts of the model train, are frozen or left out, round by round, and accuracy
against what it cost so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherlight.plugins.cost_table import CostTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from featherlight.fed_loop.timeline import Timeline

TRAINS, FROZEN, ABSENT = (0.0, 0.447, 0.698), (0.902, 0.624, 0.0), (0.94, 0.94, 0.94)
"""Blue and orange of Okabe and Ito's palette, and light grey: told apart without telling red from green, and in grey print."""

DOWN, UP = (0.0, 0.447, 0.698), (0.902, 0.624, 0.0)
MOST_WRITTEN = 160
"""Cells of a map up to which each has its number written in it."""

MOST_ROWS = 60
SO_FAR = ("sent and received so far (MiB)", "peak memory of a step so far (MiB)", "computed so far (GFLOPs)")


def figure_of(width: float, height: float) -> Figure:
    """An empty figure that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def labels_figure(counts: Sequence[Sequence[int]]) -> Figure:
    """A map of clients by labels, and above it how many images each client has.

    Args:
        counts: ``[client][label]``, numbers of training images.
    """
    from matplotlib.ticker import MaxNLocator

    clients, labels = len(counts), len(counts[0])
    figure = figure_of(min(11.0, 4.0 + 0.35 * clients), min(9.0, 3.2 + 0.22 * labels))
    totals, cells = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, max(1.5, min(4.0, 0.25 * labels))]})
    totals.stairs([sum(row) for row in counts], _edges(range(clients)), fill=True, color=DOWN)
    totals.set_ylim(bottom=0)
    totals.set_ylabel("samples")
    totals.set_title(f"training samples of {clients:,} clients, by label")
    largest = max(max(row) for row in counts)
    image = cells.imshow(
        [*zip(*counts)], aspect="auto", cmap="cividis", vmin=0, vmax=max(largest, 1), interpolation="nearest", origin="lower"
    )
    if clients * labels <= MOST_WRITTEN:
        for client, row in enumerate(counts):
            for label, count in enumerate(row):
                cells.text(
                    client, label, str(count), ha="center", va="center", fontsize=7, color="black" if count > 0.6 * largest else "white"
                )
    cells.set_xlabel("client")
    cells.set_ylabel("label")
    for axis in (cells.xaxis, cells.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=cells, label="samples", pad=0.01)
    return figure


def timeline_figure(told: Timeline | None, history: Sequence[Mapping[str, float]], cost: CostTable) -> Figure:
    """What clients do with each part of the model, and under it what a client of each round sends, receives, needs and computes.

    Args:
        told: nothing where a round divides the model; what travels is then drawn alone.
        history: a row a round, as in ``metrics.jsonl``.
        cost: for the memory of a step and a turn's FLOPs, which are known by stage.
    """
    rows = 0 if told is None else len(told.parts)
    figure = figure_of(9.0, 5.6 + 0.2 * min(rows, MOST_ROWS))
    heights = [max(1.6, 0.13 * rows)] if rows else []
    panels = figure.subplots(len(heights) + 3, 1, sharex=True, gridspec_kw={"height_ratios": [*heights, 1, 1, 1]})
    if told is not None and rows:
        _draw_parts(panels[0], told, int(history[-1]["round"]) + 1)
    *_, traffic, memory, compute = panels
    rounds = [int(row["round"]) for row in history]
    each = [max(1, row["clients"] + row["rejected"] + row.get("dropped_out", 0)) * 2**20 for row in history]
    down, up = ([row[name] / turns for row, turns in zip(history, each)] for name in ("bytes_down", "bytes_up"))
    both = [sum(pair) for pair in zip(down, up)]
    traffic.stairs(down, _edges(rounds), fill=True, color=DOWN, label="received")
    traffic.stairs(both, _edges(rounds), baseline=down, fill=True, color=UP, label="sent")
    traffic.set_ylim(bottom=0)
    traffic.set_ylabel("MiB a client")
    turns = {row["stage"]: row for row in cost.rows()}
    each_turn = [turns[row["stage"]] for row in history]
    memory.stairs([turn["peak_bytes"] / 2**20 for turn in each_turn], _edges(rounds), baseline=None, color="black", linewidth=2)
    memory.set_ylabel("peak MiB of a step")
    memory.margins(y=0.1)
    memory.set_ylim(bottom=0)
    _draw_flops(compute, each_turn, rounds)
    compute.set_ylabel("GFLOPs a client")
    compute.set_xlabel("round")
    compute.set_xlim(-0.5, rounds[-1] + 0.5)
    for panel in (traffic, memory, compute):
        panel.grid(axis="y", alpha=0.3)
    for panel in (traffic, compute):
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    panels[0].set_title("what clients train, hold, send and compute, by round" if rows else "what clients send, hold and compute, by round")
    return figure


def progress_figure(history: Sequence[Mapping[str, float]], cost: CostTable, metrics: Mapping[str, float]) -> Figure | None:
    """What the features are worth against what a client has sent and received, needed and computed by then; a point an evaluation.

    Bytes and FLOPs are of a client that took part in every round so far, as in the comparison; the peak is the largest step so far.

    Args:
        history: a row a round, as in ``metrics.jsonl``; those that were evaluated have the metrics.
        cost: of a client's round, by stage.
        metrics: of the last evaluation.

    Returns:
        Nothing where no metric was asked for.
    """
    turns = {row["stage"]: row for row in cost.rows()}
    points: dict[str, list[tuple[float, ...]]] = {name: [] for name in metrics}
    sent = peak = computed = 0.0
    for row in history:
        turn = turns[row["stage"]]
        sent += (turn["bytes_down"] + turn["bytes_up"]) / 2**20
        computed += (turn["flops_forward"] + turn["flops_backward"]) / 1e9
        peak = max(peak, turn["peak_bytes"] / 2**20)
        for name in points.keys() & row.keys():
            points[name].append((sent, peak, computed, row[name], row["round"]))
    points = {name: told for name, told in points.items() if told}
    if not points:
        return None
    figure = figure_of(12.0, 3.2 * len(points) + 0.4)
    for line, (name, told) in zip(figure.subplots(len(points), 3, squeeze=False, sharey="row"), points.items()):
        shares = all(0 <= point[3] <= 1 for point in told)
        scores = [100 * point[3] if shares else point[3] for point in told]
        for place, (panel, title) in enumerate(zip(line, SO_FAR)):
            panel.plot([point[place] for point in told], scores, "o-", color=DOWN, markersize=5)
            for end in {0, len(told) - 1}:
                where = (told[end][place], scores[end])
                panel.annotate(f"round {told[end][4]:.0f}", where, (4, 5), textcoords="offset points", fontsize=7)
            panel.set_xlabel(title)
            panel.margins(0.2)
            panel.set_xlim(left=0)
            panel.grid(alpha=0.3)
        line[0].set_ylabel(f"{name} accuracy (%)" if shares else name)
    figure.suptitle("what the features are worth, and what a client that takes part in every round has paid by then")
    return figure


def stages_figure(told: Timeline | None, cost: CostTable) -> Figure:
    """A Trainer's run: which parts of the model train in each epoch, if told, and under it what a step holds, and an epoch computes."""
    figure = figure_of(9.0, 4.2 + 0.2 * min(len(told.parts) if told else 0, MOST_ROWS))
    heights = [max(1.6, 0.13 * len(told.parts))] if told else []
    panels = figure.subplots(len(heights) + 2, 1, sharex=True, gridspec_kw={"height_ratios": [*heights, 1, 1]})
    rows = [row for row in cost.rows() for _ in range(int(row["rounds"]))]
    if told:
        _draw_parts(panels[0], told, len(rows))
    *_, memory, compute = panels
    for name, colour, label in (("peak_bytes", "black", "peak"), ("saved_bytes", DOWN, "kept for backward")):
        memory.stairs([row[name] / 2**20 for row in rows], _edges(range(len(rows))), baseline=None, color=colour, linewidth=2, label=label)
    _draw_flops(compute, rows, range(len(rows)))
    memory.set_ylabel("MiB of a step")
    compute.set_ylabel("GFLOPs an epoch")
    compute.set_xlabel("epoch")
    compute.set_xlim(-0.5, len(rows) - 0.5)
    for panel in (memory, compute):
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", alpha=0.3)
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    panels[0].set_title("what trains, holds and computes, by epoch" if told else "what a step holds and an epoch computes, by epoch")
    return figure


def _draw_flops(panel: Axes, rows: Sequence[Mapping[str, float]], places: Sequence[int]) -> None:
    """What forward passes take, and on top of it backward passes; a row of the cost table a period."""
    forward, both = ([sum(row[f"flops_{way}"] for way in ways) / 1e9 for row in rows] for ways in (["forward"], ["forward", "backward"]))
    panel.stairs(forward, _edges(places), fill=True, color=DOWN, label="forward")
    panel.stairs(both, _edges(places), baseline=forward, fill=True, color=UP, label="backward")
    panel.set_ylim(bottom=0)


def _draw_parts(panel: Axes, told: Timeline, rounds: int) -> None:
    """A row a part, from the input up; a colour is the lighter the fewer of the round's clients it is true of."""
    from matplotlib.patches import Patch

    cells = [[mixed(trains, frozen) for trains, frozen in zip(*row)] for row in zip(told.trained, told.frozen)]
    panel.imshow(cells, aspect="auto", origin="lower", interpolation="nearest", extent=(-0.5, rounds - 0.5, -0.5, len(told.parts) - 0.5))
    every = -(-len(told.parts) // MOST_ROWS)
    panel.set_yticks(range(0, len(told.parts), every), told.parts[::every], fontsize=7)
    names = (("trains", TRAINS), ("frozen", FROZEN), ("left out", ABSENT))
    handles = [Patch(facecolor=colour, edgecolor="0.6", label=name) for name, colour in names]
    panel.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title="lighter:\nfewer clients", title_fontsize=8
    )


def mixed(trains: float, frozen: float) -> tuple[float, ...]:
    """The colour of a part that this share of clients trains, this share holds frozen, and the rest do without."""
    absent = 1 - trains - frozen
    return tuple(trains * one + frozen * other + absent * none for one, other, none in zip(TRAINS, FROZEN, ABSENT))


def _edges(places: Sequence[int]) -> list[float]:
    """Where columns around ``places``, which follow one another, begin and end."""
    return [places[0] - 0.5, *(place + 0.5 for place in places)]


def label_counts(data: Any) -> list[list[int]]:
    """``[client][label]`` training images; empty where data have no labels."""
    counts = data.client_label_counts().tolist() if hasattr(data, "client_label_counts") else []
    return counts if any(map(sum, counts)) else []


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path
