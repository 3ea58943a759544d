"""Momentum copies (BYOL's and MoCo's targets): which modules follow which.

A target is never trained by gradients and never sent: it is made from its online twin wherever it is needed.
"""

from __future__ import annotations

import torch
from torch import nn


def find_targets(model: nn.Module) -> dict[str, str]:
    """Path of every target branch, with the path of the online branch that it follows.

    A model may declare them as ``model.targets = {"target path": "online path"}``. Otherwise a target is a largest module with
    parameters of which none requires grad, that has a twin (same names and shapes) all of whose parameters do;
    of several twins, the one whose path is most alike. The two lie in branches beside each other (``teacher.backbone``,
    ``student.backbone``), so that a layer that the user froze is not taken for a copy of the next one: items of one
    Sequential or ModuleList are layers, not branches, and single layers are copies only where something larger is one.

    Must be called before a plugin freezes anything. A frozen branch that must not follow its twin: declare ``targets = {}``.
    """
    declared = getattr(model, "targets", None)
    if isinstance(declared, dict):
        return dict(declared)
    online: dict[tuple[tuple[str, torch.Size], ...], list[str]] = {}
    for path, module in model.named_modules():
        if path and _gradients(module) == {True}:
            online.setdefault(_shape(module), []).append(path)
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if not path or any(path.startswith(f"{other}.") for other in found) or _gradients(module) != {False}:
            continue
        twins = [twin for twin in online.get(_shape(module), []) if _beside(model, path, twin)]
        if twins:
            found[path] = max(twins, key=lambda twin: _common(twin, path))
    return found if any(list(model.get_submodule(path).children()) for path in found) else {}


def follow(model: nn.Module, targets: dict[str, str]) -> None:
    """Copy every online branch into its target: parameters and buffers."""
    with torch.no_grad():
        for target, online in targets.items():
            copy_member(model.get_submodule(online), model.get_submodule(target))


def copy_member(source: nn.Module | nn.Parameter, destination: nn.Module | nn.Parameter) -> None:
    """Copy a parameter, or all state of a module, into its twin, in place."""
    with torch.no_grad():
        if isinstance(source, nn.Parameter) and isinstance(destination, nn.Parameter):
            destination.copy_(source)
        elif isinstance(source, nn.Module) and isinstance(destination, nn.Module):
            state = source.state_dict(keep_vars=True)
            for name, value in destination.state_dict(keep_vars=True).items():
                value.copy_(state[name])


def _gradients(module: nn.Module) -> set[bool]:
    return {parameter.requires_grad for parameter in module.parameters()}


def _shape(module: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, value.shape) for name, value in module.state_dict(keep_vars=True).items())


def _beside(model: nn.Module, target: str, online: str) -> bool:
    """Whether the two have the same place in two branches of one module, the target's all frozen."""
    ours, theirs = target.split("."), online.split(".")
    depth = next((level for level, (a, b) in enumerate(zip(ours, theirs)) if a != b), 0)
    meeting = model.get_submodule(".".join(ours[:depth]))
    branch = meeting.get_submodule(ours[depth])
    layers = isinstance(meeting, nn.Sequential | nn.ModuleList)
    return not layers and ours[depth + 1 :] == theirs[depth + 1 :] and _gradients(branch) == {False}


def _common(one: str, other: str) -> int:
    length = 0
    for a, b in zip(one, other):
        if a != b:
            break
        length += 1
    return length
