"""A frozen prefix that online and target branch have alike runs once a view, for both (ours; LW-FedSSL, arXiv 2401.11647, runs it twice).

Nothing is assumed of how a training step goes through its branches. The branch that comes second hands in the same values at its first
frozen block as the first did, and only then gets what the first made of them. Whoever looks at what a block in between puts out has it
computed (:class:`~featherlight.plugins.deferred.Deferred`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from featherlight.plugins.bypass import Bypass, is_bypassed
from featherlight.plugins.deferred import Deferred, Form, version

CLOSE = 1e-4
"""How far weights of a momentum copy may be from their twins': what rounding makes of an average of equals, step by step."""


@dataclass
class _Passed:
    """One view that has gone through the prefix of one branch: what went in and what came out, and whether somebody changed it since.

    Args:
        between: the form of what each block but the last put out.
    """

    branch: int
    running: tuple[tuple[int, float], ...]
    entered: Tensor
    left: Tensor
    between: list[Form]
    versions: tuple[int, int]
    autocast: tuple[bool, torch.dtype]
    with_grad: bool

    @property
    def unchanged(self) -> bool:
        return self.versions == (version(self.entered), version(self.left))


@dataclass
class _Pass:
    """A view on its way through a prefix: ``before`` is what the last block put out; ``given``: what stands in for the whole way."""

    branch: int
    running: tuple[tuple[int, float], ...]
    entered: Tensor
    autocast: tuple[bool, torch.dtype]
    given: _Passed | None
    before: Tensor = field(init=False)
    between: list[Form] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entered_version = version(self.entered)
        self.goes_on_from(self.entered)

    def goes_on_from(self, out: Tensor) -> None:
        self.before, self._version = out, version(out)

    def goes_on_with(self, x: Tensor) -> bool:
        """Whether ``x`` is what the last block put out, and nobody wrote to it."""
        return x is self.before and version(x) == self._version


class SharedPrefix:
    """The frozen prefixes of one online branch and its momentum copies, for one training step.

    Blocks of a prefix are in eval mode and take one tensor. Where they are called otherwise, or not one after the other, or take values
    that another branch did not, they run.

    Args:
        branches: the blocks of each branch's prefix, in forward order.
    """

    def __init__(self, branches: Sequence[Sequence[nn.Module]]) -> None:
        self._branches = [list(branch) for branch in branches]
        self._where = {id(block): (number, place) for number, branch in enumerate(branches) for place, block in enumerate(branch)}
        self._passed: list[_Passed] = []
        self._pass: _Pass | None = None

    def equal(self) -> bool:
        """Whether the copies hold what the online branch holds; taken for granted of tensors without data."""
        online, *copies = self._branches
        pairs = [(block.state_dict(), twin.state_dict()) for copy in copies for block, twin in zip(online, copy)]
        return all(ours.keys() == theirs.keys() and all(_close(ours[name], theirs[name]) for name in ours) for ours, theirs in pairs)

    def enter(self) -> None:
        """A training step begins."""
        for branch in self._branches:
            for block in branch:
                block._shared = self  # type: ignore[assignment]

    def leave(self) -> None:
        """It is over."""
        self._passed, self._pass = [], None
        for branch in self._branches:
            for block in branch:
                block._shared = None  # type: ignore[assignment]

    def run(self, block: Bypass, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What ``block`` puts out, whose own way to it is ``forward``."""
        number, place = self._where[id(block)]
        plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and not args[0].requires_grad
        running = self._running(number)
        if place == running[0][0]:
            self._pass = self._begin(number, running, args[0]) if plain and not self._watched(number) else None
        on_way = self._pass
        if on_way is None or on_way.branch != number or not plain or not on_way.goes_on_with(args[0]):
            self._pass = None
            return forward(*args, **kwargs)
        last = place == running[-1][0]
        if last:
            self._pass = None
        if on_way.given is not None:
            return self._given(on_way.given) if last else self._later(on_way, on_way.given, forward)
        out = forward(*args)
        if not on_way.goes_on_with(args[0]) or not isinstance(out, Tensor):
            self._pass = None
        elif last:
            self._keep(on_way, out)
        else:
            on_way.between.append(Form.of(out))
            on_way.goes_on_from(out)
        return out

    def _given(self, passed: _Passed) -> Tensor:
        # what an online branch keeps for backward, nobody else may write to
        return passed.left.clone() if passed.with_grad else passed.left

    def _later(self, on_way: _Pass, passed: _Passed, forward: Callable[..., Any]) -> Tensor:
        """In place of what a block puts out that no other than the next block is likely to look at."""
        out = Deferred(passed.between[len(on_way.between)], partial(_compute, forward, on_way.before, passed.autocast))
        on_way.between.append(passed.between[len(on_way.between)])
        on_way.goes_on_from(out)
        return out

    def _running(self, number: int) -> tuple[tuple[int, float], ...]:
        """Places of the blocks that nobody leaves out, with the scale of what they add."""
        blocks = enumerate(self._branches[number])
        return tuple((place, float(block._residual_scale)) for place, block in blocks if not is_bypassed(block))  # type: ignore[arg-type]

    def _watched(self, number: int) -> bool:
        """Whether somebody wants to see what goes in and out of a block, or of what is inside it."""
        modules = [module for block in self._branches[number] for module in block.modules()]
        hooks = [hook for module in modules for kind in (module._forward_hooks, module._forward_pre_hooks) for hook in kind.values()]
        return any(not getattr(hook, "content_with_forms", False) for hook in hooks)

    def _begin(self, number: int, running: tuple[tuple[int, float], ...], x: Tensor) -> _Pass:
        autocast = torch.is_autocast_enabled(x.device.type), torch.get_autocast_dtype(x.device.type)
        for passed in self._passed:
            if (passed.running, passed.autocast) != (running, autocast) or passed.branch == number:
                continue
            if passed.unchanged and _same(passed.entered, x):
                self._passed.remove(passed)
                return _Pass(number, running, x, autocast, passed)
        return _Pass(number, running, x, autocast, None)

    def _keep(self, on_way: _Pass, out: Tensor) -> None:
        if out.requires_grad or out.is_inference() or on_way.entered.is_inference():
            return
        versions = on_way.entered_version, version(out)
        passed = _Passed(
            on_way.branch, on_way.running, on_way.entered, out, on_way.between, versions, on_way.autocast, torch.is_grad_enabled()
        )
        self._passed.append(passed)


def _compute(forward: Callable[..., Tensor], x: Tensor, autocast: tuple[bool, torch.dtype]) -> Tensor:
    enabled, dtype = autocast
    if not enabled:
        return forward(x)
    with torch.autocast(x.device.type, dtype=dtype):
        return forward(x)


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return isinstance(one, FakeTensor) or one.is_meta or torch.equal(one, other)


def _close(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, FakeTensor) or one.is_meta or torch.equal(one, other):
        return True
    return one.is_floating_point() and torch.allclose(one, other, rtol=CLOSE, atol=CLOSE * float(one.abs().max()))
