"""What a module would put out, computed only if somebody looks at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_TOLD: set[Any] = {
    *(Tensor.size, Tensor.stride, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__len__),
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_leaf")),
}
"""What can be asked of a tensor without looking at its values."""


class Form(NamedTuple):
    """What is known of a tensor without its values."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: Tensor) -> Form:
        return cls(value.shape, value.stride(), value.dtype, value.device)


class Deferred(Tensor):
    """A tensor of the form given, without storage; ``make`` computes it, once, when any function of torch takes it for more than its form.

    Example:
        >>> later = Deferred(Form.of(torch.zeros(2)), lambda: torch.ones(2))
        >>> later.shape, later.made
        (torch.Size([2]), False)
        >>> (later + 1).tolist(), later.made
        ([2.0, 2.0], True)
    """

    @staticmethod
    def __new__(cls, form: Form, make: Callable[[], Tensor]) -> Deferred:
        shape, stride, dtype, device = form
        made = Tensor._make_wrapper_subclass(cls, shape, strides=stride, dtype=dtype, device=device)  # type: ignore[attr-defined]
        return made  # type: ignore[no-any-return]

    def __init__(self, form: Form, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._value: Tensor | None = None
        self._begun = 0

    @property
    def made(self) -> bool:
        """Whether somebody has looked."""
        return self._value is not None

    def value(self) -> Tensor:
        """The tensor itself."""
        if self._value is None:
            assert self._make is not None
            self._value, self._make = self._make(), None
            self._begun = version(self._value)
        return self._value

    def changes(self) -> int:
        """How often somebody wrote to it."""
        return 0 if self._value is None else version(self._value) - self._begun

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _TOLD and isinstance(args[0], Deferred) and not args[0].made:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _with_values(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _with_values(func, args, kwargs)  # of those who call torch's operators not by its functions


def _with_values(func: Any, args: Any, kwargs: Any) -> Any:
    args, kwargs = tree_map_only(Deferred, Deferred.value, (args, kwargs or {}))
    return func(*args, **kwargs)


def version(value: Tensor) -> int:
    """A number that changes when somebody writes to ``value``; 0 of tensors that nobody counts for (made in inference mode)."""
    if isinstance(value, Deferred):
        return value.changes()
    return 0 if value.is_inference() else value._version
