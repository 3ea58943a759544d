"""Layers that compute with a part of their factors: r principal kernels, and of their outputs n rows (arXiv 2208.13141).

A layer becomes one of these by a swap of its class, as ``plugins/bypass.py`` does it: its path, its ``isinstance`` and its settings stay.
Beside a layer that puts out some of its channels only, a norm that normalises those alone: the others stay 0, as if they were not there.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class Sampled:
    """Mixed in before a layer's own class: it has factors ``u`` (n, r) and ``v`` (r, I, …) and no ``weight``, or besides it.

    Its outputs are the channels in ``rows`` (n,). They are handed on alone where what is behind takes them so (``compact``), else
    among zeros for the rest. ``before`` is the layer whose outputs it takes alone, if there is one, in a tuple, which does not register it.
    """

    u: nn.Parameter
    v: nn.Parameter
    rows: Tensor | None
    whole: int
    compact: bool
    before: tuple[Any, ...]

    def forward(self, x: Tensor) -> Tensor:
        out = self.apply_factors(x)  # type: ignore[attr-defined]
        if self.rows is None or self.compact or len(self.rows) == self.whole:
            return out
        return spread(out, self.rows, self.whole, self.channel_axis)  # type: ignore[attr-defined]


class SampledConv2d(Sampled, nn.Conv2d):
    """Two convolutions: v, as the layer's own, I → r; u, 1×1, r → n."""

    channel_axis = -3

    def apply_factors(self, x: Tensor) -> Tensor:
        return F.conv2d(self._conv_forward(x, self.v, None), self.u[:, :, None, None], self.bias)


class SampledLinear(Sampled, nn.Linear):
    """Two linear layers: v, I → r; u, r → n."""

    channel_axis = -1

    def apply_factors(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.columns(x)), self.u, self.bias)

    def columns(self, x: Tensor) -> Tensor:
        """Of v those for ``x``, which has all inputs or those of the layer before that were drawn."""
        if self.before and x.shape[-1] != self.v.shape[1]:
            return self.v.index_select(1, self.before[0].rows)
        return self.v


class SampledNorm:
    """Mixed in before a norm's own class: normalises the channels that ``behind``, its layer, puts out, among zeros for the rest."""

    behind: tuple[Any]  # in a tuple, a module is not registered a second time
    whole: int

    @property
    def rows(self) -> Tensor:
        """Those channels, (n,): the layer's own tensor, wherever it was moved."""
        return self.behind[0].rows

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != len(self.rows):
            raise ValueError(
                f"a norm expects the {len(self.rows)} sampled channels of the layer before it and got {x.shape[1]}: the model calls them "
                "in another order than it registers them; use rows=False"
            )
        return spread(self.normalise(x), self.rows, self.whole, 1)  # type: ignore[attr-defined]


class SampledBatchNorm(SampledNorm, nn.BatchNorm2d):
    """Batch norm of some channels: each has its own statistics, so nothing else changes."""

    def normalise(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x)


class SampledGroupNorm(SampledNorm, nn.GroupNorm):
    """Group norm of some channels: a group's statistics are those of its channels that are there, which estimate those of all."""

    def normalise(self, x: Tensor) -> Tensor:
        group = self.rows.div(self.whole // self.num_groups, rounding_mode="floor")
        weight, bias = (None, None) if self.weight is None else self.weight_and_bias()
        return _NormaliseGroups.apply(x, group, self.num_groups, self.eps, weight, bias)

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the channels that are there."""
        return self.weight, self.bias


class _Spread(torch.autograd.Function):
    """``index_copy`` into zeros, which keeps what it copies for backward and need not."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, rows: Tensor, whole: int, axis: int) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.axis = axis
        shape = [*part.shape]
        shape[axis] = whole
        return part.new_zeros(shape).index_copy_(axis, rows, part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0].index_select(ctx.axis, ctx.saved_tensors[0]), None, None, None


class _NormaliseGroups(torch.autograd.Function):
    """(x − mean) / deviation · weight + bias over each group's channels, which may be of different number.

    Worked out in float32 (float64 of such x), as torch's group norm is; keeps one tensor of x's size and dtype for backward.

    Args:
        x: (N, n, …); group: (n,), which of ``groups`` each channel belongs to; weight, bias: (n,), or None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Tensor, groups: int, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        shape = [*x.shape[:2], *[1] * (x.ndim - 2)]
        wide = torch.promote_types(x.dtype, torch.float32)
        centred = x.to(wide)
        centred = centred - _group_means(centred.flatten(2).mean(2), group, groups).view(shape)
        scale = (_group_means(centred.square().flatten(2).mean(2), group, groups) + eps).rsqrt().view(shape)
        normed = centred.mul_(scale)
        ctx.save_for_backward(normed.to(x.dtype), scale, group, weight)
        ctx.groups, ctx.of_bias = groups, None if bias is None else bias.dtype
        out_dtype = wide if x.is_cuda and torch.is_autocast_enabled("cuda") else x.dtype  # as torch has it
        if weight is None or bias is None:
            return normed.to(out_dtype, copy=True)
        one = (1, -1, *shape[2:])
        return torch.addcmul(bias.to(wide).view(one), normed, weight.to(wide).view(one)).to(out_dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        normed, scale, group, weight = ctx.saved_tensors
        dtype, grad, normed = normed.dtype, grads[0].to(scale.dtype), normed.to(scale.dtype)
        of_weight = of_bias = None
        if weight is not None:
            places = [0, *range(2, grad.ndim)]
            of_weight, of_bias = (grad * normed).sum(places).to(weight.dtype), grad.sum(places).to(ctx.of_bias)
            grad = grad * weight.to(grad.dtype).view(1, -1, *scale.shape[2:])
        along = _group_means((grad * normed).flatten(2).mean(2), group, ctx.groups).view(scale.shape)
        mean = _group_means(grad.flatten(2).mean(2), group, ctx.groups).view(scale.shape)
        return (scale * (grad - mean - normed * along)).to(dtype), None, None, None, of_weight, of_bias


def _group_means(figure: Tensor, group: Tensor, groups: int) -> Tensor:
    """The mean of (N, n) over each group's channels, handed to each of them."""
    there = figure.new_zeros(groups).index_add_(0, group, figure.new_ones(len(group))).clamp_(min=1)
    return (figure.new_zeros(len(figure), groups).index_add_(1, group, figure) / there)[:, group]


BY_CHANNEL = re.compile(r"(ReLU6?|ELU|SiLU|Mish|[Ss]wish|Tanh|[Ss]igmoid|Softplus|Dropout|Dropout2d|Identity|Pool2d)$")
"""Classes of modules whose outputs of a channel are made of that channel alone."""

LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: SampledConv2d, nn.Linear: SampledLinear}
NORMS: dict[type[nn.Module], type[nn.Module]] = {nn.BatchNorm2d: SampledBatchNorm, nn.GroupNorm: SampledGroupNorm}


def spread(part: Tensor, rows: Tensor, whole: int, axis: int) -> Tensor:
    """``part`` at ``rows`` of ``axis``, zeros elsewhere."""
    return _Spread.apply(part, rows, whole, axis % part.ndim)


def sampled_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of ``model`` that compute with factors, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Sampled)}


def sampled_norms(model: nn.Module) -> dict[str, Any]:
    """The norms of ``model`` that follow such a layer, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SampledNorm)}


def norm_behind(parent: nn.Module, layer: str) -> str | None:
    """The name of the norm that ``parent`` registers right behind its convolution ``layer``, if it normalises that one's channels.

    Activations, dropout and pooling in between do not count. None where that is not the only reading: another norm of these channels
    follows it, or a pointwise convolution from the same inputs to as many channels has no norm of its own, so that this one may be of
    their sum.
    """
    names = list(parent._modules)
    for name in names[names.index(layer) + 1 :]:
        module = parent._modules[name]
        if type(module) in NORMS:
            rest = [parent._modules[other] for other in names[names.index(name) + 1 :]]
            outputs = parent._modules[layer].out_channels  # type: ignore[union-attr]
            rival = next((other for other in rest if other is not None and not BY_CHANNEL.search(type(other).__name__)), None)
            if _channels(module) != outputs or (type(rival) in NORMS and _channels(rival) == outputs):
                return None
            return None if any(_beside(parent, layer, other) for other in names) else name
        if module is not None and (not BY_CHANNEL.search(type(module).__name__) or any(True for _ in module.parameters())):
            return None
    return None


def _beside(parent: nn.Module, layer: str, other: str) -> bool:
    """Whether ``other`` may be a shortcut beside the convolution ``layer``, added before the norm."""
    one, two = parent._modules[layer], parent._modules[other]
    if not isinstance(one, nn.Conv2d) or not isinstance(two, nn.Conv2d) or two.kernel_size != (1, 1) or one.kernel_size == (1, 1):
        return False
    names = list(parent._modules)
    behind = next((parent._modules[name] for name in names[names.index(other) + 1 :] if parent._modules[name] is not None), None)
    alike = (one.in_channels, one.out_channels) == (two.in_channels, two.out_channels)
    return alike and one.in_channels != one.out_channels and type(behind) not in NORMS


def _channels(norm: Any) -> int:
    return norm.num_features if isinstance(norm, nn.BatchNorm2d) else norm.num_channels


def keep_out_fast_path(model: nn.Module, path: str) -> Any:
    """In torch's transformer, keep its fast path of inference, which reads W past the layer's forward, from the layer at ``path``.

    Returns:
        The handle of a hook, or None where nothing was to be done.
    """
    if not isinstance(model.get_submodule(path.rpartition(".")[0]), nn.TransformerEncoderLayer):
        return None
    return model.get_submodule(path).register_forward_pre_hook(_nothing)


def _nothing(module: nn.Module, inputs: Any) -> None:
    """A hook whose presence is enough."""
