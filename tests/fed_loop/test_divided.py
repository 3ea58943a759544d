"""A model divided between device and server, against the same training of the whole model, and against steps by hand."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from featherlight.fed_loop import stored_rounds
from featherlight.fed_loop.predict import predict
from featherlight.plugins import PartitionedTraining, Plugin
from featherlight.plugins.activation_codec import WHOLE

CUT = "blocks.1"


def divided(cut=CUT, **options):
    return PartitionedTraining(cut, **options)


class FrozenPrefix(Plugin):
    """What the front is in replay: neither trained nor in training mode."""

    def attach(self, model):
        self._front = [model.stem, model.blocks[0], model.blocks[1]]

    def advance(self, clock):
        for module in self._front:
            module.requires_grad_(False)
        self.before_forward(clock)
        return super().advance(clock)

    def before_forward(self, clock):
        for module in self._front:
            module.eval()

    def detach(self):
        for module in self._front:
            module.requires_grad_(True)


# -- split ---------------------------------------------------------------------------------------------------------------
def test_split_is_ordinary_training_of_the_whole_model(net, points, federation, same):
    """With activations and gradients in float32, over several clients and rounds: bit for bit, dropout and statistics of norms included."""
    whole, parts = net(dropout=0.3), net(dropout=0.3)
    settings = {"cohort": 2, "local_epochs": 2, "seed": 3}
    one = federation(3, **settings).run(whole, points([10, 14, 6]))
    other = federation(3, **settings).run(parts, points([10, 14, 6]), [divided(way="split")])
    same(parts.state_dict(), whole.state_dict())
    assert [row["loss"] for row in other.history] == [row["loss"] for row in one.history]


@pytest.mark.parametrize("method", ["simclr", "mocov3"])
def test_split_of_a_self_supervised_model_is_ordinary_training(method, ssl, digits, federation, same):
    """Two views in one pass (SimCLR) and four passes through two branches (MoCo v3), on a transformer with a class token."""
    whole, parts = ssl(method), ssl(method)
    data = {"num_clients": 2, "limit_train": 60, "batch_size": 15}
    federation(2).run(whole, digits(**data))
    federation(2).run(parts, digits(**data), [PartitionedTraining("backbone.blocks.1", way="split")])
    same(parts.state_dict(), whole.state_dict())


# -- classic -------------------------------------------------------------------------------------------------------------
def test_classic_is_federated_averaging_from_the_same_front(net, points, federation, same, tmp_path):
    torch.save(net(seed=7).state_dict(), tmp_path / "front.pt")
    plain, parts = net(), net()
    for part in ("stem", "blocks.0", "blocks.1"):
        plain.get_submodule(part).load_state_dict(net(seed=7).get_submodule(part).state_dict())
    one = federation(2, cohort=2).run(plain, points([10, 14, 6]))
    plugin = divided(way="classic", front_checkpoint=str(tmp_path / "front.pt"))
    other = federation(2, cohort=2).run(parts, points([10, 14, 6]), [plugin])
    same(parts.state_dict(), plain.state_dict())
    assert [row["bytes_up"] for row in other.history] == [row["bytes_up"] for row in one.history]


# -- local loss ----------------------------------------------------------------------------------------------------------
def test_local_loss_is_two_trainings_by_hand(net, points, federation):
    """The front by its own head; the rear on the front's outputs, without a gradient to it."""
    module, by_hand = net(), net()
    data = points([12])
    plugin = divided(way="local_loss", classes=3)
    federation(1, local_epochs=2).run(module, data, [plugin])

    plugin = divided(way="local_loss", classes=3)
    plugin.attach(by_hand)
    head = copy.deepcopy(by_hand.auxiliary_head)
    plugin.detach()
    front = nn.Sequential(by_hand.stem, by_hand.blocks[0], by_hand.blocks[1])
    rear = nn.Sequential(by_hand.blocks[2], by_hand.head)
    on_device = torch.optim.SGD([*front.parameters(), *head.parameters()], 0.1, momentum=0.9)
    on_server = torch.optim.SGD(rear.parameters(), 0.1, momentum=0.9)
    for x, labels in data.batches(0) * 2:
        activations = front(x)
        on_device.zero_grad()
        on_server.zero_grad()
        nn.functional.cross_entropy(head(activations), labels).backward()
        nn.functional.cross_entropy(rear(activations.detach()), labels).backward()
        on_device.step()
        on_server.step()
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, msg=name)
    assert not hasattr(module, "auxiliary_head")


# -- replay --------------------------------------------------------------------------------------------------------------
def test_replay_in_floats_and_every_round_is_training_behind_a_frozen_prefix(net, points, federation, same):
    whole, parts = net(), net()
    settings = {"cohort": 2, "local_epochs": 2, "seed": 3}
    one = federation(3, **settings).run(whole, points([10, 14, 6]), [FrozenPrefix()])
    other = federation(3, **settings).run(parts, points([10, 14, 6]), [divided(replay_period=1, bits=WHOLE)])
    same(parts.state_dict(), whole.state_dict())
    assert [row["loss"] for row in other.history] == [row["loss"] for row in one.history]
    assert torch.equal(net().stem.weight, parts.stem.weight)


def test_int8_is_training_on_what_the_codec_gives_back(net, points, federation):
    """By hand: the front once, each batch through the quantiser and back, then the rear."""
    module, by_hand, data = net(), net(), points([12])
    federation(1).run(module, data, [divided(bits=8, signed=True)])
    front, rear = nn.Sequential(by_hand.stem, *by_hand.blocks[:2]).eval(), nn.Sequential(by_hand.blocks[2], by_hand.head)
    optimizer = torch.optim.SGD(rear.parameters(), 0.1, momentum=0.9)
    for x, labels in data.batches(0):
        with torch.no_grad():
            activations = front(x)
            scale = activations.abs().max() / 127
            activations = (activations / scale).round().clamp(-128, 127) * scale
        optimizer.zero_grad()
        nn.functional.cross_entropy(rear(activations), labels).backward()
        optimizer.step()
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, msg=name)


class Watched:
    """Data that tells who was asked for batches; an epoch's are shifted by its number."""

    def __init__(self, data, shift=0.0):
        self._data, self._shift, self.asked = data, shift, []

    def __getattr__(self, name):
        return getattr(self._data, name)

    def client_batches(self, visits, epochs):
        for index, visit in enumerate(visits):
            self.asked.append((visit.round, visit.client))
            for epoch in range(epochs):
                for x, labels in self._data.batches(visit.client):
                    yield index, (x + self._shift * epoch, labels)


def test_devices_rest_in_replay_rounds(net, points, federation, cost_of):
    """Rounds 1, 2 and 4, 5 replay what rounds 0 and 3 sent; everybody who sent is drawn from."""
    data = Watched(points([10, 14, 6, 8]))
    result = federation(6, cohort=2, seed=1).run(net(), data, [divided(replay_period=3)])
    assert {round for round, _ in data.asked} == {0, 3}
    rows = result.history
    assert [row["clients"] for row in rows] == [2] * 6
    assert [row["bytes_up"] > 0 for row in rows] == [True, False, False, True, False, False]
    assert [row["bytes_down"] > 0 for row in rows[:3]] == [True, False, False]
    assert all(row["loss"] > 0 and row["server_flops"] > 0 for row in rows)
    assert rows[-1]["stored_clients"] == len({client for _, client in data.asked})
    assert result.cost.total()["bytes_up"] == pytest.approx(sum(row["bytes_up"] for row in rows) / 2)


def test_rounds_take_turns_with_the_draws(net, points, federation, same):
    """Round r of a frozen prefix trained on data shifted by r is round r on draw r of three."""
    parts, whole = net(), net()
    federation(3).run(parts, Watched(points([10, 7]), shift=0.5), [divided(replay_period=3, draws=3, bits=WHOLE)])

    class ByRound(Watched):
        def client_batches(self, visits, epochs):
            for index, visit in enumerate(visits):
                for x, labels in self._data.batches(visit.client):
                    yield index, (x + self._shift * visit.round, labels)

    federation(3).run(whole, ByRound(points([10, 7]), shift=0.5), [FrozenPrefix()])
    same(parts.state_dict(), whole.state_dict())


def test_jointly_is_one_client_whose_batches_are_all_of_theirs(net, points, federation):
    joint, alone = net(), net()
    data = points([8, 10, 3])  # batches of 4: 2, 3 and 1
    result = federation(2).run(joint, data, [divided(joint=True, bits=WHOLE)])

    class Together:
        num_clients = 1
        client_sizes = staticmethod(lambda: [21])
        steps_per_visit = staticmethod(lambda client, epochs: 3 * epochs)
        on_after_batch_transfer = staticmethod(lambda batch, index: batch)

        def client_batches(self, visits, epochs):
            for _ in range(epochs):
                for step in range(3):
                    own = [data.batches(client)[step] for client in range(3) if step < len(data.batches(client))]
                    yield 0, (torch.cat([x for x, _ in own]), torch.cat([labels for _, labels in own]))

    expected = federation(2).run(alone, Together(), [divided(bits=WHOLE)])
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(joint.state_dict()[name], value, msg=name)
    assert [row["loss"] for row in result.history] == pytest.approx([row["loss"] for row in expected.history])


@pytest.mark.parametrize("method", ["simclr", "mocov3"])
def test_replay_of_a_self_supervised_model_sends_views_and_no_labels(method, ssl, digits, federation, monkeypatch):
    """A batch of 16 images: two views of 5 tokens of 16 numbers of one byte each, and a scale each."""
    sent, real = [], stored_rounds.pack
    monkeypatch.setattr(stored_rounds, "pack", lambda message: sent.append(message) or real(message))
    module = ssl(method)
    result = federation(2).run(module, digits(num_clients=1, limit_train=32), [PartitionedTraining("backbone.blocks.1")])
    up = sent[-1]
    assert not any("labels" in name for name in up)
    assert up.keys() == {"images", "activations", "single"} | {
        f"0.{step}.{view}.{part}" for step in (0, 1) for view in (0, 1) for part in ("codes", "scale")
    }
    assert sum(value.numel() for name, value in up.items() if name.endswith("codes")) == 2 * 2 * 16 * 5 * 16
    assert all(math.isfinite(row["loss"]) for row in result.history)
    assert not any(name.startswith("backbone.blocks.0") and value.grad is not None for name, value in module.named_parameters())


# -- cost ----------------------------------------------------------------------------------------------------------------
WAYS = {
    "replay": {},
    "six bits, two draws": {"bits": 6, "draws": 2},
    "joint": {"joint": True},
    "split": {"way": "split"},
    "split, int8": {"way": "split", "bits": 8},
    "local loss": {"way": "local_loss", "classes": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_predicted_is_measured(way, net, points, federation, cost_of):
    settings = federation(3, cohort=2, seed=2, local_epochs=2)
    predicted = predict(settings, net, points([10, 7, 3]), [divided(**WAYS[way])])
    measured = settings.run(net(), points([10, 7, 3]), [divided(**WAYS[way])])
    assert cost_of(predicted) == cost_of(measured.cost)


@pytest.mark.parametrize("way", ["split", "replay"])
def test_predicted_is_measured_of_a_self_supervised_model(way, ssl, digits, federation, cost_of):
    settings, plugin = federation(2, cohort=2, seed=1), {"cut": "backbone.blocks.1", "way": way}
    predicted = predict(settings, lambda: ssl("mocov3"), digits(limit_train=60), [PartitionedTraining(**plugin)])
    measured = settings.run(ssl("mocov3"), digits(limit_train=60), [PartitionedTraining(**plugin)])
    assert cost_of(predicted) == cost_of(measured.cost)


def test_flops_by_hand(net, points, federation):
    """Net, a sample: the front is 6·8 + 2·8·8 multiply-adds, the rear 8·8 + 8·3. The stem's input needs no gradient."""
    front, rear = 2 * (6 * 8 + 2 * 8 * 8), 2 * (8 * 8 + 8 * 3)
    split = federation(1).run(net(), points([12]), [divided(way="split")]).cost
    assert (split.rows()[0]["flops_forward"], split.rows()[0]["flops_backward"]) == (12 * front, 12 * (2 * front - 2 * 6 * 8))
    assert (split.server.rows()[0]["flops_forward"], split.server.rows()[0]["flops_backward"]) == (12 * rear, 12 * 2 * rear)
    replay = federation(2).run(net(), points([12]), [divided()]).cost
    assert replay.rows()[0]["flops_forward"] == 12 * front / 2  # every other round
    assert (replay.rows()[0]["flops_backward"], replay.rows()[0]["saved_bytes"]) == (0, 0)
    assert (replay.rows()[0]["params_held"], replay.rows()[0]["params_trained"]) == (6 * 8 + 8 + 2 * (8 * 8 + 8 + 16), 0)
    # the rear's input needs no gradient now
    assert (replay.server.rows()[0]["flops_forward"], replay.server.rows()[0]["flops_backward"]) == (12 * rear, 12 * (2 * rear - 2 * 8 * 8))


def body(payload):
    """Bytes behind the header."""
    return len(payload) - 8 - int.from_bytes(payload[:8], "little")


def test_bytes_by_hand(net, points, federation, monkeypatch):
    """12 samples in batches of 4: activations of 8 numbers, labels of 8 bytes."""
    sent, real = [], stored_rounds.pack
    monkeypatch.setattr(stored_rounds, "pack", lambda message: sent.append(real(message)) or sent[-1])
    federation(1).run(net(), points([12]), [divided(bits=4)])
    front = 4 * (6 * 8 + 8 + 2 * (8 * 8 + 8 + 16 + 16)) + 2 * 8  # weights and statistics of norms, two counts of batches
    heading = 8 + 8 + 8  # shape of an image, of an activation, one view
    assert list(map(body, sent)) == [front, 12 * 4 + 3 * 4 + 12 * 8 + heading]
    assert json.loads(sent[1][8 : 8 + int.from_bytes(sent[1][:8], "little")])["0.2.0.codes"]["shape"] == [4, 4]


# -- resume --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("where", "options"),
    [("memory", {"replay_period": 3}), ("disk", {"replay_period": 2, "joint": True}), ("memory", {"way": "split"})],
    ids=["memory", "disk, joint", "split"],
)
def test_resumed_is_uninterrupted(where, options, net, points, federation, same, figures, tmp_path):
    def run(folder, rounds, resume=False):
        buffer = {"buffer": str(folder / "buffer")} if where == "disk" else {}
        module = net(dropout=0.3)
        settings = federation(rounds, cohort=2, seed=5, folder=folder)
        return module.state_dict(), settings.run(module, points([10, 14, 6]), [divided(**options, **buffer)], resume=resume)

    whole, result = run(tmp_path / "whole", 5)
    for round in (1, 2, 4):
        folder = tmp_path / str(round)
        run(folder, round)
        if where == "disk":  # files are no record: the checkpoint's content counts
            assert not [*(folder / "buffer").iterdir()]
        again, resumed = run(folder, 5, resume=True)
        same(again, whole)
        if where == "memory":
            assert figures(resumed) == figures(result)


@pytest.mark.parametrize("way", ["replay", "split", "classic"])
def test_a_resumed_run_needs_no_file_of_the_front(way, net, points, federation, same, tmp_path):
    """The checkpoint has its weights; a run that begins anew needs it, and leaves the model as it was without."""
    front = tmp_path / "front.pt"
    torch.save(net(seed=7).state_dict(), front)
    plugin = {"way": way, "front_checkpoint": str(front)}
    whole, again, other = net(), net(), net()
    federation(3).run(whole, points([10, 6]), [divided(**plugin)])
    federation(1, folder=tmp_path / "run").run(net(), points([10, 6]), [divided(**plugin)])
    assert way != "replay" or torch.equal(whole.stem.weight, net(seed=7).stem.weight)
    front.unlink()
    federation(3, folder=tmp_path / "run").run(again, points([10, 6]), [divided(**plugin)], resume=True)
    same(again.state_dict(), whole.state_dict())
    for resume in (False, True):
        with pytest.raises(ValueError, match=r"front.pt does not exist"):
            federation(1, folder=tmp_path / "other").run(other, points([10, 6]), [divided(**plugin)], resume=resume)
    same(other.state_dict(), net().state_dict())
    assert not other.blocks[1]._forward_hooks
