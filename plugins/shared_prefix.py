"""A frozen prefix that online and target branch have alike runs once a view, for both (ours; LW-FedSSL, arXiv 2401.11647, runs it twice).

Nothing is assumed of how a training step goes through its branches. The branch that comes second hands in the same values at its first
frozen block as the first did, and only then gets what the first made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from featherlight.plugins.bypass import Bypass, is_bypassed

CLOSE = 1e-4
"""How far weights of a momentum copy may be from their twins': what rounding makes of an average of equals, step by step."""


@dataclass
class _Passed:
    """One view that has gone through the prefix of one branch: what went in and what came out, and whether somebody changed it since."""

    branch: int
    running: tuple[tuple[int, float], ...]
    entered: Tensor
    left: Tensor
    versions: tuple[int, int]
    autocast: bool
    with_grad: bool

    @property
    def unchanged(self) -> bool:
        return self.versions == (self.entered._version, self.left._version)


@dataclass
class _Pass:
    """A view on its way through a prefix: ``before`` is what the last block put out; ``given``: what stands in for the whole way."""

    branch: int
    running: tuple[tuple[int, float], ...]
    entered: Tensor
    before: Tensor
    version: int
    given: Tensor | None


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
        if on_way is None or on_way.branch != number or not plain or args[0] is not on_way.before:
            self._pass = None
            return forward(*args, **kwargs)
        last = place == running[-1][0]
        if on_way.given is not None:
            if last:
                self._pass = None
            return on_way.given if last else args[0]
        out = on_way.before = forward(*args)
        if last:
            self._keep(on_way, out)
            self._pass = None
        return out

    def _running(self, number: int) -> tuple[tuple[int, float], ...]:
        """Places of the blocks that nobody leaves out, with the scale of what they add."""
        blocks = enumerate(self._branches[number])
        return tuple((place, float(block._residual_scale)) for place, block in blocks if not is_bypassed(block))  # type: ignore[arg-type]

    def _watched(self, number: int) -> bool:
        """Whether somebody wants to see what goes in and out of each block."""
        return any(block._forward_hooks or block._forward_pre_hooks for block in self._branches[number])

    def _begin(self, number: int, running: tuple[tuple[int, float], ...], x: Tensor) -> _Pass:
        for passed in self._passed:
            same = passed.branch != number and passed.running == running and passed.autocast == torch.is_autocast_enabled(x.device.type)
            if same and passed.unchanged and _same(passed.entered, x):
                self._passed.remove(passed)
                # what an online branch keeps for backward, nobody else may write to
                given = passed.left.clone() if passed.with_grad else passed.left
                return _Pass(number, running, x, x, x._version, given)
        return _Pass(number, running, x, x, x._version, None)

    def _keep(self, on_way: _Pass, out: Any) -> None:
        if not isinstance(out, Tensor) or out.requires_grad or out.is_inference() or on_way.entered.is_inference():
            return
        versions = on_way.version, out._version
        state = torch.is_autocast_enabled(out.device.type), torch.is_grad_enabled()
        self._passed.append(_Passed(on_way.branch, on_way.running, on_way.entered, out, versions, *state))


def _same(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return isinstance(one, FakeTensor) or one.is_meta or torch.equal(one, other)


def _close(one: Tensor, other: Tensor) -> bool:
    if isinstance(one, FakeTensor) or one.is_meta or torch.equal(one, other):
        return True
    return one.is_floating_point() and torch.allclose(one, other, rtol=CLOSE, atol=CLOSE * float(one.abs().max()))
