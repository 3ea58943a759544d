"""MLPs a part of whose hidden units may be left out: what comes out of one layer is, but for an activation, what goes into another.

An activation with f(0) = 0 makes of a unit that is not drawn a 0, which the next layer multiplies by a column of its weight and adds. So
the drawn units alone, with their columns, give the same, and nothing of the others' is computed or kept for backward.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import nn
from torch.nn import functional as F

KEEPS_ZERO = re.compile(r"ReLU|GELU|SiLU|Swish|Mish|Tanh|ELU|^Dropout$|Identity")
"""Classes, of those without parameters, that work on each element by itself, with f(0) = 0."""


class Hidden(NamedTuple):
    """Hidden units of an MLP.

    Args:
        makers: paths of the layers that make them, two where their outputs are multiplied (a gate); taker: of the layer that takes them.
    """

    makers: tuple[str, ...]
    taker: str


def find_hidden(model: nn.Module, paths: Collection[str]) -> list[Hidden]:
    """Hidden units between linear layers among ``paths``, of one parent that has nothing between them that would mind their number."""
    found = []
    for above in dict.fromkeys(path.rpartition(".")[0] for path in paths):
        parent = model.get_submodule(above)
        for makers, taker in _of_sequence(parent) if isinstance(parent, nn.Sequential) else _of_block(parent):
            hidden = Hidden(tuple(_join(above, name) for name in makers), _join(above, taker))
            if {*hidden.makers, hidden.taker} <= set(paths):
                found.append(hidden)
    return found


def find_gated(model: nn.Module, paths: Collection[str]) -> set[str]:
    """Of ``paths``, layers whose outputs are multiplied with one another: of rows drawn apart hardly any product would be left."""
    found = set()
    for above in dict.fromkeys(path.rpartition(".")[0] for path in paths):
        layers = _linears(model.get_submodule(above))
        gates = _gates(layers)
        ordered = list(layers.items())
        names = [*gates[0]] if gates else []
        names += [name for (name, a), (_, b) in pairwise(ordered) if a.out_features == 2 * b.in_features]  # both in one layer
        found |= {_join(above, name) for name in names}
    return found & set(paths)


def _of_sequence(parent: nn.Sequential) -> Sequence[tuple[tuple[str, ...], str]]:
    found, last = [], ""
    for name, module in parent._modules.items():
        if type(module) is nn.Linear:
            if last and parent.get_submodule(last).out_features == module.in_features:
                found.append(((last,), name))
            last = name
        elif module is None or not _keeps_zero(module):
            last = ""
    return found


def _of_block(parent: nn.Module) -> Sequence[tuple[tuple[str, ...], str]]:
    if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        activation = parent.activation
        plain = _keeps_zero(activation) if isinstance(activation, nn.Module) else activation in (F.relu, F.gelu)
        return [(("linear1",), "linear2")] if plain else []
    if any(value is not None for value in parent._parameters.values()):
        return []
    if not all(type(child) is nn.Linear or _keeps_zero(child) for child in parent.children()):
        return []
    layers = _linears(parent)
    names = list(layers)
    if len(names) == 2 and layers[names[0]].out_features == layers[names[1]].in_features:
        return [((names[0],), names[1])]
    gates = _gates(layers)
    return [gates] if gates else []


def _gates(layers: dict[str, nn.Linear]) -> tuple[tuple[str, ...], str] | None:
    """Of three layers the two from one width to another, whose product the third takes back."""
    if len(layers) != 3:
        return None
    for taker, last in layers.items():
        makers = tuple(name for name in layers if name != taker)
        if all((layers[name].in_features, layers[name].out_features) != (last.in_features, last.out_features) for name in makers) and all(
            layers[name].out_features == last.in_features and layers[name].in_features == layers[makers[0]].in_features for name in makers
        ):
            return makers, taker
    return None


def _linears(parent: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in parent._modules.items() if type(module) is nn.Linear}


def _keeps_zero(module: nn.Module) -> bool:
    return bool(KEEPS_ZERO.search(type(module).__name__)) and not any(True for _ in module.parameters())


def _join(above: str, name: str) -> str:
    return f"{above}.{name}".lstrip(".")
