"""Clients that drop out of a round: what they cost, and the mean over those who stay."""

import pytest
import torch

from featherlight.fed_loop.cohort import dropouts, steps_done
from featherlight.fed_loop.predict import predict
from featherlight.plugins import IntrinsicProjection, LayerFreezing, PartitionedTraining, TopK

SIZES = [6, 10, 14, 3, 7]


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def test_the_share_that_is_asked_for_drops_out_each_time_others():
    drawn = [dropouts(range(10), 0.25, 3, round) for round in range(200)]
    assert {len(gone) for gone in drawn} == {2, 3}
    times = torch.tensor([client for gone in drawn for client in gone]).bincount(minlength=10)
    assert (times - 50).abs().max() < 25  # 50 each on average, 6 the standard deviation
    assert dropouts(range(4), 0.0, 3, 0) == {}
    for clients, share in ((2, 0.2), (3, 0.1), (5, 0.5), (10, 0.3)):
        counts = [len(dropouts(range(clients), share, 3, round)) for round in range(1000)]
        assert sum(counts) / 1000 == pytest.approx(share * clients, abs=0.06)  # 0.016 the standard deviation
    assert len(dropouts([1, 2], 0.99, 3, 0)) == 1  # somebody stays


def test_a_client_takes_at_least_one_step_and_may_get_to_the_end():
    done = torch.tensor([steps_done(place / 1000, 4) for place in range(1000)]).bincount(minlength=5)
    assert done.tolist() == [0, 250, 250, 250, 250]


def test_the_mean_is_over_those_who_stay(net, points, federation):
    """Each of them alone, then their mean by samples; statistics and counts as well."""
    module, data = net(sgd), points(SIZES)
    result = federation(1, dropout=0.4, seed=5).run(module, data)
    gone = dropouts(range(5), 0.4, 5, 0)
    left = [client for client in range(5) if client not in gone]
    assert len(gone) == 2
    total = sum(SIZES[client] for client in left)
    wanted = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in module.state_dict().items()}
    for client in left:
        model = net(sgd).train()
        optimizer = model.configure_optimizers()
        for batch in data.batches(client):
            optimizer.zero_grad()
            model.training_step(batch, 0).backward()
            optimizer.step()
        for name, value in model.state_dict().items():
            wanted[name] += value.double() * SIZES[client] / total
    for name, value in module.state_dict().items():
        assert torch.allclose(value.double(), wanted[name].round() if value.dtype == torch.int64 else wanted[name], atol=1e-6), name
    row = result.history[0]
    assert (row["clients"], row["dropped_out"], row["rejected"], result.turns) == (3, 2, 0, 3)


@pytest.mark.parametrize("plugins", [list, lambda: [LayerFreezing("blocks.*")]], ids=["end to end", "layer-wise"])
def test_download_and_part_of_the_work_are_counted(plugins, net, points, federation, cost_of):
    whole = federation(2, seed=5).run(net(), points(SIZES), plugins())
    settings = federation(2, seed=5, dropout=0.4)
    some = settings.run(net(), points(SIZES), plugins())
    assert cost_of(predict(settings, net, points(SIZES), plugins())) == cost_of(some.cost)
    first, all_of_it = some.history[0], whole.history[0]
    assert first["bytes_down"] == all_of_it["bytes_down"]
    assert first["bytes_up"] == all_of_it["bytes_up"] * 3 / 5
    flops = [row["flops_forward"] for row in (some.cost.rows()[0], whole.cost.rows()[0])]
    assert flops[0] < flops[1]


@pytest.mark.parametrize("bits", [32, 4])
def test_subspaces_of_those_who_dropped_out_did_not_change(bits, net, points, federation, cost_of):
    """A prediction knows who drops out, and that nobody is sent what only they drew."""
    settings = federation(6, seed=5, dropout=0.5, cohort=3)
    told = [
        cost_of(cost)["total"]["bytes_down"]
        for cost in (
            predict(settings, net, points(SIZES), [IntrinsicProjection(40, subspaces=4, down_bits=bits)]),
            settings.run(net(), points(SIZES), [IntrinsicProjection(40, subspaces=4, down_bits=bits)]).cost,
        )
    ]
    assert told[0] == told[1]


def test_what_was_not_sent_is_not_forgotten(net, points, federation):
    """Error feedback: a client that dropped out remembers what it did before, as one that was not there."""
    result = federation(3, dropout=0.5, seed=2).run(net(), points([6, 10]), [TopK(5)])
    assert [row["clients"] for row in result.history] == [1, 1, 1]
    assert result.rejected == 0


def test_resumed_is_uninterrupted(tmp_path, net, points, federation, same, figures):
    def run(rounds, folder, resume=False):
        module = net()
        result = federation(rounds, cohort=4, dropout=0.5, folder=folder).run(module, points(SIZES), resume=resume)
        return module.state_dict(), figures(result)

    run(2, tmp_path)
    resumed, told = run(4, tmp_path, resume=True)
    whole, wanted = run(4, None)
    same(resumed, whole)
    assert told == wanted
    with pytest.raises(ValueError, match=r"dropout was 0.5, now None"):
        federation(5, cohort=4, folder=tmp_path).run(net(), points(SIZES), resume=True)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_out_of_range(share, federation):
    with pytest.raises(ValueError, match="dropout="):
        federation(1, dropout=share)


WAYS = {
    "replay": {"replay_period": 2},
    "joint, draws": {"joint": True, "draws": 2},
    "on disk": {"replay_period": 3, "draws": 2, "buffer": "disk"},
    "split": {"way": "split"},
    "local loss": {"way": "local_loss", "classes": 3},
}


@pytest.fixture
def divided(tmp_path):
    def make(way):
        options = {**WAYS[way]}
        if options.get("buffer") == "disk":
            options["buffer"] = str(tmp_path / "buffer")
        return [PartitionedTraining("blocks.1", **options)]

    return make


@pytest.mark.parametrize("way", WAYS)
def test_predicted_is_measured_of_a_divided_model(way, divided, net, points, federation, cost_of):
    settings = federation(3, dropout=0.4, seed=5, cohort=4)
    assert cost_of(predict(settings, net, points(SIZES), divided(way))) == cost_of(settings.run(net(), points(SIZES), divided(way)).cost)


@pytest.mark.parametrize("way", WAYS)
def test_resumed_is_uninterrupted_of_a_divided_model(way, divided, tmp_path, net, points, federation, same, figures):
    def run(rounds, folder, resume=False):
        module = net(dropout=0.3)
        settings = federation(rounds, cohort=4, dropout=0.5, seed=1, folder=folder)
        result = settings.run(module, points(SIZES), divided(way), resume=resume)
        return module.state_dict(), figures(result)

    whole, wanted = run(3, None)
    run(1, tmp_path)
    resumed, told = run(3, tmp_path, resume=True)
    same(resumed, whole)
    assert told == wanted


def test_of_a_device_that_vanished_nothing_is_kept_but_what_it_sent_before(net, points, federation, same):
    """Round 0 is that of those who stay; in round 2 of all, what others sent in round 0 still replays in round 3."""
    gone = [[*dropouts(range(5), 0.4, 5, round)] for round in (0, 2)]
    assert gone[0] != gone[1]
    stay = [[client for client in range(5) if client not in away] for away in gone]
    result = federation(4, dropout=0.4, seed=5).run(net(), points(SIZES), [PartitionedTraining("blocks.1")])
    ever = len({*stay[0], *stay[1]})
    assert [row["stored_clients"] for row in result.history] == [3, 3, ever, ever]
    assert [(row["clients"], row["dropped_out"]) for row in result.history] == [(3, 2), (3, 0), (3, 2), (ever, 0)]

    module, others = net(), net()
    federation(2, dropout=0.4, seed=5).run(module, points(SIZES), [PartitionedTraining("blocks.1")])
    left = points([SIZES[client] for client in stay[0]])
    left.clients = [points(SIZES).clients[client] for client in stay[0]]
    federation(2, seed=5).run(others, left, [PartitionedTraining("blocks.1")])
    for name, value in others.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, msg=name)
