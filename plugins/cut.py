"""A model cut in two at one of its blocks, whatever its ``training_step`` does with the two parts.

The front is everything up to and including the block, the rest is the rear. :meth:`Cut.run` takes images through the front alone: the
forward pass ends where the block has put out its tensor. :meth:`Cut.fed` runs a training step of the rear alone: wherever the block would
put something out, activations that were computed elsewhere come out. Images and the front's weights are then tensors without data
(PyTorch's ``meta`` device), so that nothing in front of the cut is computed, and a step that looks at the images themselves fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from featherlight.plugins.blocks import Tower, find_blocks

Give = Callable[[str, int], Tensor]
"""(branch, rows) → what the cut puts out, ``(rows, …)``."""


class Cut:
    """The two parts of one model. Attaching it changes nothing; :meth:`remove` takes its hooks away.

    Args:
        model: the whole.
        block: path of the last block of the front.
        stem, tail: what comes before and behind the block, where the order in which modules are registered does not say so, as for
            :func:`~featherlight.plugins.find_blocks`.
        targets: momentum copies, ``{target path: online path}``; where they have the block, they are cut there, too.

    Raises:
        ValueError: no such block, or several, or a parameter that both parts use.
    """

    def __init__(
        self, model: nn.Module, block: str, stem: Sequence[str] | None, tail: Sequence[str] | None, targets: dict[str, str]
    ) -> None:
        named = find_blocks(model, [block], stem, tail).paths
        if len(named) > 1:
            raise ValueError(f'cut="{block}" names {len(named)} blocks; name one of them: {", ".join(named)}')
        tower = find_blocks(model, _up_to(model, block), stem, tail)
        self._block = block
        self.model, self._tower = model, tower
        moved = {target: tower.moved(online, target) for target, online in targets.items()}
        self.branches: dict[str, Tower] = {"": tower} | {target: twin for target, twin in moved.items() if twin is not None}
        self._refuse_shared(model)
        self._give: Give | None = None
        self._seen: list[tuple[str, Tensor]] | None = None
        self._ends = False
        self._hooks = [
            twin.blocks[-1].register_forward_hook(lambda module, inputs, out, branch=branch: self._at_cut(branch, out))
            for branch, twin in self.branches.items()
        ]

    @property
    def modules(self) -> list[nn.Module]:
        """Modules of the front, of all branches."""
        return [module for twin in self.branches.values() for module in (*twin.stem_modules(), *twin.blocks)]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the online front."""
        return [*self._tower.stem_parameters(), *(p for block in self._tower.blocks for p in block.parameters())]

    def has(self, name: str) -> bool:
        """Whether the ``state_dict`` entry ``name`` belongs to the online front."""
        return any(name == path or name.startswith(f"{path}.") for path in (*self._tower.stem, *self._tower.paths))

    def front(self, all_branches: bool = False) -> nn.Module:
        """The online front, or those of all branches, as one module that holds their parameters and buffers: it has no forward."""
        whole = nn.Module()
        for branch, twin in self.branches.items() if all_branches else [("", self._tower)]:
            for path in (*twin.stem, *twin.paths):
                setattr(whole, f"{branch} {path}".replace(".", "-"), twin.member(path))
        return whole

    def run(self, images: Tensor, branch: str = "") -> Tensor:
        """``images``, ``(N, …)``, through the front of ``branch``; the model itself is called with them, or the momentum copy.

        Raises:
            ValueError: the block is never reached, or puts out something else than a tensor.
        """
        self._ends = True
        try:
            self.model.get_submodule(branch)(images)
        except _Reached as reached:
            return reached.out
        finally:
            self._ends = False
        raise ValueError(
            f'{type(self.model).__name__}.forward(images) never gets to "{self._block}", where the model is cut: '
            "its forward must take the images as its training_step does"
        )

    def calls(self, step: Callable[[], Any]) -> list[tuple[str, Tensor]]:
        """What the cut puts out while ``step`` runs, without gradients: (branch, tensor) in order."""
        self._seen = []
        try:
            with torch.no_grad():
                step()
            return self._seen
        finally:
            self._seen = None

    @contextmanager
    def fed(self, give: Give) -> Iterator[None]:
        """Within, what the cut puts out comes from ``give``, and the front has no data.

        Raises:
            ValueError: something in the step needs data that are not there.
        """
        slots = [slot for twin in self.branches.values() for slot in _slots(twin)]
        before = [own[name] for own, name in slots]
        for (own, name), value in zip(slots, before):
            empty = torch.empty_like(value, device="meta")
            own[name] = nn.Parameter(empty, requires_grad=False) if isinstance(value, nn.Parameter) else empty
        self._give = give
        try:
            yield
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            raise self._looked(str(error).splitlines()[0]) from error
        finally:
            self._give = None
            for (own, name), value in zip(slots, before):
                own[name] = value

    def check(self, loss: Tensor) -> None:
        """Refuse a loss into which something went that has no data: numbers mix where larger tensors would not.

        Raises:
            ValueError: there is no value in it.
        """
        if loss.is_meta:
            raise self._looked("its loss has no value")

    def _looked(self, how: str) -> ValueError:
        return ValueError(
            f'cut="{self._block}": {type(self.model).__name__}.training_step needs images, labels or weights that stay on the device '
            f"({how}). What comes before the cut can be named with stem=[...], what comes behind it with tail=[...]; "
            "labels are sent with labels=True"
        )

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def _at_cut(self, branch: str, out: Any) -> Tensor | None:
        if self._give is not None:
            return self._give(branch, out.shape[0])
        if not isinstance(out, Tensor):
            raise ValueError(f'"{self._block}" puts out a {type(out).__name__}; the model can be cut where one tensor goes on')
        if self._seen is not None:
            self._seen.append((branch, out))
        if self._ends:
            raise _Reached(out)
        return None

    def _refuse_shared(self, model: nn.Module) -> None:
        own = {id(parameter) for parameter in self.parameters}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in own and not self.has(name):
                raise ValueError(f'"{name}" is used before and behind cut="{self._block}": cut where no parameter is shared')


class InOrder:
    """Which views a pass through the front is of: each branch takes them in order, one by one or several at once, and begins again.

    Args:
        rows: of each view of a batch.

    Example:
        >>> order = InOrder([8, 8])
        >>> order.views("", 16), order.views("target", 8), order.views("target", 8), order.views("", 8)
        ((0, 1), (0,), (1,), (0,))
    """

    def __init__(self, rows: Sequence[int]) -> None:
        self._rows = list(rows)
        self._next: dict[str, int] = {}

    def views(self, branch: str, rows: int) -> tuple[int, ...]:
        """The views in the next pass of ``branch``, which has so many rows.

        Raises:
            ValueError: views in this order do not make up so many rows.
        """
        taken: list[int] = []
        while sum(self._rows[view] for view in taken) < rows:
            taken.append(self._next.get(branch, 0))
            self._next[branch] = (taken[-1] + 1) % len(self._rows)
        if sum(self._rows[view] for view in taken) != rows:
            raise ValueError(f"a pass of {rows} samples is not made of whole views in order, which have {self._rows} samples")
        return tuple(taken)


class _Reached(Exception):  # nothing is wrong
    """Carries what the cut put out to where the forward pass began."""

    def __init__(self, out: Tensor) -> None:
        super().__init__("the cut")
        self.out = out


def _up_to(model: nn.Module, block: str) -> list[str]:
    """The blocks of a chain up to ``block``: what comes before it in a container of blocks, and the block itself."""
    parent, _, last = block.rpartition(".")
    container = model.get_submodule(parent)
    if not isinstance(container, nn.Sequential | nn.ModuleList):
        return [block]
    names = [name for name, _ in container.named_children()]
    prefix = f"{parent}." if parent else ""
    return [prefix + name for name in names[: names.index(last) + 1]]


def _slots(tower: Tower) -> Iterator[tuple[Any, str]]:
    """Where each parameter and buffer of a front is kept: the dict, and the key."""
    for module in (*tower.stem_modules(), *tower.blocks):
        for inner in module.modules():
            for own in (inner._parameters, inner._buffers):
                for name, value in own.items():
                    if value is not None:
                        yield own, name
    for path in tower.stem:
        if isinstance(tower.member(path), nn.Parameter):
            parent, _, name = path.rpartition(".")
            yield tower.model.get_submodule(parent)._parameters, name
