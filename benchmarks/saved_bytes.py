"""Bytes kept for backward and peak memory of one training step, by method and stage, against end to end, in one run.

    python benchmarks/saved_bytes.py             counted on tensors without data: seconds, and no memory
    python benchmarks/saved_bytes.py --real      the ResNet-18 steps for real, too

ResNet-18 (CIFAR stem), batch 64, supervised: 286.9 MiB end to end and 62.2 MiB with the second half trained are this project's
reference. ViT-Tiny/4, 12 blocks, SimCLR, batch 64: the systems claim 3.3× for layer-wise training (LW-FedSSL, arXiv 2401.11647)
and 5× with depth dropout (arXiv 2309.05213).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses import FakeTensorMode

from featherlight.plugins import Chain, Clock, DepthDropout, LayerFreezing, Plugin, ProgressiveGrowth, Visit
from featherlight.plugins.step_cost import StepCost, StepMeter
from featherlight.ssl_models import Classifier, SimCLR

BATCH = 64
MIB = 2**20


def steps(model: torch.nn.Module, plugins: Sequence[Plugin], periods: Sequence[int], real: bool) -> list[StepCost]:
    """The cost of the second step of each period."""
    costs = []
    with nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
        if not real:
            model.to_empty(device="cpu")
        chain = Chain(plugins)
        chain.attach(model)
        optimizer = model.configure_optimizers()["optimizer"]  # type: ignore[operator]
        labels = torch.zeros(BATCH, dtype=torch.long)
        for period in periods:
            optimizer.state.clear()
            chain.advance(Clock(period))
            chain.visit(Visit(period))
            for step in range(2):
                images = [torch.rand(BATCH, 3, 32, 32) for _ in range(2)]
                batch = (images[0], labels) if isinstance(model, Classifier) else (tuple(images), labels)
                optimizer.zero_grad()
                chain.before_forward(Clock(period, step))
                with StepMeter(model, [optimizer], batch) as meter:
                    loss = model.training_step(batch, step)  # type: ignore[operator]
                    meter.forward_is_done()
                    loss.backward()
                    optimizer.step()
                chain.after_step(Clock(period, step))
            costs.append(meter.cost)
    return costs


def resnet(console: Console, real: bool) -> None:
    table = Table(title=f"ResNet-18, batch {BATCH}: bytes kept for backward")
    for heading in ("what trains", "counted MiB", *(["really MiB"] if real else []), "reference MiB", "ratio", "end to end / this"):
        table.add_column(heading, justify="right")

    def one(period: int, really: bool) -> float:
        with nullcontext() if really else torch.device("meta"):
            model = Classifier("resnet18_cifar")
        halves = LayerFreezing("backbone.layer*", blocks_per_stage=2, grow=False)
        return steps(model, [halves], [period], really)[0].saved_bytes / MIB

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
    costs = {}
    for name, plugins in ways.items():
        with torch.device("meta"):
            model = SimCLR("vit_tiny", temperature=0.2)
        costs[name] = steps(model, plugins, range(12), real=False)
    for field, title in (("saved_bytes", "kept for backward"), ("peak_bytes", "peak of a step")):
        table = Table(title=f"ViT-Tiny/4, SimCLR, batch {BATCH}: {title}, MiB, at stages 1 to 12 (two blocks a stage: 1 to 6, twice)")
        table.add_column("method")
        for stage in range(1, 13):
            table.add_column(str(stage), justify="right")
        table.add_column("mean", justify="right")
        table.add_column("end to end / mean", justify="right")
        table.add_column("end to end / largest", justify="right")
        whole = getattr(costs["end to end"][0], field) / MIB
        for name, stages in costs.items():
            sizes = [getattr(cost, field) / MIB for cost in stages]
            mean = sum(sizes) / len(sizes)
            table.add_row(name, *(f"{size:.0f}" for size in sizes), f"{mean:.0f}", f"{whole / mean:.2f}", f"{whole / max(sizes):.2f}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="run the ResNet-18 steps for real, too")
    real = parser.parse_args().real
    console = Console(width=170)
    resnet(console, real)
    vit(console)


if __name__ == "__main__":
    main()
