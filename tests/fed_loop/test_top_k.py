"""Rounds in which clients send few elements and remember the rest, against the same rounds by hand; what is sent to those who were away."""

import copy
import signal
import warnings

import pytest
import torch

from featherlight.fed_loop import Momentum
from featherlight.fed_loop.cohort import sample
from featherlight.fed_loop.predict import predict
from featherlight.plugins import DepthDropout, FetchSGD, IntrinsicProjection, LayerFreezing, Plugin, PrismSampling, Quantization, TopK

SIZES = [6, 10, 14]


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def flat(values):
    return torch.cat([value.detach().flatten() for value in values])


def trained(server, data, client):
    model = copy.deepcopy(server).train()
    optimizer = model.configure_optimizers()
    for step, batch in enumerate(data.batches(client)):
        optimizer.zero_grad()
        model.training_step(batch, step).backward()
        optimizer.step()
    return model


def by_hand(server, data, rounds, k, cohort=3, seed=0, feedback=True, broken=None):
    """Every client: its change and what it has left over; the k largest go, the rest is left over."""
    left = {}
    for round in range(rounds):
        clients = [client for client in sample(3, cohort, seed, round) if client != broken]
        total = sum(SIZES[client] for client in clients)
        before, models = flat(server.parameters()), [trained(server, data, client) for client in clients]
        step = torch.zeros_like(before)
        for client, model in zip(clients, models):
            change = flat(model.parameters()) - before + left.get(client, 0.0)
            for place in sorted(range(len(change)), key=lambda place: -abs(float(change[place])))[:k]:
                step[place] += change[place] * SIZES[client] / total
                change[place] = 0.0
            left |= {client: change} if feedback else {}
        for value, part in zip(server.parameters(), step.split([value.numel() for value in server.parameters()])):
            value.data += part.view_as(value)
        for name, value in server.named_buffers():
            mean = sum(model.get_buffer(name).double() * SIZES[client] / total for client, model in zip(clients, models))
            value.copy_(mean if value.is_floating_point() else mean.round())
    return server


def doubles(points, sizes=SIZES):
    data = points(sizes)
    data.clients = [(x.double(), y) for x, y in data.clients]
    return data


def close(module, wanted):
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


# -- rounds by hand ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("cohort", [2, 3])
def test_rounds(cohort, feedback, net, points, federation):
    data, module = doubles(points), net(sgd).double()
    federation(4, cohort=cohort).run(module, data, [TopK(30, error_feedback=feedback)])
    close(module, by_hand(net(sgd).double(), data, 4, 30, cohort, feedback=feedback))


def test_all_elements_are_plain_averaging(net, points, federation):
    data, module, plain = doubles(points), net(sgd).double(), net(sgd).double()
    federation(2).run(module, data, [TopK(share=1.0)])
    federation(2).run(plain, data)
    close(module, plain)


def test_a_share(net, points, federation):
    data, one, other = points(SIZES), net(sgd), net(sgd)
    size = len(flat(one.parameters()))
    federation(2).run(one, data, [TopK(share=0.1)])
    federation(2).run(other, data, [TopK(round(size / 10))])
    assert torch.equal(flat(one.parameters()), flat(other.parameters()))


def test_a_rejected_client_remembers_what_it_had(net, points, federation):
    """Client 1's data are broken in round 1 alone: in round 2 it goes on with what round 0 left."""

    class Spoil(Plugin):
        def encode(self, message, visit):
            spoilt = visit.client == 1 and visit.round == 1
            return {name: value * float("nan") if spoilt and value.is_floating_point() else value for name, value in message.items()}

    data, module = doubles(points), net(sgd).double()
    result = federation(3).run(module, data, [Spoil(), TopK(30)])
    assert [row["rejected"] for row in result.history] == [0, 1, 0]
    server, left = net(sgd).double(), {}
    for round in range(3):  # by_hand, with client 1 left out of round 1
        clients = [0, 2] if round == 1 else [0, 1, 2]
        total = sum(SIZES[client] for client in clients)
        before, models = flat(server.parameters()), [trained(server, data, client) for client in clients]
        step = torch.zeros_like(before)
        for client, model in zip(clients, models):
            change = flat(model.parameters()) - before + left.get(client, 0.0)
            places = change.abs().argsort(descending=True)[:30]
            step[places] += change[places] * SIZES[client] / total
            left[client] = change.index_fill(0, places, 0.0)
        for value, part in zip(server.parameters(), step.split([value.numel() for value in server.parameters()])):
            value.data += part.view_as(value)
        for name, value in server.named_buffers():
            mean = sum(model.get_buffer(name).double() * SIZES[client] / total for client, model in zip(clients, models))
            value.copy_(mean if value.is_floating_point() else mean.round())
    close(module, server)


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_indices_of_no_element_are_rejected(bad, net, points, federation, capsys):
    class Lie(Plugin):
        def encode(self, message, visit):
            wrong = message["topk.indices"].index_fill(0, torch.tensor([0]), bad)
            return message | ({"topk.indices": wrong} if visit.client == 1 and message["topk.values"].any() else {})

    result = federation(1).run(net(sgd), points(SIZES), [TopK(20), Lie()])
    assert result.history[0]["rejected"] == 1
    told = " ".join(capsys.readouterr().err.split())
    assert "update of client 1 rejected: its message cannot be read" in told
    assert "the indices of (20,) values must be as many, from 0 to" in told


# -- down -------------------------------------------------------------------------------------------------------------
class Listen(Plugin):
    """Notes what clients are sent, and the server's weights after each round."""

    def __init__(self):
        self._sent, self._servers = [], []

    def attach(self, model):
        self._model = model

    def encode_down(self, message, visit, kept=()):
        self._sent.append((visit, {name: value.clone() for name, value in message.items() if name.startswith("topk")}))
        return message

    def settle(self, server, clock):
        self._servers.append(flat(server.parameters()).clone())


@pytest.mark.parametrize("server", [None, Momentum()])
def test_clients_that_were_away_catch_up(server, net, points, federation):
    """Clients that hold nothing but their copies have the server's weights, bit for bit, at each visit. With momentum on the server
    every element goes on changing, so that all are sent to those who were away for long."""
    rounds, listen, module = 12, Listen(), net(sgd)
    start = flat(module.parameters()).clone()
    result = federation(rounds, cohort=1, seed=3, server=server).run(module, points(SIZES), [TopK(60), listen])
    copies = [start.clone() for _ in SIZES]
    ways, statistics = [], 3 * (2 * 8 * 4 + 8)
    for visit, sent in listen._sent:
        copy_ = copies[visit.client]
        entries = {name.partition("@")[0]: value for name, value in sent.items()}
        if "topk.changed" in entries:
            copy_[entries["topk.changed"]] = entries["topk.new"]
        copy_ = copies[visit.client] = entries.get("topk.all", copy_)
        assert torch.equal(copy_, listen._servers[visit.round - 1] if visit.round else start), visit
        ways.append(tuple(sorted(entries)))
        content = 4 * sum(value.numel() for value in sent.values()) + statistics
        assert 0 < result.history[visit.round]["bytes_down"] - content < 1400
    assert ("topk.at", "topk.changed", "topk.new") in ways
    if server is not None:
        assert ("topk.all", "topk.at") in ways


def test_an_unknown_start_is_sent(net, points, federation):
    size = len(flat(net(sgd).parameters()))
    known, sent = (federation(1).run(net(sgd), points([8]), [TopK(20, known_start=known)]) for known in (True, False))
    assert 4 * size <= sent.history[0]["bytes_down"] - known.history[0]["bytes_down"] < 4 * size + 120


# -- bytes ------------------------------------------------------------------------------------------------------------
METHODS = {
    "k": lambda: [TopK(20)],
    "share": lambda: [TopK(share=0.05)],
    "without feedback": lambda: [TopK(20, error_feedback=False)],
    "unknown start": lambda: [TopK(20, known_start=False)],
    "quantised": lambda: [TopK(20), Quantization()],
    "of a stage": lambda: [LayerFreezing("blocks.*"), TopK(20)],
    "of what is kept": lambda: [DepthDropout("blocks.*"), TopK(20)],
}


@pytest.mark.parametrize("method", METHODS)
def test_predicted_is_measured_where_one_client_trains(method, net, points, federation, cost_of):
    """What changes is then what was sent; the union of several clients' elements is predicted as if they had none in common."""
    several = federation(5, cohort=2, seed=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*real steps are metered")
        one = cost_of(predict(federation(5), lambda: net(sgd), points([10]), METHODS[method]()))
        most = cost_of(predict(several, lambda: net(sgd), points(SIZES), METHODS[method]()))
    measured = cost_of(federation(5).run(net(sgd), points([10]), METHODS[method]()).cost)
    for table in (one, measured):
        for row in (*table["rows"], table["total"]):
            row.pop("peak_bytes")
    if method == "of a stage":  # elements that train no more are not sent, and which they are depends on values
        one, measured = ({**table["total"], "bytes_down": 0} for table in (one, measured))
    assert one == measured
    really = cost_of(several.run(net(sgd), points(SIZES), METHODS[method]()).cost)
    for predicted, row in zip(most["rows"], really["rows"], strict=True):
        assert predicted["bytes_up"] == row["bytes_up"]
        assert 0.5 * predicted["bytes_down"] <= row["bytes_down"] <= predicted["bytes_down"]


def test_bytes_by_hand(net, points, federation):
    """Up four bytes for each index and each value; down, to the only client, those k elements again."""
    result = federation(3).run(net(sgd), points([8]), [TopK(40)])
    statistics = 3 * (2 * 8 * 4 + 8)
    up, down = ([row[way] for row in result.history] for way in ("bytes_up", "bytes_down"))
    assert all(0 < length - 8 * 40 - statistics < 1200 for length in up)
    assert 0 < down[0] - statistics < 1200
    assert all(0 < length - 8 * 40 - statistics < 1300 for length in down[1:])


# -- resuming ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("done", [1, 2, 3])
def test_resumed_is_uninterrupted(done, net, points, federation, same, figures, tmp_path):
    def run(rounds, folder=None, resume=False, seed=0):
        module = net(seed=seed)
        plugins = [LayerFreezing("blocks.*", periods_per_stage=2, init="copy_previous"), TopK(15)]
        result = federation(rounds, cohort=2, folder=folder).run(module, points(SIZES), plugins, resume=resume)
        return module.state_dict(), result

    whole, result = run(5)
    run(done, tmp_path)
    resumed, again = run(5, tmp_path, resume=True, seed=9)
    same(resumed, whole)
    assert figures(again) == figures(result)


class Stop(Plugin):
    """Ctrl-C in the first client's turn of a round."""

    def __init__(self, round=-1):
        self._round = round

    def after_backward(self, clock):
        if clock.period == self._round:
            self._round = -1
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("sparse", [lambda: TopK(15), lambda: FetchSGD(20, 3, k=15)], ids=["top-k", "FetchSGD"])
def test_interrupted_within_a_round(sparse, net, points, federation, same, figures, tmp_path):
    """The client whose turn was over before the interruption has it again, with what it remembered before."""

    def run(stop=-1, **options):
        module = net(sgd)
        settings = federation(4, cohort=2, folder=tmp_path if options or stop >= 0 else None, checkpoint_every=9)
        result = settings.run(module, points(SIZES), [sparse(), Stop(stop)], **options)
        return module.state_dict(), result

    whole, result = run()
    with pytest.raises(KeyboardInterrupt):
        run(stop=2)
    resumed, again = run(resume=True)
    same(resumed, whole)
    assert figures(again) == figures(result)


def test_a_plugin_used_again_begins_anew(net, points, federation, same):
    plugin, one, other = TopK(20), net(sgd), net(sgd)
    federation(2).run(net(sgd, seed=5), points(SIZES), [plugin])
    federation(2).run(one, points(SIZES), [plugin])
    federation(2).run(other, points(SIZES), [TopK(20)])
    same(one.state_dict(), other.state_dict())


# -- other methods ----------------------------------------------------------------------------------------------------
def test_quantised(net, points, federation):
    modules = [net(sgd) for _ in range(3)]
    plain, coded = (
        federation(1).run(module, points(SIZES), [TopK(60), *codecs]) for module, codecs in zip(modules, ([], [Quantization()]))
    )
    exact, rounded, start = (flat(module.parameters()) for module in modules)
    assert 0 < float((exact - rounded).norm() / (exact - start).norm()) < 0.03
    assert coded.history[0]["bytes_up"] < plain.history[0]["bytes_up"] - 3 * 60


def test_within_a_stage(net, points, federation):
    """What is frozen stays, and at most k of what trains changes."""
    states, data = [net(sgd)], points([8])
    for rounds in (1, 2):
        module = net(sgd)
        federation(rounds).run(module, data, [LayerFreezing("blocks.*"), TopK(25)])
        states.append(module)
    before, after = states[1:]
    changed = {name: int((value != after.get_parameter(name)).sum()) for name, value in before.named_parameters()}
    assert 0 < sum(changed.values()) <= 25
    assert not any(count for name, count in changed.items() if not name.startswith(("head", "blocks.1")))


REFUSED = {
    "smaller modules": (
        lambda: [PrismSampling(0.5, layers="blocks.*"), TopK(20)],
        "TopK needs clients that train the same parameters, and PrismSampling gives them smaller modules",
    ),
    "behind a projection": (lambda: [IntrinsicProjection(20), TopK(10)], "intrinsic.z is not a parameter of the server's model"),
    "before a projection": (lambda: [TopK(10), IntrinsicProjection(20)], "topk.indices is not a parameter of the server's model"),
    "behind a quantiser": (
        lambda: [Quantization(), TopK(10)],
        "is not a parameter of the server's model that trains in this round: topk goes before",
    ),
    "quantised down": (lambda: [TopK(10), Quantization(down=True)], "another plugin sends topk.at@0 in place of some"),
    "too many": (lambda: [TopK(10**6)], "k=1000000: 347 parameters train in stage 1; give that many or fewer"),
}


@pytest.mark.parametrize("combination", REFUSED)
def test_refused(combination, net, points, federation):
    plugins, message = REFUSED[combination]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            federation(1).run(net(sgd), points(SIZES), plugins())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "k=None, share=None: give one of them"),
        ({"k": 3, "share": 0.1}, "k=3, share=0.1: give one of them"),
        ({"k": 0}, "k=0: give 1 or more"),
        ({"share": 0.0}, "share=0.0: give a part above 0 and up to 1"),
        ({"share": 1.5}, "share=1.5: give a part"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        TopK(**options)
