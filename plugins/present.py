"""What a model holds and what of it trains: the two questions from which every cost and every message follows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from featherlight.plugins.bypass import is_absent


def _walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    if is_absent(module):
        return
    yield prefix, module
    for name, child in module.named_children():
        yield from _walk(child, f"{prefix}{name}.")


def held(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` entries that are present, tied ones once: what a machine that trains ``model`` holds.

    Returns:
        name → the live tensor (a Parameter or a persistent buffer), in ``state_dict`` order.
    """
    entries: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in _walk(model):
        temporary = module._non_persistent_buffers_set
        own = list(module.named_parameters(prefix="", recurse=False))
        own += [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in temporary]  # type: ignore[misc]
        for name, value in own:
            if id(value) not in seen:
                seen.add(id(value))
                entries[prefix + name] = value
    return entries


def trained(model: nn.Module, ignore: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The held entries that a training step may change: parameters that require grad, and the persistent buffers of modules
    in training mode (running statistics), except below the paths in ``ignore`` (targets, which are derived and never sent).
    """
    skip = tuple(f"{path}." for path in ignore)
    live = {
        prefix + name
        for prefix, module in _walk(model)
        if module.training and not prefix.startswith(skip)
        for name, _ in module.named_buffers(recurse=False)
    }
    return {
        name: value
        for name, value in held(model).items()
        if not name.startswith(skip) and (name in live or (isinstance(value, nn.Parameter) and value.requires_grad))
    }


def count(entries: dict[str, Tensor]) -> int:
    """Number of parameters (elements of Parameters; buffers are not counted) among ``entries``."""
    return sum(value.numel() for value in entries.values() if isinstance(value, nn.Parameter))
