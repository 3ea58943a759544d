"""Several clients' weights side by side on one device, and steps that train them all at once: a lane each, none of which sees another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins import Precision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import dropout
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import NAdam, Optimizer, RAdam
from torch.optim.adadelta import Adadelta
from torch.optim.adagrad import Adagrad
from torch.optim.adam import Adam
from torch.optim.adamax import Adamax
from torch.optim.adamw import AdamW
from torch.optim.rmsprop import RMSprop
from torch.optim.sgd import SGD
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from featherlight.fed_loop.local_step import as_weights
from featherlight.fed_loop.plan import Plan
from featherlight.plugins.optimizer_state import has_own_decay

ELEMENTWISE = (SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, Adadelta, Adamax)
"""Optimizers that move each element by its own gradient and past: what is side by side moves as it would alone."""


def why_not(module: nn.Module, optimizer: Optimizer, precision: Precision) -> str:
    """Why several clients cannot be trained at once with these, or nothing."""
    name = type(module).__name__
    if type(optimizer) not in ELEMENTWISE:
        known = ", ".join(kind.__name__ for kind in ELEMENTWISE)
        return f"{type(optimizer).__name__} may look at more than one element at a time, as {known} do not"
    if has_own_decay(optimizer):
        return "some parameters have a weight decay that a plugin works out"
    if getattr(precision, "scaler", None) is not None:
        return "one loss scaler would serve several clients, and leave out a step of all where one overflows"
    if hasattr(module, "after_optimizer_step"):
        return f"{name}.after_optimizer_step acts on one client's weights"
    if getattr(module, "queues", ()):
        return f"{name} pushes to a queue in every step"
    for path, inner in module.named_modules():
        if isinstance(inner, _BatchNorm) and inner.track_running_stats and inner.momentum is None:
            return f'"{path}" averages its running statistics by a count of steps (momentum=None)'
    return ""


class _TrainingStep(nn.Module):
    """A module whose ``forward`` is the other's ``training_step``: only that can be called with weights from elsewhere."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any, batch_idx: int) -> Tensor:
        with _unlogged(self.module):
            out = self.module.training_step(batch, batch_idx)  # type: ignore[operator]
        return out["loss"] if isinstance(out, Mapping) else out


@contextmanager
def _unlogged(module: nn.Module) -> Iterator[None]:
    """Without ``self.log``, which reads a number off a tensor, and in a federation has nobody to tell it to."""
    names = [name for name in ("log", "log_dict") if hasattr(module, name) and name not in vars(module)]
    for name in names:
        vars(module)[name] = lambda *_, **__: None
    try:
        yield
    finally:
        for name in names:
            del vars(module)[name]


class _OwnDropout(TorchFunctionMode):
    """Dropout within a step of several lanes: each lane's mask comes from its own generator, as it would alone."""

    def __init__(self, generators: Sequence[torch.Generator], lane: Tensor) -> None:
        super().__init__()
        self._generators, self._lane = generators, lane

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not dropout:
            return func(*args, **(kwargs or {}))
        return self._dropout(*args, **(kwargs or {}))

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or not p:
            return x
        shape, dtype, device = x.shape, x.dtype, x.device  # of one lane
        with torch._C._DisableFuncTorch():  # drawn outside, for all lanes; each then takes its own
            masks = torch.stack(
                [torch.empty(shape, dtype=dtype, device=device).bernoulli_(1 - p, generator=own) for own in self._generators]
            )
            masks.div_(1 - p if p < 1 else 1.0)
        mask = masks.index_select(0, self._lane.view(1)).squeeze(0)
        return x.mul_(mask) if inplace else x * mask


class Lanes:
    """Weights of up to ``size`` clients that train the same of one module, and the optimizer that moves them.

    Args:
        module: is called with the lanes' weights in place of its own.
        optimizer: as which each client's would be; its options are read anew at every beginning.
        plan: what is trained, the same for all clients.
        precision, clip: as for :class:`~featherlight.fed_loop.local_step.LocalStep`.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, plan: Plan, size: int, precision: Precision, clip: float | None) -> None:
        self._step = _TrainingStep(module)
        self._like, self._precision, self._clip = optimizer, precision, clip
        self.size = size
        self.values = {name: _several(value, size) for name, value in plan.sent.items()}
        """By name, (size, …): what is trained of each client."""
        self._names = {id(value): name for name, value in plan.sent.items()}
        self._optimizer = self._make(self.values)
        self._draws = any(isinstance(inner, nn.Dropout) and inner.p for inner in module.modules())

    def begin(self, apart: Mapping[str, Tensor], seeds: Sequence[int]) -> None:
        """New clients, ``size`` of them or fewer, have been put into :attr:`values`.

        Args:
            apart: (clients, …) by name: what is not trained, and yet differs from client to client.
            seeds: of each client's own randomness.
        """
        self._optimizer.state.clear()
        for group, like in zip(self._optimizer.param_groups, self._like.param_groups, strict=True):
            group.update({name: value for name, value in like.items() if name != "params"})
        self._apart = dict(apart)
        self._past: dict[str, dict[str, Any]] = {}
        self._number = -1
        device = next(iter(self.values.values())).device
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds] if self._draws else []

    def step(self, at: slice, batches: Sequence[Flat], number: int) -> Tensor:
        """One step of the lanes ``at``, each on its own batch, all of one kind.

        Args:
            number: of the step, counted from 0 and the same in all lanes.

        Returns:
            Their losses, (lanes,), detached.
        """
        whole = at == slice(0, self.size)
        values = self.values if whole else {name: _part(value, at) for name, value in self.values.items()}
        optimizer = self._optimizer if whole else self._with_past(at, values, number)
        leaves, spec = _stacked(batches)
        lane = torch.arange(len(batches), device=next(iter(values.values())).device)
        weights = {f"module.{name}": value for name, value in values.items()}
        weights |= {f"module.{name}": value[at] for name, value in self._apart.items()}

        def loss_of(weights: dict[str, Tensor], leaves: list[Any], lane: Tensor) -> Tensor:
            with _OwnDropout(self._generators[at], lane) if self._draws else nullcontext():
                return functional_call(self._step, weights, (tree_unflatten(leaves, spec), number))

        dims = 0, [0 if isinstance(leaf, Tensor) else None for leaf in leaves], 0
        with self._precision.forward_context():
            losses = torch.vmap(loss_of, dims, randomness="error")(weights, as_weights(leaves, self._precision), lane)
        optimizer.zero_grad()
        self._precision.backward(losses.sum(), None)
        if self._clip is not None:
            _clip([value.grad for value in values.values() if value.grad is not None], self._clip)
        optimizer.step()
        if not whole:
            self._keep_past(at, values, optimizer)
        return losses.detach()

    def _make(self, values: Mapping[str, Tensor]) -> Optimizer:
        groups = [
            {**group, "params": [values[self._names[id(own)]] for own in group["params"] if id(own) in self._names]}
            for group in self._like.param_groups
        ]
        return type(self._like)(groups)  # type: ignore[call-arg]

    def _with_past(self, at: slice, values: Mapping[str, Tensor], number: int) -> Optimizer:
        """An optimizer of some lanes, as they were when step ``number`` began."""
        if number != self._number:  # others may have taken this step already, and there is one count of steps for all
            self._number = number
            self._past = {
                name: {key: _copied(entry, value) for key, entry in self._optimizer.state.get(value, {}).items()}
                for name, value in self.values.items()
            }
        optimizer = self._make(values)
        for name, past in self._past.items():
            for key, entry in past.items():
                optimizer.state[values[name]][key] = entry[at] if _is_like(entry, self.values[name]) else _copied(entry)
        return optimizer

    def _keep_past(self, at: slice, values: Mapping[str, Tensor], optimizer: Optimizer) -> None:
        for name, value in self.values.items():
            for key, entry in optimizer.state.get(values[name], {}).items():
                if _is_like(entry, values[name]):
                    self._optimizer.state[value].setdefault(key, torch.zeros_like(value, requires_grad=False))[at] = entry
                else:
                    self._optimizer.state[value][key] = entry


class Flat(NamedTuple):
    """A batch taken apart.

    Args:
        leaves: what it is made of; spec: how; kind: equal for batches that can be put side by side.
    """

    leaves: list[Any]
    spec: TreeSpec
    kind: tuple[TreeSpec, list[Any]]

    @classmethod
    def of(cls, batch: Any) -> Flat:
        leaves, spec = tree_flatten(batch)
        return cls(leaves, spec, (spec, [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]))


def _stacked(batches: Sequence[Flat]) -> tuple[list[Any], TreeSpec]:
    """Leaves of batches of one kind, tensors (lanes, …), and how they make a batch."""
    leaves = zip(*(batch.leaves for batch in batches), strict=True)
    return [torch.stack(same) if isinstance(same[0], Tensor) else same[0] for same in leaves], batches[0].spec


def _several(value: Tensor, size: int) -> Tensor:
    several = value.detach().new_empty(size, *value.shape)
    return nn.Parameter(several) if isinstance(value, nn.Parameter) else several


def _part(value: Tensor, at: slice) -> Tensor:
    """Some lanes, in the same memory."""
    return nn.Parameter(value.detach()[at]) if isinstance(value, nn.Parameter) else value[at]


def _is_like(entry: Any, value: Tensor) -> bool:
    return isinstance(entry, Tensor) and entry.shape == value.shape


def _copied(entry: Any, but: Tensor | None = None) -> Any:
    """A copy of what an optimizer counts; what is ``but``'s shape has rows that only their own lanes write to."""
    return entry.clone() if isinstance(entry, Tensor) and (but is None or not _is_like(entry, but)) else entry


def _clip(gradients: Sequence[Tensor], largest: float) -> None:
    """Scale each lane's gradients, (lanes, …), to a norm of at most ``largest``, as ``clip_grad_norm_`` does."""
    norms = torch.stack([gradient.reshape(len(gradient), -1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (largest / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))
