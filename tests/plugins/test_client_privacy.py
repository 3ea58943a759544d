"""What a client adds is bounded, the noise is Gaussian and as wide as it says, and what would get past it is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featherlight.plugins import Chain, ClientPrivacy, Clock, FetchSGD, IntrinsicProjection, NormClipping, Plugin, Quantization, TopK, Visit
from featherlight.plugins.rejection import Rejection

ROWS = st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=6)


def private(clip=1.0, noise_multiplier=1.0, model=None, **options):
    plugin = ClientPrivacy(clip, noise_multiplier, **options)
    plugin.attach(nn.Linear(2, 1) if model is None else model)
    return plugin


def norm(message):
    return float(torch.cat([value.flatten().double() for value in message.values()]).norm())


# -- bounds -------------------------------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(ROWS, ROWS, st.floats(1e-3, 1e3), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_nothing_is_longer_than_the_bound_and_what_is_shorter_stays(one, other, clip, dtype):
    message = {"weight": torch.tensor(one, dtype=dtype), "bias": torch.tensor(other, dtype=dtype)}
    sent = private(clip).encode(message, Visit(0))
    assert norm(sent) <= clip
    if norm(message) <= clip:
        assert all(torch.equal(sent[name], message[name]) for name in message)
    else:
        assert norm(sent) == pytest.approx(clip, rel=0.02 if dtype == torch.bfloat16 else 1e-5)


def test_the_server_bounds_what_a_client_did_not():
    read = private(2.0).decode({"weight": torch.full((100,), 7.0)}, Visit(0))
    assert 1.99 < norm(read) <= 2.0
    broken = private(2.0).decode({"weight": torch.tensor([math.nan, 5.0])}, Visit(0))
    assert not broken["weight"].isfinite().all()  # for whoever adds up to reject


@pytest.mark.parametrize("codec", [Quantization(4), Quantization(2)])
def test_a_codec_behind_it_lengthens_nothing_that_is_added(codec):
    chain = Chain([ClientPrivacy(1.0, 1.0), codec])
    chain.attach(nn.Linear(30, 30))
    change = {"weight": torch.randn(30, 30), "bias": torch.randn(30)}
    coded = chain.encode(change, Visit(0))
    assert norm(codec.decode(coded, Visit(0))) > 1.0  # rounding would
    assert norm(chain.decode(coded, Visit(0))) <= 1.0


# -- noise --------------------------------------------------------------------------------------------------------------
def apart_from_normal(values, std):
    """Kolmogorov's distance."""
    ordered = (values.flatten().double() / std).sort().values
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    below = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    return float(torch.maximum((steps - below).abs(), (below - steps + 1 / len(ordered)).abs()).max())


def noise_of(plugin, round=0, over=4, counted=4, size=200_000):
    plugin.decode({}, Visit(round, seed=7))
    plugin.summed(over, counted)
    return plugin.lift({"a": torch.zeros(size, dtype=torch.float64), "b": torch.zeros(5, dtype=torch.float64)}, Clock(round))


def test_the_noise_of_a_round_is_gaussian_and_of_its_width():
    noise = noise_of(private(0.5, 3.0))["a"]
    std = 3.0 * 0.5 / 4
    assert float(noise.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * len(noise)))
    assert abs(float(noise.mean())) < 4 * std / math.sqrt(len(noise))
    assert apart_from_normal(noise, std) < 1.95 / math.sqrt(len(noise))  # one in a thousand would be farther


def test_rounds_and_entries_have_noise_of_their_own_and_the_same_round_the_same():
    first, again, next_one = (noise_of(private(), round) for round in (0, 0, 1))
    assert torch.equal(first["a"], again["a"])
    assert not torch.equal(first["a"][:5], first["b"])
    assert abs(float((first["a"] * next_one["a"]).mean())) < 4 * (1 / 4) ** 2 / math.sqrt(200_000)


@pytest.mark.parametrize("came", [10, 6, 13])
def test_clients_shares_of_noise_add_up_and_the_server_adds_what_lacks(came):
    plugin = private(2.0, 1.5, shares=10)
    zeros = {"weight": torch.zeros(100_000)}
    total = sum(plugin.encode(zeros, Visit(3, client, 7))["weight"].double() for client in range(came))
    plugin.summed(10, came)
    result = plugin.lift({"weight": total / 10}, Clock(3))["weight"]
    std = 2.0 * 1.5 / 10 * math.sqrt(max(came / 10, 1.0))
    assert float(result.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * 100_000))
    assert apart_from_normal(result, std) < 1.95 / math.sqrt(100_000)
    if came >= 10:
        assert torch.equal(result, total / 10)


def test_clients_with_shares_are_not_bounded_but_rejected_where_noise_explains_nothing():
    plugin = private(1.0, 1.0, shares=4)
    sent = plugin.encode({"weight": torch.randn(1000)}, Visit(0))
    assert plugin.decode(sent, Visit(0)) == sent
    with pytest.raises(Rejection, match="its norm is"):
        plugin.decode({"weight": torch.full((1000,), 100.0)}, Visit(0))


def test_secret_noise_is_not_that_of_the_seed_and_goes_on_from_a_checkpoint():
    one, other, open_one = private(secret=True), private(secret=True), private()
    for plugin in (one, other):
        plugin.start()
    noises = [noise_of(plugin, size=10)["a"] for plugin in (one, other, open_one)]
    assert not any(torch.equal(noises[a], noises[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
    later = private(secret=True)
    later.load_state_dict(one.state_dict())
    assert torch.equal(noise_of(later, size=10)["a"], noises[0])
    assert [int(value) for value in one.agree()] == [one.state_dict()["secret"]]


# -- refused ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"clip": 0.0}, "clip=0"),
        ({"clip": math.inf}, "clip=inf"),
        ({"clip": math.nan}, "clip=nan"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1"),
        ({"noise_multiplier": math.inf}, "noise_multiplier=inf"),
        ({"delta": 0.0}, "delta=0"),
        ({"delta": 1.0}, "delta=1"),
        ({"shares": 0}, "shares=0"),
        ({"statistics": "noisy"}, "statistics='noisy'"),
    ],
)
def test_arguments_out_of_range(options, why):
    with pytest.raises(ValueError, match=why):
        ClientPrivacy(**{"clip": 1.0, "noise_multiplier": 1.0, **options})


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(()))


def test_buffers_do_not_travel_and_those_that_change_are_refused():
    plugin = private(model=Counts())
    assert plugin.encode({"linear.weight": torch.zeros(2, 2), "seen": torch.zeros(())}, Visit(0)).keys() == {"linear.weight"}
    with pytest.raises(ValueError, match='the buffer "seen" changes as clients train'):
        plugin.encode({"linear.weight": torch.zeros(2, 2), "seen": torch.ones(())}, Visit(0))


def test_running_statistics_are_refused():
    with pytest.raises(ValueError, match=r'"1" keeps running statistics.*group norm'):
        private(model=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    private(model=nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.GroupNorm(1, 2)))
    staying = private(model=nn.Sequential(nn.BatchNorm1d(2)), statistics="stay")
    assert staying.encode({"0.weight": torch.zeros(2), "0.running_mean": torch.ones(2)}, Visit(0)).keys() == {"0.weight"}


class Doubling(Plugin):
    """A codec of somebody's, which reads twice what was sent."""

    def decode(self, message, visit):
        return {name: 2 * value for name, value in message.items()}


@pytest.mark.parametrize(
    ("chain", "why"),
    [
        ([ClientPrivacy(1.0, 1.0), IntrinsicProjection(2)], "put ClientPrivacy behind IntrinsicProjection"),
        ([ClientPrivacy(1.0, 1.0), FetchSGD(4, 3, 1)], "put ClientPrivacy behind FetchSGD"),
        ([ClientPrivacy(1.0, 1.0), TopK(1)], "TopK takes a round's sum before ClientPrivacy has added noise"),
        ([Quantization(), ClientPrivacy(1.0, 1.0)], "Quantization sends codes.*put ClientPrivacy in front of it"),
        ([Doubling(), ClientPrivacy(1.0, 1.0)], "Doubling sends codes"),
        ([ClientPrivacy(1.0, 1.0), ClientPrivacy(1.0, 1.0)], "each add noise"),
    ],
)
def test_orders_that_do_not_hold_are_refused(chain, why):
    with pytest.raises(ValueError, match=why):
        Chain(chain).attach(nn.Linear(3, 3))


@pytest.mark.parametrize("before", [[IntrinsicProjection(2)], [FetchSGD(4, 3, 1)], [TopK(1)], [NormClipping(5.0)], []])
def test_what_is_bounded_is_all_that_is_sent(before):
    """Behind a projection, the numbers that are sent."""
    chain = Chain([*before, ClientPrivacy(0.25, 1.0), Quantization()])
    chain.attach(nn.Linear(3, 3))
    plugin = chain.plugins[len(before)]
    heard = []
    encode, plugin.encode = plugin.encode, lambda message, visit: heard.append(encode(message, visit)) or heard[-1]
    chain.encode({"weight": torch.randn(3, 3), "bias": torch.randn(3)}, Visit(0))
    floating = {name: value for name, value in heard[0].items() if value.is_floating_point()}
    assert norm(floating) == pytest.approx(0.25, rel=1e-5)
