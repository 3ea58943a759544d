"""Clients that are too late: who, how far they get, and that nobody is left out more than others."""

import pytest
import torch

from featherlight.fed_loop import Federation
from featherlight.fed_loop.cohort import absent, asked, late, steps_done
from featherlight.fed_loop.predict import predict
from featherlight.plugins import LayerFreezing, PartitionedTraining

SIZES = [6, 10, 14, 3, 7]


def test_the_first_to_return_count():
    for round in range(50):
        gone = late(range(10), 7, None, 3, round)
        assert len(gone) == 3
        assert all(0 < progress < 1 for progress in gone.values())
    assert late([4, 2], 2, None, 3, 0) == {}
    assert late([4, 2], 5, None, 3, 0) == {}


def test_a_deadline_by_hand():
    """P(e^(0.5·N) > 2) = 1 − Φ(ln 2 / 0.5) = 0.0828."""
    gone = [late(range(20), None, 2.0, 3, round) for round in range(500)]
    assert sum(map(len, gone)) / 10_000 == pytest.approx(0.0828, abs=0.01)
    assert len(late(range(5), None, 1e-9, 3, 0)) == 4  # one is always awaited
    both = late(range(20), 12, 1.0, 3, 0)
    assert both.keys() == late(range(20), 12, None, 3, 0).keys() | late(range(20), None, 1.0, 3, 0).keys()


def test_nobody_is_left_out_more_than_others_and_the_mean_is_that_of_all():
    """Of samples that differ by a factor of 40: over many rounds the mean by samples is the mean over all clients."""
    settings = Federation(1, cohort=6, over_select=1.5, deadline=1.5, dropout=0.1, seed=5)
    sizes = [1, 2, 5, 10, 20, 40, 3, 7, 9, 4]
    values = torch.arange(10.0)
    times, means = torch.zeros(10), []
    for round in range(4000):
        cohort = asked(settings, 10, round)
        gone = absent(settings, cohort, round)
        assert len(cohort) == 9
        stay = [client for client in cohort if client not in gone]
        assert 1 <= len(stay) <= 6
        times[stay] += 1
        weight = sum(sizes[client] for client in stay)
        means.append(sum(values[client] * sizes[client] for client in stay) / weight)
    assert (times / times.mean() - 1).abs().max() < 0.05
    exact = sum(value * size for value, size in zip(values, sizes)) / sum(sizes)
    smaller = Federation(1, cohort=round_half(times.sum() / 4000), seed=6)
    plain = []
    for round in range(4000):
        stay = asked(smaller, 10, round)
        plain.append(sum(values[c] * sizes[c] for c in stay) / sum(sizes[c] for c in stay))
    # a mean over some clients, by samples, is off a little (it is a ratio), by as much as that over a smaller cohort
    assert abs(torch.stack(means).mean() - torch.stack(plain).mean()) < 0.06
    assert abs(torch.stack(means).mean() - exact) < 0.25


def round_half(value):
    return int(value + 0.5)


def test_a_round_is_that_of_those_who_return(net, points, federation, same):
    settings = {"cohort": 3, "over_select": 1.6, "seed": 5}
    result = federation(3, **settings).run(net(), points(SIZES))
    assert [(row["clients"], row["dropped_out"], row["rejected"]) for row in result.history] == [(3, 2, 0)] * 3
    with pytest.raises(ValueError, match=r"over_select=1.5, cohort=None"):
        federation(1, over_select=1.5)
    for options in ({"over_select": 0.5, "cohort": 2}, {"deadline": 0.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            federation(1, **options)


@pytest.mark.parametrize("plugins", [lambda: [LayerFreezing("blocks.*")], lambda: [PartitionedTraining("blocks.1", replay_period=2)]])
def test_predicted_is_measured_and_resumed_is_uninterrupted(plugins, tmp_path, net, points, federation, same, figures, cost_of):
    settings = {"cohort": 3, "over_select": 1.4, "deadline": 1.2, "dropout": 0.2, "seed": 1}

    def run(rounds, folder, resume=False):
        module = net(dropout=0.3)
        result = federation(rounds, folder=folder, **settings).run(module, points(SIZES), plugins(), resume=resume)
        return module.state_dict(), result

    whole, wanted = run(3, None)
    run(1, tmp_path)
    resumed, told = run(3, tmp_path, resume=True)
    same(resumed, whole)
    assert figures(told) == figures(wanted)
    assert cost_of(predict(federation(3, **settings), lambda: net(dropout=0.3), points(SIZES), plugins())) == cost_of(wanted.cost)


def test_how_far_a_late_client_gets():
    gone = late(range(6), 4, None, 0, 1)
    assert all(1 <= steps_done(progress, 5) <= 5 for progress in gone.values())
