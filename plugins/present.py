"""What a model holds and what of it trains: the two questions from which every cost and every message follows."""

from __future__ import annotations

from torch import Tensor, nn

from featherlight.plugins.bypass import is_absent


def held(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` entries that are present, tied ones once: what a machine that trains ``model`` holds.

    Returns:
        name → the live tensor (a Parameter or a persistent buffer).
    """
    return {name: value for name, (value, _) in entries(model).items()}


def trained(model: nn.Module, ignore: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The held entries that a training step may change: parameters that require grad, and the persistent buffers of modules
    in training mode (running statistics), except below the paths in ``ignore`` (targets, which are derived and never sent).
    """
    return select_trained(entries(model), ignore)


def entries(model: nn.Module) -> dict[str, tuple[Tensor, nn.Module]]:
    """As :func:`held`, each with the module that owns it."""
    found: dict[str, tuple[Tensor, nn.Module]] = {}
    seen: set[int] = set()
    left = [("", model)]
    while left:  # depth first, by hand: this runs for every client of every round, and the library's own walks are ten times slower
        prefix, module = left.pop()
        if is_absent(module):
            continue
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if value is not None and id(value) not in seen and name not in module._non_persistent_buffers_set:
                    seen.add(id(value))
                    found[prefix + name] = (value, module)
        for name, child in reversed(module._modules.items()):
            if child is not None:
                left.append((f"{prefix}{name}.", child))
    return found


def select_trained(present: dict[str, tuple[Tensor, nn.Module]], ignore: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Those of :func:`entries` that :func:`trained` gives."""
    skip = tuple(f"{path}." for path in ignore)
    return {
        name: value
        for name, (value, owner) in present.items()
        if (value.requires_grad if isinstance(value, nn.Parameter) else owner.training) and not name.startswith(skip)
    }


def count(tensors: dict[str, Tensor]) -> int:
    """Number of parameters (elements of Parameters; buffers are not counted) among ``tensors``."""
    return sum(value.numel() for value in tensors.values() if isinstance(value, nn.Parameter))
