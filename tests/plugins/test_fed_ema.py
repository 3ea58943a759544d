"""FedEMA: where a turn starts, by hand."""

import copy

import pytest
import torch
from torch import nn

from featherlight.plugins import Chain, Clock, FedEMA, LayerFreezing, Proximal, Visit


@pytest.fixture
def byol(make_tiny, make_byol):
    return make_byol(make_tiny(depth=2))


def flat(model, path="encoder"):
    return torch.cat([value.detach().flatten() for value in model.get_submodule(path).parameters()])


def shift(model, by, seed):
    with torch.no_grad():
        for value in model.parameters():
            value += by * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed + value.numel()))


def turn(plugin, model, round, memory, train):
    """One turn from the model as received; what the client then remembers, and where it started."""
    plugin.advance(Clock(round))
    plugin.visit(Visit(round, 0))
    plugin.recall(memory, Visit(round))
    plugin.receive(Visit(round))
    start = copy.deepcopy(model)
    shift(model, train, round)
    return {name: value.detach().clone() for name, value in plugin.remember(Visit(round)).items()}, start


@pytest.mark.parametrize("of", [None, "encoder"])
def test_where_turns_start(of, byol):
    plugin = FedEMA(0.7, of=of)
    plugin.attach(byol)
    received = copy.deepcopy(byol)
    memory, start = turn(plugin, byol, 0, {}, 0.01)
    assert torch.equal(flat(start), flat(received))  # the first turn is as without the method
    assert "scale" not in memory
    scale = None
    for round in (1, 2, 3):
        local = copy.deepcopy(byol)
        shift(byol, 0.02 * round, 10 * round)
        received = copy.deepcopy(byol)
        memory, start = turn(plugin, byol, round, memory, 0.01)
        parts = ("encoder", "predictor") if of is None else ("encoder",)
        apart = torch.cat([flat(received, part) - flat(local, part) for part in parts]).norm()
        scale = 0.7 / apart if scale is None else scale
        mu = min(scale * apart, torch.tensor(1.0))
        assert round > 1 or abs(mu - 0.7) < 1e-6
        assert round < 3 or mu == 1.0
        for part in ("encoder", "predictor"):
            assert torch.allclose(flat(start, part), mu * flat(local, part) + (1 - mu) * flat(received, part), atol=1e-6)
        assert torch.equal(flat(start, "target"), flat(start, "encoder"))
        assert torch.allclose(memory["scale"], scale)


def test_a_fixed_scale(byol):
    plugin = FedEMA(scale=0.05)
    plugin.attach(byol)
    memory, _ = turn(plugin, byol, 0, {}, 0.05)
    local = copy.deepcopy(byol)
    shift(byol, 0.1, 7)
    received = copy.deepcopy(byol)
    memory, start = turn(plugin, byol, 1, memory, 0.01)
    apart = torch.cat([flat(received, part) - flat(local, part) for part in ("encoder", "predictor")]).norm()
    assert 0 < 0.05 * apart < 1
    assert torch.allclose(flat(start), torch.lerp(flat(received), flat(local), 0.05 * apart), atol=1e-6)
    assert "scale" not in memory


def test_a_client_that_was_away_starts_from_what_it_received(byol):
    plugin = FedEMA(consecutive=True, keep_targets=True)
    plugin.attach(byol)
    memory, _ = turn(plugin, byol, 0, {}, 0.05)
    shift(byol, 0.1, 7)
    with torch.no_grad():
        for target, online in zip(byol.target.parameters(), byol.encoder.parameters()):
            target.copy_(online)
    received = copy.deepcopy(byol)
    away, start = turn(plugin, byol, 2, memory, 0.0)
    assert torch.equal(flat(start), flat(received))
    assert torch.equal(flat(start, "target"), flat(received))
    byol.load_state_dict(received.state_dict())
    _, start = turn(plugin, byol, 3, away, 0.0)
    assert torch.equal(flat(start), flat(received))  # nothing is apart, so nothing is divided by nothing


def test_kept_targets_go_on_where_they_were(byol):
    plugin = FedEMA(keep_targets=True)
    plugin.attach(byol)
    memory, _ = turn(plugin, byol, 0, {}, 0.05)
    before = flat(byol, "target")
    shift(byol, 0.1, 7)
    _, start = turn(plugin, byol, 1, memory, 0.0)
    assert torch.equal(flat(start, "target"), before)


def test_only_what_trains_is_mixed(byol):
    """In stage 2 the first block is frozen, and the second was not there in the client's last turn."""
    chain = Chain([FedEMA(), LayerFreezing("encoder.layers.*")])
    chain.attach(byol)
    memory, _ = turn(chain, byol, 0, {}, 0.05)
    shift(byol, 0.1, 7)
    received = copy.deepcopy(byol)
    _, start = turn(chain, byol, 1, memory, 0.0)
    moved = {name for name, value in start.named_parameters() if not torch.equal(value, received.get_parameter(name))}
    assert {name for name in moved if not name.startswith("target.")} == {
        f"{part}.{kind}" for part in ("encoder.norm", "encoder.head", "predictor") for kind in ("weight", "bias")
    }


def test_the_scale_is_of_what_is_measured(byol):
    """The second turn is the first of a new stage, where only norm and head are in both: the next, with the new block, sets λ again."""
    chain = Chain([FedEMA(), LayerFreezing("encoder.layers.*", periods_per_stage=[1, 3])])
    chain.attach(byol)
    plugin, memory, told = chain.plugins[0], {}, []
    for round in range(4):
        local = copy.deepcopy(byol)
        shift(byol, 0.02 * (round + 1), 7 + round)
        received = copy.deepcopy(byol)
        memory, _ = turn(chain, byol, round, memory, 0.01)
        apart = [
            (value - local.get_parameter(name)).norm().square()
            for name, value in received.named_parameters()
            if f"0:local.{name}" in memory and (round > 1 or ".layers." not in name)
        ]
        told.append((plugin._scale, torch.stack(apart).sum().sqrt()))
    assert told[0][0] is None
    for scale, apart in told[1:3]:  # μ = τ in each
        assert torch.allclose(scale * apart, torch.tensor(0.7), atol=1e-5)
    assert torch.equal(told[3][0], told[2][0])
    assert not torch.allclose(told[1][0], told[2][0], rtol=0.01)


def test_others_see_what_was_received(byol):
    """Wherever they stand, methods that compare take their copy before the model is mixed."""
    chain = Chain([FedEMA(), Proximal(1.0)])
    chain.attach(byol)
    memory, _ = turn(chain, byol, 0, {}, 0.05)
    shift(byol, 0.1, 7)
    received = copy.deepcopy(byol)
    _, start = turn(chain, byol, 1, memory, 0.0)
    assert not torch.equal(flat(start), flat(received))
    for name, copied in chain.plugins[1]._received.items():
        assert torch.equal(copied, received.get_parameter(name)), name


def test_a_share_of_nothing_remembers_nothing(byol):
    for plugin in (FedEMA(0.0), FedEMA(scale=0.0)):
        plugin.attach(byol)
        assert plugin.remember(Visit(0)) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 1.5}, "tau=1.5: give a share"),
        ({"tau": float("nan")}, "tau=nan"),
        ({"scale": -1.0}, "scale=-1.0: give 0"),
        ({"of": "backbone"}, 'of="backbone" has no parameters; this Linear has'),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FedEMA(**arguments).attach(nn.Linear(2, 2))
