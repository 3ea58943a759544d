"""PrismSampling by itself: what each client holds, that it comes back to its place, and what the server makes of it."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prism_network import LAYERS, held_by, network, on_server
from torch import nn

from featherlight.plugins import Chain, Clock, DepthDropout, LayerFreezing, PrismSampling, Visit
from featherlight.plugins.sampled_layers import sampled_layers


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
