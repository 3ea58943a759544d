"""What clients of PrismSampling are sent and send comes back to its place, and what the server makes of it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prism_network import LAYERS, entries, held_by, network, on_server
from torch import nn

from featherlight.plugins import Clock, PrismSampling, Visit
from featherlight.plugins.factors import factorise
from featherlight.plugins.sampled_layers import sampled_layers


# -- the wire ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_every_element_comes_back_to_where_it_came_from(keep, rows):
    model = network()
    with torch.no_grad():
        model[1].weight.uniform_()
        model[1].bias.uniform_()
    plugin = on_server(model, keep=keep, rows=rows)
    server, visit = entries(model), Visit(4, 2, 1)
    sent = plugin.encode_down(server, visit)
    small = plugin.narrow(visit)
    assert {name: value.shape for name, value in sent.items()} == {name: value.shape for name, value in small.state_dict().items()}
    assert set(server) == set(entries(model))  # the server's own dictionary is as it was
    back = plugin.decode(sent, visit)
    assert set(back) == set(sent)
    for path in LAYERS:
        u, v, _ = factorise(server[f"{path}.weight"])
        (value_u, mask_u), (value_v, mask_v) = back[f"{path}.u"], back[f"{path}.v"]
        assert value_u.shape == mask_u.shape == u.shape
        assert value_v.shape == mask_v.shape == (len(v), *server[f"{path}.weight"].shape[1:])
        assert torch.equal(value_u, u * mask_u)
        assert torch.equal(value_v.flatten(1), v * mask_v.flatten(1))
        kernels, held_rows = mask_u.any(0), mask_u.any(1)
        assert torch.equal(mask_u, torch.outer(held_rows.float(), kernels.float()))
        assert torch.equal(mask_v.flatten(1), kernels.float()[:, None].expand_as(v))
        per_row = {"0": ["1.weight", "1.bias"], "3": ["3.bias"], "6": ["6.bias"]}[path]
        for name in per_row:
            if rows:
                value, mask = back[name]
                assert torch.equal(mask, held_rows.float())
                assert torch.equal(value, server[name] * mask)
            else:
                assert back[name] is server[name]


def test_a_client_computes_with_what_the_server_meant():
    """The module that a client has, given what it is sent, is the full model with u·v of its kernels and rows."""
    model = network().double()
    plugin = on_server(model)
    visit = Visit(1, 3, 2)
    small = plugin.narrow(visit)
    client = PrismSampling(keep=0.5, layers=LAYERS)
    client.attach(small)
    small.load_state_dict(client.decode_down(plugin.encode_down(entries(model), visit), visit))
    held = held_by(plugin, model, visit)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    wanted = x
    for path, module in model.named_children():
        if path not in LAYERS:
            if path != "1":
                wanted = module(wanted)
            continue
        kernels, rows = held[path]
        dense = copy.deepcopy(module)
        u, v, _ = factorise(module.weight)
        mask = torch.zeros(len(u), dtype=torch.float64)
        mask[rows] = 1
        with torch.no_grad():
            dense.weight.copy_((u[:, kernels] @ v[kernels]).view_as(dense.weight))
        wanted = dense(wanted)
        if path == "0":  # a group's statistics are of the rows there
            out = torch.zeros_like(wanted)
            for group in range(2):
                there = [row for row in rows if row // 3 == group]
                if there:
                    values = wanted[:, there]
                    mean, variance = values.mean((1, 2, 3), keepdim=True), values.var((1, 2, 3), unbiased=False, keepdim=True)
                    out[:, there] = (values - mean) / (variance + 1e-5).sqrt()
            wanted = out
        wanted = wanted * mask.view(-1, *[1] * (wanted.ndim - 2))
    torch.testing.assert_close(small(x), wanted, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.booleans(), st.booleans())
def test_lift_is_the_change_of_the_product(seed, masked_u, masked_v):
    model = network()
    plugin = on_server(model)
    random = torch.Generator().manual_seed(seed)
    total, wanted, covered = {"1.bias": torch.ones(6, dtype=torch.float64)}, {}, []
    for path in LAYERS:
        weight = model.get_submodule(path).weight
        u, v, _ = factorise(weight)
        change_u = torch.randn(u.shape, generator=random, dtype=torch.float64)
        change_v = torch.randn(len(v), *weight.shape[1:], generator=random, dtype=torch.float64)
        mask_u = torch.rand(u.shape, generator=random) < 0.5
        kernels = torch.rand(len(v), generator=random) < 0.5
        mask_v = kernels.view(-1, *[1] * (weight.ndim - 1)).expand(change_v.shape)
        if masked_u:
            change_u = change_u * mask_u
        if masked_v:
            change_v = change_v * mask_v
        total[f"{path}.u"] = (change_u, mask_u) if masked_u else change_u
        total[f"{path}.v"] = (change_v, mask_v) if masked_v else change_v
        new = (u.double() + change_u) @ (v.double() + change_v.flatten(1))
        wanted[f"{path}.weight"] = (new - u.double() @ v.double()).view(weight.shape)
        covered.append(kernels.double().mean().item() if masked_v else 1.0)
    lifted = plugin.lift(total, Clock(0))
    assert set(lifted) == {"1.bias", *wanted}
    assert lifted["1.bias"] is total["1.bias"]
    for name, value in wanted.items():
        torch.testing.assert_close(lifted[name], value, rtol=1e-9, atol=1e-9)
    assert plugin.figures()["kernel_coverage"] == pytest.approx(sum(covered) / 3)


def test_of_a_layer_that_nobody_sent_no_kernel_is_covered():
    """But for one that is frozen."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    model[2].weight.requires_grad_(False)
    plugin = on_server(model, layers="*")
    zeros = torch.zeros(4, 4, dtype=torch.float64)
    plugin.lift({"0.u": zeros, "0.v": zeros}, Clock(0))
    assert plugin.figures()["kernel_coverage"] == 0.5


def test_coverage_by_hand():
    """Kernels 0, 1 and 2 of 4 in one layer, all in the other: (3/4 + 1)/2."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plugin = on_server(model, layers="*")
    mask = torch.tensor([True, True, True, False])[:, None].expand(4, 4)
    zeros = torch.zeros(4, 4, dtype=torch.float64)
    plugin.lift({"0.u": zeros, "0.v": (zeros, mask), "1.u": zeros, "1.v": zeros}, Clock(0))
    assert plugin.figures() == {"kernel_coverage": 0.875}


# -- momentum copies --------------------------------------------------------------------------------------------------
def test_a_momentum_copy_draws_its_twin_s_rows_and_is_not_sent(make_vit, make_byol):
    model = make_byol(make_vit(depth=2, classes=3))
    plugin = PrismSampling(0.5, attention=True)
    plugin.attach(model)
    plugin.advance(Clock(0))
    visit = Visit(2, 5, 1)
    small = plugin.narrow(visit)
    client = PrismSampling(0.5, attention=True)
    client.attach(small)
    server = {name: value for name, value in entries(model).items() if not name.startswith("target.")}
    sent = client.decode_down(plugin.encode_down(server, visit), visit)
    assert not any(name.startswith("target.") for name in sent)
    layers = sampled_layers(small)
    assert len(layers) == 2 * 2 * 4
    assert all(torch.equal(layers[path].rows, layers[path.replace("encoder.", "target.")].rows) for path in layers)
    held = plugin.decode(sent, visit)
    for path, layer in layers.items():
        if path.startswith("encoder."):
            assert held[f"{path}.u"][1].any(1).nonzero().flatten().tolist() == layer.rows.tolist()


# -- updates that do not fit ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update({"3.u": m["3.u"][:1]}), r"3\.u: the client holds a part of shape \(\d+, \d+\), and sent \(1, \d+\)"),
        (lambda m: m.update({"3.v": m["3.v"].flatten(1)}), r"3\.v: the client holds a part of shape"),
        (lambda m: m.pop("3.v"), r"3\.v: the client holds a part of shape .*, and sent nothing"),
        (lambda m: m.update({"1.weight": torch.ones(3)}), r"1\.weight: the client holds a part of shape \(4,\), and sent \(3,\)"),
        (lambda m: m.update({"1.bias": torch.ones(1)}), r"1\.bias: the client holds a part of shape \(4,\), and sent \(1,\)"),
        (lambda m: m.update({"0.bias": torch.ones(4, 1)}), r"0\.bias: the client holds a part of shape \(4,\), and sent \(4, 1\)"),
    ],
    ids=["rows", "flat", "missing", "a norm's", "one of a norm's", "a bias"],
)
def test_an_update_of_another_shape_is_named(change, says):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 3))
    plugin = PrismSampling(0.5, layers="*")
    plugin.attach(model)
    plugin.advance(Clock(0, 0))
    message = plugin.encode_down(dict(model.state_dict()), Visit(0, 0, 0))
    change(message)
    with pytest.raises(ValueError, match=says):
        plugin.decode(message, Visit(0, 0, 0))


def test_a_server_weight_that_is_not_finite_is_named():
    model = network()
    model[3].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r'layer "3" is not finite.*: training diverged; lower the learning rate'):
        on_server(model)
