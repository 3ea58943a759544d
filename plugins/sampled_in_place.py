"""Layers of an ordinary model that train in a principal share of themselves and are evaluated whole: PriSM on one machine.

A layer keeps its whole weight W, which does not train. Beside it lie the factors that do, u (n, r) and v (r, I, …), with what they
were when they were drawn: all rows of u's columns, and v. At any time the layer's weight is

    W + u₀·(v − v₀) + (u − u₀ at the drawn rows)·v

which evaluation, checkpoints and whoever reads the weight at the end get; nothing is ever rounded by getting it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from featherlight.plugins.factors import Factors
from featherlight.plugins.principal import Layer
from featherlight.plugins.sampled_layers import (
    LAYERS,
    NORMS,
    SampledBatchNorm,
    SampledConv2d,
    SampledGroupNorm,
    SampledLinear,
    keep_out_fast_path,
)

BROUGHT = ("u_before", "v_before", "rows", "drawn_in")


class InPlace:
    """Mixed in before a sampled layer's class: sampled while ``sampling``, whole otherwise."""

    sampling: bool = False
    weight: Any
    bias: Any
    u: nn.Parameter
    v: nn.Parameter
    u_before: Tensor
    v_before: Tensor
    rows: Any
    drawn_in: Tensor

    def whole_weight(self) -> Tensor:
        """The layer's weight as it is now, (O, I, …)."""
        v = self.v.flatten(1)
        change = self.u_before @ (v - self.v_before.flatten(1))
        change = change.index_add(0, self.rows, (self.u - self.u_before[self.rows]) @ v)
        return self.weight + change.view_as(self.weight)

    def begin(self, factors: Factors, kernels: Tensor, rows: Tensor, period: int) -> None:
        """Hold ``kernels`` and ``rows`` of ``factors``, those of the whole weight, from here on."""
        with torch.no_grad():
            self.weight.copy_(self.whole_weight())
            self.u_before.copy_(factors.u[:, kernels])
            self.v_before.copy_(factors.v[kernels].view_as(self.v_before))
            self.u.copy_(self.u_before[rows])
            self.v.copy_(self.v_before)
            self.rows.copy_(rows)
            self.drawn_in.fill_(period)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if not keep_vars:
            destination[f"{prefix}weight_before"] = destination[f"{prefix}weight"]
            destination[f"{prefix}weight"] = self.whole_weight().detach()

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        before = state.pop(f"{prefix}weight_before", None)
        if before is not None:
            state[f"{prefix}weight"] = before
        elif f"{prefix}weight" in state:  # an ordinary state: the whole weight, from which the factors have not moved
            state[f"{prefix}u"], state[f"{prefix}v"] = self.u_before[self.rows], self.v_before
        for name in ("u", "v", *BROUGHT):
            state.setdefault(f"{prefix}{name}", getattr(self, name).detach())
        super()._load_from_state_dict(state, prefix, *arguments)  # type: ignore[misc]


class InPlaceConv2d(InPlace, SampledConv2d):
    """A convolution, sampled or whole."""

    def forward(self, x: Tensor) -> Tensor:
        if self.sampling:
            return super().forward(x)
        return self._conv_forward(x, self.whole_weight(), self.bias)

    def apply_factors(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[self.rows]
        return F.conv2d(self._conv_forward(x, self.v, None), self.u[:, :, None, None], bias)


class InPlaceLinear(InPlace, SampledLinear):
    """A linear layer, sampled or whole."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.sampling else F.linear(x, self.whole_weight(), self.bias)

    def apply_factors(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.columns(x)), self.u, None if self.bias is None else self.bias[self.rows])


class InPlaceBatchNorm(SampledBatchNorm):
    """Batch norm of all channels, or of the sampled ones: only their running statistics move then."""

    sampling: bool = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.sampling else nn.BatchNorm2d.forward(self, x)

    def normalise(self, x: Tensor) -> Tensor:
        affine = (None, None) if self.weight is None else (self.weight[self.rows], self.bias[self.rows])
        if self.running_mean is None or self.running_var is None:
            return F.batch_norm(x, None, None, *affine, True, 0.0, self.eps)
        if not self.training:
            return F.batch_norm(x, self.running_mean[self.rows], self.running_var[self.rows], *affine, False, 0.0, self.eps)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        mean, variance = self.running_mean[self.rows], self.running_var[self.rows]
        out = F.batch_norm(x, mean, variance, *affine, True, momentum, self.eps)
        self.running_mean.index_copy_(0, self.rows, mean)
        self.running_var.index_copy_(0, self.rows, variance)
        return out


class InPlaceGroupNorm(SampledGroupNorm):
    """Group norm of all channels, or of the sampled ones."""

    sampling: bool = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.sampling else nn.GroupNorm.forward(self, x)

    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        return self.weight[self.rows], self.bias[self.rows]


_IN_PLACE: dict[type[nn.Module], type[nn.Module]] = {
    SampledConv2d: InPlaceConv2d,
    SampledLinear: InPlaceLinear,
    SampledBatchNorm: InPlaceBatchNorm,
    SampledGroupNorm: InPlaceGroupNorm,
}


def sample_in_place(model: nn.Module, layers: dict[str, Layer], keep: float) -> list[nn.Module]:
    """Let ``layers`` of ``model`` train in the share ``keep`` of themselves; returns what was changed, in forward order of registration."""
    changed: list[nn.Module] = []
    for path, layer in layers.items():
        module: Any = model.get_submodule(path)
        weight, (kernels, rows) = module.weight, (layer.kernels_at(keep), layer.rows_at(keep))
        module.__class__ = _IN_PLACE[LAYERS[type(module)]]
        module.u = nn.Parameter(weight.detach().new_zeros(rows, kernels), requires_grad=weight.requires_grad)
        module.v = nn.Parameter(weight.detach().new_zeros(kernels, *weight.shape[1:]), requires_grad=weight.requires_grad)
        module.register_buffer("u_before", weight.detach().new_zeros(layer.outputs, kernels))
        module.register_buffer("v_before", torch.zeros_like(module.v.detach()))
        module.register_buffer("rows", torch.arange(rows, device=weight.device))
        module.register_buffer("drawn_in", torch.tensor(-1, device=weight.device))
        module.whole, module.compact = layer.outputs, layer.compact
        module.before = (model.get_submodule(layer.takes),) if layer.takes else ()
        module._trains = weight.requires_grad
        weight.requires_grad_(False)
        module._keep_out = keep_out_fast_path(model, path)
        changed.append(module)
        if layer.norm is not None:
            norm: Any = model.get_submodule(layer.norm)
            norm.__class__ = _IN_PLACE[NORMS[type(norm)]]
            norm.behind, norm.whole = (module,), layer.outputs
            changed.append(norm)
    return changed


def make_whole(module: Any) -> None:
    """Make one of :func:`sample_in_place`'s an ordinary layer or norm again, with the weight that training left."""
    if isinstance(module, InPlace):
        with torch.no_grad():
            module.weight.copy_(module.whole_weight())
        module.weight.requires_grad_(module._trains)  # type: ignore[attr-defined]
        for name in ("u", "v", *BROUGHT):
            delattr(module, name)
        del module.compact, module.before, module._trains  # type: ignore[attr-defined]
        if hook := module.__dict__.pop("_keep_out", None):
            hook.remove()
    else:
        del module.behind
    del module.whole
    module.__dict__.pop("sampling", None)
    ordinary = next(base for base in type(module).__mro__ if base in (*LAYERS, *NORMS))
    module.__class__ = ordinary


def idle(module: Any) -> list[tuple[nn.Parameter, Tensor]]:
    """Of a layer's or norm's own parameters with a figure for each row: which rows do not train now, as (parameter, indices)."""
    mask = torch.ones(module.whole, dtype=torch.bool, device=module.rows.device)
    mask[module.rows] = False
    resting = mask.nonzero().flatten()
    own = (module.bias,) if isinstance(module, InPlace) else (module.weight, module.bias)
    return [(parameter, resting) for parameter in own if parameter is not None]
