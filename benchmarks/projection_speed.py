"""How long lifting and projecting take, what they hold, and what that is of a client's round, in one run.

    python benchmarks/projection_speed.py                 ResNet-18 (11.2 M parameters) and GPT-2 (124.4 M), d = 65,536, one thread
    python benchmarks/projection_speed.py --quick         ResNet-18 only

Beside Fastfood stands the same Fastfood with a radix-2 loop of whole-vector additions for a transform, checked to give the same numbers.
Beside all stands the time in which the bytes that must move can be moved: lifting reads z and writes D numbers, projecting reads D
and writes z, float32, at the rate of a copy of D numbers (D read, D written) in this run. Lifting writes to memory that was
there before, as the copy does; the first touch of fresh memory costs either as much again and more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from featherlight.plugins import Clock, IntrinsicProjection, Visit
from featherlight.plugins.projections import PROJECTIONS, Fastfood
from featherlight.plugins.step_cost import StepMeter
from featherlight.ssl_models import Classifier

GPT2 = 124_439_808
DIM = 65_536
STEPS, BATCH = 10, 32


def median_seconds(act: Callable[[], object], runs: int, warm_up: bool = True) -> float:
    if warm_up:
        act()
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        act()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def radix2(x: Tensor) -> Tensor:
    """H·x by halves: log₂ L times a sum and a difference of whole vectors, between two buffers. Of three ways to write it the fastest."""
    x, other = x.clone(), torch.empty_like(x)
    half = 1
    while half < len(x):
        pairs, out = x.view(-1, 2, half), other.view(-1, 2, half)
        torch.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=out[:, 1])
        x, other, half = other, x, 2 * half
    return x


class ByRadix2:
    """The same A as a Fastfood's, step by step over all L numbers."""

    def __init__(self, map_: Fastfood) -> None:
        self.map = map_
        self.rows, self.columns = map_._row_order, map_._column_order
        self.normal = map_._normal.transpose(0, 1).reshape(-1).float()

    def lift(self, z: Tensor) -> Tensor:
        padded = z.new_zeros(self.map.length)
        padded[: len(z)] = z * self.map._signs
        mixed = radix2(padded).view(len(self.rows), -1)[self.rows][:, self.columns].view(-1)
        return radix2(mixed.mul_(self.normal))[: self.map.size] * self.map._scale

    def project(self, g: Tensor) -> Tensor:
        padded = g.new_zeros(self.map.length)
        padded[: len(g)] = g
        mixed = radix2(padded).mul_(self.normal).view(len(self.rows), -1)
        back = mixed[self.rows.argsort()][:, self.columns.argsort()].view(-1)
        return radix2(back)[: self.map.dim] * self.map._signs * self.map._scale


def same(one: Tensor, other: Tensor) -> str:
    off = float((one - other).norm() / other.norm())
    if off > 1e-4:
        raise SystemExit(f"Fastfood and its radix-2 form differ by {off:.1e} of the result: one of them is wrong")
    return f"{off:.0e}"


def speed(size: int, runs: int, radix_runs: int, table: Table) -> None:
    """Rows of a table: each projection at D = ``size``."""
    random = torch.Generator().manual_seed(0)
    z, g, out = torch.randn(DIM, generator=random), torch.randn(size, generator=random), torch.zeros(size)
    rate = 8 * size / median_seconds(lambda: out.copy_(g), 2 * runs + 1)
    bound = 4 * (size + DIM) / rate
    for name, kind in PROJECTIONS.items():
        started = time.perf_counter()
        map_ = kind(size, DIM, 0)
        made = time.perf_counter() - started
        lift, project = median_seconds(lambda: map_.lift(z, out=out), runs), median_seconds(lambda: map_.project_(g), runs)  # noqa: B023
        cells = ["", "", ""]
        if isinstance(map_, Fastfood):
            slow = ByRadix2(map_)
            g.copy_(torch.randn(size, generator=random))  # project_ used it up
            lift_off, project_off = same(map_.lift(z), slow.lift(z)), same(map_.project(g), slow.project(g))
            slow_lift = median_seconds(lambda: slow.lift(z), radix_runs, False)  # noqa: B023
            slow_project = median_seconds(lambda: slow.project(g), radix_runs, False)  # noqa: B023
            cells = [
                f"{slow_lift + slow_project:.2f}",
                f"{(slow_lift + slow_project) / (lift + project):.1f}",
                f"{lift_off}, {project_off}",
            ]
        g.normal_(generator=random)
        table.add_row(
            f"{size / 1e6:.1f} M", name, f"{made:.3f}", f"{lift:.4f}", f"{project:.4f}", *cells, f"{rate / 1e9:.1f}", f"{bound:.4f}",
            f"{lift / bound:.2f}", f"{project / bound:.2f}", f"{(lift + project) / bound / 2:.2f}",
        )  # fmt: skip


def life(
    model: nn.Module, kind: str, subspaces: int = 1, periods_per_span: int | None = None
) -> tuple[IntrinsicProjection, dict[str, Tensor]]:
    """A plugin that has sent and received, and an update of the model."""
    plugin = IntrinsicProjection(DIM, subspaces, periods_per_span, projection=kind)  # type: ignore[arg-type]
    plugin.attach(model)
    update = {name: torch.full_like(value, 1e-3) for name, value in model.named_parameters()}
    return plugin, update


def turn(plugin: IntrinsicProjection, model: nn.Module, update: dict[str, Tensor], round: int) -> None:
    """Encode an update (with K subspaces those of K clients), and decode: what Σ became, added to the parameters."""
    visits = [Visit(round, client) for client in range(plugin.subspaces)]
    plugin.encode_down(dict(model.named_parameters()), visits[0])
    z = sum(plugin.decode(plugin.encode(update, visit), visit)["intrinsic.z"] for visit in visits)
    changes = plugin.lift({"intrinsic.z": z}, Clock(round))
    with torch.no_grad():
        for name, change in changes.items():
            model.get_parameter(name).add_(change)
    del changes, change
    plugin.settle(model, Clock(round))
    plugin.decode_down({}, visits[0])


def buffers(model: nn.Module, kind: str, subspaces: int = 1, periods_per_span: int | None = None) -> float:
    """Largest memory at once of two rounds of encoding and decoding, beyond the parameters and the update, in vectors of D float32."""
    plugin, update = life(model, kind, subspaces, periods_per_span)
    held = sum(value.untyped_storage().nbytes() for value in (*model.parameters(), *model.buffers(), *update.values()))
    with StepMeter(model, batch=update) as meter:
        for round in range(2):
            turn(plugin, model, update, round)
    return (meter.cost.peak_bytes - held) / (4 * sum(value.numel() for value in model.parameters()))


class Flat(nn.Module):
    """D parameters in one."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))


def resnet18() -> Classifier:
    torch.manual_seed(0)
    model = Classifier("resnet18_cifar", optimizer="sgd", lr=0.1)
    model._log = lambda *_: None  # type: ignore[method-assign, assignment]
    return model


def step_seconds(runs: int) -> float:
    """Median seconds of a ResNet-18's step, batch 32, 32 px."""
    model, batch = resnet18(), (torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,)))
    optimizer = model.configure_optimizers()["optimizer"]

    def step() -> None:
        optimizer.zero_grad()
        model.training_step(batch).backward()
        optimizer.step()

    return median_seconds(step, runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=7, help="medians of so many")
    parser.add_argument("--quick", action="store_true", help="ResNet-18 only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=190)
    size = sum(value.numel() for value in resnet18().parameters())
    table = Table(title=f"seconds, d = {DIM:,}, {arguments.threads} thread(s); bound: 4·(D + d) bytes at the rate of a copy")
    for heading in (
        "D", "projection", "make", "lift", "project", "both, radix-2", "times ours", "off", "copy GB/s", "bound of each", "lift / bound",
        "project / bound", "both / bound",
    ):  # fmt: skip
        table.add_column(heading, justify="right")
    speed(size, arguments.runs, 3, table)
    if not arguments.quick:
        speed(GPT2, max(3, arguments.runs // 2), 2, table)
    console.print(table)

    seconds = step_seconds(arguments.runs)
    share = Table(
        title=f"of a client's round of {STEPS} steps: ResNet-18, batch {BATCH}, 32 px, {seconds:.3f} s a step; memory in vectors of D"
    )
    for heading in (
        "projection",
        "encode + decode, seconds",
        "of the round",
        "A anew each round, seconds",
        "of the round",
        "peak memory, ResNet-18",
        "the same, A anew",
        "the same, K = 8",
        "peak memory, GPT-2's D",
    ):
        share.add_column(heading, justify="right")
    for kind in PROJECTIONS:
        model = resnet18()
        took = []
        for periods_per_span in (None, 1):
            plugin, update = life(model, kind, periods_per_span=periods_per_span)
            rounds = iter(range(10**6))
            took.append(median_seconds(lambda: turn(plugin, model, update, next(rounds)), arguments.runs))  # noqa: B023
        share.add_row(
            kind, *(cell for coding in took for cell in (f"{coding:.3f}", f"{coding / (STEPS * seconds + coding):.2%}")),
            f"{buffers(model, kind):.2f}", f"{buffers(model, kind, 1, 1):.2f}", f"{buffers(model, kind, 8):.2f}",
            "" if arguments.quick else f"{buffers(Flat(GPT2), kind):.2f}",
        )  # fmt: skip
    console.print(share)


if __name__ == "__main__":
    main()
