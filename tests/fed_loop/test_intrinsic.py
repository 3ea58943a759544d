"""Rounds in a random subspace against the same rounds by hand with dense matrices; cost, resuming, and other methods beside it."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from featherlight import callbacks
from featherlight.fed_loop import Average, Momentum
from featherlight.fed_loop.cohort import sample
from featherlight.fed_loop.predict import predict
from featherlight.plugins import DepthDropout, IntrinsicProjection, LayerFreezing, Plugin, PrismSampling
from featherlight.plugins.projections import PROJECTIONS
from featherlight.plugins.seeds import derive

SIZES = [6, 10, 14]
RATE = 0.1


def sgd(parameters):
    return torch.optim.SGD(parameters, RATE)


def dense(size, dim, span, which=0, kind="fastfood", seed=0):
    """A of a span and a subspace, (D, d), float64."""
    projection = PROJECTIONS[kind](size, dim, derive(seed, "intrinsic", span, which))
    return torch.stack([projection.lift(unit) for unit in torch.eye(dim, dtype=torch.float64)], 1)


@pytest.fixture
def double(net):
    """A net in float64, where rounding does not grow: batch norm over two samples tells only which of them is larger."""
    return lambda optimizer=sgd: net(optimizer).double()


@pytest.fixture
def doubles(points):
    def make(sizes):
        data = points(sizes)
        data.clients = [(x.double(), y) for x, y in data.clients]
        return data

    return make


def flat(values):
    return torch.cat([value.detach().flatten() for value in values]).double()


def locally(server, batches, each_step=None):
    """What a client's parameters and statistics become, by a plain loop on a deep copy."""
    model = copy.deepcopy(server).train()
    optimizer = model.configure_optimizers()
    for step, batch in enumerate(batches):
        before = flat(model.parameters())
        optimizer.zero_grad()
        model.training_step(batch, step).backward()
        optimizer.step()
        if each_step is not None:
            put(model, before + each_step(flat(model.parameters()) - before))
    return model


def put(model, values):
    parameters = [value for value in model.parameters() if value.requires_grad]
    for value, part in zip(parameters, values.split([value.numel() for value in parameters])):
        value.data.copy_(part.view_as(value))


def average(servers, weights, model):
    """Entries that are no parameters: means by samples."""
    parameters = dict(model.named_parameters())
    for name, value in model.state_dict().items():
        if name not in parameters:
            mean = sum(one.state_dict()[name].double() * weight for one, weight in zip(servers, weights))
            value.copy_(mean if value.is_floating_point() else mean.round())


def rounds_by_hand(model, data, rounds, dim, subspaces=1, span=None, kind="fastfood", space="gradient", gain=None, which=None, used=None):
    """θ = θ₀ + Σ_k A_k·Σ_k; Σ_k grows by the clients' mean of Aᵀ·change, or of what each step made in the subspace; ``which(round,
    client)`` says k; ``used`` leaves clients out."""
    size = len(flat(model.parameters()))
    gain = (dim / size) ** 0.5 if gain is None else gain
    for round in range(rounds):
        number = round // span if span else 0
        if round % (span or rounds) == 0:
            start = flat(model.parameters())
            sums = torch.zeros(subspaces, dim, dtype=torch.float64)
            maps = [dense(size, dim, number, k, kind) for k in range(subspaces)]
        before = flat(model.parameters())
        clients = used or range(len(data.sizes))
        total = sum(data.sizes[client] for client in clients)
        trained = []
        for client in clients:
            k = which(round, client) if which else 0
            a = maps[k]
            steps = []

            def each(change, a=a, steps=steps):
                steps.append(gain * a.T @ change)
                return a @ steps[-1]

            trained.append(locally(model, data.batches(client), each if space == "subspace" else None))
            z = sum(steps) if space == "subspace" else gain * a.T @ (flat(trained[-1].parameters()) - before)
            sums[k] += z * data.sizes[client] / total
        average(trained, [data.sizes[client] / total for client in clients], model)
        put(model, start + sum(a @ z for a, z in zip(maps, sums)))
    return model


def close(module, wanted, rtol=1e-4, atol=2e-7):  # weights of clients are whole multiples of 2⁻³⁰
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def drawn(**options):
    """Which subspace a client draws in a round."""
    from featherlight.plugins import Visit

    plugin = IntrinsicProjection(**options)
    return lambda round, client: plugin._which(Visit(round, client, 0))


# -- by hand ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("gain", ["length", 0.3])
def test_static(gain, kind, rounds, double, doubles, federation):
    data, module = doubles(SIZES), double()
    start = flat(module.parameters())
    federation(rounds).run(module, data, [IntrinsicProjection(40, projection=kind, gain=gain)])
    close(module, rounds_by_hand(double(), data, rounds, 40, kind=kind, gain=None if gain == "length" else gain))
    moved = flat(module.parameters()) - start
    assert float(moved.norm()) > 1e-3
    a = dense(len(start), 40, 0, kind=kind)
    inside = a @ torch.linalg.lstsq(a, moved[:, None]).solution[:, 0]
    assert float((moved - inside).norm() / moved.norm()) < 1e-4


def test_unbiased_with_a_small_rate(double, doubles, federation):
    """gain 1: A·Aᵀ·change, D/d times as long."""
    data, make = doubles(SIZES), lambda: double(lambda parameters: torch.optim.SGD(parameters, 0.01))
    module = make()
    federation(1).run(module, data, [IntrinsicProjection(60, gain="unbiased")])
    close(module, rounds_by_hand(make(), data, 1, 60, gain=1.0))


@pytest.mark.parametrize("draw", ["client", "round"])
def test_subspaces(draw, double, doubles, federation):
    data, module = doubles(SIZES), double()
    options = {"dim": 30, "subspaces": 3, "draw": draw, "gain": 0.1}
    which = drawn(**options)
    choices = [[which(round, client) for client in range(3)] for round in range(3)]
    assert len({k for row in choices for k in row}) > 1
    assert all(len(set(row)) == 1 for row in choices) == (draw == "round")
    federation(3).run(module, data, [IntrinsicProjection(**options)])
    close(module, rounds_by_hand(double(), data, 3, 30, subspaces=3, gain=0.1, which=which))


def test_time_varying(double, doubles, federation):
    data, module, static = doubles(SIZES), double(), double()
    federation(3).run(module, data, [IntrinsicProjection(40, periods_per_span=2)])
    close(module, rounds_by_hand(double(), data, 3, 40, span=2))
    federation(3).run(static, data, [IntrinsicProjection(40)])
    assert not torch.allclose(module.stem.weight, static.stem.weight, atol=1e-5)


def test_time_varying_subspaces(double, doubles, federation):
    data, module = doubles(SIZES), double()
    options = {"dim": 20, "subspaces": 2, "periods_per_span": 1}
    federation(3).run(module, data, [IntrinsicProjection(**options)])
    close(module, rounds_by_hand(double(), data, 3, 20, subspaces=2, span=1, which=drawn(**options)))


@pytest.mark.parametrize("gain", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_every_local_step_in_the_subspace(kind, gain, double, doubles, federation):
    """Clients take several steps in Σ and send their sum: exact, whatever the gain."""

    def make():
        return double(lambda parameters: torch.optim.SGD(parameters, 0.01 / gain**0.5))

    data, module = doubles(SIZES), make()
    federation(2).run(module, data, [IntrinsicProjection(40, space="subspace", gain=gain, projection=kind)])
    close(module, rounds_by_hand(make(), data, 2, 40, kind=kind, space="subspace", gain=gain))


class Ends(Plugin):
    """What parameters were at the end of the last client's steps."""

    def attach(self, model):
        self.model = model

    def encode(self, message, visit):
        if message and any(bool(value.any()) for value in message.values()):
            self.end = [value.detach().clone() for value in self.model.parameters()]
        return message


@pytest.mark.parametrize("gain", ["length", "projection", "unbiased", 0.3])
def test_one_client_is_where_the_server_goes(gain, net, points, federation):
    """Bit for bit in float32: training in the subspace and averaging is training."""
    module, ends = net(lambda parameters: torch.optim.SGD(parameters, 0.01)), Ends()
    federation(3).run(module, points([10]), [ends, IntrinsicProjection(40, space="subspace", gain=gain)])
    assert all(torch.equal(value, end) for value, end in zip(module.parameters(), ends.end))
    assert not torch.equal(module.stem.weight, net().stem.weight)


@pytest.mark.parametrize("span", [None, 2])
@pytest.mark.parametrize("gain", ["length", "projection", 0.3])
def test_a_trainer_run_is_a_one_client_federation(gain, span, double, doubles, federation, tmp_path):
    """In float64, where rounding tells nothing; momentum begins anew with every visit."""

    def make():
        return double(lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9))

    data, fitted, module = doubles([10]), make(), make()
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    acting = [callbacks.FreshStart(seed=3), callbacks.IntrinsicProjection(dim=40, gain=gain, periods_per_span=span, seed=3)]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=3, callbacks=acting, default_root_dir=tmp_path, **silent)
    trainer.fit(fitted, DataLoader(Batches(data.batches(0)), batch_size=None))
    federation(3, seed=3).run(module, data, [IntrinsicProjection(40, space="subspace", gain=gain, periods_per_span=span)])
    moved = float((flat(module.parameters()) - flat(make().parameters())).norm())
    assert float((flat(module.parameters()) - flat(fitted.parameters())).norm()) < 1e-9 * moved


class Batches(Dataset):
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def test_statistics_travel_as_they_are(net, points, federation):
    """After one round those of plain averaging."""
    data, module, plain = points(SIZES), net(sgd), net(sgd)
    federation(1).run(module, data, [IntrinsicProjection(10)])
    federation(1).run(plain, data)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(module.get_buffer(name), value)
    assert bool((module.blocks[0].norm.running_mean != 0).any())


def test_a_rejected_update_is_left_out(double, doubles, federation):
    data, module = doubles(SIZES), double()
    data.clients[1][0][0] = float("nan")
    result = federation(2).run(module, data, [IntrinsicProjection(40)])
    assert [row["rejected"] for row in result.history] == [1, 1]
    close(module, rounds_by_hand(double(), data, 2, 40, used=[0, 2]))


def test_all_updates_rejected(net, points, federation):
    data, module, start = points([6]), net(sgd), net(sgd)
    data.clients[0][0][0] = float("nan")
    federation(2).run(module, data, [IntrinsicProjection(40)])
    assert all(torch.equal(value, start.get_parameter(name)) for name, value in module.named_parameters())


# -- other methods ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grow", [True, False])
def test_with_layer_freezing(grow, net, points, federation, cost_of, same_but_for_the_peak):
    """In every stage a subspace of what trains in it; what is frozen stays, and moves lie in the stage's subspace."""
    states, data, settings = [net(sgd)], points(SIZES), federation(3, cohort=2)

    def plugins():
        return [IntrinsicProjection(30), LayerFreezing("blocks.*", grow=grow)]

    for rounds in (1, 2, 3):
        module = net(sgd)
        result = federation(rounds, cohort=2).run(module, data, plugins())
        states.append(module)
    for stage in range(3):
        before, after = states[stage], states[stage + 1]
        prefixes = ("head", "stem") if stage == 0 else ("head",)
        prefixes += tuple(f"blocks.{block}" for block in range(stage, stage + 1 if grow else 3))
        names = [name for name, _ in before.named_parameters() if name.startswith(prefixes)]
        for name, value in before.named_parameters():
            assert torch.equal(value, after.get_parameter(name)) == (name not in names), (stage, name)
        moved = flat(after.get_parameter(name) for name in names) - flat(before.get_parameter(name) for name in names)
        a = dense(len(moved), 30, stage)
        inside = a @ torch.linalg.lstsq(a, moved[:, None]).solution[:, 0]
        assert float((moved - inside).norm() / moved.norm()) < 1e-3
    same_but_for_the_peak(cost_of(predict(settings, lambda: net(sgd), data, plugins())), cost_of(result.cost))


@pytest.mark.parametrize("rounds", [2, 3])
def test_what_a_stage_froze_is_not_sent_again(rounds, net, points, federation, cost_of):
    """Clients know it from the stage's last Σ: d numbers and two blocks' statistics, none of the 144 parameters that stay as they are."""
    dim, data, traffic = 30, points([8, 8]), []

    def plugins():
        return [IntrinsicProjection(dim), LayerFreezing("blocks.*")]

    predicted = predict(federation(rounds), lambda: net(sgd), data, plugins(), last_traffic=traffic.append)
    statistics = 2 * 8 * 4 + 8  # of a block's norm
    assert traffic[0].down == 2 * (4 * dim + 2 * statistics)
    assert traffic[0].up == 2 * (4 * dim + statistics)
    measured = federation(rounds).run(net(sgd), data, plugins())
    assert cost_of(predicted) == cost_of(measured.cost)


@pytest.mark.parametrize("order", [1, -1], ids=["first", "last"])
def test_with_depth_dropout(order, net, points, federation, cost_of, same_but_for_the_peak):
    """One subspace, whatever blocks a client leaves out: those did not change."""
    data, module, settings = points(SIZES), net(sgd), federation(3, cohort=2)

    def plugins():
        return [IntrinsicProjection(30), DepthDropout("blocks.*")][::order]

    start = flat(module.parameters())
    own = plugins()
    result = settings.run(module, data, own)
    moved = flat(module.parameters()) - start
    a = dense(len(moved), 30, 0)
    inside = a @ torch.linalg.lstsq(a, moved[:, None]).solution[:, 0]
    assert float((moved - inside).norm() / moved.norm()) < 1e-3
    same_but_for_the_peak(cost_of(predict(settings, lambda: net(sgd), data, plugins())), cost_of(result.cost))


@pytest.mark.parametrize("subspaces", [1, 2])
def test_with_a_quantiser_behind_it(int8, subspaces, net, points, federation, cost_of, same_but_for_the_peak):
    """z is off by at most half a step of 1/127 of its largest number, and so is what is lifted by A times that."""
    data, plain, coded, start = points(SIZES), net(sgd), net(sgd), net(sgd)
    federation(1).run(plain, data, [IntrinsicProjection(40, subspaces)])
    other = federation(1).run(coded, data, [IntrinsicProjection(40, subspaces), int8()])
    first, second, origin = (flat(model.parameters()) for model in (plain, coded, start))
    assert float((first - second).norm() / (first - origin).norm()) < 0.03
    predicted = predict(federation(1), lambda: net(sgd), data, [IntrinsicProjection(40, subspaces), int8()])
    same_but_for_the_peak(cost_of(predicted), cost_of(other.cost))


@pytest.mark.parametrize("order", [1, -1])
def test_smaller_modules_are_refused(order, net, points, federation):
    def plugins():
        return [IntrinsicProjection(20), PrismSampling(0.5, layers="blocks.*")][::order]

    reason = "IntrinsicProjection needs clients that train the same parameters, and PrismSampling gives them smaller modules"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=reason):
            federation(1).run(net(sgd), points(SIZES), plugins())
        with pytest.raises(ValueError, match=reason):
            predict(federation(1), lambda: net(sgd), points(SIZES), plugins())


@pytest.mark.parametrize(("server", "rounds"), [(Momentum(), 2), (Momentum(0.5), 1), (Average(0.5), 1)], ids=["momentum", "half", "part"])
def test_another_step_of_the_server_is_refused(server, rounds, net, points, federation):
    def run(rate):
        module = net(lambda parameters: torch.optim.SGD(parameters, rate))
        federation(rounds, server=server).run(module, points(SIZES), [IntrinsicProjection(40)])

    for rate in (0.1, 1e-3):
        with pytest.raises(ValueError, match=r"the plain average as the server's step: use Average\(\), lr=1"):
            run(rate)


def test_more_dimensions_than_parameters(net, points, federation):
    size = len(flat(net(sgd).parameters()))
    with pytest.raises(ValueError, match=f"dim={size + 1}: {size} parameters train in stage 1"):
        federation(1).run(net(sgd), points(SIZES), [IntrinsicProjection(size + 1)])


def test_more_dimensions_than_a_later_stage_trains(net, points, federation, tmp_path):
    """Found before the first round."""
    plugins = [LayerFreezing("blocks.*"), IntrinsicProjection(150)]
    with pytest.raises(ValueError, match="dim=150: 115 parameters train in stage 2; give that many or fewer"):
        federation(3, folder=tmp_path).run(net(sgd), points(SIZES), plugins)
    assert not list(tmp_path.iterdir())


def test_who_was_away(net, points, federation):
    """A cohort of one of two clients, spans of one round: floats that come down are q + 1 vectors, or the parameters."""
    dim, rounds = 60, 8
    result = federation(rounds, cohort=1, seed=3).run(net(sgd), points([8, 8]), [IntrinsicProjection(dim, periods_per_span=1)])
    size = len(flat(net(sgd).parameters()))
    statistics = 3 * (2 * 8 * 4 + 8)
    known, wanted = {0: 0, 1: 0}, []
    for round in range(rounds):
        (client,) = sample(2, 1, 3, round)
        missing = round - known[client]
        known[client] = round
        wanted.append(statistics + 4 * min(missing * dim, size))
    assert max(wanted) > min(wanted[1:])
    headers = [row["bytes_down"] - data for row, data in zip(result.history, wanted)]
    assert all(0 < header < 3500 for header in headers)
    assert max(wanted) - min(wanted) < 4 * size + 1
