"""Clients that send what they should not: rejected, counted by reason, and the round goes on without them, down to ``min_clients``."""

import json

import pytest
import torch

from featherlight.fed_loop import Federation, Median, TrimmedMean, checkpoint
from featherlight.fed_loop.away import Reply
from featherlight.fed_loop.turn import Turn
from featherlight.fed_loop.wire import pack
from featherlight.plugins import (
    FetchSGD,
    IntrinsicProjection,
    LayerFreezing,
    NormClipping,
    PartitionedTraining,
    Plugin,
    PrismSampling,
    ProgressiveGrowth,
    Quantization,
    TopK,
)

SIZES = [8, 8, 8, 8]


class Tampered:
    """The server's half of turns, with one client's bytes changed on the way."""

    def __init__(self, change, of=(1,)):
        self.change, self.of = change, of

    def __call__(self, monkeypatch):
        from featherlight.fed_loop import wire
        from featherlight.fed_loop.serving import Serving

        real, change, of = Serving.read, self.change, self.of

        def read(serving, payload, limit, trainee, plan, visit, turn):
            if visit.client in of and payload:
                payload = change(wire.unpack(payload), payload)
                payload = payload if isinstance(payload, bytes | bytearray) else pack(payload)
            return real(serving, payload, max(limit, len(payload)), trainee, plan, visit, turn)

        monkeypatch.setattr(Serving, "read", read)


def first(message, kind=torch.Tensor.is_floating_point):
    return next(name for name in sorted(message) if kind(message[name]))


def changed(how):
    """The first floating entry changed."""
    return lambda message, _: {**message, first(message): how(message[first(message)])}


FAULTS = {
    "NaN": (changed(lambda x: torch.full_like(x, torch.nan)), {"not_finite"}),
    "Inf": (changed(lambda x: torch.full_like(x, -torch.inf)), {"not_finite"}),
    "another shape": (changed(lambda x: torch.cat([x.flatten(), x.flatten(), x.new_zeros(1)])), {"shape", "unreadable", "other"}),
    "another dtype": (changed(torch.Tensor.double), {"dtype"}),
    "another name": (lambda m, _: {**{k: v for k, v in m.items() if k != first(m)}, "intruder": m[first(m)]}, {"names", "unreadable"}),
    "a name more": (lambda m, _: {**m, "intruder": torch.ones(1)}, {"names", "other", "unreadable"}),
    "half missing": (lambda m, _: dict(sorted(m.items())[: len(m) // 2]), {"names", "unreadable"}),
    "nothing": (lambda m, _: {}, {"names", "unreadable"}),
    "cut off": (lambda _, payload: payload[: len(payload) // 2], {"unreadable"}),
    "no message": (lambda _, payload: b"\x80\x04cos\nsystem\n(S'false'\ntR.", {"unreadable"}),
    "a million times as much": (lambda m, _: {k: 1e6 * v if v.is_floating_point() else v for k, v in m.items()}, {"norm", "not_finite"}),
}
METHODS = {
    "averaging": lambda: [NormClipping(5.0)],
    "layer-wise": lambda: [LayerFreezing("blocks.*"), NormClipping(5.0)],
    "progressive": lambda: [ProgressiveGrowth("blocks.*"), NormClipping(5.0)],
    "principal kernels": lambda: [PrismSampling(0.5, layers=["blocks.*.linear"]), NormClipping(5.0)],
    "intrinsic": lambda: [IntrinsicProjection(20, subspaces=2), NormClipping(5.0)],
    "8 bits": lambda: [NormClipping(5.0), Quantization()],
    "4 bits": lambda: [NormClipping(5.0), Quantization(4)],
    "top-k": lambda: [TopK(20), NormClipping(5.0)],
    "sketches": lambda: [FetchSGD(40, 3, 10), NormClipping(5.0)],
}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_wrong_is_rejected_and_counted_and_the_others_go_on(method, net, points, federation, monkeypatch):
    for fault, (change, reasons) in FAULTS.items():
        with monkeypatch.context() as tampering:
            Tampered(change)(tampering)
            module = net()
            result = federation(1).run(module, points(SIZES), METHODS[method]())
        row = result.history[0]
        assert (row["clients"], row["rejected"]) == (3, 1), fault
        assert len(result.rejected_by) == 1, fault
        assert set(result.rejected_by) <= reasons, (fault, result.rejected_by)
        assert all(torch.isfinite(value).all() for value in module.state_dict().values()), fault


def test_another_stage_s_update_is_rejected(net, points, federation, monkeypatch):
    """What a client made of the first stage comes in the second, of which it lacks the block."""
    old = {}

    def stale(message, payload):
        return old.setdefault("first", payload)

    Tampered(stale)(monkeypatch)
    result = federation(2).run(net(), points(SIZES), [LayerFreezing("blocks.*")])
    assert [row["rejected"] for row in result.history] == [0, 1]
    assert result.rejected_by == {"names": 1}


def test_none_is_rejected_where_nobody_tampers(net, points, federation):
    for make in METHODS.values():
        assert federation(2).run(net(), points(SIZES), make()).rejected == 0


# -- too few ------------------------------------------------------------------------------------------------------------
def test_a_round_of_too_few_changes_nothing_and_three_in_a_row_end_the_run(net, points, federation, same, monkeypatch, tmp_path):
    data, module = points(SIZES), net()
    before = net().state_dict()
    for client in (0, 1, 2):
        data.clients[client][0][0, 0] = float("nan")
    with pytest.raises(
        ValueError, match=r"in 3 rounds in a row, up to round 2, fewer than min_clients=2 .*not_finite 9.*lower min_clients"
    ):
        federation(9, min_clients=2, folder=tmp_path).run(module, data)
    state = checkpoint.read(checkpoint.newest(tmp_path))
    assert state["round"] == 3
    assert all(torch.equal(state["server"][name], before[name]) for name in state["server"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["clients"], row["rejected"], row["rejected_not_finite"], row["void"]) for row in rows] == [(0, 3, 3, 1)] * 3
    resumed = net()
    result = federation(4, min_clients=2, folder=tmp_path).run(resumed, points(SIZES), resume=True)  # the clients were seen to
    assert [row["void"] for row in result.history] == [1, 1, 1, 0]


def test_the_round_goes_on_down_to_as_many(net, points, federation, same):
    data, bad = points(SIZES), points(SIZES)
    bad.clients[3][0][0, 0] = float("nan")
    one, other = net(), net()
    federation(2, min_clients=3).run(one, bad)
    federation(2).run(other, bad)
    same(one.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match="min_clients=3, but cohort=2"):
        Federation(1, cohort=2, min_clients=3)
    assert federation(1, min_clients=4).run(net(), data).history[0]["void"] == 0


# -- clients elsewhere -----------------------------------------------------------------------------------------------------
def test_replies_that_are_doubled_stale_of_strangers_or_missing(net, points, federation, mail):
    class Confused(mail):
        def exchange(self, requests):
            replies = list(super().exchange(requests))
            if not replies:
                return
            round = replies[0].round
            yield Reply(Turn(77), round=round)
            for reply in replies:
                if reply.turn.client == 1 and round == 1:
                    continue  # no reply at all
                if reply.turn.client == 2 and round == 1:
                    reply = reply._replace(round=0)
                yield reply
                if reply.turn.client == 3:
                    yield reply
            if round == 0:
                yield Reply.failed(0, "again")

    settings, data, module = federation(2, seed=3), points(SIZES), net()
    result = settings.run(module, data, carrier=Confused(settings, net, data, list))
    assert [(row["clients"], row["rejected"]) for row in result.history] == [(4, 3), (2, 4)]
    assert result.rejected_by == {"duplicate": 5, "no_reply": 1, "stale": 1}
    plain = net()
    one_round = federation(1, seed=3).run(plain, data)
    assert one_round.history[0]["loss"] == result.history[0]["loss"]
    assert one_round.history[0]["bytes_up"] == result.history[0]["bytes_up"]  # strays cost nothing


BAD_HEADERS = [
    "",
    "[" * 100_000,
    "{}",
    "[]",
    '{"turn": null, "lost": false, "round": 0}',
    '{"turn": {"client": "1"}, "lost": 0, "round": 0}',
    json.dumps({"turn": {**Turn(1).to_json(), "steps": -1}, "lost": False, "round": 0}),
    json.dumps({"turn": {**Turn(1).to_json(), "loss": "low"}, "lost": False, "round": 0}),
    json.dumps({"turn": {**Turn(1).to_json(), "reason": "sunspots"}, "lost": False, "round": 0}),
    json.dumps({"turn": {**Turn(1).to_json(), "more": 1}, "lost": False, "round": 0}),
    json.dumps({"turn": Turn(1).to_json(), "lost": False, "round": 1e999}),
]


@pytest.mark.parametrize("header", BAD_HEADERS, ids=range(len(BAD_HEADERS)))
def test_a_reply_s_header_that_cannot_be_read(header):
    with pytest.raises(ValueError, match="its reply's header cannot be read"):
        Reply.of(header, b"")


# -- bounds and medians ------------------------------------------------------------------------------------------------------
class Flip(Plugin):
    """Some clients send the opposite of what they learned, many times over."""

    def __init__(self, clients, times):
        self._clients, self._times = clients, times

    def encode(self, message, visit):
        if visit.client not in self._clients:
            return message
        return {name: -self._times * value if value.is_floating_point() else value for name, value in message.items()}


def weights(module):
    return torch.cat([value.flatten() for value in module.parameters()])


def test_a_bound_holds_what_one_client_can_do(net, points, federation):
    """Its share of the samples times C, whatever it sends; longer than tolerance × C, nothing."""
    start, moved, data = weights(net()), {}, points([8, 8])
    for times in (0, 50, 1e4):
        module = net(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1))
        result = federation(1).run(module, data, [NormClipping(0.5), Flip({1}, times)])
        moved[times] = weights(module) - start, result.history[0]
    alone, pushed, refused = (moved[times] for times in (0, 50, 1e4))
    assert pushed[1]["rejected"] + refused[1]["rejected"] == 2  # 50 and 10⁴ times 0.5 at most are beyond 10 · 0.5
    assert pushed[1]["rejected_norm"] == 1
    within = net(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1))
    result = federation(1).run(within, data, [NormClipping(0.5, tolerance=100), Flip({1}, 50)])
    assert result.rejected == 0
    assert (weights(within) - start - alone[0]).norm() <= 0.5 * 0.5 + 1e-5


def test_clipping_by_hand_and_what_is_refused():
    clip = NormClipping(2.0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    clip.attach(model)
    message = {"0.weight": torch.tensor([[3.0]]), "1.weight": torch.tensor([4.0]), "1.running_var": torch.tensor([100.0])}
    sent = clip.encode({**message, "1.num_batches_tracked": torch.tensor(5)}, None)
    assert sent["0.weight"].item() == pytest.approx(1.2)
    assert sent["1.weight"].item() == pytest.approx(1.6)
    assert sent["1.running_var"].item() == 100
    assert sent["1.num_batches_tracked"].item() == 5
    assert clip.encode({"0.weight": torch.tensor([[1.5]])}, None)["0.weight"].item() == 1.5
    assert clip.decode(message, None)["0.weight"].item() == pytest.approx(1.2)
    for options, message in (({"max_norm": 0.0}, "max_norm=0.0"), ({"max_norm": 1.0, "tolerance": 0.5}, "tolerance=0.5")):
        with pytest.raises(ValueError, match=message):
            NormClipping(**options)


def test_a_bound_goes_behind_what_projects(net, points, federation):
    for plugin in (IntrinsicProjection(20), FetchSGD(40, 3, 10)):
        name = type(plugin).__name__
        with pytest.raises(ValueError, match=f"put NormClipping behind {name}"):
            federation(1).run(net(), points(SIZES), [NormClipping(1.0), plugin])


@pytest.mark.parametrize("aggregate", [Median(), TrimmedMean(0.25)], ids=["median", "trimmed"])
def test_one_client_of_four_cannot_carry_a_median_away(aggregate, net, points, federation):
    def trained(bad, aggregate):
        module = net(optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1))
        federation(3, aggregate=aggregate).run(module, points(SIZES), [Flip({2} if bad else (), 1000.0)])
        return weights(module)

    honest, attacked, mean = trained(False, aggregate), trained(True, aggregate), trained(True, None)
    start = weights(net())
    assert (attacked - start).norm() < 3 * (honest - start).norm()
    assert (mean - start).norm() > 50 * (honest - start).norm()


REFUSED = {
    "projected": (lambda: [IntrinsicProjection(20)], "with IntrinsicProjection clients send coordinates"),
    "sketched": (lambda: [FetchSGD(40, 3, 10)], "with FetchSGD clients send sketches"),
    "sparse": (lambda: [TopK(20)], "with TopK a client sends few elements"),
    "joint": (lambda: [PartitionedTraining("blocks.1", joint=True)], "there is one update"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_only_adds_has_no_median(case, net, points, federation):
    plugins, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"aggregate=Median takes each coordinate .*{message}"):
        federation(1, aggregate=Median()).run(net(), points(SIZES), plugins())


def test_a_run_with_another_aggregate_is_another_run(net, points, federation, tmp_path):
    federation(1, folder=tmp_path, aggregate=TrimmedMean(0.1)).run(net(), points(SIZES))
    with pytest.raises(ValueError, match=r"aggregate.trim was 0.1, now 0.3"):
        federation(2, folder=tmp_path, aggregate=TrimmedMean(0.3)).run(net(), points(SIZES), resume=True)
    federation(2, folder=tmp_path, aggregate=TrimmedMean(0.1)).run(net(), points(SIZES), resume=True)
