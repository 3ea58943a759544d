"""What a model under training makes of each view, and what the same model makes of it with other weights.

Nobody changes their ``training_step``: hooks note what went into and came out of the submodules that make representations, so that the
pass that is trained is not computed twice. With other weights the same submodules then take the same inputs once more, without
gradients, from the first one that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from featherlight.plugins.bypass import Bypass, set_bypassed
from featherlight.plugins.present import trained

OWNER = "representations"


@dataclass
class _Pass:
    """One call of a submodule: its arguments, what came out, and how far its frozen blocks took it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any = None
    frozen: list[Bypass] = field(default_factory=list)
    behind_frozen: Any = None


class _Whole(nn.Module):
    """A submodule and what else it runs, so that all their weights can be given at once."""

    def __init__(self, module: nn.Module, elsewhere: Sequence[nn.Module]) -> None:
        super().__init__()
        self.module, self.elsewhere = module, nn.ModuleList(elsewhere)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Representations:
    """The output of the last of ``through``, each of which takes what the one before puts out.

    Of every step, calls with gradients are noted, from :meth:`begin` to :meth:`end`; target branches run without and do not count. What
    frozen blocks of the model put out is the same with the other weights, which are of what trains, and is not computed again.

    Args:
        model: whose submodules they are.
        through: their paths, in the order in which a view goes through them.

    Raises:
        ValueError: no such submodule.
    """

    def __init__(self, model: nn.Module, through: str | Sequence[str]) -> None:
        self._model = model
        self.through = (through,) if isinstance(through, str) else tuple(through)
        self._modules = [_submodule(model, path) for path in self.through]
        if not self._modules:
            raise ValueError("through=[]: name the submodules that make a representation, such as ['backbone', 'projector']")
        self._hooks: list[Any] = []
        self._noting = False
        self._replayed: _Pass | None = None
        self._forget()

    def _forget(self) -> None:
        self._passes: list[list[_Pass]] = [[] for _ in self._modules]
        self._open: _Pass | None = None

    # -- what a step computes -------------------------------------------------------------------------------------
    def hook(self) -> None:
        """Put the hooks on, once; all plugins must be attached by then, since blocks that may be frozen are theirs."""
        if self._hooks:
            return
        for place, module in enumerate(self._modules):
            self._hooks.append(module.register_forward_pre_hook(self._entering(place), with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leaving(place)))
            blocks = [block for block in module.modules() if isinstance(block, Bypass)]
            self._hooks += [block.register_forward_hook(self._behind_block()) for block in blocks]  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.end()

    def begin(self) -> None:
        """A step begins."""
        self._forget()
        self._noting = True

    def end(self) -> None:
        """The step is over."""
        self._noting = False
        self._forget()

    # -- what came of it ------------------------------------------------------------------------------------------
    def weights(self) -> dict[str, nn.Parameter]:
        """Those that train now, by their names in the model."""
        elsewhere = self._elsewhere()
        return {
            name: value
            for name, value in trained(self._model).items()
            if isinstance(value, nn.Parameter) and self._place(name, elsewhere)[0] >= 0
        }

    def local(self) -> list[Tensor]:
        """What the step made of its passes, each ``(N, …)``, with gradients.

        Raises:
            ValueError: none went through the submodules.
        """
        self._noting = False  # what is computed from here on, recomputed activations for one, is not noted
        passes = [one.out for one in self._passes[-1]]
        if not passes or any(len(calls) != len(passes) for calls in self._passes):
            counts = ", ".join(f'"{path}" {len(calls)}' for path, calls in zip(self.through, self._passes))
            raise ValueError(
                f"the step called {counts} times with gradients; every pass must go once through each: name with through=[...] the "
                f"submodules of {type(self._model).__name__} that make a representation"
            )
        return passes

    def other(self, weights: Mapping[str, Tensor]) -> list[Tensor]:
        """The same passes with other ``weights`` in place of the model's, without gradients.

        Norms over batches use the batch's statistics where the model does, and note none; everything else (dropout) is as in evaluation.
        """
        parts: list[dict[str, Tensor]] = [{} for _ in self._modules]
        elsewhere = self._elsewhere()
        for name, value in weights.items():
            place, inside = self._place(name, elsewhere)
            parts[place][inside] = value
        first = next((place for place, part in enumerate(parts) if part), len(parts) - 1)
        found = []
        with torch.no_grad(), self._still():
            modules = [_Whole(module, [one for of, one in elsewhere.values() if of == place]) for place, module in enumerate(self._modules)]
            for calls in zip(*self._passes):
                out: Any = None
                for place in range(first, len(calls)):
                    one = calls[place]
                    args = one.args if place == first else (out.reshape(one.args[0].shape), *one.args[1:])
                    out = self._again(modules[place], one, parts[place], args)
                found.append(out)
        return found

    def _again(self, module: _Whole, one: _Pass, weights: dict[str, Tensor], args: tuple[Any, ...]) -> Any:
        self._replayed = one
        for block in one.frozen:
            set_bypassed(block, OWNER, True)  # type: ignore[arg-type]
        try:
            return functional_call(module, weights, args, one.kwargs)
        finally:
            self._replayed = None
            for block in one.frozen:
                set_bypassed(block, OWNER, False)  # type: ignore[arg-type]

    @contextmanager
    def _still(self) -> Iterator[None]:
        noisy = [inner for module in self._modules for inner in module.modules() if inner.training]
        norms = [inner for inner in noisy if isinstance(inner, _BatchNorm) and inner.track_running_stats]
        rest = [inner for inner in noisy if not isinstance(inner, _BatchNorm)]
        try:
            for inner in rest:
                inner.__dict__["training"] = False
            for norm in norms:
                norm.__dict__["track_running_stats"] = False  # torch's own way: the batch's statistics, none noted
            yield
        finally:
            for inner in rest:
                inner.__dict__["training"] = True
            for norm in norms:
                norm.__dict__["track_running_stats"] = True

    def _elsewhere(self) -> dict[str, tuple[int, nn.Module]]:
        """Modules that blocks run and that are the model's own, not the submodules' (adapters of width): path → place, module."""
        run = {
            id(block._instead[0]): (place, block._instead[0])
            for place, module in enumerate(self._modules)
            for block in module.modules()
            if isinstance(block, Bypass) and block._instead
        }
        inside = {id(inner) for module in self._modules for inner in module.modules()}
        return {path: run[id(one)] for path, one in self._model.named_modules() if id(one) in run and id(one) not in inside} if run else {}

    def _place(self, name: str, elsewhere: Mapping[str, tuple[int, nn.Module]]) -> tuple[int, str]:
        """Which of the submodules a parameter belongs to, −1 for none, and its name in :class:`_Whole`."""
        for place, path in enumerate(self.through):
            if not path or name.startswith(f"{path}."):
                return place, f"module.{name[len(path) + 1 :] if path else name}"
        for path, (place, one) in elsewhere.items():
            if name.startswith(f"{path}."):
                among = [other for of, other in elsewhere.values() if of == place].index(one)
                return place, f"elsewhere.{among}.{name[len(path) + 1 :]}"
        return -1, ""

    # -- hooks ----------------------------------------------------------------------------------------------------
    def _entering(self, place: int) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._noting and torch.is_grad_enabled():
                if place:
                    self._check_follows(place, args)
                self._open = _Pass(args, kwargs)
                self._passes[place].append(self._open)

        return enter

    def _leaving(self, place: int) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if self._noting and self._open is not None:
                if not isinstance(out, Tensor):
                    raise ValueError(
                        f'"{self.through[place]}" puts out a {type(out).__name__}; name with through=[...] what puts out a tensor'
                    )
                self._open.out, self._open = out, None

        return leave

    def _behind_block(self) -> Callable[..., Any]:
        def leave(block: Any, args: tuple[Any, ...], out: Any) -> Any:
            if self._replayed is not None:
                last = bool(self._replayed.frozen) and self._replayed.frozen[-1] is block
                return self._replayed.behind_frozen if last else None
            if not (self._noting and self._open is not None and isinstance(out, Tensor)):
                return None
            if block._frozen and not block._bypassed_by and not out.requires_grad:
                self._open.frozen.append(block)
                self._open.behind_frozen = out
            return None

        leave.content_with_forms = True  # type: ignore[attr-defined]  # a shared prefix need not run for it
        return leave  # no method of this object: a copy of the block, as evaluation makes one, would copy the whole model with it

    def _check_follows(self, place: int, args: tuple[Any, ...]) -> None:
        """What a submodule takes is what the one before it put out, as it is or in another shape.

        Raises:
            ValueError: something is computed between them, which nobody could compute again.
        """
        before, number = self._passes[place - 1], len(self._passes[place])
        out = before[number].out if number < len(before) else None
        if not (args and isinstance(args[0], Tensor) and isinstance(out, Tensor) and _same_values(args[0], out)):
            one, other = self.through[place - 1], self.through[place]
            raise ValueError(
                f'"{other}" does not take what "{one}" puts out, so that a representation cannot be made again with other weights: name '
                "with through=[...] submodules of which each takes what the one before puts out, or the one that contains them all"
            )


def each_view(batch_size: int, passes: Sequence[Tensor]) -> list[Tensor]:
    """Representations by view, ``(N, D)``: a pass over several views at once is taken apart.

    Example:
        >>> [tuple(view.shape) for view in each_view(4, [torch.zeros(8, 3), torch.zeros(4, 3, 1, 1)])]
        [(4, 3), (4, 3), (4, 3)]
    """
    views: list[Tensor] = []
    for out in passes:
        flat = out.flatten(1)
        views += flat.split(batch_size) if batch_size and len(flat) % batch_size == 0 else [flat]
    return views


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Whether ``one`` is ``other``, or a reshaped view of it, element by element in the same order."""
    if one is other:
        return True
    if one.untyped_storage()._cdata != other.untyped_storage()._cdata or one.numel() != other.numel():
        return False
    return bool(one.storage_offset() == other.storage_offset()) and one.is_contiguous() and other.is_contiguous()


def _submodule(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        names = ", ".join(name for name, _ in model.named_children()) or "no modules"
        raise ValueError(
            f'through="{path}" not found; this {type(model).__name__} has {names}: name the submodules that make a representation'
        ) from None
