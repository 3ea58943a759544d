"""The comparison as a picture: how good the features are against what a client held, computed and sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

AXES = (
    ("peak memory of a step", "MiB", lambda cost: cost["peak_bytes"] / 2**20),
    ("kept for backward", "MiB", lambda cost: cost["saved_bytes"] / 2**20),
    ("computed over the run", "GFLOPs", lambda cost: (cost["flops_forward"] + cost["flops_backward"]) / 1e9),
    ("sent and received over the run", "MiB", lambda cost: (cost["bytes_down"] + cost["bytes_up"]) / 2**20),
)

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's, told apart by all."""

MARKERS = "os^DvPX*"
"""Shapes, so that runs at one point are both seen."""


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """One panel a cost, a line of panels a metric, a point a run.

    Args:
        runs: as in ``comparison.json``.
        path: PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = list(dict.fromkeys(name for run in runs for name in run["metrics"])) or [""]
    figure, panels = pyplot.subplots(
        len(metrics), len(AXES), figsize=(4 * len(AXES), 3.4 * len(metrics) + 0.6), squeeze=False, sharey="row", layout="constrained"
    )
    for line, metric in zip(panels, metrics):
        for panel, (title, unit, figure_of) in zip(line, AXES):
            for number, run in enumerate(runs):
                score = 100 * run["metrics"].get(metric, float("nan"))
                again = number // len(COLOURS)  # from the ninth on, colours have other shapes
                style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[(number + again) % len(MARKERS)]}
                panel.scatter(figure_of(run["cost"]), score, s=90, alpha=0.8, label=run["name"].replace("_", " "), zorder=3, **style)
            panel.set_xlabel(f"{title} ({unit})")
            panel.set_xlim(left=0)
            panel.grid(alpha=0.3)
        line[0].set_ylabel(f"{metric} accuracy (%)" if metric else "")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(runs), 5), frameon=False)
    figure.suptitle("what a client that takes part in every round pays, and what the features are worth")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)
