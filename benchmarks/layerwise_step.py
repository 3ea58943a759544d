"""Seconds and peak memory of a client's step at each stage of layer-wise training, over end to end's, beside what counted cost predicts.

    python benchmarks/layerwise_step.py                                 ViT-Tiny/4 (12 stages) and ResNet-18 (4), SimCLR, batch 16; minutes
    python benchmarks/layerwise_step.py --quick                         three stages each, batch 4
    python benchmarks/layerwise_step.py --clock cpu                     by processor time: on a machine that has other work to do
    python benchmarks/layerwise_step.py --ways plain fused inference    the same steps taken otherwise, against plain ones
    python benchmarks/layerwise_step.py --method MoCoV3 --device cuda --batch 256

A step is a federation's own (`LocalStep`): forward, backward, AdamW, target update; augmentation is none of it. Ways and stages take
turns on one thread; figures are medians. Where the last stage's loss is not that of a model of which the same parts were put in eval
mode by hand, or a way's differs from the plain one's, this stops.

Predicted twice, from a step counted on tensors without data: by FLOPs (of matrix products, convolutions, attention) alone; and by FLOPs
and the bytes that all other operators read and write, each at the rate that operators of the end-to-end step have here.
Memory: the peak of all tensors alive (on CUDA the allocator's), really and predicted. `x` is measured over predicted: 1.1 or less is
the goal.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import MixedPrecision, Precision
from our_loop import CLOCKS, quiet
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from featherlight.fed_loop.local_step import LocalStep
from featherlight.fed_loop.optimizers import ClientOptimizer
from featherlight.plugins import Chain, Clock, LayerFreezing, Plugin, Visit, find_targets
from featherlight.plugins.blocks import find_blocks
from featherlight.plugins.step_cost import StepCost
from featherlight.ssl_models import MoCoV3, SimCLR

METHODS = {"SimCLR": SimCLR, "MoCoV3": MoCoV3}
BLOCKS = {"vit_tiny": "backbone.blocks.*", "resnet18_cifar": "backbone.layer*"}
STAGES = {"vit_tiny": 12, "resnet18_cifar": 4}
WAYS = ("plain", "fused", "foreach", "inference", "channels_last", "bf16", "compile", "unshared")
ROUGH = ("bf16", "compile")
"""Ways that may round otherwise."""
MIB = 2**20


class Moved(TorchDispatchMode):
    """Bytes that operators without FLOPs of their own read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket not in flop_registry and not func.is_view and "empty" not in func.__name__:
            self.bytes += sum(value.nbytes for value in tree_leaves((args, kwargs, out)) if isinstance(value, Tensor))
        return out


class Stepper:
    """A model in a stage (0 and on; None: end to end), from weights that are always the same, and its step.

    Args:
        way: of :data:`WAYS`; model: whose tensors have no data, if not one with data.
    """

    def __init__(self, backbone: str, stage: int | None, way: str, options: argparse.Namespace, model: Any = None) -> None:
        real = model is None
        device = options.device if real else "cpu"
        if real:
            torch.manual_seed(0)
            model = METHODS[options.method](backbone, temperature=0.2).to(device)
        self.model = model
        plugins: list[Plugin] = [] if stage is None else [LayerFreezing(BLOCKS[backbone], share_prefix=way != "unshared")]
        self.chain, self.clock = Chain(plugins), Clock(stage or 0, 0)
        self.chain.attach(self.model)
        draw = torch.Generator().manual_seed(1) if real else None
        views = [torch.randn(options.batch, 3, 32, 32, generator=draw).to(device) for _ in range(2)]
        precision = MixedPrecision("bf16-mixed", device) if way == "bf16" else Precision()
        if way == "channels_last":
            self.model.to(memory_format=torch.channels_last)
            views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        self.batch = (tuple(views), torch.zeros(options.batch, dtype=torch.long, device=device))
        self.optimizer = ClientOptimizer(self.model).optimizer
        for group in self.optimizer.param_groups:
            group |= {"fused": True} if way == "fused" else {"foreach": True} if way == "foreach" else {}
        self.chain.advance(self.clock)
        self.chain.visit(Visit(self.clock.period))
        self.local = LocalStep(self.chain, precision)
        blocks = [module for module in self.model.modules() if "_frozen" in vars(module)]
        if way == "compile":
            for block in blocks:
                block.compile()
        if way == "inference":
            for block in blocks:
                if block._frozen:
                    block.forward = without_autograd(block.forward)

    def step(self) -> Tensor:
        loss = self.local(self.model, self.optimizer, self.batch, self.clock)
        self.clock = Clock(self.clock.period, self.clock.step + 1)
        return loss

    def cost(self) -> StepCost:
        """Of a step behind the first, which makes the optimizer's state."""
        return self.local.metered(self.model, self.optimizer, self.batch, self.clock)[1]


def without_autograd(forward: Any) -> Any:
    """``forward`` in inference mode; what comes out is copied, since nothing may keep an inference tensor for backward."""

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            out = forward(x)
        return out.clone()

    return run


class Predicted(NamedTuple):
    """Of one step: FLOPs, bytes that other operators move, and peak bytes."""

    flops: int
    moved: int
    peak: int


def predicted(backbone: str, stage: int | None, options: argparse.Namespace) -> Predicted:
    with torch.device("meta"):
        model = METHODS[options.method](backbone, temperature=0.2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        stepper = Stepper(backbone, stage, "plain", options, model.to_empty(device="cpu"))
        stepper.step()
        with Moved() as moved:
            cost = stepper.cost()
    return Predicted(cost.flops_forward + cost.flops_backward, moved.bytes, cost.peak_bytes)


class Shares(TorchDispatchMode):
    """Seconds of one step: in operators that have FLOPs, in the optimizer's, in all others."""

    def __init__(self, stepper: Stepper, options: argparse.Namespace) -> None:
        super().__init__()
        self.seconds = {"with FLOPs": 0.0, "the optimizer's": 0.0, "others": 0.0}
        self._device, self._now, self._optimizing = options.device, CLOCKS[options.clock], False
        hooks = stepper.optimizer.register_step_pre_hook(self._begins), stepper.optimizer.register_step_post_hook(self._ends)
        with self:
            stepper.step()
        for hook in hooks:
            hook.remove()

    def _begins(self, *_: Any) -> None:
        self._optimizing = True

    def _ends(self, *_: Any) -> None:
        self._optimizing = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = self._now()
        out = func(*args, **(kwargs or {}))
        _wait(self._device)
        kind = "with FLOPs" if func._overloadpacket in flop_registry else "the optimizer's" if self._optimizing else "others"
        self.seconds[kind] += self._now() - started
        return out


def by_hand(backbone: str, options: argparse.Namespace) -> float:
    """The last stage's first loss, of a plain model of which everything before the last block was put in eval mode."""
    stepper = Stepper(backbone, None, "plain", options)
    online = find_blocks(stepper.model, BLOCKS[backbone])
    copies = [online.moved(leader, follower) for follower, leader in find_targets(stepper.model).items()]
    for tower in filter(None, [online, *copies]):
        for module in (*tower.stem_modules(), *tower.blocks[:-1]):
            module.eval()
    return float(stepper.model.training_step(stepper.batch, 0))


def timed(steppers: Sequence[Stepper], options: argparse.Namespace) -> list[float]:
    """Median seconds of each one's step; all take turns, after one that is not counted."""
    took: list[list[float]] = [[] for _ in steppers]
    for repeat in range(options.repeats + 1):
        for stepper, seconds in zip(steppers, took):
            _wait(options.device)
            started = CLOCKS[options.clock]()
            stepper.step()
            _wait(options.device)
            if repeat:
                seconds.append(CLOCKS[options.clock]() - started)
    return [statistics.median(seconds) for seconds in took]


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def study(backbone: str, options: argparse.Namespace, console: Console) -> None:
    last = STAGES[backbone]
    stages = [stage for stage in options.stages or ([1, last // 2, last] if options.quick else range(1, last + 1)) if stage <= last]
    whole, *staged = (Stepper(backbone, stage, "plain", options) for stage in (None, *(stage - 1 for stage in stages)))
    first = {stage: float(stepper.step()) for stage, stepper in zip((None, *stages), (whole, *staged))}
    if last in first:
        same(f"stage {last}", first[last], by_hand(backbone, options))
    counted = [predicted(backbone, stage, options) for stage in (None, *(stage - 1 for stage in stages))]
    peaks = [stepper.cost().peak_bytes for stepper in (whole, *staged)]
    seconds = timed([whole, *staged], options)
    shares = Shares(whole, options).seconds
    rates = counted[0].flops / shares["with FLOPs"], counted[0].moved / (shares["the optimizer's"] + shares["others"])
    modelled = [cost.flops / rates[0] + cost.moved / rates[1] for cost in counted]
    title = f"{backbone}, {options.method}, batch {options.batch}, {options.device}, {options.clock} time, torch {torch.__version__}"
    table = Table(title=f"{title}: a step's share of end to end's")
    for heading in ("stage", "ms", "measured", "by FLOPs", "x", "by FLOPs and bytes", "x", "peak MiB", "measured", "predicted", "x"):
        table.add_column(heading, justify="right")
    for place, stage in enumerate(("end to end", *stages)):
        time, memory = seconds[place] / seconds[0], peaks[place] / peaks[0]
        ratios = [counted[place].flops / counted[0].flops, modelled[place] / modelled[0], counted[place].peak / counted[0].peak]
        by_flops, by_both, by_bytes = ratios
        cells = [f"{seconds[place] * 1e3:.0f}", f"{time:.3f}", f"{by_flops:.3f}", f"{time / by_flops:.2f}", f"{by_both:.3f}"]
        cells += [f"{time / by_both:.2f}", f"{peaks[place] / MIB:.0f}", f"{memory:.3f}", f"{by_bytes:.3f}", f"{memory / by_bytes:.2f}"]
        table.add_row(str(stage), *cells)
    console.print(table)
    if options.profile:
        for stage, stepper in zip(("end to end", *stages), (whole, *staged)):
            told = ", ".join(f"{name} {value * 1e3:.1f}" for name, value in Shares(stepper, options).seconds.items())
            console.print(f"    {stage}: ms in operators: {told}")
    if ways := [way for way in options.ways if way != "plain"]:
        otherwise(backbone, stages, first, ways, options, console)


def otherwise(
    backbone: str, stages: Sequence[int], first: dict[Any, float], ways: Sequence[str], options: argparse.Namespace, console: Console
) -> None:
    """The same steps taken in other ways: how many times as fast, the plain one beside each."""
    table = Table(title="times as fast as plain")
    for heading in ("stage", *ways):
        table.add_column(heading, justify="right")
    for stage in (None, *stages):
        number = None if stage is None else stage - 1
        steppers = [Stepper(backbone, number, way, options) for way in ("plain", *ways)]
        for way, stepper in zip(("plain", *ways), steppers):
            same(f"{way} in stage {stage}", float(stepper.step()), first[stage], 0.05 if way in ROUGH else 1e-4)
        plain, *others = timed(steppers, options)
        table.add_row("end to end" if stage is None else str(stage), *(f"{plain / seconds:.2f}" for seconds in others))
    console.print(table)


def same(what: str, got: float, wanted: float, tolerance: float = 1e-5) -> None:
    """
    Raises:
        SystemExit: they are further apart than ``tolerance`` of the wanted one.
    """
    if not abs(got - wanted) <= tolerance * abs(wanted):
        raise SystemExit(f"{what}: the first step's loss is {got:.6f}, and should be {wanted:.6f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=list(BLOCKS), default=list(BLOCKS))
    parser.add_argument("--method", choices=METHODS, default="SimCLR")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--stages", type=int, nargs="+", help="counted from 1; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["plain"], help="take the steps in these ways, too")
    parser.add_argument("--profile", action="store_true", help="where the time goes, by kind of operator")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.repeats = 4, 3
    quiet()
    for backbone in options.backbones:
        study(backbone, options, Console(width=150))


if __name__ == "__main__":
    main()
