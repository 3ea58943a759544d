"""Which layers PriSM takes apart, and a model made smaller: a keep ratio's share of their principal kernels and rows (arXiv 2208.13141)."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import nn

from featherlight.plugins.hidden_units import find_gated, find_hidden
from featherlight.plugins.sampled_layers import LAYERS, NORMS, keep_out_fast_path, norm_behind

MLP = re.compile(
    r"(^|\.)(fc1|fc2|linear1|linear2|lin1|lin2|c_fc|w1|w2|w3|(mlp|ffn|feed_forward)\.\w+|intermediate\.dense|\d+\.output\.dense)$"
)
"""How transformers name the linear layers of their MLPs (timm, torchvision, torch.nn, Hugging Face)."""
ATTENTION = re.compile(r"(^|\.)(qkv|q_proj|k_proj|v_proj|o_proj|out_proj|query|key|value|attn\.proj|attn\.c_attn|attn\.c_proj)$")
"""How they name those of attention."""


class Layer(NamedTuple):
    """A layer that is taken apart.

    Args:
        leader: the path of the layer whose draws it follows: its own, or its online twin's where it is in a momentum copy.
        norm: path of the norm behind it, which then sees the sampled rows alone.
        outputs: O; rank: R = min(O, K); samples_rows: whether of its outputs a part is drawn, too.
        draws_as: the path of the layer whose draw of rows it shares, where not its leader's: a gate's two layers have one.
        takes: the path of the layer whose drawn outputs alone are its inputs; given: whether another layer takes its own so.
    """

    leader: str
    norm: str | None
    outputs: int
    rank: int
    samples_rows: bool
    draws_as: str = ""
    takes: str | None = None
    given: bool = False

    @property
    def rows_as(self) -> str:
        """What its rows are drawn by."""
        return self.draws_as or self.leader

    @property
    def compact(self) -> bool:
        """Whether what is behind takes its sampled rows alone, not among zeros."""
        return self.norm is not None or self.given

    def kernels_at(self, keep: float) -> int:
        """r = ⌈κR⌉."""
        return ceil(round(keep * self.rank, 9))

    def rows_at(self, keep: float) -> int:
        """n = ⌈κO⌉, or O."""
        return ceil(round(keep * self.outputs, 9)) if self.samples_rows else self.outputs


def find_layers(model: nn.Module, layers: str | Sequence[str], attention: bool, rows: bool, targets: dict[str, str]) -> dict[str, Layer]:
    """The layers to take apart, by path.

    Args:
        layers: ``"auto"``: convolutions of more than one tap and more than 3 input channels, and the linear layers of transformers'
            MLPs, with ``attention`` those of attention, too; or paths and patterns.

    Raises:
        ValueError: nothing found, or something named cannot be taken apart.
    """
    kinds = {path: module for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    if layers == "auto":
        chosen = [path for path, module in kinds.items() if _is_auto(path, module, attention)]
        chosen = [path for path in chosen if path not in _ends(model, chosen)]
    else:
        patterns = [layers] if isinstance(layers, str) else list(layers)
        for pattern in patterns:
            if not any(fnmatchcase(path, pattern) for path in kinds):
                raise ValueError(f'layer "{pattern}" not found; convolutions and linear layers of this model are {_listed(kinds)}')
        chosen = [path for path in kinds if any(fnmatchcase(path, pattern) for pattern in patterns)]
        for path in chosen:
            if reason := _why_not(model, kinds[path]):
                raise ValueError(f'layer "{path}" cannot be taken apart: {reason}; name others, or use layers="auto"')
    online = {path for path in chosen if not _why_not(model, kinds[path])}
    chosen = [path for path in kinds if path in online or _leader(path, targets) in online]
    if not chosen:
        raise ValueError(
            "nothing to take apart: no convolution of more than one tap (the stem apart), no transformer's MLP; name linear layers with "
            f"layers=[...]: {_listed(kinds)}"
        )
    found = {path: _layer(model, path, kinds[path], rows, targets) for path in chosen}
    return _with_hidden_units(model, _without_the_last(model, found, targets, layers == "auto"))


def warn_of_what_stays_whole(model: nn.Module, layers: dict[str, Layer], attention: bool, keep: float) -> None:
    """Say so where ``layers="auto"`` takes little of a model apart, or nothing of the attention that was asked for."""
    whole = sum(value.numel() for value in model.parameters())
    weights: list[Any] = [model.get_submodule(path).weight for path in layers]
    apart = sum(weight.numel() for weight in weights)
    if keep < 1 and apart < whole / 2:
        warnings.warn(
            f'layers="auto" takes apart {len(layers)} layers with {apart / whole:.0%} of the parameters; all others a client holds whole: '
            "name more with layers=[...]",
            stacklevel=3,
        )
    if attention and not any(ATTENTION.search(path) for path in layers):
        warnings.warn(
            "attention=True found no linear layers of attention that can be taken apart (those of nn.MultiheadAttention and torchvision's "
            "Swin are read past their forward): attention stays whole",
            stacklevel=3,
        )


def _with_hidden_units(model: nn.Module, layers: dict[str, Layer]) -> dict[str, Layer]:
    """Who takes whose sampled rows alone, and who draws them together."""
    shared = set()
    for makers, taker in find_hidden(model, layers):
        if all(layers[path].samples_rows for path in makers):
            for path in makers:
                draws_as = "" if path == makers[0] else layers[makers[0]].leader
                layers[path] = layers[path]._replace(draws_as=draws_as, given=True)
            layers[taker] = layers[taker]._replace(takes=makers[0])
            shared |= {*makers}
    for path in find_gated(model, layers) - shared:
        layers[path] = layers[path]._replace(samples_rows=False)
    return layers


def _without_the_last(model: nn.Module, layers: dict[str, Layer], targets: dict[str, str], auto: bool) -> dict[str, Layer]:
    """All rows of a layer with nothing behind it: zeros among what a model puts out would be answers."""
    leaves = [
        path
        for path, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and _leader(path, targets) == path
    ]
    for path, layer in layers.items():
        if layer.samples_rows and layer.norm is None and leaves[-1:] == [layer.leader]:
            if auto:
                layers[path] = layer._replace(samples_rows=False)
            else:
                warnings.warn(
                    f'layer "{path}" is the last of the model, and what it does not sample of its outputs is 0: if these are answers, '
                    "leave it out of layers=[...], or use rows=False",
                    stacklevel=2,
                )
    return layers


def shrink(model: nn.Module, layers: dict[str, Layer], keep: float) -> nn.Module:
    """A copy of ``model`` whose ``layers`` hold the share ``keep`` of their kernels and rows, and the norms behind them as many channels.

    Its weights are of no meaning until they are sent; ``model`` must be as its user made it.
    """
    # tensors are copied here, since deepcopy does not know those without data, with which cost is predicted
    copies: dict[int, Any] = {id(value): value.clone() for value in model.buffers()}
    copies |= {id(value): _parameter(value, value.shape) for value in model.parameters()}
    small = copy.deepcopy(model, copies)
    for encoder in small.modules():
        if isinstance(encoder, nn.TransformerEncoder):  # its nested tensors are for its layers' fast path, and have no shape for others
            encoder.use_nested_tensor = False
    for path, layer in layers.items():
        module: Any = small.get_submodule(path)
        kernels, rows = layer.kernels_at(keep), layer.rows_at(keep)
        weight = module.weight
        module.__class__ = next(new for old, new in LAYERS.items() if isinstance(module, old))
        module.u = _parameter(weight, (rows, kernels))
        module.v = _parameter(weight, (kernels, *weight.shape[1:]))
        module.register_parameter("weight", None)
        module.rows_as, module.whole, module.compact = layer.rows_as, layer.outputs, layer.compact
        module.before = (small.get_submodule(layer.takes),) if layer.takes else ()
        keep_out_fast_path(small, path)
        places = torch.arange(rows, device=weight.device) if layer.samples_rows else None
        module.register_buffer("rows", places, persistent=False)
        if layer.samples_rows and module.bias is not None:
            module.bias = _parameter(module.bias, (rows,))
        if layer.norm is not None and layer.samples_rows:
            norm: Any = small.get_submodule(layer.norm)
            norm.__class__ = NORMS[type(norm)]
            norm.behind, norm.whole = (module,), layer.outputs
            for name in ("weight", "bias"):
                if getattr(norm, name) is not None:
                    setattr(norm, name, _parameter(getattr(norm, name), (rows,)))
            for name in ("running_mean", "running_var"):
                if getattr(norm, name, None) is not None:
                    setattr(norm, name, getattr(norm, name)[:rows].clone())
    return small


def _parameter(like: nn.Parameter, shape: Sequence[int]) -> nn.Parameter:
    """Zeros of ``shape``, otherwise as ``like``."""
    return nn.Parameter(like.detach().new_zeros(shape), requires_grad=like.requires_grad)


def _layer(model: nn.Module, path: str, module: Any, rows: bool, targets: dict[str, str]) -> Layer:
    outputs, inputs = module.weight.shape[0], module.weight[0].numel()
    behind = _behind(model, path) if isinstance(module, nn.Conv2d) else None
    # any other norm would make something of channels that are not there
    samples_rows = rows and (behind is not None or not _normalised(model, path))
    return Layer(_leader(path, targets), behind if samples_rows else None, outputs, min(outputs, inputs), samples_rows)


def _leader(path: str, targets: dict[str, str]) -> str:
    """The path of the layer that ``path`` copies, where it lies in a momentum copy; else its own."""
    return next((online + path[len(target) :] for target, online in targets.items() if f"{path}.".startswith(f"{target}.")), path)


def _normalised(model: nn.Module, path: str) -> bool:
    """Whether a norm that is not known to be another layer's may see the outputs of the one at ``path``: what the model registers next
    (behind a linear layer, within its parent); for a convolution, also any of as many channels: forward passes have their own order."""
    layer: Any = model.get_submodule(path)
    is_conv = isinstance(layer, nn.Conv2d)
    if is_conv:
        taken = {_behind(model, other) for other, module in model.named_modules() if isinstance(module, nn.Conv2d)}
        norms = [module for other, module in model.named_modules() if _is_norm(module) and other not in taken]
        if any(_channels(norm) == layer.out_channels for norm in norms):
            return True
    leaves = [(other, module) for other, module in model.named_modules() if not list(module.children())]
    place = next(index for index, (other, _) in enumerate(leaves) if other == path)
    within = "" if is_conv else path.rpartition(".")[0]
    for other, module in leaves[place + 1 :]:
        if not f"{other}.".startswith(f"{within}." if within else ""):
            return False
        if _is_norm(module) or any(True for _ in module.parameters()):
            return _is_norm(module)
    return False


def _behind(model: nn.Module, path: str) -> str | None:
    """The path of the norm that is registered right behind the convolution at ``path``."""
    parent, _, name = path.rpartition(".")
    norm = norm_behind(model.get_submodule(parent), name)
    return None if norm is None else f"{parent}.{norm}".lstrip(".")


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _channels(norm: Any) -> int | None:
    """Of how many channels ``norm`` is; None where it does not say."""
    return getattr(norm, "num_features", None) or getattr(norm, "num_channels", None)


def _is_auto(path: str, module: nn.Module, attention: bool) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.in_channels > 3 and module.weight[0, 0].numel() > 1
    return bool(MLP.search(path) or (attention and ATTENTION.search(path)))


def _ends(model: nn.Module, paths: Sequence[str]) -> set[str]:
    """The last linear layers of what has a name as of a transformer's MLP and is none: of an MLP that classifies, they give the answer."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        if MLP.search(path) and isinstance(model.get_submodule(path), nn.Linear) and not _in_block(model, path):
            groups.setdefault(path.rpartition(".")[0], []).append(path)
    return {group[-1] for group in groups.values()}


def _in_block(model: nn.Module, path: str) -> bool:
    """Whether a layer is in one of several blocks of a kind, or beside attention."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        holder = model.get_submodule(".".join(parts[: depth - 1]))
        own = holder.get_submodule(parts[depth - 1])
        siblings = [module for module in holder.children() if module is not own and type(module) is type(own)]
        if isinstance(holder, nn.ModuleList | nn.Sequential) and any(_names(module) == _names(own) for module in siblings):
            return True
    beside = [model.get_submodule(".".join(parts[:depth])) for depth in (len(parts) - 1, len(parts) - 2) if depth >= 0]
    return any("attn" in name or "attention" in name for block in beside for name in block._modules)


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def _why_not(model: nn.Module, module: nn.Module) -> str:
    """Why a layer cannot be taken apart, or nothing."""
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return f"it convolves in {module.groups} groups, whose kernels see different channels"
    if type(module) not in LAYERS:
        return f"it is a {type(module).__name__}, of which only the class it is derived from is known"
    if getattr(module, "parametrizations", None) is not None or "weight" not in module._parameters:
        return "its weight is made by a parametrization"
    if any(type(parent).__name__.startswith("ShiftedWindowAttention") and module in parent.children() for parent in model.modules()):
        return "torchvision's window attention reads its weight past the layer's forward"
    if sum(getattr(other, "weight", None) is module.weight for other in model.modules()) > 1:
        return "its weight is another layer's, too"
    return ""


def _listed(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
