"""Layers of sampled kernels and rows against dense layers with the same factors, masked after the norm."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from featherlight.plugins.factors import factorise
from featherlight.plugins.principal import find_layers, shrink
from featherlight.plugins.sampled_layers import SampledBatchNorm, SampledGroupNorm, norm_behind, sampled_layers, sampled_norms, spread


def random_input(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(model, keep, rows=True):
    """``model`` made smaller, with kernels 0 … r − 1 and rows 0 … n − 1 of each layer."""
    layers = find_layers(model, "*", False, rows, {})
    return shrink(model, layers, keep)


def fill(layer, weight, kernels=None, bias=None, rows=None):
    """Give a sampled layer the chosen kernels and rows of ``weight``'s factors."""
    u, v, _ = factorise(weight)
    kernels = torch.arange(len(v)) if kernels is None else torch.tensor(kernels)
    rows = torch.arange(len(u)) if rows is None else torch.tensor(rows)
    with torch.no_grad():
        layer.u.copy_(u[rows][:, kernels])
        layer.v.copy_(v[kernels].view_as(layer.v))
        if layer.rows is not None:
            layer.rows.copy_(rows)
        if bias is not None:
            layer.bias.copy_(bias[rows])


# -- full rank --------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 5),
    st.integers(1, 6),
    st.sampled_from([1, 2, 3, (1, 3), (3, 2)]),
    st.sampled_from([1, 2, (2, 1)]),
    st.sampled_from([0, 1, (1, 0)]),
    st.sampled_from([1, 2]),
    st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_full_rank_convolution_is_the_original(channels, outputs, kernel, stride, padding, dilation, mode, bias, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, bias=bias, padding_mode=mode).double()
    model = nn.Sequential(conv)
    same = small(model, 1.0)
    fill(same[0], conv.weight, bias=conv.bias)
    x = random_input(2, channels, 8, 7, seed=seed)
    torch.testing.assert_close(same(x), conv(x), rtol=1e-10, atol=1e-10)
    assert isinstance(same[0], nn.Conv2d)
    assert same[0].weight is None
    assert type(model[0]) is nn.Conv2d  # the original is as it was


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=3), st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 2**31))
def test_a_full_rank_linear_layer_is_the_original_whatever_leads_its_input(leading, inputs, outputs, bias, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias).double()
    same = small(nn.Sequential(linear), 1.0)
    fill(same[0], linear.weight, bias=linear.bias)
    x = random_input(*leading, inputs, seed=seed)
    torch.testing.assert_close(same(x), linear(x), rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=2), st.integers(0, 2**31))
def test_rows_of_a_linear_layer_are_the_dense_layer_s_and_the_others_0(leading, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(5, 6).double()
    part = small(nn.Sequential(linear), 0.5)
    kernels, rows = [0, 2, 4], [1, 2, 5]  # ⌈0.5 · 5⌉ of 5, ⌈0.5 · 6⌉ of 6
    fill(part[0], linear.weight, kernels, linear.bias, rows)
    u, v, _ = factorise(linear.weight)
    dense = F.linear(random_input(*leading, 5), u[:, kernels] @ v[kernels], linear.bias)
    mask = torch.zeros(6, dtype=torch.float64)
    mask[rows] = 1
    out = part(random_input(*leading, 5))
    torch.testing.assert_close(out, dense * mask, rtol=1e-10, atol=1e-10)
    assert (out[..., [0, 3, 4]] == 0).all()


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_spread_by_a_loop(axis):
    part, rows = random_input(2, 2, 2), torch.tensor([0, 3])
    out = spread(part, rows, 5, axis)
    for place in range(5):
        expected = part.select(axis, [0, 3].index(place)) if place in (0, 3) else torch.zeros(2, 2)
        assert torch.equal(out.select(axis, place), expected.to(out))


# -- with a norm ------------------------------------------------------------------------------------------------------
KERNELS, ROWS = [0, 1, 3], [0, 2, 3]


class Dense(nn.Module):
    """Convolution with the sampled factors at full width, its norm, and a mask behind it."""

    def __init__(self, model, kernels, rows):
        super().__init__()
        u, v, _ = factorise(model[0].weight)
        self.conv = model[0]
        self.u = nn.Parameter(u[:, kernels].clone())
        self.v = nn.Parameter(v[kernels].view(len(kernels), *model[0].weight.shape[1:]).clone())
        self.norm = copy.deepcopy(model[1])
        self.register_buffer("mask", torch.zeros(len(u), dtype=torch.float64))
        self.mask[rows] = 1

    def forward(self, x):
        bias = self.conv.bias
        out = F.conv2d(F.conv2d(x, self.v, None, self.conv.stride, self.conv.padding), self.u[:, :, None, None], bias)
        return self.norm(out) * self.mask[:, None, None]


def conv_and_norm(norm, bias=False, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, bias=bias), norm, nn.ReLU()).double()
    with torch.no_grad():
        if norm.weight is not None:
            norm.weight.copy_(torch.linspace(0.5, 2, 6))
            norm.bias.copy_(torch.linspace(1, 3, 6))
    return model


def sampled(model, rows=ROWS, kernels=KERNELS):
    part = small(model, 0.5)
    fill(part[0], model[0].weight, kernels, model[0].bias, rows)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            if getattr(part[1], name, None) is not None:
                getattr(part[1], name).copy_(getattr(model[1], name)[rows])
    return part


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_behind_rows_is_the_dense_one_masked(training, bias):
    model = conv_and_norm(nn.BatchNorm2d(6), bias)
    with torch.no_grad():
        model[1].running_mean.copy_(torch.linspace(-1, 1, 6))
        model[1].running_var.copy_(torch.linspace(0.5, 2, 6))
    part, dense = sampled(model).train(training), Dense(model, KERNELS, ROWS).train(training)
    x = random_input(3, 4, 7, 7)
    out, wanted = part[1](part[0](x)), dense(x)
    assert out.shape == wanted.shape == (3, 6, 4, 4)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
    assert (out[:, [1, 4, 5]] == 0).all()  # not the norm's bias
    loss = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    (out * loss).sum().backward()
    (wanted * loss).sum().backward()
    torch.testing.assert_close(part[0].u.grad, dense.u.grad[ROWS], rtol=1e-8, atol=1e-8)
    assert (dense.u.grad[[1, 4, 5]] == 0).all()
    torch.testing.assert_close(part[0].v.grad, dense.v.grad, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(part[1].weight.grad, dense.norm.weight.grad[ROWS], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(part[1].bias.grad, dense.norm.bias.grad[ROWS], rtol=1e-8, atol=1e-8)
    if bias:
        torch.testing.assert_close(part[0].bias.grad, model[0].bias.grad[ROWS], rtol=1e-8, atol=1e-8)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(part[1], name), getattr(dense.norm, name)[ROWS], rtol=1e-9, atol=1e-9)


def test_batch_norm_without_affine_and_without_statistics():
    model = conv_and_norm(nn.BatchNorm2d(6, affine=False, track_running_stats=False))
    part, dense = sampled(model), Dense(model, KERNELS, ROWS)
    x = random_input(3, 4, 7, 7)
    torch.testing.assert_close(part[1](part[0](x)), dense(x), rtol=1e-9, atol=1e-9)


# -- group norm -------------------------------------------------------------------------------------------------------
def group_norm_by_loop(x, rows, whole, groups, eps, weight, bias):
    """Every group of present channels has its own mean and variance, over its channels and places."""
    out = torch.zeros(len(x), whole, *x.shape[2:], dtype=x.dtype)
    size = whole // groups
    for group in range(groups):
        places = [place for place, row in enumerate(rows) if row // size == group]
        for sample in range(len(x)) if places else ():
            values = x[sample, places]
            normed = (values - values.mean()) / (values.var(unbiased=False) + eps).sqrt()
            for place, value in zip(places, normed):
                scale, shift = (1.0, 0.0) if weight is None else (weight[place], bias[place])
                out[sample, rows[place]] = value * scale + shift
    return out


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(6, 1), (6, 2), (6, 3), (6, 6)]),
    st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_group_norm_is_a_loop_over_groups_of_the_channels_there(sizes, rows, affine, seed):
    """Groups may have none of their channels."""
    rows = sorted(rows)
    whole, groups = sizes
    norm = nn.GroupNorm(groups, whole, affine=affine, eps=1e-3).double()
    norm.__class__ = SampledGroupNorm
    norm.whole, norm.behind = whole, (SimpleNamespace(rows=torch.tensor(rows)),)
    torch.manual_seed(seed)
    if affine:
        norm.weight = nn.Parameter(torch.randn(len(rows), dtype=torch.float64))
        norm.bias = nn.Parameter(torch.randn(len(rows), dtype=torch.float64))
    x = (torch.randn(2, len(rows), 3, 2, dtype=torch.float64) * 3 + 1).requires_grad_()
    wanted = group_norm_by_loop(x, rows, whole, groups, 1e-3, norm.weight, norm.bias)
    out = norm(x)
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-9)
    inputs = [x, *norm.parameters()]
    ours, theirs = (torch.autograd.grad((one * torch.linspace(-1, 1, 6)[:, None, None]).sin().sum(), inputs) for one in (out, wanted))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_group_norm_of_all_rows_is_torch_s(groups):
    model = conv_and_norm(nn.GroupNorm(groups, 6))
    whole = small(model, 1.0)
    fill(whole[0], model[0].weight)
    whole[1].load_state_dict(model[1].state_dict())
    assert isinstance(whole[1], SampledGroupNorm)
    x = random_input(2, 4, 7, 7).requires_grad_()
    torch.testing.assert_close(whole(x), model(x), rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(one(x).sin().sum(), (x, one[1].weight, one[1].bias)) for one in (whole, model))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("scale", "offset"), [(1, 0), (1, 20), (400, 0)])
def test_group_norm_in_low_precision_is_as_exact_as_torch_s(scale, offset, dtype, autocast):
    random = torch.Generator().manual_seed(0)
    x = (torch.randn(4, 8, 16, 16, generator=random) * scale + offset).to(dtype)
    theirs = nn.GroupNorm(2, 8)
    with torch.no_grad():
        theirs.weight.copy_(torch.linspace(0.5, 2, 8))
        theirs.bias.copy_(torch.linspace(-1, 1, 8))
    exact = theirs(x.float())
    if not autocast:
        theirs = theirs.to(dtype)
    ours = copy.deepcopy(theirs)
    ours.__class__ = SampledGroupNorm
    ours.whole, ours.behind = 8, (SimpleNamespace(rows=torch.arange(8)),)
    along = torch.randn(4, 8, 16, 16, generator=random)
    found = []
    for norm in (ours, theirs):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            out = norm(given)
        found.append((out, *torch.autograd.grad((out.float() * along).sum(), (given, norm.weight, norm.bias))))
    assert [value.dtype for value in found[0]] == [value.dtype for value in found[1]]
    errors = [(out.float() - exact).abs().max() for out, *_ in found]
    assert errors[0] <= 1.1 * errors[1] + 1e-6
    for one, other in zip(*found):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2 * float(other.detach().abs().max()))


# -- which norm -------------------------------------------------------------------------------------------------------
class TwoOfOneWidth(nn.Module):
    """Registers its norms in one order and calls them in another: both convolutions have 6 outputs, and one keeps fewer rows."""

    def __init__(self, called_in_order):
        super().__init__()
        self.wide, self.norm_of_wide = nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.narrow, self.norm_of_narrow = nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.called_in_order = called_in_order

    def forward(self, x):
        if self.called_in_order:
            return self.norm_of_wide(self.wide(x)).sum() + self.norm_of_narrow(self.narrow(x)).sum()
        return self.norm_of_wide(self.narrow(x)).sum()


def test_a_norm_that_is_not_called_behind_its_layer_says_what_to_do():
    assert torch.isfinite(small(TwoOfOneWidth(True), 0.5)(torch.randn(2, 4, 5, 5)))
    with pytest.raises(ValueError, match=r"expects the 4 sampled channels of the layer before it and got 3: .* use rows=False"):
        small(TwoOfOneWidth(False), 0.5)(torch.randn(2, 4, 5, 5))


CONV = nn.Conv2d(3, 6, 3)


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        (nn.Sequential(CONV, nn.BatchNorm2d(6)), "1"),
        (nn.Sequential(CONV, nn.ReLU(), nn.GroupNorm(2, 6)), "2"),
        (nn.Sequential(CONV, nn.BatchNorm2d(5)), None),  # another one's
        (nn.Sequential(CONV, nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)), None),
        (nn.Sequential(CONV, nn.LayerNorm(6)), None),
        (nn.Sequential(CONV, nn.PReLU(), nn.BatchNorm2d(6)), None),
        (nn.Sequential(CONV), None),
    ],
    ids=lambda value: "-".join(type(one).__name__ for one in value) if isinstance(value, nn.Sequential) else "",
)
def test_which_norm_is_right_behind(parent, expected):
    assert norm_behind(parent, "0") == expected


def test_sampled_layers_and_norms_are_found():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))
    part = small(model, 0.5)
    assert list(sampled_layers(part)) == ["0", "4"]
    assert list(sampled_norms(part)) == ["1"]
    assert isinstance(part[1], SampledBatchNorm)
    assert part[0].rows is part[1].rows
    assert not sampled_layers(model)
    assert not sampled_norms(model)
