"""Leaving blocks out of a model without taking them out of it.

A block is made bypassable by swapping its class, as ``torch.nn.utils.parametrize`` does: parameters, ``state_dict`` keys,
``isinstance``, ``deepcopy`` and ``torch.compile`` go on as before, and what a bypassed block does is to hand on its input. Three marks on a
block say everything that hosts and methods need to know of it; each holds the names of those who set it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


class Bypass:
    """Mixed in before a block's own class: its forward, or its input where somebody bypasses it."""

    _bypassed_by: frozenset[str] = frozenset()
    _skippable: bool = False
    _frozen: bool = False
    _residual_scale: float = 1.0
    _instead: tuple[nn.Module, ...] = ()  # in a tuple, so that it is not registered a second time
    _shared: Any = None  # the SharedPrefix of a step under way

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._bypassed_by:
            return self._instead[0](args[0]) if self._instead else args[0]
        if self._shared is None or torch.compiler.is_compiling():
            return self._forward(*args, **kwargs)
        return self._shared.run(self, self._forward, args, kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own way from its input to its output."""
        grows_graph = torch.is_grad_enabled() and args and isinstance(args[0], Tensor) and args[0].requires_grad
        if self._frozen and grows_graph and not any(p.requires_grad for p in self.parameters()):  # type: ignore[attr-defined]
            raise RuntimeError(
                "the input of a frozen block requires grad, so everything before it is kept for backward and nothing is saved: "
                "something in front of the blocks still trains (name it with stem=[...]), or the images require grad"
            )
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if self._skippable and not isinstance(out, Tensor):
            raise TypeError(
                f"a block puts out a {type(out).__name__}, so its input cannot stand in for it where it is left out: "
                "let it return its tensor alone, or only freeze, with grow=False and without depth dropout"
            )
        if self._residual_scale != 1.0:
            out = args[0] + (out - args[0]) * self._residual_scale
        return out


def make_bypassable(block: nn.Module, skippable: bool = True) -> None:
    """Swap ``block``'s class for one whose forward can be bypassed; a second call changes nothing else than ``skippable``.

    Args:
        skippable: it, or a block beside it, will be bypassed, so that it must put out a tensor as it takes one.
    """
    if isinstance(block, Bypass):
        block._skippable |= skippable
        return
    if isinstance(block, nn.ModuleList | nn.ModuleDict):
        raise ValueError(f"a block must be a module with a forward; {type(block).__name__} has none: name its items, as in 'layers.*'")
    own = type(block)
    if own not in _CLASSES:
        _CLASSES[own] = type(f"Bypassable{own.__name__}", (Bypass, own), {"__module__": own.__module__})
    block.__class__ = _CLASSES[own]
    block._skippable = skippable  # type: ignore[assignment]


def restore(block: nn.Module) -> None:
    """Give ``block`` its own class back and clear every mark."""
    if isinstance(block, Bypass):
        block.__class__ = type(block).__mro__[2]  # [Bypassable…, Bypass, own]
    for mark in ("_bypassed_by", "_absent_for", "_active", "_staged", "_frozen", "_skippable", "_residual_scale", "_instead", "_shared"):
        block.__dict__.pop(mark, None)


@contextmanager
def none_frozen(model: nn.Module) -> Iterator[None]:
    """Within, no block of ``model`` counts as frozen, whatever of it trains."""
    blocks = [module for module in model.modules() if isinstance(module, Bypass) and module._frozen]
    for block in blocks:
        block._frozen = False
    try:
        yield
    finally:
        for block in blocks:
            block._frozen = True


def _mark(module: nn.Module, mark: str, owner: str, on: bool) -> None:
    owners: frozenset[str] = module.__dict__.get(mark, frozenset())
    wanted = owners | {owner} if on else owners - {owner}
    if wanted != owners:
        setattr(module, mark, wanted)


def set_bypassed(block: nn.Module, owner: str, on: bool) -> None:
    """Whether the forward pass skips ``block`` on ``owner``'s account."""
    _mark(block, "_bypassed_by", owner, on)


def is_bypassed(block: nn.Module) -> bool:
    """Whether anybody makes the forward pass skip ``block``."""
    return bool(block.__dict__.get("_bypassed_by"))


def set_absent(module: nn.Module, owner: str, on: bool) -> None:
    """Whether ``module`` is not there at all on ``owner``'s account: not held, not computed, not sent."""
    _mark(module, "_absent_for", owner, on)


def is_absent(module: nn.Module, but: str = "") -> bool:
    """Whether anybody (other than ``but``) leaves ``module`` out."""
    return bool(module.__dict__.get("_absent_for", frozenset()) - {but})
