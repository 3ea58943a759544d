"""Bytes kept for backward, peak memory and FLOPs of one training step, by method and stage, against end to end, in one run.

    python benchmarks/saved_bytes.py             counted on tensors without data: a minute of one core, and no memory
    python benchmarks/saved_bytes.py --real      the ResNet-18 steps for real, too

ResNet-18 (CIFAR stem), batch 64, supervised: 286.9 MiB end to end and 62.2 MiB with the second half trained are this project's
reference. ViT-Tiny/4, 12 blocks, SimCLR, batch 64: the systems claim 3.3× for layer-wise training (LW-FedSSL, arXiv 2401.11647)
and 5× with depth dropout (arXiv 2309.05213).
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch._subclasses import FakeTensorMode

from featherlight.plugins import Chain, Clock, DepthDropout, LayerFreezing, Plugin, ProgressiveGrowth, Visit, held, trained
from featherlight.plugins.step_cost import StepCost, StepMeter
from featherlight.ssl_models import Classifier, SimCLR

BATCH = 64
MIB = 2**20
STAGES = 12


class Structure(NamedTuple):
    """What a step's cost depends on, for one model and batch: the entries that are present, and those that train."""

    held: frozenset[str]
    trained: frozenset[str]


Known = dict[Structure, StepCost]


def steps(model: torch.nn.Module, plugins: Sequence[Plugin], periods: Iterable[int], real: bool, known: Known) -> list[StepCost]:
    """The cost of a step of each period, once optimizers have their state; taken from ``known`` where an earlier one was alike."""
    costs = []
    with nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
        if not real:
            model.to_empty(device="cpu")
        chain = Chain(plugins)
        chain.attach(model)
        optimizer = model.configure_optimizers()["optimizer"]  # type: ignore[operator]
        labels = torch.zeros(BATCH, dtype=torch.long)
        for period in periods:
            chain.advance(Clock(period))
            chain.visit(Visit(period))
            structure = Structure(frozenset(held(model)), frozenset(trained(model)))
            if structure not in known:
                optimizer.state.clear()
                for name, parameter in model.named_parameters():  # a first step of zeros, so that moments are there
                    parameter.grad = torch.zeros_like(parameter) if name in structure.trained else None
                optimizer.step()
                optimizer.zero_grad()
                images = [torch.rand(BATCH, 3, 32, 32) for _ in range(2)]
                batch = (images[0], labels) if isinstance(model, Classifier) else (tuple(images), labels)
                chain.before_forward(Clock(period, 1))
                with StepMeter(model, [optimizer], batch) as meter:
                    loss = model.training_step(batch, 1)  # type: ignore[operator]
                    meter.forward_is_done()
                    loss.backward()
                    optimizer.step()
                chain.after_step(Clock(period, 1))
                optimizer.zero_grad()
                known[structure] = meter.cost
            costs.append(known[structure])
    return costs


def resnet(console: Console, real: bool) -> None:
    table = Table(title=f"ResNet-18, batch {BATCH}: bytes kept for backward")
    for heading in ("what trains", "counted MiB", *(["really MiB"] if real else []), "reference MiB", "ratio", "end to end / this"):
        table.add_column(heading, justify="right")

    def one(period: int, really: bool) -> float:
        with nullcontext() if really else torch.device("meta"):
            model = Classifier("resnet18_cifar")
        halves = LayerFreezing("backbone.layer*", blocks_per_stage=2, grow=False)
        return steps(model, [halves], [period], really, {})[0].saved_bytes / MIB

    whole = one(0, False)
    for label, period, reference in (("end to end", 0, 286.9), ("second half", 1, 62.2)):
        counted = one(period, False)
        measured = [f"{one(period, True):.1f}"] if real else []
        table.add_row(label, f"{counted:.1f}", *measured, f"{reference}", f"{counted / reference:.3f}", f"{whole / counted:.2f}")
    console.print(table)


def vit(console: Console) -> None:
    blocks = "backbone.blocks.*"
    ways: dict[str, list[Plugin]] = {
        "end to end": [],
        "layer-wise": [LayerFreezing(blocks)],
        "layer-wise + depth dropout 0.5": [LayerFreezing(blocks), DepthDropout(blocks, rate=0.5)],
        "layer-wise, 2 blocks a stage": [LayerFreezing(blocks, blocks_per_stage=2, periods_per_stage=2)],
        "progressive": [ProgressiveGrowth(blocks)],
        "progressive + depth dropout 0.5": [ProgressiveGrowth(blocks), DepthDropout(blocks, rate=0.5)],
        "progressive + depth dropout, 6 kept": [ProgressiveGrowth(blocks), DepthDropout(blocks, rate=0.0, max_kept=6)],
    }
    costs: dict[str, list[StepCost]] = {}
    known: Known = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name, plugins in ways.items():
            with torch.device("meta"):
                model = SimCLR("vit_tiny", temperature=0.2)
            costs[name] = steps(model, plugins, progress.track(range(STAGES), description=name), False, known)
    quantities: dict[str, Callable[[StepCost], float]] = {
        "kept for backward, MiB": lambda cost: cost.saved_bytes / MIB,
        "peak of a step, MiB": lambda cost: cost.peak_bytes / MIB,
        "GFLOPs of a step": lambda cost: (cost.flops_forward + cost.flops_backward) / 1e9,
    }
    for title, quantity in quantities.items():
        console.print(by_stage(title, {name: [quantity(cost) for cost in stages] for name, stages in costs.items()}))


def by_stage(title: str, sizes: dict[str, list[float]]) -> Table:
    """A row for each method: every stage, their mean, and how many times less that is than end to end."""
    table = Table(title=f"ViT-Tiny/4, SimCLR, batch {BATCH}: {title}, at stages 1 to {STAGES} (two blocks a stage: 1 to 6, twice)")
    table.add_column("method")
    for heading in (*range(1, STAGES + 1), "mean", "end to end / mean", "end to end / largest"):
        table.add_column(str(heading), justify="right")
    whole = sizes["end to end"][0]
    for name, stages in sizes.items():
        mean = sum(stages) / len(stages)
        table.add_row(name, *(f"{size:.0f}" for size in stages), f"{mean:.0f}", f"{whole / mean:.2f}", f"{whole / max(stages):.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="run the ResNet-18 steps for real, too")
    real = parser.parse_args().real
    warnings.filterwarnings("ignore", message=".*self.log.*")  # nothing is logged of a step that is only counted
    console = Console(width=170)
    resnet(console, real)
    vit(console)


if __name__ == "__main__":
    main()
