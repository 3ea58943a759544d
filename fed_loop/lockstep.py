"""One training step that device and server take together: activations up, then gradients down, or a loss on the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import Precision
from torch import Tensor
from torch.optim import Optimizer

from featherlight.fed_loop.divided_batch import DividedBatch
from featherlight.fed_loop.local_step import LocalStep, as_weights
from featherlight.fed_loop.trainees import Trainee
from featherlight.fed_loop.two_parts import Rear, front_flops, has_data, rear_only, server_batch
from featherlight.plugins import Clock, Message, Partition
from featherlight.plugins.step_cost import StepCost, StepMeter

Travel = Callable[[Message], tuple[int, Message]]
"""A message → its length in bytes, and what arrives."""


class Step(NamedTuple):
    """What one step came to.

    Args:
        loss: the server's; bytes_up, bytes_down: lengths of its messages; seconds: of the device's passes.
        server: what the server computed, where that was asked for.
    """

    loss: Tensor
    bytes_up: int
    bytes_down: int
    seconds: float
    server: StepCost | None


class Refused(ValueError):
    """The device will not send these activations."""


class Lockstep:
    """Steps of one model that is divided.

    Args:
        own: the model, whole; its optimizer is stepped as a whole, too, which does to each part what an optimizer of its own would.
        calls: passes of a training step through the front: branch, and views.
        backward: fills gradients from a loss; update: takes the optimizer's step; travel: the wire.
    """

    def __init__(
        self,
        own: Trainee,
        partition: Partition,
        calls: Sequence[tuple[str, tuple[int, ...]]],
        precision: Precision,
        backward: Callable[[Tensor], None],
        update: Callable[[Optimizer], object],
        travel: Travel,
    ) -> None:
        self._own, self._partition, self._calls, self._precision = own, partition, calls, precision
        self._base_backward, self._travel = backward, travel
        self._step = LocalStep(own.chain, precision, self._backward, update=update)
        self._rear = Rear(own.module, partition)

    def __call__(self, batch: Any, clock: Clock, metered: StepCost | None = None) -> Step:
        """Take one step.

        Args:
            metered: what the step costs the device, where the server's part is to be counted, too.

        Raises:
            Refused: activations that must not be sent.
            ValueError: the codec does not fit the model's.
        """
        partition = self._partition
        divided = DividedBatch.of(batch)
        started = time.perf_counter()
        self._outs = self._front(divided)
        labels = divided.labels(partition.labels)
        up, arrived = self._travel(self.message(self._outs, labels))
        self._seconds, self._down = time.perf_counter() - started, 0
        self._labels = divided.others  # the device's own, whatever of them travels
        self._received = self._decoded(arrived)
        given = iter(zip(self._calls, self._received))
        self._rear.give = lambda branch, rows: _next(given, branch, rows)
        shapes = [tuple(view.shape) for view in divided.views]
        on_server = [arrived[f"labels.{place}"] for place in range(len(labels))]
        batch = server_batch(shapes, divided.single, on_server, self._precision)
        rear: Any = self._rear
        if metered is None:
            loss, cost = self._step(rear, self._own.optimizer, batch, clock), None
        else:
            loss, whole = self._step.metered(rear, self._own.optimizer, batch, clock)
            per_sample = front_flops(partition, divided.views[0].shape[1:], self._precision)
            head = metered.flops_forward - self._rear.rows * per_sample  # the device's own, which ran between backward passes
            cost = rear_only(whole, self._rear, lambda: per_sample, metered)
            cost = cost._replace(flops_backward=round(cost.flops_backward - head))
        return Step(loss, up, self._down, self._seconds, cost)

    def message(self, outs: Sequence[Tensor], labels: Sequence[Tensor]) -> Message:
        """What goes up."""
        entries: Message = {f"labels.{place}": value for place, value in enumerate(labels)}
        for place, out in enumerate(outs):
            if has_data(out):
                try:
                    self._partition.codec.check(out)
                except ValueError as error:
                    raise Refused(str(error)) from error
                self._partition.codec.check_sign(out)
            entries |= {f"{place}.{part}": value for part, value in self._partition.codec.encode(out).items()}
        return entries

    def device_cost(self, batch: Any) -> StepCost:
        """What a step costs the device: its part is rehearsed, and leaves nothing behind."""
        divided, partition = DividedBatch.of(batch), self._partition
        device = partition.cut.front(all_branches=len({branch for branch, _ in self._calls}) > 1)
        if partition.on_device is not None:
            device.add_module("head", partition.on_device[1])
        own = [parameter for parameter in device.parameters() if parameter.requires_grad]
        for parameter in own:
            parameter.grad = None
        state = {parameter: self._own.optimizer.state[parameter] for parameter in own if parameter in self._own.optimizer.state}
        before = [(buffer, buffer.clone()) for buffer in device.buffers()]
        optimizer: Any = SimpleNamespace(state=state)
        with torch.random.fork_rng(devices=[]), StepMeter(device, [optimizer], list(divided.views)) as meter:
            outs = self._front(divided)
            losses = self._device_losses(outs, divided.others)
            meter.forward_is_done()
            if partition.gradients:
                trained = [out for out in outs if out.requires_grad]
                torch.autograd.backward(trained, [torch.ones_like(out) for out in trained])
            for loss in losses:
                loss.backward()
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        for parameter in own:
            parameter.grad = None
        return meter.cost

    def _front(self, divided: DividedBatch) -> list[Tensor]:
        outs = []
        with self._precision.forward_context():
            views = as_weights(list(divided.views), self._precision)
            for branch, which in self._calls:
                images = views[which[0]] if len(which) == 1 else torch.cat([views[view] for view in which])
                with torch.set_grad_enabled(not branch):  # momentum copies are not trained by gradients
                    outs.append(self._partition.cut.run(images, branch))
        return outs

    def _decoded(self, arrived: Message) -> list[Tensor]:
        received = []
        for place, ((branch, _), out) in enumerate(zip(self._calls, self._outs)):
            entries = {part: arrived[f"{place}.{part}"] for part in ("codes", "scale") if f"{place}.{part}" in arrived}
            value = as_weights(self._partition.codec.decode(entries, tuple(out.shape)), self._precision).detach()
            received.append(value.requires_grad_(self._partition.gradients and not branch))
        return received

    def _device_losses(self, outs: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
        local = self._partition.local_loss
        if local is None:
            return []
        if not labels:
            raise ValueError("the device's own head learns from labels, which these batches do not have")
        with self._precision.forward_context():
            return [local(out, labels[0].repeat(len(which))) for out, (branch, which) in zip(outs, self._calls) if not branch]

    def _backward(self, loss: Tensor) -> None:
        """The server's backward pass, then the device's."""
        self._base_backward(loss)
        places = [place for place, value in enumerate(self._received) if value.requires_grad]
        if places:
            grads = {str(place): _grad(self._received[place]) for place in places}
            length, arrived = self._travel(grads)
            self._down += length
        started = time.perf_counter()
        if places:
            outs = [self._outs[place] for place in places]
            torch.autograd.backward(outs, [arrived[str(place)].to(out.dtype) for place, out in zip(places, outs)])
        for own in self._device_losses(self._outs, self._labels):
            self._base_backward(own)
        self._seconds += time.perf_counter() - started


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _next(given: Iterator[tuple[tuple[str, tuple[int, ...]], Tensor]], branch: str, rows: int) -> Tensor:
    (wanted, _), value = next(given)
    if (wanted, len(value)) != (branch, rows):
        raise RuntimeError(f'a training step went through the front otherwise than before: "{branch}" with {rows} samples')
    return value
