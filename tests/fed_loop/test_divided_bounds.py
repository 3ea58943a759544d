"""Divided models: what is bounded, refused or left out, and that nobody else pays for it."""

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
