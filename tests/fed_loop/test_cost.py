"""Cost: predicted is measured, to the byte; and bytes are what formulas by hand say."""

import json

import pytest
import torch

from featherlight.fed_loop import serving, turn
from featherlight.fed_loop.cohort import sample
from featherlight.fed_loop.predict import predict
from featherlight.plugins import DepthDropout, LayerFreezing, ProgressiveGrowth
from featherlight.ssl_models import Classifier, Dirichlet

METHODS = {
    "end to end": lambda blocks: [],
    "layer-wise": lambda blocks: [LayerFreezing(blocks)],
    "layer-wise, depth dropout": lambda blocks: [LayerFreezing(blocks), DepthDropout(blocks)],
    "progressive": lambda blocks: [ProgressiveGrowth(blocks)],
    "progressive, depth dropout": lambda blocks: [ProgressiveGrowth(blocks), DepthDropout(blocks)],
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("model", "partition"), [("simclr", "dirichlet"), ("mocov3", "iid")])
def test_vision_transformer(model, partition, method, ssl, digits, federation, cost_of):
    """Clients of 80 images in batches of 16; the Dirichlet ones have down to a few, less than a batch."""

    def data():
        return digits(num_clients=4, limit_train=80, partition=Dirichlet(0.3) if partition == "dirichlet" else None)

    if partition == "dirichlet":
        assert min(data().client_sizes()) < 16 < max(data().client_sizes())
    settings = federation(3, cohort=3, seed=1, local_epochs=1 if model == "simclr" else 2)
    predicted = predict(settings, lambda: ssl(model), data(), METHODS[method]("backbone.blocks.*"))
    measured = settings.run(ssl(model), data(), METHODS[method]("backbone.blocks.*"))
    assert cost_of(predicted) == cost_of(measured.cost)


@pytest.mark.parametrize(
    "method",
    ["end to end", "layer-wise, depth dropout", "progressive, depth dropout"],
)
def test_resnet(method, digits, federation, cost_of):
    def make():
        torch.manual_seed(0)
        return Classifier("resnet9", image_size=8, in_channels=1, optimizer="sgd")

    def data():
        return digits(num_clients=3, partition=Dirichlet(0.5), views=1, limit_train=30, batch_size=8)

    settings = federation(3, cohort=2, seed=1)
    blocks = "backbone.layer*.*"
    predicted = cost_of(predict(settings, make, data(), METHODS[method](blocks)))
    measured = cost_of(settings.run(make(), data(), METHODS[method](blocks)).cost)
    for ours, theirs in zip([*predicted["rows"], predicted["total"]], [*measured["rows"], measured["total"]], strict=True):
        # A convolution's backward may put its gradient into another memory layout than its shapes tell, and copy it back.
        assert ours.pop("peak_bytes") == pytest.approx(theirs.pop("peak_bytes"), rel=0.01)
    assert predicted == measured


@pytest.mark.parametrize("options", [{"clip": 0.1}, {"resend": True}, {"precision": "bf16-true"}], ids=str)
def test_settings_that_change_the_cost(options, ssl, digits, federation, cost_of):
    settings = federation(3, **options)
    predicted = predict(settings, lambda: ssl("simclr"), digits(), METHODS["layer-wise"]("backbone.blocks.*"))
    measured = settings.run(ssl("simclr"), digits(), METHODS["layer-wise"]("backbone.blocks.*"))
    assert cost_of(predicted) == cost_of(measured.cost)


def test_mixed_precision_is_predicted_to_half_a_percent(ssl, digits, federation):
    """Autocast keeps a few small casts more of real tensors than of fake ones."""
    settings = federation(2, precision="bf16-mixed")
    predicted = predict(settings, lambda: ssl("simclr"), digits()).total()
    measured = settings.run(ssl("simclr"), digits()).cost.total()
    full = federation(2).run(ssl("simclr"), digits()).cost.total()
    assert measured["saved_bytes"] < 0.7 * full["saved_bytes"]
    for name, value in measured.items():
        if name != "seconds":
            assert predicted[name] == pytest.approx(value, rel=0.005), name


def test_a_turn_costs_the_same_whoever_trained_before(net, points, federation, cost_of):
    """Clients alone, one federation each, add up to the federation of all."""
    sizes = [3, 10, 4, 6, 14]
    together = federation(1).run(net(), points(sizes)).cost.to_json()["rows"][0]
    alone = [federation(1).run(net(), points([size])).cost.to_json()["rows"][0] for size in sizes]
    for name in ("saved_bytes", "peak_bytes"):
        assert together[name] == max(row[name] for row in alone)
    for name in ("flops_forward", "flops_backward"):
        assert together[name] == sum(row[name] for row in alone) / 5


def test_flops_by_hand(net, points, federation):
    """A multiply-add is 2; the weight's gradient and the input's each cost what the forward pass does, but for the input of the stem."""
    row = federation(1, local_epochs=2).run(net(), points([10, 14])).cost.to_json()["rows"][0]
    samples = 2 * (10 + 14) / 2  # a client's mean
    forward = 2 * (6 * 8 + 3 * 8 * 8 + 8 * 3)
    assert row["flops_forward"] == samples * forward
    assert row["flops_backward"] == samples * (2 * forward - 2 * 6 * 8)


# -- bytes -------------------------------------------------------------------------------------------------------------
WIDTH = 16
BLOCK = (3 * WIDTH**2 + 3 * WIDTH) + (WIDTH**2 + WIDTH) + 2 * 2 * WIDTH + (2 * WIDTH**2 + 2 * WIDTH) + (2 * WIDTH**2 + WIDTH)
STEM = (16 * WIDTH + WIDTH) + WIDTH + 5 * WIDTH  # patches of 4 × 4, class token, four patches and the token
NORM = 2 * WIDTH


@pytest.fixture
def sent(monkeypatch):
    """Every message, in order: (names, bytes of data, length of it all)."""
    messages, real = [], turn.pack

    def pack(message):
        payload = real(message)
        header = int.from_bytes(payload[:8], "little")
        entries = json.loads(payload[8 : 8 + header])
        entries.pop("__metadata__", None)
        messages.append((set(entries), len(payload) - 8 - header, len(payload)))
        return payload

    for half in (serving, turn):
        monkeypatch.setattr(half, "pack", pack)
    return messages


def heads(module):
    """Bytes of the projector's parameters and statistics."""
    return sum(value.numel() * value.element_size() for value in module.projector.state_dict().values())


@pytest.mark.parametrize("model", ["simclr", "mocov3"])
def test_layer_wise_traffic_by_hand(model, sent, ssl, digits, federation):
    """Up: the newest block, the final norm and the heads, in stage 1 the stem besides. Down: the same, and once a stage the
    prefix, which has changed since. Targets, which are copies, never travel."""
    module = ssl(model)
    trained = 4 * (BLOCK + NORM) + heads(module)
    if model == "mocov3":
        trained += sum(value.numel() * value.element_size() for value in module.predictor.state_dict().values())
    stem = 4 * STEM
    result = federation(6).run(module, digits(num_clients=1), [LayerFreezing("backbone.blocks.*", periods_per_stage=2)])
    down, up = sent[::2], sent[1::2]
    assert len(sent) == 12
    # what trained until the end of a stage has changed on the server since, and is sent once more
    prefix = [0, 0, stem + 4 * BLOCK, 0, 4 * BLOCK, 0]
    assert [data for _, data, _ in up] == [trained + stem] * 2 + [trained] * 4
    assert [data for _, data, _ in down] == [size + before for size, before in zip([trained + stem] * 2 + [trained] * 4, prefix)]
    for round, (names, _, _) in enumerate(up):
        assert not any("target" in name for name in names | down[round][0])
        assert {name.split(".")[2] for name in names if "blocks" in name} == {str(round // 2)}  # nothing frozen goes up
        assert any("patch_embed" in name for name in names) == (round < 2)
    for way, messages in (("bytes_up", up), ("bytes_down", down)):
        assert [row[way] for row in result.history] == [length for *_, length in messages]


def test_resending_sends_the_prefix_every_round(sent, ssl, digits, federation):
    module = ssl("simclr")
    federation(6, resend=True).run(module, digits(num_clients=1), [LayerFreezing("backbone.blocks.*", periods_per_stage=2)])
    fixed = 4 * (STEM + NORM) + heads(module)
    assert [data for _, data, _ in sent[::2]] == [fixed + 4 * BLOCK * stage for stage in (1, 1, 2, 2, 3, 3)]


def test_a_client_that_was_away_gets_the_prefix_when_it_comes_back(net, points, federation):
    """Cohorts of one of two clients, in stages of three rounds; bytes by keeping what each client holds."""
    block, stem, head = 4 * (8 * 8 + 8 + 4 * 8) + 8, 4 * (6 * 8 + 8), 4 * (8 * 3 + 3)
    result = federation(9, cohort=1, seed=3).run(net(), points([8, 8]), [LayerFreezing("blocks.*", periods_per_stage=3)])
    holds, wanted = {0: {}, 1: {}}, []
    version = dict.fromkeys(["stem", "0", "1", "2"], 0)
    size = {"stem": stem, "0": block, "1": block, "2": block}
    for round in range(9):
        (client,) = sample(2, 1, 3, round)
        stage = round // 3
        trains = ["stem", "0"] if stage == 0 else [str(stage)]
        present = ["stem", *map(str, range(stage + 1))]
        needed = [name for name in present if holds[client].get(name) != version[name]]
        holds[client] |= {name: version[name] for name in present}
        for name in trains:
            version[name] += 1
            holds[client].pop(name)
        wanted.append(head + sum(size[name] for name in needed))
    lengths = [row["bytes_down"] for row in result.history]
    headers = [length - data for length, data in zip(lengths, wanted)]
    assert len({client for round in range(9) for client in sample(2, 1, 3, round)}) == 2
    assert all(100 < header < 2000 for header in headers)
    by_entries = {}
    for header, data in zip(headers, wanted):  # one set of entries, one header (offsets of the same digits)
        assert by_entries.setdefault(data, header) == header


def test_depth_dropout_spares_the_download(sent, ssl, digits, federation):
    """In stage 3 one of the two earlier blocks is left out: not held, not sent."""
    module = ssl("simclr")
    plugins = [LayerFreezing("backbone.blocks.*"), DepthDropout("backbone.blocks.*", rate=0.5)]
    federation(3, resend=True).run(module, digits(num_clients=1), plugins)
    fixed = 4 * (STEM + NORM) + heads(module)
    # rate 0.5 of one earlier block rounds up to one, of two to one: one earlier block at most is left
    assert [data for _, data, _ in sent[::2]] == [fixed + 4 * BLOCK * blocks for blocks in (1, 1, 2)]
