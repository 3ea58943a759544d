"""Clients in places of their own, known by their messages alone: every method gives the weights and bytes of the built-in loop."""

import math

import pytest
import torch

from featherlight import plugins as exported
from featherlight.fed_loop.away import Belongings
from featherlight.plugins import (
    MOON,
    Chain,
    ClientPrivacy,
    DepthDropout,
    FedEMA,
    FetchSGD,
    IntrinsicProjection,
    LayerFreezing,
    NormClipping,
    PartitionedTraining,
    Plugin,
    PrismSampling,
    ProgressiveGrowth,
    Proximal,
    Quantization,
    RepresentationAlignment,
    ServerCalibration,
    TopK,
)

SIZES = [6, 10, 14, 8]


@pytest.fixture
def both(net, points, federation, mail):
    """Runs a federation here and by mail; returns both results, their modules' states and the mail."""

    def run(plugins, rounds=4, lose=(), refuse=(), **settings):
        data, settings = points(SIZES), {"cohort": 2, "seed": 3, **settings}
        here, away = net(), net()
        one = federation(rounds, **settings).run(here, data, plugins())
        carrier = mail(federation(rounds, **settings), net, data, plugins, lose, refuse)
        other = federation(rounds, **settings).run(away, data, plugins(), carrier=carrier)
        return (one, here.state_dict()), (other, away.state_dict()), carrier

    return run


WAYS = {
    "averaging": lambda: [],
    "layer-wise": lambda: [LayerFreezing("blocks.*", periods_per_stage=2)],
    "layer-wise, blocks copied": lambda: [LayerFreezing("blocks.*", periods_per_stage=2, init="copy_previous")],
    "progressive, depth dropout": lambda: [ProgressiveGrowth("blocks.*", periods_per_stage=2), DepthDropout("blocks.*", rate=0.5)],
    "layer-wise, depth dropout": lambda: [LayerFreezing("blocks.*", periods_per_stage=2), DepthDropout("blocks.*", rate=0.5)],
    "principal kernels": lambda: [PrismSampling({0.25: 0.5, 0.5: 0.5}, layers=["blocks.*.linear"])],
    "principal kernels, layer-wise": lambda: [
        PrismSampling(0.5, layers=["blocks.*.linear"], principal_start=True),
        LayerFreezing("blocks.*", periods_per_stage=2),
    ],
    "8 bits": lambda: [Quantization()],
    "8 bits both ways, layer-wise": lambda: [LayerFreezing("blocks.*", periods_per_stage=2), Quantization(down=True)],
    "top-k": lambda: [TopK(k=20)],
    "top-k, start unknown": lambda: [TopK(k=20, known_start=False)],
    "top-k, layer-wise, depth dropout": lambda: [LayerFreezing("blocks.*", periods_per_stage=2), DepthDropout("blocks.*"), TopK(k=20)],
    "sketches": lambda: [FetchSGD(40, 3, 10)],
    "sketches, growing": lambda: [ProgressiveGrowth("blocks.*", periods_per_stage=2), FetchSGD(40, 3, 10), Quantization()],
    "held near": lambda: [Proximal(0.1), RepresentationAlignment(through=["stem", "blocks"])],
    "clipped": lambda: [NormClipping(0.1), Quantization()],
    "private": lambda: [ClientPrivacy(0.5, 0.1, delta=1e-3, shares=4, statistics="stay")],
    "its last model": lambda: [MOON(through=["stem", "blocks"]), FedEMA()],
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_weights_and_bytes_are_the_built_in_loop_s(way, both, same, figures):
    (one, here), (other, away), mail = both(WAYS[way])
    same(here, away)
    assert figures(one) == figures(other)
    assert len(mail.asked) == 8


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_calibration_is_the_server_s_own(ssl, digits, federation, mail, same, figures):
    plugins = lambda: [LayerFreezing("backbone.blocks.*"), ServerCalibration()]  # noqa: E731
    here, away, data = ssl("simclr"), ssl("simclr"), digits(num_clients=2, limit_train=70, server_fraction=0.4)
    one = federation(2).run(here, data, plugins())
    other = federation(2).run(away, data, plugins(), carrier=mail(federation(2), lambda: ssl("simclr"), data, plugins))
    same(here.state_dict(), away.state_dict())
    assert figures(one) == figures(other)


def test_every_method_is_tried_here():
    kinds = {kind for name in exported.__all__ if isinstance(kind := getattr(exported, name), type) and issubclass(kind, Plugin)}
    tried = {type(plugin) for way in WAYS.values() for plugin in way()} | {ServerCalibration, PartitionedTraining}
    elsewhere = {IntrinsicProjection}  # tests/fed_loop/test_intrinsic_messages.py: equal to rounding
    assert kinds - {Plugin, Chain} == tried | elsewhere


def test_clients_that_drop_out_take_as_many_steps(both, same, figures):
    (one, here), (other, away), _ = both(lambda: [TopK(k=20)], dropout=0.5, cohort=4)
    same(here, away)
    assert figures(one) == figures(other)
    assert sum(row["dropped_out"] for row in other.history) == 8


def test_a_client_that_lost_what_it_had_is_sent_it_again(both, same):
    stages = lambda: [LayerFreezing("blocks.*", periods_per_stage=1)]  # noqa: E731
    (one, here), (other, away), mail = both(stages, rounds=4, cohort=4, lose=[(2, 1), (3, 2)])
    same(here, away)
    assert len(mail.asked) == 16 + 2
    more = [other["bytes_down"] - one["bytes_down"] for one, other in zip(one.history, other.history)]
    assert more[:2] == [0, 0]
    assert more[2] > 0


def test_error_feedback_that_is_lost_begins_anew(both):
    (_, here), (other, away), _ = both(lambda: [TopK(k=20)], rounds=3, cohort=4, lose=[(1, 1)])
    assert not all(torch.equal(here[name], away[name]) for name in here)
    assert other.rejected == 0


def test_a_client_that_cannot_be_reached_is_left_out_and_told_of(both, net):
    (one, _), (other, _), _ = both(lambda: [LayerFreezing("blocks.*", periods_per_stage=1)], rounds=4, cohort=4, refuse=[(1, 2)])
    assert [row["rejected"] for row in other.history] == [0, 1, 0, 0]
    assert [row["clients"] for row in other.history] == [4, 3, 4, 4]
    assert one.history[1]["bytes_down"] == other.history[1]["bytes_down"]
    assert one.history[2]["bytes_down"] < other.history[2]["bytes_down"]  # what it has is not known: it is sent all again
    assert all(math.isfinite(row["loss"]) for row in other.history)


@pytest.mark.parametrize(
    ("plugins", "settings", "why"),
    [
        (
            lambda: [LayerFreezing("blocks.*", init="copy_previous"), IntrinsicProjection(dim=10)],
            {},
            "LayerFreezing begins stages with other weights",
        ),
        (lambda: [PartitionedTraining(cut="blocks.0")], {}, "divided between device and server"),
        (lambda: [], {"evaluate_clients": True}, "not to evaluate"),
        (lambda: [], {"devices": 2}, "one more"),
    ],
)
def test_what_does_not_run_is_refused_before_the_first_round(plugins, settings, why, net, points, federation):
    class Nobody:
        def exchange(self, requests):
            raise AssertionError("a client was asked")

    with pytest.raises(ValueError, match=why):
        federation(2, **settings).run(net(), points(SIZES), plugins(), carrier=Nobody())


def test_what_a_client_has_goes_through_bytes():
    own = Belongings(
        {"a/b": torch.arange(3), "n": torch.tensor(2.5)}, {"a/b": 4, "n": 0}, {"a/b": torch.ones(2)}, {3: {}, 5: {"0:x/y": torch.ones(1)}}
    )
    again = Belongings.unpacked(own.packed())
    assert (again.versions, again.memories.keys()) == (own.versions, own.memories.keys())
    for one, other in ((own.kept, again.kept), (own.received, again.received), (own.memories[5], again.memories[5])):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
