"""Clients in places of their own whose updates reach the server as one sum of whole numbers: the weights are the built-in loop's."""

import importlib.util
from pathlib import Path

import pytest
import torch

from featherlight.fed_loop import Median
from featherlight.fed_loop.aggregate import Mean
from featherlight.fed_loop.weighing import FixedMean
from featherlight.fed_loop.wire import unpack
from featherlight.plugins import LayerFreezing, PrismSampling, TopK

spec = importlib.util.spec_from_file_location("test_away", Path(__file__).parent / "test_away.py")
away = importlib.util.module_from_spec(spec)
spec.loader.exec_module(away)
WAYS = {way: make for way, make in away.WAYS.items() if not way.startswith("principal kernels")}


@pytest.fixture
def summed(net, points, federation, mail):
    """Runs a federation here and by sums; returns both results and states, and the carrier."""

    class Added(mail):
        """Hands the sum over, and what some clients in it made of theirs."""

        spoil = staticmethod(lambda numbers, visit: numbers)

        def summed(self, requests, size):
            replies, total = list(self.exchange(requests)), torch.zeros(size, dtype=torch.int64)
            of = {request.visit.client: request.visit for request in requests}
            for reply in replies:
                if reply.turn.counts and not reply.lost:
                    numbers = unpack(reply.payload)["whole"]
                    assert (numbers.dtype, numbers.shape) == (torch.int64, (size,))
                    total += self.spoil(numbers, of[reply.turn.client])
            return replies, total

    def run(plugins, rounds=4, lose=(), refuse=(), spoil=None, **settings):
        data, settings = points(away.SIZES), {"cohort": 3, "seed": 3, **settings}
        here, there = net(), net()
        one = federation(rounds, **settings).run(here, data, plugins())
        carrier = Added(federation(rounds, **settings), net, data, plugins, lose, refuse)
        carrier.spoil = spoil or carrier.spoil
        other = federation(rounds, **settings).run(there, data, plugins(), carrier=carrier)
        return (one, here.state_dict()), (other, there.state_dict())

    return run


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_the_weights_are_the_built_in_loop_s(way, summed, same):
    (one, here), (other, there) = summed(WAYS[way], rounds=3, dropout=0.2)
    same(here, there)
    assert [(row["loss"], row["clients"]) for row in one.history] == [(row["loss"], row["clients"]) for row in other.history]
    assert other.rejected == 0


def test_who_lost_what_it_had_comes_again_in_a_later_round(summed):
    stages = lambda: [LayerFreezing("blocks.*", periods_per_stage=1), TopK(20)]  # noqa: E731
    _, (other, _) = summed(stages, lose=[(1, 1)], refuse=[(2, 2)], cohort=4)
    assert [(row["clients"], row["rejected"]) for row in other.history] == [(4, 0), (3, 1), (3, 1), (4, 0)]


def test_a_sum_that_is_none_of_updates_changes_nothing(summed, same):
    before = summed(lambda: [], rounds=1)[1][1]
    spoilt = lambda numbers, visit: numbers + 2**60 if visit == (1, 0, 3) else numbers  # noqa: E731
    _, (other, there) = summed(lambda: [], rounds=2, spoil=spoilt, cohort=4)
    assert [(row["clients"], row["rejected"]) for row in other.history] == [(4, 0), (0, 4)]
    assert before.keys() == there.keys()
    same(there, summed(lambda: [], rounds=1, cohort=4)[0][1])


def test_a_client_rejects_its_own_update_where_the_server_would_have(net, points, federation, summed):
    nan = lambda: [Nan()]  # noqa: E731

    class Nan(LayerFreezing):
        def __init__(self):
            super().__init__("blocks.*")

        def encode(self, message, visit):
            return {name: value * torch.nan if visit.client == 2 else value for name, value in message.items()}

    _, (other, _) = summed(nan, rounds=1, cohort=4)
    assert other.rejected_by == {"not_finite": 1}
    assert other.history[0]["clients"] == 3


@pytest.mark.parametrize("over", [3, 5, 154, 175])
def test_a_whole_round_of_clients_that_count_alike_is_a_sum(over):
    like = {"a": torch.zeros(2)}
    one, found = FixedMean(like, over), FixedMean(like, over)
    one.add({"a": torch.tensor([0.5, -1.0])})
    found.add_whole(one.whole() * over)
    assert found.result()["a"].tolist() == pytest.approx([0.5, -1.0], rel=1e-12)
    with pytest.raises(ValueError, match="none of updates"):
        FixedMean(like, over).add_whole(one.whole() * 2 * over)


def test_whole_numbers_add_up():
    like = {"a": torch.zeros(3), "b": torch.zeros(2, 2)}
    one, other, both = Mean(like), Mean(like), Mean(like)
    updates = [({"a": torch.tensor([1.0, -2.0, 1e-9])}, 0.25), ({"a": torch.ones(3), "b": torch.full((2, 2), 3.0)}, 0.5)]
    for mean, (update, weight) in zip((one, other), updates):
        mean.add(update, weight)
        both.add(update, weight)
    found = Mean(like)
    found.add_whole(one.whole() + other.whole())
    expected = both.result()
    assert {name: value.tolist() for name, value in found.result().items()} == {name: value.tolist() for name, value in expected.items()}
    assert expected["a"].tolist() == pytest.approx([1.0, 0.0, (0.25e-9 + 0.5) / 0.75], rel=1e-12)


@pytest.mark.parametrize(
    ("plugins", "settings", "why"),
    [
        ([PrismSampling(0.5, layers=["blocks.*.linear"])], {}, "PrismSampling: what a smaller module sends"),
        ([], {"aggregate": Median()}, "aggregate=Median looks at each client's update"),
        ([], {"sampling": "poisson", "cohort": 2}, "sampling='poisson': a sum can be read only where enough clients came"),
    ],
)
def test_what_needs_updates_one_by_one_is_refused(plugins, settings, why, net, points, federation):
    class Sums:
        def summed(self, requests, size):
            raise AssertionError

    with pytest.raises(ValueError, match=why):
        federation(1, **settings).run(net(), points(away.SIZES), plugins, carrier=Sums())
