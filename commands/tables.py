"""Tables a person reads at the end of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from featherlight.plugins.cost_table import HEADINGS, CostTable, readable, text_rows

SERVER_ROWS = ("flops_forward", "flops_backward", "seconds")
"""What a comparison tells of the server's work, in the place of that client or on data of its own."""


def cost_table(cost: CostTable, title: str, names: Iterable[str] = HEADINGS) -> Table:
    """Rows by stage, and the total."""
    lines = text_rows(cost, names)
    table = _table(title)
    for heading in lines[0]:
        table.add_column(heading, justify="right")
    for line in lines[1:-1]:
        table.add_row(*line)
    table.add_section()
    table.add_row(*lines[-1], style="bold")
    return table


def server_table(cost: CostTable, names: Iterable[str] = HEADINGS) -> Table:
    """What the server computed, in clients' places or on data of its own: it neither receives nor sends, and in clients' places its peak
    is not known."""
    own = cost.total()["peak_bytes"] > 0
    left_out = ("bytes_down", "bytes_up") if own else ("peak_bytes", "bytes_down", "bytes_up")
    title = "what the server computed on data of its own, in one round" if own else "what the server computed in the place of one client"
    return cost_table(cost, title, [name for name in names if name not in left_out])


def metrics_line(metrics: Mapping[str, float]) -> str:
    """``knn 93.1 %   linear 95.0 %``"""
    return "   ".join(f"{name} {value:.1%}" if 0 <= value <= 1 else f"{name} {value:.4g}" for name, value in metrics.items())


def privacy_line(told: Mapping[str, Any]) -> str:
    """``(ε, δ) = (2.31, 1e-05) for any one client (add or remove one), noise multiplier 1.1, clip 0.5``"""
    whose = f"for any one client ({told['adjacency']}), noise multiplier {told['noise_multiplier']:g}, clip {told['clip']:g}"
    return f"(ε, δ) = ({told['epsilon']:.3g}, {told['delta']:g}) {whose}"


def compression_line(compression: Sequence[float]) -> str:
    """``in the last round, tensors without names: 1899× less down, 1899× less up, 1899× less both ways``"""
    down, up, both = (f"{factor:.0f}" if factor >= 100 else f"{factor:.1f}" for factor in compression)
    return f"in the last round, tensors without names, beside the whole model: {down}× less down, {up}× less up, {both}× less both ways"


def parts_line(parts: Mapping[str, tuple[int, int]]) -> str:
    """``… backbone 1.04GiB down, 317MiB up; projector …``"""
    told = (f"{name} {readable('bytes', down)} down, {readable('bytes', up)} up" for name, (down, up) in sorted(parts.items()))
    return f"over the run, tensors without names, a client in every round: {'; '.join(told)}"


def comparison_table(runs: list[dict[str, Any]]) -> Table:
    """One column a run: what a client held, computed and sent, what the server computed where it did, and how good the features are."""
    metrics = list(dict.fromkeys(name for run in runs for name in run["metrics"]))
    table = _table("a client that takes part in every round: most held, trained, saved for backward and peak; sums of the rest")
    table.add_column("")
    for run in runs:
        table.add_column(run["name"].replace("_", " "), justify="right")
    for name in [name for name in HEADINGS if name not in ("stage", "rounds")]:
        table.add_row(HEADINGS[name], *(readable(name, run["cost"][name]) if name in run["cost"] else "" for run in runs))
    for name in SERVER_ROWS if any("server" in run for run in runs) else ():
        table.add_row(f"server {HEADINGS[name]}", *(readable(name, run["server"][name]) if "server" in run else "" for run in runs))
    if any(run.get("rejected") for run in runs):
        table.add_row("rejected", *(f"{run['rejected']} of {run['turns']}" if "turns" in run else "" for run in runs), style="yellow")
    if any(run.get("privacy") for run in runs):
        found = (run["privacy"]["epsilon"] if run.get("privacy") else "" for run in runs)
        table.add_row("ε", *("∞" if epsilon is None else epsilon and f"{epsilon:.3g}" for epsilon in found))
    table.add_section()
    for name in metrics or (["result"] if any("failed" in run for run in runs) else []):
        table.add_row(name, *(_score(run, name) for run in runs), style="bold")
    return table


def _score(run: Mapping[str, Any], name: str) -> str:
    if "failed" in run:
        return "[red]failed"
    return f"{run['metrics'][name]:.1%}" if name in run["metrics"] else ""


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=0, pad_edge=False, show_edge=False)
