"""One queue of keys for all clients: in one server part's training, across rounds, checkpoints and processes; refused elsewhere."""

import pytest
import torch
from torch.nn.functional import normalize

from featherlight.fed_loop.predict import predict
from featherlight.plugins import PartitionedTraining, Visit
from featherlight.plugins.activation_codec import WHOLE

CUT = "backbone.blocks.1"


def shared(**options):
    return PartitionedTraining(CUT, joint=True, **options)


def test_all_clients_keys_lie_in_one_queue(ssl, digits, federation):
    """Two clients of one batch of 16 each: 2 · 2 · 16 keys of the first target, first views before second, then the oldest rows."""
    data = {"num_clients": 2, "limit_train": 32}
    module, first = ssl("mocov3", queue_size=70), ssl("mocov3", queue_size=70)
    federation(1).run(module, digits(**data), [shared(bits=WHOLE)])

    by_hand = digits(**data)
    stream = by_hand.client_batches([Visit(0, 0, 0), Visit(0, 1, 0)], 1)
    views = [by_hand.on_after_batch_transfer(batch, 0)[0] for _, batch in stream]
    assert [len(view[0]) for view in views] == [16, 16]
    first.train()
    first.backbone_target.patch_embed.eval()
    with torch.no_grad():  # norms of the projector see all clients' first views at once, then the second ones
        keys = [first.projector_target(first.backbone_target(torch.cat([own[view] for own in views]))) for view in (0, 1)]
    torch.testing.assert_close(module.queue[:64], normalize(torch.cat(keys), dim=1))
    assert torch.equal(module.queue[64:], first.queue[:6])


def test_the_queue_goes_on_from_round_to_round_and_through_a_checkpoint(ssl, digits, federation, same, figures, tmp_path):
    def run(folder, rounds, resume=False):
        module = ssl("mocov3", queue_size=150)
        result = federation(rounds, cohort=2, seed=3, folder=folder).run(module, digits(), [shared()], resume=resume)
        return module.state_dict(), figures(result)

    whole, wanted = run(tmp_path / "whole", 3)
    before, _ = run(tmp_path / "part", 2)
    pushed = 2 * 2 * 16  # a whole batch of each of two clients, two views
    assert torch.equal(whole["queue"][pushed:], before["queue"][: 150 - pushed])
    again, resumed = run(tmp_path / "part", 3, resume=True)
    same(again, whole)
    assert resumed == wanted


def test_a_round_that_is_rejected_leaves_the_queue(ssl, digits, federation):
    module = ssl("mocov3", queue_size=20)
    before = module.queue.clone()
    with torch.no_grad():
        module.predictor.layers[0].weight.fill_(float("nan"))
    result = federation(1).run(module, digits(num_clients=2), [shared()])
    assert result.history[0]["rejected"] == 2
    assert torch.equal(module.queue, before)


def test_predicted_is_measured(ssl, digits, federation, cost_of):
    settings = federation(2, cohort=2, seed=1)
    predicted = predict(settings, lambda: ssl("mocov3", queue_size=40), digits(), [shared()])
    measured = settings.run(ssl("mocov3", queue_size=40), digits(), [shared()])
    assert cost_of(predicted) == cost_of(measured.cost)
    without = settings.run(ssl("mocov3"), digits(), [shared()])
    assert measured.cost.total()["bytes_up"] == without.cost.total()["bytes_up"]
    assert measured.cost.total()["bytes_down"] == without.cost.total()["bytes_down"]  # the queue is the server's


@pytest.mark.parametrize("options", [None, {}, {"way": "split"}], ids=["classic", "a copy a client", "split"])
def test_queues_of_which_there_is_no_mean_are_refused(options, ssl, digits, federation):
    def plugins():
        return [] if options is None else [PartitionedTraining(CUT, **options)]

    message = r'MoCoV3 pushes to "queue" in every step, and of several clients\' queues there is no mean: .*joint=True.*queue_size=0'
    with pytest.raises(ValueError, match=message):
        federation(1).run(ssl("mocov3", queue_size=20), digits(), plugins())
    with pytest.raises(ValueError, match=message):
        predict(federation(1), lambda: ssl("mocov3", queue_size=20), digits(), plugins())


def test_one_client_needs_no_mean(ssl, digits, federation):
    module = ssl("mocov3", queue_size=20)
    before = module.queue.clone()
    federation(1).run(module, digits(num_clients=1))
    assert not torch.equal(module.queue, before)
    assert torch.allclose(module.queue.norm(dim=1), torch.ones(20))
