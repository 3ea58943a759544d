"""Rounds of PriSM against the same rounds by hand, what they cost, and runs of several."""

import copy
import json

import pytest
import torch
from prism_by_hand import DECAY, LAYERS, MIXED, RATE, SIZES, STATISTICS, ConvNet, attached, close, places, round_by_hand
from torch import nn

from featherlight.fed_loop import Average, Momentum
from featherlight.fed_loop.predict import predict
from featherlight.plugins import Clock, DepthDropout, LayerFreezing, Plugin, PrismSampling, Visit
from featherlight.plugins.factors import factorise
from featherlight.plugins.sampled_layers import sampled_layers

pytestmark = pytest.mark.filterwarnings("ignore:batch norm's running statistics are gathered by sub-models")


# -- a round ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("keep", [1.0, 0.5, MIXED], ids=str)
@pytest.mark.parametrize("sizes", [[12], SIZES], ids=["one client", "three clients"])
def test_two_rounds_are_the_rounds_by_hand(sizes, keep, rows, norm, pictures, federation):
    data, module, server = pictures(sizes), ConvNet(norm), ConvNet(norm)
    result = federation(2).run(module, data, [PrismSampling(keep, list(LAYERS), rows=rows)])
    plugin = attached(server, keep=keep, rows=rows)
    for round in range(2):
        wanted, coverage, weights = round_by_hand(server, plugin, data, round)
        assert result.history[round]["kernel_coverage"] == pytest.approx(coverage)
        if keep == 0.5 and len(sizes) == 1:
            assert coverage == pytest.approx((3 / 6 + 4 / 8 + 4 / 8) / 3)
            assert (weights["conv1.u"] > 0).double().mean() == (0.25 if rows else 0.5)
        server.load_state_dict({name: value.float() for name, value in wanted.items()}, strict=False)
    close(module, wanted)
    assert all(type(one) in (nn.Conv2d, nn.Linear) for one in (module.conv1, module.conv2, module.fc1))


def test_what_nobody_held_stays_as_the_server_has_it(pictures, federation):
    """One client with rows: others' norm, bias and statistics stay bit for bit."""
    module, server, data = ConvNet(), ConvNet(), pictures([12])
    federation(1).run(module, data, [PrismSampling(0.5, list(LAYERS))])
    plugin = attached(server, keep=0.5)
    plugin.advance(Clock(0))
    for path, (_, rows) in places(plugin, server, Visit(0, 0, 0)).items():
        norm = LAYERS[path]
        names = [f"{path}.bias", *(f"{norm}.{one}" for one in ("weight", "bias", *STATISTICS) if norm)]
        for name in names:
            if name in server.state_dict():
                different = module.state_dict()[name] != server.state_dict()[name]
                assert different.nonzero().flatten().tolist() == rows.tolist(), name


def test_full_rank_of_one_client_is_the_factorised_model_trained_whole(pictures, federation):
    """κ = 1 against torch's own modules and SGD: two layers in the place of one, the product's decay by autograd."""
    data, module, server = pictures([12]), ConvNet(), ConvNet()
    federation(1).run(module, data, [PrismSampling(1.0, list(LAYERS))])
    for path in LAYERS:
        layer = getattr(server, path)
        u, v, _ = factorise(layer.weight)
        if isinstance(layer, nn.Conv2d):
            first = nn.Conv2d(layer.in_channels, len(v), 3, layer.stride, layer.padding, bias=False)
            second = nn.Conv2d(len(v), len(u), 1, bias=layer.bias is not None)
        else:
            first, second = nn.Linear(layer.in_features, len(v), bias=False), nn.Linear(len(v), len(u))
        with torch.no_grad():
            first.weight.copy_(v.view_as(first.weight))
            second.weight.copy_(u.view_as(second.weight))
            if layer.bias is not None:
                second.bias.copy_(layer.bias)
        setattr(server, path, nn.Sequential(first, second))
    factors = [pair.weight for path in LAYERS for pair in getattr(server, path)]
    others = [value for value in server.parameters() if all(value is not factor for factor in factors)]
    optimizer = torch.optim.SGD([{"params": factors, "weight_decay": 0.0}, {"params": others}], RATE, momentum=0.9, weight_decay=DECAY)
    server.train()
    for step, batch in enumerate(data.batches(0)):
        optimizer.zero_grad()
        pairs = [getattr(server, path) for path in LAYERS]
        product = sum((pair[1].weight.flatten(1) @ pair[0].weight.flatten(1)).square().sum() for pair in pairs)
        (server.training_step(batch, step) + DECAY / 2 * product).backward()
        optimizer.step()
    for path in LAYERS:
        pair = getattr(server, path)
        weight = pair[1].weight.flatten(1) @ pair[0].weight.flatten(1)
        torch.testing.assert_close(getattr(module, path).weight.flatten(1), weight, rtol=1e-4, atol=1e-5)
    for name, value in server.state_dict().items():
        if name.split(".")[0] not in LAYERS:
            torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(data.clients[0][0]), server.eval()(data.clients[0][0]), rtol=1e-3, atol=1e-4)


def test_a_cohort_smaller_than_all(pictures, federation):
    from featherlight.fed_loop.cohort import sample

    data, module, server = pictures(), ConvNet(), ConvNet()
    federation(1, cohort=2).run(module, data, [PrismSampling(MIXED, list(LAYERS))])
    wanted, *_ = round_by_hand(server, attached(server, keep=MIXED), data, 0, sample(3, 2, 0, 0))
    close(module, wanted)


def test_server_momentum_is_on_whole_weights(pictures, federation):
    """Round 1 is the plain average's, so round 2 starts alike: W₂ = average's W₂ + β·(W₁ − W₀)."""

    def after(rounds, server):
        data, module = pictures(), ConvNet()
        federation(rounds, server=server).run(module, data, [PrismSampling(0.5, list(LAYERS), rows=False)])
        return {name: value.detach().double() for name, value in module.named_parameters()}

    start = {name: value.detach().double() for name, value in ConvNet().named_parameters()}
    one, two, moved = after(1, Average()), after(2, Average()), after(2, Momentum(momentum=0.5))
    for name, value in moved.items():
        torch.testing.assert_close(value, two[name] + 0.5 * (one[name] - start[name]), rtol=0, atol=1e-6)
    assert not torch.equal(moved["conv2.weight"], two["conv2.weight"])


def test_a_plugin_serves_a_second_run(pictures, federation, same):
    plugins, modules = [PrismSampling(0.5, list(LAYERS))], [ConvNet(), ConvNet()]
    for module in modules:
        federation(2).run(module, pictures(), plugins)
    same(*(module.state_dict() for module in modules))


def test_a_principal_start_is_the_server_s_own_and_resumes(pictures, federation, same, tmp_path):
    """What the first round starts from has been made principal, once: a run in two parts is the run in one."""
    plugins = [PrismSampling(0.5, list(LAYERS), principal_start=True)]
    data, whole, parts, other = pictures(), ConvNet(), ConvNet(), ConvNet()
    federation(2).run(whole, data, copy.deepcopy(plugins))
    federation(1, folder=tmp_path).run(parts, data, copy.deepcopy(plugins))
    federation(2, folder=tmp_path).run(other, data, copy.deepcopy(plugins), resume=True)
    same(whole.state_dict(), other.state_dict())


# -- self-supervised --------------------------------------------------------------------------------------------------
class Look(Plugin):
    """Notes, at every client's first step, whether its module's momentum copy is as small, and the same, and when it is not any more."""

    seen: list = []  # noqa: RUF012  one for all copies

    def attach(self, model):
        self._model = model

    def __deepcopy__(self, memo):
        return Look()

    def before_forward(self, clock):
        online, target = self._model.backbone.state_dict(), self._model.backbone_target.state_dict()
        layers = sampled_layers(self._model)
        same = all(torch.equal(value, target[name]) for name, value in online.items())
        rows = [
            torch.equal(layer.rows, layers[path.replace("backbone.", "backbone_target.")].rows)
            for path, layer in layers.items()
            if path.startswith("backbone.")
        ]
        Look.seen.append((clock.step, len(layers), same, all(rows)))


@pytest.mark.parametrize("method", ["byol", "mocov3"])
def test_the_momentum_copy_is_the_client_s_own_sub_model(method, ssl, digits, federation):
    Look.seen.clear()
    module = ssl(method, depth=2)
    before = copy.deepcopy(module.state_dict())
    result = federation(2).run(module, digits(num_clients=2), [PrismSampling(0.5, attention=True), Look()])
    steps = [entry for entry in Look.seen if entry[1]]
    assert {layers for _, layers, _, _ in steps} == {2 * 2 * 4}  # two branches of two blocks with four layers each
    assert all(rows for *_, rows in steps)
    started = [same for step, _, same, _ in steps if step == 0]
    assert len(started) == 2 * 2 * 2  # rounds, clients; once when what the turn takes is read off, before anything is received
    assert all(started[1::2])
    later = [same for step, _, same, _ in steps if step > 0]
    assert later
    assert not any(later)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in result.history)
    after = module.state_dict()
    assert not torch.equal(after["backbone.blocks.0.mlp.fc1.weight"], before["backbone.blocks.0.mlp.fc1.weight"])
    for name, value in module.backbone.state_dict().items():
        assert torch.equal(value, after[f"backbone_target.{name}"])


# -- cost -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("model", "keep", "rows"),
    [("simclr", 0.25, False), ("simclr", {0.2: 0.5, 0.6: 0.5}, True), ("mocov3", {0.2: 0.5, 0.6: 0.5}, True)],
    ids=str,
)
def test_predicted_is_measured_of_a_vision_transformer(model, keep, rows, ssl, digits, federation, cost_of):
    settings = federation(2, cohort=3)
    plugins = [PrismSampling(keep, attention=True, rows=rows)]
    predicted = predict(settings, lambda: ssl(model, depth=2), digits(limit_train=64), copy.deepcopy(plugins))
    measured = settings.run(ssl(model, depth=2), digits(limit_train=64), plugins)
    assert cost_of(predicted) == cost_of(measured.cost)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_predicted_is_measured_of_a_convolutional_network(norm, pictures, federation, cost_of):
    settings = federation(3, cohort=2)
    predicted = cost_of(predict(settings, lambda: ConvNet(norm), pictures(), [PrismSampling(MIXED, list(LAYERS))]))
    measured = cost_of(settings.run(ConvNet(norm), pictures(), [PrismSampling(MIXED, list(LAYERS))]).cost)
    for ours, theirs in zip([*predicted["rows"], predicted["total"]], [*measured["rows"], measured["total"]], strict=True):
        assert ours.pop("peak_bytes") == pytest.approx(theirs.pop("peak_bytes"), rel=0.02)  # as for other convolutions
    assert predicted == measured


def test_bytes_by_hand(pictures, federation):
    """Floats of one client: r·I·k² + n·r + n of a bias + 4·n of a norm, the stem, the head, and two counters."""
    row = federation(1).run(ConvNet(), pictures([12]), [PrismSampling(0.5, list(LAYERS))]).history[0]
    floats = (4 * 2 * 9 + 4) + (3 * 4 * 9 + 3 * 3 + 4 * 3) + (4 * 6 * 9 + 4 * 4 + 4 + 4 * 4) + (4 * 8 + 5 * 4 + 5) + (10 * 3 + 3)
    data = 4 * floats + 2 * 8
    assert 0 < row["bytes_up"] - data < 3000
    assert row["bytes_down"] == row["bytes_up"]
    other = federation(1).run(ConvNet(), pictures([12]), [PrismSampling(0.5, list(LAYERS), rows=False)]).history[0]
    assert other["bytes_down"] - row["bytes_down"] == pytest.approx(4 * (3 * 3 + 4 * 3 + 4 * 4 + 5 * 4 + 5 + 4 + 4 * 4), abs=64)


# -- with other methods -----------------------------------------------------------------------------------------------
BLOCKS = "backbone.blocks.*"


OTHERS = {
    "layer freezing": lambda: [LayerFreezing(BLOCKS)],
    "layer freezing, two rounds a stage": lambda: [LayerFreezing(BLOCKS, periods_per_stage=2)],
    "freezing without growth": lambda: [LayerFreezing(BLOCKS, grow=False)],
    "depth dropout": lambda: [DepthDropout(BLOCKS)],
    "layer freezing, depth dropout": lambda: [LayerFreezing(BLOCKS), DepthDropout(BLOCKS)],
}


@pytest.mark.parametrize(("model", "other"), [*(("simclr", other) for other in OTHERS), ("mocov3", "layer freezing, depth dropout")])
def test_with_other_methods_predicted_is_measured_and_what_is_there_trains(other, model, ssl, digits, federation, cost_of):
    def plugins():
        return [PrismSampling({0.3: 0.5, 0.6: 0.5}), *OTHERS[other]()]

    module, start = ssl(model), ssl(model).state_dict()
    settings, data = federation(3, cohort=2), digits(limit_train=64)
    measured = settings.run(module, data, plugins())
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    reached = 2 if "two rounds" in other else 3
    for block in range(3):
        name = f"backbone.blocks.{block}.mlp.fc2.weight"
        assert torch.equal(module.state_dict()[name], start[name]) == (block >= reached)
    assert cost_of(predict(settings, lambda: ssl(model), data, plugins())) == cost_of(measured.cost)


def test_a_frozen_block_stays_as_it_is(ssl, digits, federation):
    """In stage 2 block 0 is handed out in factors, and comes back bit for bit."""
    one, other = ssl("simclr"), ssl("simclr")
    for module, rounds in ((one, 1), (other, 2)):
        federation(rounds).run(module, digits(), [PrismSampling(0.5), LayerFreezing(BLOCKS)])
    for name, value in one.state_dict().items():
        if name.startswith("backbone.blocks.0"):
            assert torch.equal(value, other.state_dict()[name]), name


def test_with_a_quantiser(int8, pictures, federation):
    """Entries off by at most half a step of 1/127 of the largest change."""
    plain, coded, start = ConvNet(), ConvNet(), ConvNet()
    one = federation(1).run(plain, pictures(), [PrismSampling(MIXED, list(LAYERS))])
    other = federation(1).run(coded, pictures(), [PrismSampling(MIXED, list(LAYERS)), int8()])
    assert other.history[0]["bytes_up"] < one.history[0]["bytes_up"]
    assert other.history[0]["bytes_down"] == one.history[0]["bytes_down"]
    assert other.history[0]["kernel_coverage"] == one.history[0]["kernel_coverage"]
    for name, value in plain.named_parameters():
        change = (value - start.get_parameter(name)).abs().max().item()
        assert torch.allclose(value, coded.get_parameter(name), atol=0.03 * change + 1e-6), name


# -- runs -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_resumed_is_uninterrupted(norm, pictures, federation, same, figures, tmp_path):
    def plugins():
        return [PrismSampling(MIXED, list(LAYERS), warmup_periods=1)]

    whole, parts = ConvNet(norm), ConvNet(norm)
    uninterrupted = federation(4, cohort=2).run(whole, pictures(), plugins())
    federation(2, cohort=2, folder=tmp_path).run(parts, pictures(), plugins())
    again = ConvNet(norm, seed=9)
    resumed = federation(4, cohort=2, folder=tmp_path).run(again, pictures(), plugins(), resume=True)
    same(whole.state_dict(), again.state_dict())
    assert figures(uninterrupted) == figures(resumed)


def test_another_keep_is_another_run(pictures, federation, tmp_path):
    federation(1, folder=tmp_path).run(ConvNet(), pictures(), [PrismSampling(0.5, list(LAYERS))])
    with pytest.raises(ValueError, match="plugins"):
        federation(2, folder=tmp_path).run(ConvNet(), pictures(), [PrismSampling(0.4, list(LAYERS))], resume=True)


def test_an_update_that_is_not_finite_is_left_out(pictures, federation):
    data, module, server = pictures(), ConvNet("group"), ConvNet("group")
    data.clients[1][0][0] = float("nan")
    result = federation(1).run(module, data, [PrismSampling(MIXED, list(LAYERS))])
    assert (result.history[0]["rejected"], result.history[0]["clients"]) == (1, 2)
    wanted, coverage, _ = round_by_hand(server, attached(server, keep=MIXED), data, 0, [0, 2])
    close(module, wanted)
    assert result.history[0]["kernel_coverage"] == pytest.approx(coverage)


def test_coverage_is_in_the_log(pictures, federation, tmp_path):
    result = federation(2, folder=tmp_path).run(ConvNet(), pictures(), [PrismSampling(0.5, list(LAYERS))])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["kernel_coverage"] for row in rows] == [row["kernel_coverage"] for row in result.history]
    assert all(0.5 <= row["kernel_coverage"] <= 1 for row in rows)


def test_in_warm_up_all_clients_hold_the_same(pictures, federation):
    history = federation(3).run(ConvNet(), pictures(), [PrismSampling(0.5, list(LAYERS), warmup_periods=2, power=0)]).history
    assert [row["kernel_coverage"] for row in history[:2]] == [0.5, 0.5]
    assert history[2]["kernel_coverage"] > 0.5
