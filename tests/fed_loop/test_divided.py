"""A model divided between device and server, against the same training of the whole model, and against steps by hand."""

import copy
import json
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from featherlight.fed_loop import stored_rounds
from featherlight.fed_loop.divided_batch import StoredBatches
from featherlight.fed_loop.predict import predict
from featherlight.plugins import PartitionedTraining, Plugin
from featherlight.plugins.activation_codec import WHOLE, ActivationCodec

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


# -- bounds and bad input ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_buffer_is_bounded(where, net, points, federation, tmp_path):
    """Room for one of two messages of 8 samples: the later client's stays, and replays."""
    folder = "memory" if where == "memory" else str(tmp_path / "buffer")
    free = federation(1).run(net(), points([8, 8]), [divided()]).history[0]["stored_bytes"]
    result = federation(2).run(net(), points([8, 8]), [divided(buffer_bytes=int(free * 0.7), buffer=folder)])
    assert [(row["stored_clients"], row["stored_bytes"]) for row in result.history] == [(1, free // 2)] * 2
    assert [row["clients"] for row in result.history] == [2, 1]
    assert where == "memory" or not [*(tmp_path / "buffer").iterdir()]  # the run is over


def test_what_the_buffer_can_never_hold_is_rejected_and_says_how_much_it_takes(net, points, federation, capsys):
    size = federation(1).run(net(), points([8]), [divided()]).history[0]["stored_bytes"]
    result = federation(1).run(net(), points([8]), [divided(buffer_bytes=size - 1)])
    assert (result.history[0]["rejected"], result.history[0]["stored_clients"]) == (1, 0)
    told = " ".join(capsys.readouterr().err.split())
    assert f"its activations take {size} bytes, and all there is for them is buffer_bytes={size - 1}" in told


@pytest.mark.parametrize("way", ["replay", "split"])
def test_activations_that_are_not_finite_are_never_sent(way, net, points, federation, capsys, tmp_path):
    data = points([8, 8, 12])
    data.clients[1][0][0, 0] = float("nan")
    module = net()
    result = federation(2, folder=tmp_path).run(module, data, [divided(way=way)])
    assert [row["rejected"] for row in result.history] == ([1, 0] if way == "replay" else [1, 1])
    assert [row["clients"] for row in result.history] == [2, 2]
    assert "update of client 1 rejected: activations are not finite" in " ".join(capsys.readouterr().err.split())
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    if way == "replay":
        assert result.history[0]["stored_clients"] == 2


@pytest.mark.parametrize("options", [{}, {"joint": True}, {"bits": WHOLE}], ids=["int8", "joint", "floats"])
def test_huge_activations_are_neither_sent_nor_trained_on(options, net, points, federation, same, capsys):
    """1e30 in the data of one device of three: the round is that of the other two."""
    data, module, others = points([8, 8, 12]), net(), net()
    data.clients[1][0][0, 0] = 1e30
    result = federation(2).run(module, data, [divided(**options)])
    assert [(row["clients"], row["rejected"], row["stored_clients"]) for row in result.history] == [(2, 1, 2), (2, 0, 2)]
    assert "update of client 1 rejected: activations of a magnitude of" in " ".join(capsys.readouterr().err.split())
    left = points([8, 12])
    left.clients = [data.clients[0], data.clients[2]]
    federation(2).run(others, left, [divided(**options)])
    for name, value in others.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, msg=name)


class Unnormed(pl.LightningModule):
    """A rear without a norm, whose loss grows as the fourth power of activations."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1))

    def forward(self, x):
        return self.blocks(x)

    def training_step(self, batch, batch_idx):
        return self(batch[0]).pow(4).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


@pytest.mark.parametrize("joint", [True, False], ids=["jointly", "a copy each"])
def test_activations_that_ruin_a_training_step_cost_nobody_else_the_round(joint, points, federation, same, capsys):
    """Far below the bound, and enough to carry a server part to infinity: not kept, so the next round does not meet them again."""
    data, module, alone = points([8, 8, 8, 8]), Unnormed(), Unnormed()
    data.clients[2][0].mul_(3e4)
    plugin = divided("blocks.0", joint=joint, bits=WHOLE)
    result = federation(4).run(module, data, [plugin])
    assert [(row["clients"], row["rejected"], row["stored_clients"]) for row in result.history] == [(3, 1, 3), (3, 0, 3)] * 2
    assert all(math.isfinite(row["loss"]) for row in result.history)
    told = " ".join(capsys.readouterr().err.split())
    assert "update of client 2 rejected: " + ("activations of a magnitude of" if joint else "loss is not finite") in told
    left = points([8, 8, 8])
    left.clients = [data.clients[client] for client in (0, 1, 3)]
    plugin = divided("blocks.0", joint=joint, bits=WHOLE)
    federation(4).run(alone, left, [plugin])
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, msg=name)


def test_a_replayed_message_that_ruins_its_copy_is_forgotten(points, federation, monkeypatch):
    """It was harmless when it came; the copy does not enter the mean."""
    real, module = stored_rounds.StoredRounds._train, Unnormed()

    def train(self, partition, visit, stored, age, server, turn):
        update = real(self, partition, visit, stored, age, server, turn)
        if (visit.round, visit.client) == (1, 0):
            update["blocks.2.weight"][0, 0] = float("nan")
        return update

    monkeypatch.setattr(stored_rounds.StoredRounds, "_train", train)
    plugin = divided("blocks.0", replay_period=3)
    result = federation(4).run(module, points([8, 8]), [plugin])
    assert [(row["clients"], row["rejected"], row["stored_clients"]) for row in result.history] == [
        (2, 0, 2),
        (1, 1, 1),
        (1, 0, 1),
        (2, 0, 2),
    ]
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_where_all_fail_together_nobody_is_forgotten(points, federation, same):
    """Too large a learning rate is no client's fault."""
    module = Unnormed()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 1e9)
    plugin, before = divided("blocks.0", joint=True, bits=WHOLE), Unnormed().state_dict()
    result = federation(2).run(module, points([8, 8]), [plugin])
    assert [(row["clients"], row["rejected"], row["stored_clients"]) for row in result.history] == [(0, 2, 2)] * 2
    same(module.state_dict(), before)


def test_where_all_copies_fail_in_a_replay_nobody_is_forgotten(points, federation):
    """As above, of a rear for each client, in a round in which no device works; the next one trains on what was kept."""

    class Scaled(Unnormed):
        scale = 1.0

        def training_step(self, batch, batch_idx):
            return self.scale * super().training_step(batch, batch_idx)

    class Rescale(Plugin):
        def settle(self, server, clock):
            server.scale = 1e38 if clock.period == 0 else 1.0

    module = Scaled()
    result = federation(3).run(module, points([8, 8]), [divided("blocks.0", bits=WHOLE, replay_period=3), Rescale()])
    assert [(row["clients"], row["rejected"], row["stored_clients"]) for row in result.history] == [(2, 0, 2), (0, 2, 2), (2, 0, 2)]


def test_where_nothing_arrives_the_server_stays(net, points, federation, same):
    data, module, before = points([8]), net(), net().state_dict()
    data.clients[0][0].fill_(float("nan"))
    result = federation(2).run(module, data, [divided()])
    same(module.state_dict(), before)
    assert [(row["clients"], row["rejected"]) for row in result.history] == [(0, 1), (0, 0)]


def test_messages_that_no_device_makes_are_refused():
    codec = ActivationCodec(8)
    good = {
        "images": torch.tensor([[6]]),
        "activations": torch.tensor([[5]]),
        "single": torch.tensor(1),
        "0.0.labels.0": torch.tensor([0, 1]),
    } | {f"0.0.0.{part}": value for part, value in codec.encode(torch.randn(2, 5)).items()}
    assert StoredBatches(good, codec).activations(0, 0)[0].shape == (2, 5)
    for change, message in (
        ({"images": None}, "lacks what says how to read it"),
        ({"0.0.0.codes": None}, "holds none"),
        ({"0.0.0.scale": torch.tensor(float("nan"))}, "not finite"),
        ({"0.0.0.scale": torch.tensor(1e30)}, r"a magnitude of 1.27e\+32 are beyond 4194304"),
        ({"0.0.0.scale": torch.tensor(-1.0)}, "scale of activations is -1.0, and should be above 0"),
        ({"0.0.0.codes": torch.zeros(2, 9, dtype=torch.int8)}, "codes of activations should be"),
        ({"activations": torch.tensor([[4]])}, "codes of activations should be"),
        ({"0.0.labels.0": torch.tensor([0])}, r"labels 0 of step 0 have shape \(1,\) for 2 samples"),
        ({"0.7.0.codes": torch.zeros(2, 5, dtype=torch.int8)}, "lacks step 1"),
        ({"0.x.0.codes": torch.zeros(2, 5, dtype=torch.int8)}, "lacks what says how to read it"),
    ):
        with pytest.raises(ValueError, match=message):
            StoredBatches({name: value for name, value in {**good, **change}.items() if value is not None}, codec)


def test_settings_that_a_divided_model_cannot_have(net, points, federation):
    for run in (lambda f, p: f.run(net(), points([8]), [p]), lambda f, p: predict(f, net, points([8]), [p])):
        with pytest.raises(ValueError, match=r"clip=1.0 needs the norm of all gradients, of which device and server each have a part"):
            run(federation(1, clip=1.0), divided(way="split"))
    federation(1, clip=1.0).run(net(), points([8]), [divided()])  # the server has all that trains


@pytest.mark.parametrize("way", ["replay", "split"])
@pytest.mark.parametrize(
    ("extra", "looks"),
    [
        (lambda x, y: (x, y, torch.arange(len(x))), r"\(a tensor of shape \(4, 6\), a tensor of shape \(4,\), a tensor of shape \(4,\)\)"),
        (lambda x, y: (x, y, {"names": "theirs"}), r"a dict\): leave the rest out"),
        (lambda x, y: (x, y[:1]), r"a tensor of shape \(1,\)\): leave"),
        (lambda x, y: (x, None), r"a NoneType\)"),
    ],
    ids=["numbers of samples", "a dict", "too few labels", "nothing"],
)
def test_what_stands_behind_labels_is_refused_and_never_sent(extra, looks, way, net, points, federation, monkeypatch):
    data, sent = points([8]), []
    monkeypatch.setattr(stored_rounds, "pack", sent.append)
    data.on_after_batch_transfer = lambda batch, index: extra(*batch)
    with pytest.raises(ValueError, match=rf"batches must be \(images, labels\) or \(\(view, view\), labels\), .* {looks}"):
        federation(1).run(net(), data, [divided(way=way)])
    assert not any("labels" in name for message in sent for name in message)


@pytest.mark.parametrize("way", ["replay", "split"])
def test_unsigned_codes_of_activations_below_0_are_an_error(way, net, points, federation):
    with pytest.raises(ValueError, match=r"signed=False, and there are activations below 0 at the cut .*set signed=True, or cut"):
        federation(1).run(net(), points([8, 8]), [divided(way=way, bits=8, signed=False)])
    data = points([8])
    data.clients[0][0][0, 0] = float("nan")  # that is the device's own fault, and no setting's
    assert federation(1).run(net(), data, [divided(way=way, bits=8, signed=False)]).rejected == 1


def test_a_model_whose_step_goes_otherwise_through_the_front_is_refused(net, points, federation):
    class Halves(net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0] * 0.5, batch[1]), batch_idx)

    for way in ("replay", "split"):
        with pytest.raises(ValueError, match=r"Halves.training_step takes something else through the front than the views of a batch"):
            federation(1).run(Halves(), points([8]), [divided(way=way)])


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
