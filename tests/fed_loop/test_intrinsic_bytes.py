"""Intrinsic projection: bytes predicted, measured and by hand, and resuming."""

import copy
import warnings

import pytest
import torch

from featherlight.fed_loop.predict import predict
from featherlight.plugins import IntrinsicProjection, projections
from featherlight.plugins.projections import PROJECTIONS

SIZES = [6, 10, 14]
RATE = 0.1


def sgd(parameters):
    return torch.optim.SGD(parameters, RATE)


# -- bytes ------------------------------------------------------------------------------------------------------------
METHODS = {
    "static": lambda: IntrinsicProjection(40),
    "sparse": lambda: IntrinsicProjection(40, projection="sparse_signs"),
    "subspaces": lambda: IntrinsicProjection(20, subspaces=3),
    "as many vectors as parameters": lambda: IntrinsicProjection(2, subspaces=15),
    "drawn once a round": lambda: IntrinsicProjection(20, subspaces=3, draw="round"),
    "time-varying": lambda: IntrinsicProjection(20, periods_per_span=2),
    "time-varying subspaces": lambda: IntrinsicProjection(10, subspaces=2, periods_per_span=2),
    "unknown start": lambda: IntrinsicProjection(20, known_start=False),
    "every step": lambda: IntrinsicProjection(20, space="subspace"),
    "every step, sparse": lambda: IntrinsicProjection(20, space="subspace", projection="sparse_signs"),
    "large": lambda: IntrinsicProjection(200, periods_per_span=1),
    "all subspaces": lambda: IntrinsicProjection(20, subspaces=3, serve="all"),
    "more vectors than parameters": lambda: IntrinsicProjection(150, subspaces=4, serve="all"),
    "momentum": lambda: IntrinsicProjection(20, subspaces=2, periods_per_span=2, momentum=0.9),
    "steps of 6 bits": lambda: IntrinsicProjection(20, subspaces=2, periods_per_span=3, momentum=0.9, down_bits=6),
    "steps of 8 bits, unknown start": lambda: IntrinsicProjection(60, down_bits=8, known_start=False),
}


@pytest.mark.parametrize("method", METHODS)
def test_predicted_is_measured(method, net, points, federation, cost_of):
    """Without a real step; in the row of 15 vectors and a start there are as many entries as parameters."""
    settings = federation(5, cohort=2, seed=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*real steps are metered")
        predicted = predict(settings, lambda: net(sgd), points([6, 10, 14, 4]), [METHODS[method]()])
    measured = cost_of(settings.run(net(sgd), points([6, 10, 14, 4]), [METHODS[method]()]).cost)
    for ours, theirs in zip([*(table := cost_of(predicted))["rows"], table["total"]], [*measured["rows"], measured["total"]]):
        assert ours == theirs


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_predicted_is_measured_piece_by_piece(kind, net, points, federation, cost_of, monkeypatch):
    """FLOPs and the peak of a step, where vectors are worked on in pieces of 32 numbers."""
    for name in ("PANEL", "BLOCK", "TILE"):
        monkeypatch.setattr(projections, name, 32)

    def method():
        return [IntrinsicProjection(20, space="subspace", projection=kind)]

    predicted = cost_of(predict(federation(2), lambda: net(sgd), points([8, 8]), method()))
    assert predicted == cost_of(federation(2).run(net(sgd), points([8, 8]), method()).cost)


def test_bytes_by_hand(net, points, federation):
    """Up d floats and the statistics; down in the first round the statistics, later Σ besides."""
    result = federation(3).run(net(sgd), points([8]), [IntrinsicProjection(40)])
    statistics = 3 * (2 * 8 * 4 + 8)
    up, down = ([row[way] for row in result.history] for way in ("bytes_up", "bytes_down"))
    assert all(0 < length - 4 * 40 - statistics < 1200 for length in up)
    assert 0 < down[0] - statistics < 1200
    assert all(0 < length - 4 * 40 - statistics < 1300 for length in down[1:])


def test_a_client_is_sent_the_subspaces_that_were_drawn(net, points, federation):
    """K = 8, one client: one changes in a round."""
    result = federation(5).run(net(sgd), points([8]), [IntrinsicProjection(15, subspaces=8)])
    statistics = 3 * (2 * 8 * 4 + 8)
    assert all(0 < row["bytes_down"] - 4 * 15 - statistics < 1300 for row in result.history[1:])


def test_tied_weights_are_predicted_once(net, points, federation, cost_of, same_but_for_the_peak):
    """A module that has one tensor under two names."""

    class Tied(net):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.blocks[2].linear.weight = self.blocks[0].linear.weight
            self.blocks[2].norm.running_mean = self.blocks[0].norm.running_mean

    for plugins in ([], [IntrinsicProjection(20)]):
        predicted = predict(federation(2), lambda: Tied(sgd), points([8, 8]), copy.deepcopy(plugins))
        measured = federation(2).run(Tied(sgd), points([8, 8]), plugins).cost
        assert cost_of(predicted)["total"]["params_held"] == sum(value.numel() for value in Tied(sgd).parameters())
        same_but_for_the_peak(cost_of(predicted), cost_of(measured))


# -- resuming ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["subspaces", "time-varying", "every step", "unknown start", "momentum", "steps of 6 bits"])
def test_resumed_is_uninterrupted(method, net, points, federation, same, figures, tmp_path):
    """Interrupted within a span of two rounds (after 1 and 3) and between spans (after 2)."""

    def run(rounds, folder=None, resume=False, seed=0):
        module = net(seed=seed)
        result = federation(rounds, cohort=2, folder=folder).run(module, points(SIZES), [METHODS[method]()], resume=resume)
        return module.state_dict(), result

    whole, result = run(5)
    for done in (1, 2, 3):
        run(done, tmp_path / str(done))
        resumed, again = run(5, tmp_path / str(done), resume=True, seed=9)
        same(resumed, whole)
        assert figures(again) == figures(result)


def test_a_plugin_used_again_begins_anew(net, points, federation, same):
    plugin, one, other = IntrinsicProjection(20), net(sgd), net(sgd)
    federation(2).run(net(sgd, seed=5), points(SIZES), [plugin])
    federation(2).run(one, points(SIZES), [plugin])
    federation(2).run(other, points(SIZES), [IntrinsicProjection(20)])
    same(one.state_dict(), other.state_dict())
