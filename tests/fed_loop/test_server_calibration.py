"""Server-side calibration: what it trains, what then travels, what it costs, and beside whom it is refused."""

import copy
import os
import signal

import pytest
import torch
from PIL import Image

from featherlight.fed_loop import Momentum
from featherlight.fed_loop.predict import predict
from featherlight.plugins import (
    SERVER,
    DepthDropout,
    IntrinsicProjection,
    LayerFreezing,
    PartitionedTraining,
    Plugin,
    PrismSampling,
    ProgressiveGrowth,
    ServerCalibration,
    TopK,
    Visit,
)
from featherlight.ssl_models import Classifier, ImageData, TextData

BLOCKS = "backbone.blocks.*"
METHODS = {
    "simclr": lambda: [],
    "byol": lambda: [LayerFreezing(BLOCKS), DepthDropout(BLOCKS)],
    "mocov3": lambda: [ProgressiveGrowth(BLOCKS), DepthDropout(BLOCKS)],
}


class Watch(Plugin):
    """The server's weights before and after its own training."""

    def __init__(self):
        self._seen = []

    def attach(self, model):
        self._model = model

    def settle(self, server, clock):
        self._seen.append(copy.deepcopy(server.state_dict()))


def test_without_epochs_it_is_as_if_left_out(ssl, digits, federation, same, figures):
    modules, results = zip(
        *(
            (module := ssl("simclr"), federation(2).run(module, digits(num_clients=2, limit_train=70), plugins))
            for plugins in ([], [ServerCalibration(epochs=0)])
        )
    )
    same(modules[1].state_dict(), modules[0].state_dict())
    assert figures(results[1]) == figures(results[0])


@pytest.mark.parametrize("model", METHODS)
def test_predicted_is_measured(model, ssl, digits, federation, cost_of):
    """End to end, with a frozen prefix, and with a growing model; blocks are left out of clients' turns, but not of the server's."""

    def data():
        return digits(num_clients=2, limit_train=70, server_fraction=0.4)

    settings = federation(2, seed=1)
    predicted = cost_of(predict(settings, lambda: ssl(model), data(), [ServerCalibration(epochs=2), *METHODS[model]()]))
    measured = cost_of(settings.run(ssl(model), data(), [*METHODS[model](), ServerCalibration(epochs=2)]).cost)
    assert predicted == measured
    server, client = measured["server"]["rows"][-1], measured["rows"][-1]
    assert server["params_trained"] > client["params_trained"] or model == "simclr"
    assert server["bytes_down"] == server["bytes_up"] == 0
    assert 0 < server["saved_bytes"] < server["peak_bytes"]


def test_all_blocks_go_down_and_what_trains_goes_up(net, points, federation):
    """Down as if everything were resent; up as without calibration."""
    told = []
    for options, data, plugins in (({}, WithServer(points([6, 10])), [ServerCalibration()]), ({"resend": True}, points([6, 10]), [])):
        rows = federation(4, **options).run(net(), data, [LayerFreezing("blocks.*", periods_per_stage=2), *plugins]).history
        told.append([(row["bytes_down"], row["bytes_up"]) for row in rows])
    assert told[0] == told[1]
    assert len(set(told[0])) == 2


def test_what_trains_is_the_whole_model_of_the_stage(ssl, digits, federation):
    module, watch, frozen = ssl("mocov3"), Watch(), "projector.layers.0.weight"
    module.get_parameter(frozen).requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    modes = []

    class Mode(Plugin):
        def settle(self, server, clock):
            modes.append([parameter.requires_grad for parameter in server.backbone.blocks.parameters()])

    data = digits(num_clients=1, server_fraction=0.3)
    federation(2, resend=True).run(module, data, [LayerFreezing(BLOCKS), ServerCalibration(), watch, Mode()])
    first, second = watch._seen
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    own = {name.split(".")[2] for name in changed if name.startswith("backbone.blocks.")}
    assert own == {"0", "1"}  # in stage 2 block 0 is frozen for clients, and block 2 is not there yet
    assert {name for name in changed if name.startswith("backbone.patch_embed")}
    assert torch.equal(second[frozen], before[frozen])  # the user's own choice stands
    per_block = len(modes[1]) // 3
    assert modes[1] == [False] * per_block + [True] * per_block + [False] * per_block  # closed again


@pytest.mark.parametrize("place", [0, 1])
def test_a_block_that_the_user_froze(place, net, points, federation):
    """Behind a stem that trains on the server, and that clients have frozen by then: it stays as it was, and what is around it trains."""
    module, watch = net(), Watch()
    module.blocks[place].requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    federation(3).run(module, WithServer(points([6, 10])), [LayerFreezing("blocks.*"), ServerCalibration(), watch])
    parameters = dict(module.named_parameters())
    own = {name for name in parameters if name.startswith(f"blocks.{place}.")}
    first, last = watch._seen[0], watch._seen[-1]
    assert all(torch.equal(last[name], before[name]) for name in own)
    assert not torch.equal(first["stem.weight"], last["stem.weight"])
    assert {parameters[name].requires_grad for name in own} == {False}


def test_a_round_by_hand(net, points, federation):
    """FedAvg of one client, then plain steps of a fresh optimizer at the round's rate times the factor, on the server's points."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, 0.1, momentum=0.9)

    data, module, model = WithServer(points([6])), net(sgd), net(sgd)
    result = federation(2).run(module, data, [ServerCalibration(epochs=2, lr_factor=0.5)])
    losses = []
    for _ in range(2):
        for batches, rate in ((data.batches(0), 0.1), (data.own * 2, 0.05)):
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
            losses.append([])
            for batch in batches:
                optimizer.zero_grad()
                loss = model.training_step(batch, 0)
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
    for name, value in module.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-6), name
    assert result.history[1]["server_loss"] == pytest.approx(sum(losses[3]) / 4, rel=1e-5)
    assert result.history[1]["server_flops"] > 0
    assert data.asked == [(Visit(0, SERVER, 0), 2), (Visit(1, SERVER, 0), 2)]
    assert result.turns == 2  # the server's own turn is no client's


class WithServer:
    """Points, and some of the server's own, in two batches."""

    def __init__(self, points, spoil=False):
        self._points, self.asked = points, []
        random = torch.Generator().manual_seed(7)
        self.own = [(torch.randn(5, 6, generator=random), torch.randint(0, 3, (5,), generator=random)) for _ in range(2)]
        if spoil:
            self.own[1][0][0, 0] = float("nan")

    def __getattr__(self, name):
        return getattr(self._points, name)

    def server_batch_sizes(self, epochs):
        return [5, 5] * epochs

    def server_batches(self, visit, epochs):
        self.asked.append((visit, epochs))
        return [(x.clone(), y.clone()) for x, y in self.own] * epochs


def test_a_calibration_that_diverges_is_left_out(net, points, federation, same, capsys):
    module, plain = net(), net()
    result = federation(2).run(module, WithServer(points([6, 10]), spoil=True), [ServerCalibration()])
    federation(2).run(plain, points([6, 10]))
    same(module.state_dict(), plain.state_dict())
    assert result.rejected == 0
    assert [row["calibration_rejected"] for row in result.history] == [1, 1]
    assert "server's own training rejected" in capsys.readouterr().err


def test_one_that_diverges_to_large_numbers_poisons_nothing(net, points, federation, same):
    """Finite, but so large that clients could not send what they make of it: the mean stands, and the next round is as without."""

    def sgd(parameters):
        return torch.optim.SGD(parameters, 0.1)

    module, plain = net(sgd), net(sgd)
    data = WithServer(points([6, 10]))
    data.own = data.own[:1]
    result = federation(2).run(module, data, [ServerCalibration(lr_factor=1e11)])
    federation(2).run(plain, points([6, 10]))
    same(module.state_dict(), plain.state_dict())
    assert [(row["calibration_rejected"], row["rejected"]) for row in result.history] == [(1, 0), (1, 0)]
    assert all(row["server_loss"] < 100 for row in result.history)


def test_nothing_is_calibrated_where_nothing_arrived(net, points, federation, same):
    class Spoilt(Plugin):
        def extra_loss(self, model, batch):
            return torch.tensor(float("nan"))

    module = net()
    data, before = WithServer(points([6, 10])), copy.deepcopy(module.state_dict())
    result = federation(1).run(module, data, [Spoilt(), ServerCalibration()])
    assert (result.rejected, data.asked) == (2, [])
    same(module.state_dict(), before)
    assert result.cost.server is None or result.cost.server.rows() == []


def test_ctrl_c_stops_before_the_next_step(tmp_path, net, points, federation, capsys):
    """The round whose calibration was cut off is not in the checkpoint, and is done again."""
    interrupted, drawn = [], []

    class Interrupted(WithServer):
        def server_batches(self, visit, epochs):
            for number, batch in enumerate(super().server_batches(visit, epochs)):
                if visit.round == 1 and number == 1 and not interrupted:
                    interrupted.append(True)
                    os.kill(os.getpid(), signal.SIGINT)
                drawn.append((visit.round, number))
                yield batch

    plugins = [ServerCalibration(epochs=50)]
    with pytest.raises(KeyboardInterrupt):
        federation(2, folder=tmp_path).run(net(), Interrupted(points([6, 10])), plugins)
    assert drawn[-1] == (1, 1)
    assert "interrupted at the end of round 1" in capsys.readouterr().err
    module, whole = net(), net()
    result = federation(2, folder=tmp_path).run(module, Interrupted(points([6, 10])), plugins, resume=True)
    other = federation(2).run(whole, Interrupted(points([6, 10])), plugins)
    assert [row["server_loss"] for row in result.history] == [row["server_loss"] for row in other.history]
    assert all(torch.equal(one, two) for one, two in zip(module.state_dict().values(), whole.state_dict().values()))


@pytest.mark.parametrize("plugins", [[PrismSampling({0.5: 1.0}, layers="blocks.*")], [TopK(20)]], ids=["prism", "top-k"])
def test_beside_methods_whose_server_is_ordinary(plugins, net, points, federation):
    """What the server changed reaches clients: their module holds the server's weights when they begin."""
    module = net()
    result = federation(3, server=Momentum()).run(module, WithServer(points([6, 10, 7])), [*plugins, ServerCalibration()])
    plain = net()
    federation(3, server=Momentum()).run(plain, points([6, 10, 7]), [type(plugin)(**plugin.describe()) for plugin in plugins])
    assert result.rejected == 0
    assert not torch.equal(module.stem.weight, plain.stem.weight)


def test_top_k_sends_what_calibration_changed(net, points, federation):
    """The second round's download holds every parameter, where without calibration it holds what the first round's clients sent."""
    down = []
    for data, plugins in ((points([6, 10]), []), (WithServer(points([6, 10])), [ServerCalibration()])):
        down.append(federation(2).run(net(), data, [TopK(5), *plugins]).history[1]["bytes_down"])
    parameters = sum(value.numel() for value in net().parameters())
    assert down[0] < 2 * 4 * parameters < down[1]


@pytest.mark.parametrize(
    ("plugins", "data", "message"),
    [
        (lambda: [IntrinsicProjection(5)], True, "IntrinsicProjection the server holds no ordinary model"),
        (lambda: [PartitionedTraining("blocks.1")], True, "PartitionedTraining the server holds no ordinary model"),
        (lambda: [ServerCalibration()], True, "ServerCalibration and ServerCalibration each"),
        (list, False, "Points has none: give it server_batches"),
    ],
)
def test_refused(plugins, data, message, net, points, federation):
    given = WithServer(points([6])) if data else points([6])
    for go in (
        lambda: federation(1).run(net(), given, [*plugins(), ServerCalibration()]),
        lambda: predict(federation(1), net, given, [*plugins(), ServerCalibration()]),
    ):
        with pytest.raises(ValueError, match=message):
            go()


def test_data_without_a_part_for_the_server(ssl, net, digits, federation):
    with pytest.raises(ValueError, match=r"set server_fraction .* or server_root"):
        federation(1).run(ssl("simclr"), digits(), [ServerCalibration()])
    with pytest.raises(ValueError, match=r"TextData has not one batch: it sets none aside; choose data that do, or leave the plugin out"):
        federation(1).run(net(), TextData(limit_train=40), [ServerCalibration()])


def test_a_model_that_learns_from_labels_needs_the_servers(tmp_path, federation):
    for number in range(4):
        Image.new("L", (8, 8), 9 * number).save(tmp_path / f"{number}.png")
    model = Classifier("vit", image_size=8, in_channels=1, backbone_options={"depth": 1, "width": 16, "heads": 2, "patch_size": 4})
    data = ImageData(views=1, batch_size=4, limit_train=8, server_root=str(tmp_path))
    with pytest.raises(ValueError, match="4 of the server's 4 images have no label that clients know"):
        federation(1).run(model, data, [ServerCalibration()])


@pytest.mark.parametrize("options", [{"epochs": -1}, {"lr_factor": 0.0}])
def test_arguments_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ServerCalibration(**options)


def test_resumed_is_uninterrupted(tmp_path, ssl, digits, federation, same, figures):
    """Stopped behind a round whose calibration is done: the next round's download and everything after are the same."""
    plugins = [LayerFreezing(BLOCKS), DepthDropout(BLOCKS), ServerCalibration()]

    def run(rounds, folder, resume=False):
        module = ssl("mocov3")
        data = digits(server_fraction=0.3, limit_train=60)
        result = federation(rounds, cohort=2, folder=folder).run(module, data, copy.deepcopy(plugins), resume=resume)
        return module.state_dict(), figures(result)

    run(2, tmp_path)
    resumed, told = run(3, tmp_path, resume=True)
    whole, wanted = run(3, None)
    same(resumed, whole)
    assert told == wanted
