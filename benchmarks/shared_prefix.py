"""What it saves to run the frozen prefix of online and target branch once a view, at each stage of layer-wise training.

    python benchmarks/shared_prefix.py                     ViT-Tiny at 32 px, MoCo v3, batch 16, all 12 stages, one CPU thread: minutes
    python benchmarks/shared_prefix.py --method BYOL --batch 256 --device cuda --stages 1 6 12

Each line is one step, forward and backward, with and without sharing: its time (the fastest of some), bytes kept for backward, peak bytes,
FLOPs forward (a multiply-add is 2), and the largest difference that sharing makes to any gradient.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from featherlight.plugins import Clock, LayerFreezing
from featherlight.plugins.step_cost import StepCost, StepMeter
from featherlight.ssl_models import BYOL, MoCoV3

METHODS = {"MoCoV3": MoCoV3, "BYOL": BYOL}


def step(model: Any, plugin: LayerFreezing, clock: Clock, views: list[Tensor], meter: StepMeter | None = None) -> list[Tensor | None]:
    """One step without an optimizer; returns all gradients."""
    model.zero_grad()
    plugin.before_forward(clock)
    loss = model.view_loss(*views)
    if meter is not None:
        meter.forward_is_done()
    loss.backward()
    plugin.after_step(clock)
    return [parameter.grad for parameter in model.parameters()]


def measure(share: bool, stage: int, views: list[Tensor], options: argparse.Namespace) -> tuple[float, StepCost, list[Tensor | None]]:
    """Seconds, cost and gradients of a step in ``stage``, counted from 0."""
    torch.manual_seed(0)
    model = METHODS[options.method]("vit_tiny", image_size=32).to(options.device)
    plugin = LayerFreezing("backbone.blocks.*", share_prefix=share)
    plugin.attach(model)
    clock = Clock(stage, 0)
    plugin.advance(clock)
    model.train()
    grads = [None if grad is None else grad.clone() for grad in step(model, plugin, clock, views)]
    model.zero_grad()
    with StepMeter(model) as meter:
        step(model, plugin, clock, views, meter)
    seconds = []
    for _ in range(options.repeats):
        _wait(options.device)
        started = time.perf_counter()
        step(model, plugin, clock, views)
        _wait(options.device)
        seconds.append(time.perf_counter() - started)
    return min(seconds), meter.cost, grads


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="MoCoV3")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stages", type=int, nargs="+", default=list(range(1, 13)))
    options = parser.parse_args()
    torch.set_num_threads(1)
    views = list(torch.randn(2, options.batch, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(options.device))
    table = Table(title=f"{options.method}, ViT-Tiny, batch {options.batch}, {options.device}: without sharing → with")
    for heading in ("stage", "ms", "time saved", "saved MiB", "peak MiB", "GFLOPs forward", "FLOPs saved", "largest gradient difference"):
        table.add_column(heading, justify="right")
    for stage in options.stages:
        (slow, twice, wanted), (fast, once, got) = (measure(share, stage - 1, views, options) for share in (False, True))
        if [one is None for one in wanted] != [one is None for one in got]:
            raise SystemExit(f"stage {stage}: sharing the prefix changes which parameters have a gradient")
        pairs = [(one, other) for one, other in zip(wanted, got, strict=True) if one is not None and other is not None]
        table.add_row(
            f"{stage}",
            f"{slow * 1e3:.0f} → {fast * 1e3:.0f}",
            f"{1 - fast / slow:.0%}",
            f"{twice.saved_bytes / 2**20:.1f} → {once.saved_bytes / 2**20:.1f}",
            f"{twice.peak_bytes / 2**20:.1f} → {once.peak_bytes / 2**20:.1f}",
            f"{twice.flops_forward / 1e9:.2f} → {once.flops_forward / 1e9:.2f}",
            f"{1 - once.flops_forward / twice.flops_forward:.0%}",
            f"{max(float((one - other).abs().max()) for one, other in pairs):.1e}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
