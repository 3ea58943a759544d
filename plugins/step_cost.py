"""What one training step costs: bytes saved for backward, peak memory and FLOPs, counted while it runs.

The same counters see real tensors and fake ones, so that a prediction (fake tensors, no training) and a measurement are one piece of
code. Nothing here needs a GPU; on one, the peak is the allocator's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary


class StepCost(NamedTuple):
    """Cost of one step.

    Args:
        saved_bytes: bytes that autograd keeps between forward and backward, each storage once, parameters and buffers not counted.
        peak_bytes: largest sum of bytes alive at once: parameters, buffers, gradients, optimizer state, batch, activations.
        flops_forward: floating-point operations of matrix products and convolutions in the forward pass; a multiply-add is 2.
        flops_backward: the same in the backward pass.
    """

    saved_bytes: int
    peak_bytes: int
    flops_forward: int
    flops_backward: int


class StepMeter:
    """Count one training step. Compiled parts run eagerly while it counts.

    Args:
        model: whose parameters and buffers are not activations.
        optimizers: whose state counts towards the peak.
        beside: weights that are there besides the model's.

    Example:
        >>> from torch import nn
        >>> model, x = nn.Linear(4, 3), torch.ones(2, 4)
        >>> with StepMeter(model) as meter:
        ...     loss = model(x).sum()
        ...     meter.forward_is_done()
        ...     loss.backward()
        >>> meter.cost.flops_forward, meter.cost.saved_bytes  # 2·2·4·3 FLOPs; x is kept for the weight's gradient
        (48, 32)
    """

    cost: StepCost

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer] = (), batch: Any = None, beside: Iterable[Tensor] = ()) -> None:
        self._stay = [*model.parameters(), *model.buffers()]
        before = [p.grad for p in model.parameters() if p.grad is not None]
        state = [value for optimizer in optimizers for entry in optimizer.state.values() for value in entry.values()]
        self._alive = [*self._stay, *beside, *before, *state, *tree_leaves(batch)]
        self._saved: dict[int, int] = {}
        self._forward_flops: int | None = None
        self._cuda = next((value.device for value in self._stay if value.is_cuda), None)

    def __enter__(self) -> StepMeter:
        self._own = {_storage(value)._cdata for value in self._stay}
        self._flops = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward_flops})
        self._memory = _LiveBytes(self._alive)
        self._stack = ExitStack()
        self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        self._stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved))
        self._stack.enter_context(self._flops)
        self._stack.enter_context(self._memory)
        if self._cuda is not None:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        return self

    def forward_is_done(self) -> None:
        """Mark the end of the forward pass: what was counted before is forward, what follows backward."""
        self._forward_flops = self._flops.get_total_flops()

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        total = self._flops.get_total_flops()
        forward = total if self._forward_flops is None else self._forward_flops
        peak = self._memory.peak if self._cuda is None else torch.cuda.max_memory_allocated(self._cuda)
        self.cost = StepCost(sum(self._saved.values()), peak, forward, total - forward)

    def _pack(self, value: Tensor) -> Tensor:
        storage = _storage(value)
        if self._forward_flops is None and storage._cdata not in self._own:
            self._saved[storage._cdata] = storage.nbytes()
        return value


def count_samples(batch: Any) -> int:
    """Samples in ``batch``: the length of its first tensor that has one, however nested; 1 where there is none.

    Example:
        >>> count_samples(({"scale": torch.tensor(2.0), "x": torch.ones(5, 3)}, torch.ones(4)))
        5
    """
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if isinstance(first, Tensor) and first.ndim:  # nearly always; looking at all leaves takes longer than a small model's step
        return len(first)
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), 1)


def _convolution_backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: Any,
    _stride: Any,
    _padding: Any,
    _dilation: Any,
    transposed: bool,
    _output_padding: Any,
    _groups: int,
    output_mask: Sequence[bool],
    out_shape: Any,
) -> int:
    """Each of the two gradients costs what the forward pass does; torch 2.15's own formula counts the weight's once a group."""
    return 2 * prod(x if transposed else grad) * prod(weight[1:]) * sum(output_mask[:2])


def _storage(value: Tensor) -> torch.UntypedStorage:
    return value.untyped_storage()


class _LiveBytes(TorchDispatchMode):
    """Sum of the bytes of all storages alive, and its largest value: each is added when an operator first returns it."""

    def __init__(self, alive: Iterable[Any]) -> None:
        super().__init__()
        self.now = 0
        self._seen = WeakIdKeyDictionary()
        for value in alive:
            self._add(value)
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            self._add(value)
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, value: Any) -> None:
        if not isinstance(value, Tensor):
            return
        storage = _storage(value)
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.now += size
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size
