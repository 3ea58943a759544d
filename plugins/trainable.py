"""The parameters that methods on a flat vector of them go by: which, how many, how large."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


def outside(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Parameter]:
    """Parameters by name, without those of momentum copies, whose paths are ``targets``."""
    skip = tuple(f"{path}." for path in targets)
    return {name: value for name, value in model.named_parameters() if not name.startswith(skip)}


def trainable(model: nn.Module, targets: Iterable[str]) -> dict[str, nn.Parameter]:
    """Of :func:`outside` those that train now."""
    return {name: value for name, value in outside(model, targets).items() if value.requires_grad}


def magnitude(value: Tensor) -> float:
    """Of the largest number; in one pass, where torch's norm takes as long as ten."""
    return max(abs(float(extreme)) for extreme in value.aminmax()) if value.numel() else 0.0


def refuse_more(argument: str, given: int, parameters: int, where: str = "this stage") -> None:
    """
    Raises:
        ValueError: ``given`` is more than train.
    """
    if given > parameters:
        raise ValueError(f"{argument}={given}: {parameters} parameters train in {where}; give that many or fewer")


def check_stage(argument: str, given: int, model: nn.Module, targets: Iterable[str], stage: int) -> None:
    """As :func:`refuse_more`, for ``stage`` (counted from 0), which ``model`` is in."""
    refuse_more(argument, given, sum(value.numel() for value in trainable(model, targets).values()), f"stage {stage + 1}")
