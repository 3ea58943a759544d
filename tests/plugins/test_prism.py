"""PrismSampling by itself: what each client holds, that it comes back to its place, and what the server makes of it."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featherlight.plugins import Chain, Clock, DepthDropout, LayerFreezing, PrismSampling, Visit
from featherlight.plugins.factors import factorise
from featherlight.plugins.sampled_layers import sampled_layers


def network(seed=0):
    """Convolution 4 → 6 with group norm, convolution 6 → 10 with a bias, linear layer 10 → 8."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(4, 6, 3, bias=False), nn.GroupNorm(2, 6), nn.ReLU()),
        *(nn.Conv2d(6, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 8)),
    )


LAYERS = ["0", "3", "6"]


def on_server(model, period=0, **arguments):
    plugin = PrismSampling(**{"layers": LAYERS, "keep": 0.5, **arguments})
    plugin.attach(model)
    plugin.advance(Clock(period))
    plugin.encode_down(entries(model), Visit(period, 10**6))  # as in a round, where somebody is served before anything is lifted
    return plugin


def entries(model):
    return {name: value.detach() for name, value in model.state_dict().items()}


def held_by(plugin, model, visit):
    """Layer → (kernels, rows) of one client, read off where what it was sent belongs."""
    decoded = plugin.decode(plugin.encode_down(entries(model), visit), visit)
    return {
        path.removesuffix(".u"): (mask.any(0).nonzero().flatten().tolist(), mask.any(1).nonzero().flatten().tolist())
        for path, (_, mask) in ((path, entry) for path, entry in decoded.items() if path.endswith(".u"))
    }


# -- arguments --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"keep": 0}, r"keep=0: give a share above 0 and up to 1"),
        ({"keep": 1.01}, r"keep=1\.01"),
        ({"keep": float("nan")}, r"keep=nan"),
        ({"keep": {}}, r"keep=\{\}"),
        ({"keep": {0.2: 0.6, 1.5: 0.4}}, r"give a share above 0 and up to 1"),
        ({"keep": {0.2: 0.6, 0.4: 0.3}}, r"must be above 0 and add up to 1; they add up to 0\.9"),
        ({"keep": {0.2: 1.5, 0.4: -0.5}}, r"must be above 0"),
        ({"power": -1}, r"power=-1: give 0 \(all kernels alike\) or more"),
        ({"power": float("nan")}, r"power=nan: give 0"),
        ({"keep": {"0.2": 1.0}}, r"keep='0\.2': give a plain number, .* not a str"),
        ({"keep": True}, r"keep=True: give a plain number, as 0\.2 or 1, not a bool"),
        ({"keep": torch.tensor(0.2).numpy()[()]}, r"keep=.*: give a plain number, as 0\.2 or 1, not a float32"),
        ({"keep": {0.2: "1"}}, r"keep='1': give a plain number"),
        ({"power": "2"}, r"power='2': give a plain number"),
        ({"warmup_periods": 1.5}, r"warmup_periods=1\.5: give 0 or more, a whole number"),
        ({"warmup_periods": float("nan")}, r"warmup_periods=nan: give 0 or more, a whole number"),
        ({"keep": {0.2: float("nan"), 0.4: 1.0}}, r"must be above 0 and add up to 1"),
        ({"keep": {0.2: 0.0, 0.4: 1.0}}, r"must be above 0 and add up to 1"),
        ({"warmup_periods": -1}, r"warmup_periods=-1: give 0 or more"),
    ],
)
def test_mistakes_are_answered(arguments, says):
    with pytest.raises(ValueError, match=says):
        PrismSampling(**arguments)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d])
def test_running_statistics_are_told_of(kind):
    with pytest.warns(UserWarning, match=r'running statistics \(1, 1 in all\) .* use group norm where .*norm="group".*update_bn'):
        PrismSampling(layers="0").attach(nn.Sequential(nn.Conv2d(4, 4, 3), kind(4)))


def test_how_much_stays_whole_is_told():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(256, 10))
    with pytest.warns(UserWarning, match=r"takes apart 1 layers with 5% of the parameters; all others a client holds whole: name more"):
        PrismSampling().attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PrismSampling().attach(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 2)))


def test_attention_that_is_not_found_is_told_of():
    model = nn.Sequential(*[nn.TransformerEncoderLayer(8, 2, 64, dropout=0.0) for _ in range(2)])
    plugin = PrismSampling(0.5, attention=True)
    with pytest.warns(UserWarning, match=r"attention=True found no linear layers of attention"):
        plugin.attach(model)
    assert plugin.narrow(Visit(0))(torch.randn(2, 3, 8)).shape == (2, 3, 8)


@pytest.mark.filterwarnings("ignore:layers=")
def test_torchvision_s_swin_keeps_attention_whole():
    from torchvision.models.swin_transformer import SwinTransformer

    model = SwinTransformer([2, 2], 8, [2], [2], [2, 2], num_classes=3)
    plugin = PrismSampling(0.5, attention=True)
    with pytest.warns(UserWarning, match=r"attention stays whole"):
        plugin.attach(model)
    assert plugin.narrow(Visit(0))(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    assert {path.rpartition(".")[2] for path in sampled_layers(plugin.narrow(Visit(0)))} == {"0", "3"}  # both layers of the MLPs


def test_what_describes_a_run_is_the_arguments():
    arguments = {"keep": {0.2: 0.5, 0.4: 0.5}, "layers": ["a"], "attention": True, "power": 3.0, "warmup_periods": 5, "rows": False}
    arguments["principal_start"] = True
    assert PrismSampling(**arguments).describe() == arguments


@pytest.mark.parametrize("other", [DepthDropout, LayerFreezing])
def test_it_must_come_first_in_a_chain(other, make_tiny):
    chain = Chain([other(blocks="layers.*"), PrismSampling(layers="layers.*.up")])
    model = make_tiny()
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"put it first among the plugins"):
        chain.attach(model)
    assert [type(module) for module in model.modules()] == types
    Chain([PrismSampling(layers="layers.*.up"), other(blocks="layers.*")]).attach(model)


def test_there_is_one_that_narrows():
    chain = Chain([PrismSampling(layers=LAYERS), PrismSampling(layers=LAYERS)])
    chain.attach(network())
    with pytest.raises(ValueError, match=r"PrismSampling, PrismSampling each make a smaller module"):
        chain.narrow(Visit(0))


# -- keep ratios ------------------------------------------------------------------------------------------------------
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 1500))
def test_ratios_are_dealt_out_in_their_parts_however_many_clients(parts, clients):
    """Multiples of the golden ratio fall into any interval evenly: off by a number that grows as log n (here below 8)."""
    shares = {(index + 1) / 10: part / sum(parts) for index, part in enumerate(parts)}
    plugin = PrismSampling(shares)
    dealt = [plugin.keep_of(client) for client in range(clients)]
    for ratio, share in shares.items():
        assert abs(dealt.count(ratio) - share * clients) < 8
    assert dealt[:5] == [plugin.keep_of(client) for client in range(min(clients, 5))]


def test_clients_of_one_ratio_share_a_module():
    model = network()
    plugin = on_server(model, keep={0.2: 0.5, 0.5: 0.5})
    modules = {plugin.keep_of(client): plugin.narrow(Visit(0, client, 0)) for client in range(20)}
    assert set(modules) == {0.2, 0.5}
    for client in range(20):
        assert plugin.narrow(Visit(3, client, 1)) is modules[plugin.keep_of(client)]
    assert modules[0.2][0].u.shape == (2, 2)  # ⌈0.2 · 6⌉
    assert modules[0.5][3].v.shape == (5, 6, 3, 3)


# -- draws ------------------------------------------------------------------------------------------------------------
def test_sizes_and_that_clients_rounds_seeds_and_layers_draw_apart():
    model = network()
    plugin = on_server(model, power=0)
    for visits in ([Visit(0, c, 0) for c in range(8)], [Visit(r, 0, 0) for r in range(8)], [Visit(0, 0, s) for s in range(8)]):
        drawn = [held_by(plugin, model, visit) for visit in visits]
        for one in drawn:
            assert {path: (len(kernels), len(rows)) for path, (kernels, rows) in one.items()} == {"0": (3, 3), "3": (5, 5), "6": (4, 4)}
        for path in LAYERS:
            assert len({tuple(one[path][0]) for one in drawn}) > 2
            assert len({tuple(one[path][1]) for one in drawn}) > 2
    torch.manual_seed(0)
    alike = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    alike[1].load_state_dict(alike[0].state_dict())
    one = held_by(on_server(alike, layers="*", power=0), alike, Visit(0))
    assert one["0"][0] != one["1"][0]
    assert one["0"][1] != one["1"][1]
    assert one["0"][0] != one["0"][1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 2**31), st.permutations(LAYERS), st.integers(1, 3))
def test_a_draw_depends_on_seed_round_client_and_layer_alone(round, client, seed, order, count):
    model, visit = network(), Visit(round, client, seed)
    whole = held_by(on_server(model, round), model, visit)
    torch.manual_seed(seed)
    state = torch.random.get_rng_state()
    part = on_server(model, round, layers=order[:count])
    for other in range(3):  # others before change nothing
        held_by(part, model, Visit(round, client + 1 + other, seed))
    assert held_by(part, model, visit) == {path: whole[path] for path in whole if path in order[:count]}
    assert torch.equal(torch.random.get_rng_state(), state)


def test_kernels_come_as_their_importance_says_and_rows_alike():
    """One of two kernels, σ 2 and 1, power 2: 4/5 and 1/5; one of two rows: a half each. Four deviations of 1,000 draws."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    plugin = on_server(model, layers="0", power=2)
    held = [held_by(plugin, model, Visit(0, client, 5))["0"] for client in range(1000)]
    first = sum(kernels == [0] for kernels, _ in held)
    assert abs(first - 800) < 4 * (1000 * 0.8 * 0.2) ** 0.5
    assert abs(sum(rows == [0] for _, rows in held) - 500) < 4 * (1000 * 0.25) ** 0.5


def test_during_warm_up_everybody_gets_the_most_important():
    model = network()
    plugin = on_server(model, warmup_periods=2, power=0)
    for client in range(6):
        for round in (0, 1):
            held = held_by(plugin, model, Visit(round, client, 0))
            assert [held[path][0] for path in LAYERS] == [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3]]
    after = [held_by(plugin, model, Visit(2, client, 0)) for client in range(6)]
    assert len({tuple(one["3"][0]) for one in after}) > 1
    assert len({tuple(held_by(plugin, model, Visit(0, client, 0))["3"][1]) for client in range(6)}) > 1  # rows are drawn all the same


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


# -- principal start --------------------------------------------------------------------------------------------------
def energy(weight, share):
    """The part of ‖W‖² that the first ⌈share·R⌉ singular values carry."""
    squares = torch.linalg.svdvals(weight.detach().flatten(1).double()).square()
    return float(squares[: math.ceil(share * len(squares))].sum() / squares.sum())


@pytest.mark.parametrize("in_place", [False, True])
def test_a_principal_start_leaves_nearly_all_energy_to_clients(in_place):
    """With everything beyond at most a tenth, the rest of 3 in 4 kernels has at most 3·0.01 of what the first have."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3))
    length = [float(model[place].weight.detach().norm()) for place in (0, 2)]
    plugin = PrismSampling({0.25: 0.5, 0.5: 0.5} if not in_place else 0.25, layers="*", principal_start=True)
    plugin = plugin.in_place() if in_place else plugin
    assert energy(model[0].weight, 0.25) < 0.6
    plugin.attach(model)
    plugin.advance(Clock(0, 0))
    plugin.detach()
    assert all(energy(model[place].weight, 0.25) > 1 / 1.03 for place in (0, 2))
    assert [float(model[place].weight.detach().norm()) for place in (0, 2)] == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("in_place", [False, True])
def test_only_training_from_the_start_changes_weights(in_place):
    """Not attaching (evaluation attaches, and so does a chain that is refused), not a later period."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.GroupNorm(4, 16))
    before = model[0].weight.detach().clone()
    plugin = PrismSampling(0.25, layers="*", principal_start=True)
    plugin = plugin.in_place() if in_place else plugin
    plugin.attach(model)
    plugin.advance(Clock(3, 0))
    plugin.advance(Clock(0, 5))
    plugin.detach()
    assert torch.equal(model[0].weight, before)


# -- one plugin, several models ---------------------------------------------------------------------------------------
def test_a_second_model_gets_its_own_factors():
    """Equally made models have weights of equal version, and here of equal shape."""
    plugin, sent = PrismSampling(0.5, layers="*"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv2d(4, 6, 3))
        plugin.attach(model)
        plugin.advance(Clock(0, 0))
        sent.append(plugin.encode_down(dict(model.state_dict()), Visit(0, 0, 0)))
        plugin.detach()
        again = PrismSampling(0.5, layers="*")
        again.attach(model)
        again.advance(Clock(0, 0))
        for name, value in again.encode_down(dict(model.state_dict()), Visit(0, 0, 0)).items():
            assert torch.equal(value, sent[-1][name]), name
    assert not torch.equal(sent[0]["0.u"], sent[1]["0.u"])


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
