"""A model's front on a device and its rear on the server: what each computes, holds and costs. Training and prediction share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.fabric.plugins import Precision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from featherlight.fed_loop.divided_batch import DividedBatch, stand_in
from featherlight.fed_loop.local_step import as_weights
from featherlight.fed_loop.plan import Plan
from featherlight.plugins import Partition
from featherlight.plugins.cut import Give, InOrder
from featherlight.plugins.present import count
from featherlight.plugins.step_cost import StepCost, StepMeter


class Rear:
    """The model as the server trains it: a training step takes activations at the cut. Everything else is the model's own.

    Args:
        module: the whole model.
        partition: where it is cut.
    """

    def __init__(self, module: nn.Module, partition: Partition) -> None:
        self._module, self._cut = module, partition.cut
        self.give: Give = _nothing
        self.rows = 0
        """Samples that the last step had in front of the cut, in all its passes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.rows = 0
        with self._cut.fed(self._counted):
            out = self._module.training_step(batch, batch_idx)  # type: ignore[operator]
        self._cut.check(out["loss"] if isinstance(out, Mapping) else out)
        return out

    def _counted(self, branch: str, rows: int) -> Tensor:
        self.rows += rows
        return self.give(branch, rows)


def _nothing(branch: str, rows: int) -> Tensor:
    raise RuntimeError("no activations are there for this step")


def give_views(activations: Sequence[Tensor]) -> Give:
    """What the cut puts out for passes that take views in order."""
    order = InOrder([len(value) for value in activations])

    def give(branch: str, rows: int) -> Tensor:
        views = order.views(branch, rows)
        return activations[views[0]] if len(views) == 1 else torch.cat([activations[view] for view in views])

    return give


def passes(module: nn.Module, partition: Partition, batch: Any) -> list[tuple[str, tuple[int, ...]]]:
    """How a training step takes a batch through the front: for each pass, its branch and its views.

    It is found out in evaluation mode, without gradients, and leaves no buffer changed. Where tensors have data, it is made sure of.

    Raises:
        ValueError: the step takes something else through the front than the batch's views in order.
    """
    cut, views = partition.cut, DividedBatch.of(batch).views
    modes = [(inner, inner.training) for inner in module.modules()]
    before = [(buffer, buffer.clone()) for buffer in module.buffers()] if has_data(views[0]) else []
    module.eval()
    try:
        seen = cut.calls(lambda: module.training_step(batch, 0))  # type: ignore[operator]
        order = InOrder([len(view) for view in views])
        found = [(branch, order.views(branch, len(out))) for branch, out in seen]
        if not found:
            raise ValueError(f"{type(module).__name__}.training_step never gets to the block where the model is cut")
        if has_data(views[0]):
            for (branch, which), (_, out) in zip(found, seen):
                with torch.no_grad():
                    ours = torch.cat([cut.run(views[view], branch) for view in which])
                near = 1e-2 * float(out.nan_to_num(0.0, 0.0, 0.0).abs().max())
                if ours.shape != out.shape or not torch.allclose(ours, out, rtol=1e-2, atol=near, equal_nan=True):
                    raise ValueError(
                        f"{type(module).__name__}.training_step takes something else through the front than the views of a batch in "
                        "order, each as its forward takes it: such a model cannot be divided"
                    )
        return found
    finally:
        for inner, mode in modes:
            inner.training = mode
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def has_data(value: Tensor) -> bool:
    """Whether ``value`` has data, which a prediction's tensors have not."""
    from torch._subclasses import FakeTensor

    return not (value.is_meta or isinstance(value, FakeTensor))


def device_plan(plan: Plan, partition: Partition) -> Plan:
    """What of a turn is the device's: the front, and its own head where it has one."""

    def own(entries: dict[str, Tensor]) -> dict[str, Tensor]:
        head = "" if partition.on_device is None else f"{partition.on_device[0]}."
        return {name: value for name, value in entries.items() if partition.cut.has(name) or (head and name.startswith(head))}

    received, sent = own(plan.received), own(plan.sent)
    structure = tuple((tuple(value.shape), name in sent) for name, value in received.items())
    copies = 0  # momentum copies of the front, which devices have where it trains
    if partition.buffer is None:
        copies = _parameters(partition.cut.front(all_branches=True)) - _parameters(partition.cut.front())
    return Plan(received, sent, count(received) + copies, count(sent), ("device", structure))


def server_plan(plan: Plan, device: Plan) -> Plan:
    """What of a turn is the server's: everything but what the device trains or, of a front that stays as it is, holds."""
    held = plan.params_held - device.params_held
    return plan._replace(params_held=held, params_trained=plan.params_trained - device.params_trained)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def forward_only(partition: Partition, views: Sequence[Tensor], precision: Precision) -> list[Tensor]:
    """A device's pass of all views through a front that does not train."""
    with torch.no_grad(), precision.forward_context():
        return [partition.cut.run(view) for view in as_weights(list(views), precision)]


def forward_only_metered(partition: Partition, views: Sequence[Tensor], precision: Precision) -> tuple[list[Tensor], StepCost]:
    """As :func:`forward_only`; what it costs the device, too."""
    with StepMeter(partition.cut.front(), batch=list(views)) as meter:
        out = forward_only(partition, views, precision)
    return out, meter.cost


def rear_only(cost: StepCost, rear: Rear, front_flops: Callable[[], float], device: StepCost | None = None) -> StepCost:
    """What the server computed of a metered step.

    Args:
        cost: of the step, in which the front was gone through on tensors without data; the peak cannot be told from it.
        front_flops: of one sample in front of the cut; device: what of the backward pass was the device's.
    """
    forward = cost.flops_forward - rear.rows * front_flops()
    return StepCost(cost.saved_bytes, 0, round(forward), cost.flops_backward - (0 if device is None else device.flops_backward))


def front_flops(partition: Partition, shape: Sequence[int], precision: Precision) -> float:
    """FLOPs of one image of ``shape``, ``(C, H, W)``, in front of the cut, counted on tensors without data."""
    counter = FlopCounterMode(display=False)
    images = as_weights(torch.empty(2, *shape, device="meta"), precision)
    with torch.no_grad(), suppress(_AtCut), partition.cut.fed(_end), counter:
        partition.cut.model(images)
    return counter.get_total_flops() / 2


class _AtCut(Exception):  # nothing is wrong
    pass


def _end(branch: str, rows: int) -> Tensor:
    raise _AtCut


def server_batch(shapes: Sequence[tuple[int, ...]], single: bool, labels: Sequence[Tensor], precision: Precision) -> Any:
    """What the server's training step is called with."""
    return as_weights(stand_in(shapes, single, labels), precision)
