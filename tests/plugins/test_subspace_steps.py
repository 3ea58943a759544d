"""Σ in quantised steps: what is left over is not lost, what is kept is less than Σ, and who gets what."""

import pytest
import torch
from torch import nn

from featherlight.fed_loop.wire import pack
from featherlight.plugins import Clock, IntrinsicProjection, Visit
from featherlight.plugins.projections import PROJECTIONS
from featherlight.plugins.seeds import derive
from featherlight.plugins.subspaces import Past, Span, nbytes, step_bytes, step_of

DIM = 20


def span():
    zeros = torch.zeros(2, DIM, dtype=torch.float64)
    return Span(0, ["w"], 100, torch.zeros(100), zeros.clone(), zeros[:0], [-1, -1], zeros.clone(), dropped=[-1, -1])


def steps(count):
    return list(torch.randn(count, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@pytest.mark.parametrize("bits", range(2, 9))
def test_what_is_left_over_goes_to_the_next_step(bits):
    own, sum_taken = span(), torch.zeros(DIM, dtype=torch.float64)
    for step in steps(50):
        taken, code = own.quantise(1, step, bits)
        assert torch.equal(step_of(code, DIM, bits), taken)
        assert len(code) == step_bytes(DIM, bits)
        sum_taken += taken
    total = torch.stack(steps(50)).sum(0)
    assert torch.allclose(sum_taken + own.unsent[1], total, atol=1e-12)
    assert float(own.unsent[1].abs().max()) <= 0.5 * float(step_of(code, DIM, bits).abs().max()) / (2 ** (bits - 1) - 1) * (1 + 1e-6)
    assert not own.unsent[0].any()


def test_a_step_of_nothing():
    taken, code = span().quantise(0, torch.zeros(DIM, dtype=torch.float64), 4)
    assert not taken.any()
    assert not step_of(code, DIM, 4).any()


@pytest.mark.parametrize(("bits", "most"), [(2, 15), (3, 10), (4, 7), (5, 6), (6, 5), (7, 4), (8, 3)])
def test_kept_steps_are_fewer_bytes_than_the_sum(bits, most):
    own = span()
    for round, step in enumerate(steps(40)):
        own.keep(round % 2, round, own.quantise(round % 2, step, bits)[1], bits)
    assert [sum(of == which for of, _ in own.steps) for which in (0, 1)] == [most, most]
    assert len(own.codes) == 2 * most
    assert sorted(own.since(1, own.dropped[1])) == list(range(39 - 2 * (most - 1), 40, 2))
    assert own.since(1, own.dropped[1] - 1) is None
    assert own.since(0, 38) == {}
    again = Span.of(own.state(), torch.device("cpu"))
    assert again.steps == own.steps
    assert torch.equal(again.codes, own.codes)


def test_who_is_sent_steps_and_who_the_sum():
    """8 bits of 200 numbers: three steps, with their names, are longer than Σ, 800 bytes."""
    model = nn.Linear(20, 20, bias=False)
    plugin = IntrinsicProjection(200, down_bits=8)
    plugin.attach(model)
    kept = {client: [] for client in range(3)}
    sent = {}
    for round in range(6):
        present = {0: range(6), 1: (0, 3, 5), 2: (0, 5)}
        for client in (client for client in present if round in present[client]):
            message = plugin.encode_down({"weight": model.weight.detach()}, Visit(round, client), kept[client])
            sent[round, client] = {name: len(value) for name, value in message.items() if name not in kept[client] and value.numel()}
            kept[client] = list(message)
        lifted = plugin.lift({"intrinsic.z": torch.randn(200, dtype=torch.float64)}, Clock(round))
        with torch.no_grad():
            model.weight.add_(lifted["weight"])
        plugin.settle(model, Clock(round))
    code = step_bytes(200, 8)
    assert all(not sent[0, client] for client in range(3))
    assert [sent[round, 0] for round in range(1, 6)] == [{f"intrinsic.0.0+{round - 1}": code} for round in range(1, 6)]
    assert sent[3, 1] == {"intrinsic.0.0@2": 200}
    assert sent[5, 1] == {f"intrinsic.0.0+{round}": code for round in (3, 4)}
    assert sent[5, 2] == {"intrinsic.0.0@4": 200}


@pytest.mark.parametrize("dim", [8, 100, 200, 512, 4096])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_steps_are_sent_only_where_they_are_less_as_serialised(bits, dim):
    """Names and headers counted, to a few dozen bytes of header."""
    zeros = torch.zeros(1, dim, dtype=torch.float64)
    own = Span(0, ["w"], 9999, torch.zeros(1), zeros.clone(), zeros[:0], [-1], zeros.clone(), dropped=[-1])
    own.sums += 1
    used = 0
    for round in range(12):
        own.keep(0, round, own.quantise(0, torch.randn(dim, dtype=torch.float64), bits)[1], bits)
        own.changed[0] = round
        sums, sent = own.owed(())
        used += len(sent) > 1
        assert len(pack(sent)) <= len(pack(sums)) + 64
    assert used == 0 if dim == 8 else used > 0 if dim >= 512 else True


def one_of(number, names=("w",), moved=True, bits=32):
    """A span of one round that is over, 4·DIM bytes for whoever lacks it."""
    own = span()
    own.number, own.names, own.dropped = number, list(names), [] if bits == 32 else own.dropped
    if moved:
        own.changed = [number, -1]
        own.sums[0] = steps(1)[0]
        if bits < 32:
            own.sums[0], code = own.quantise(0, steps(1)[0], bits)
            own.keep(0, number, code, bits)
    own.finish()
    return own


def test_spans_go_once_the_model_is_less_than_what_came_since():
    past, spans = Past(), [one_of(number) for number in range(3)]
    past.take(spans, 4 * DIM * 3)  # as much, but not since the first
    assert (past.count, len(spans)) == (0, 3)
    assert not past.lacking(())
    past.take(spans, 4 * DIM * 2)
    assert (past.count, [own.number for own in spans]) == (1, [1, 2])
    assert past.lacking(())
    assert past.lacking({"intrinsic.start@0", "w", "intrinsic.0.0@-1", "intrinsic.w@7"})
    for kept in ("intrinsic.0.0@0", "intrinsic.1.0@1", "intrinsic.2.0@1", "intrinsic.past@1"):
        assert not past.lacking({"w", kept})
    spans.append(one_of(3, ["w", "x"]))
    past.take(spans, 4 * DIM)
    assert (past.count, [own.number for own in spans]) == (3, [3])
    assert past.lacking({"intrinsic.1.0@1", "intrinsic.past@1"})
    assert past.newest_with(spans) == 3
    past.take([one_of(number, ["x"], moved=False) for number in (3, 4)] + [one_of(5)], 4 * DIM)
    assert (past.count, past.newest, past.names) == (5, 3, ["w", "x"])
    assert not past.lacking({"intrinsic.2.0@2"})  # the last that moved anything


def test_a_finished_span_has_what_may_still_be_sent():
    whole, small = one_of(0), one_of(0, bits=4)
    assert whole.sums.dtype == torch.float32
    assert nbytes([whole.sums]) == 4 * DIM  # of the one that moved
    assert not nbytes([whole.position, whole.velocity, whole.unsent])
    assert list(whole.owed(())[1]) == ["intrinsic.0.0@0"]
    big = span()
    big.sums = torch.zeros(2, 400, dtype=torch.float64)
    big.unsent = big.sums.clone()
    big.sums[1], code = big.quantise(1, torch.ones(400, dtype=torch.float64), 4)
    big.keep(1, 5, code, 4)
    big.changed = [-1, 5]
    before = {name: value for name, value in big.owed(())[1].items() if len(value)}
    big.finish()
    assert not nbytes([big.sums])  # whoever lacks it is sent the step
    after = {name: value for name, value in big.owed(())[1].items() if len(value)}
    assert before.keys() == after.keys() == {"intrinsic.0.1+5"}
    assert nbytes([small.sums]) == 4 * DIM  # with its name the step is longer than the sum
    for own in (whole, small, big):
        again = Span.of(own.state(), torch.device("cpu"))
        assert {name: value.tolist() for name, value in again.owed(())[1].items()} == {
            name: value.tolist() for name, value in own.owed(())[1].items()
        }


@pytest.mark.parametrize("options", [{"down_bits": 8}, {}, {"subspaces": 4, "draw": "round"}], ids=["steps", "sums", "of 4"])
def test_memory_and_messages_do_not_grow_with_spans(options):
    """A span a round, each 300 of 900 numbers: what is kept of those that are over is at most two vectors of the model's size."""
    model = nn.Linear(30, 30, bias=False)
    plugin, server = IntrinsicProjection(300, periods_per_span=1, **options), {"weight": model.weight}
    plugin.attach(model)
    kept: dict[int, set[str]] = {0: set(), 1: set()}
    sizes, lengths, whole = [], [], []
    for round in range(30):
        served = plugin.encode_down(server, Visit(round, 0), kept[0])
        kept[0] = {name for name in served if name != "weight"}
        plugin.encode({"weight": torch.zeros_like(model.weight)}, Visit(round, 0))
        z = torch.zeros(plugin.subspaces, 300)
        z[plugin._which(Visit(round, 0))] = 0.1
        lift = plugin.lift({"intrinsic.z": z.view(-1) if plugin.subspaces == 1 else z}, Clock(round, 0))
        with torch.no_grad():
            model.weight += lift["weight"]
        plugin.settle(model, Clock(round, 0))
        plugin.arrive([Visit(round, 0)])
        state = plugin.state_dict()
        over = [value for one in state["spans"][:-1] for value in one.values() if isinstance(value, torch.Tensor)]
        sizes.append(nbytes(over))
        lengths.append(len(served))
        whole.append("weight" in served)
        assert "weight" in plugin.encode_down(server, Visit(round, 1), kept[1]) or round < 15
    assert not any(whole)  # who is there in every round is sent steps or sums
    assert max(sizes) <= 2 * nbytes([model.weight])
    assert max(sizes[20:]) == max(sizes[10:20])
    assert max(lengths[20:]) == max(lengths[10:20])


def test_a_step_from_large_weights_to_small_ones_is_the_plain_average():
    """What the change was rounded at are the weights before it, not those that it leads to."""
    model = nn.Linear(4, 4, bias=False)
    torch.manual_seed(0)
    nn.init.uniform_(model.weight, 0.5, 1.5)
    plugin = IntrinsicProjection(16, subspaces=2)
    plugin.attach(model)
    plugin.encode_down({"weight": model.weight.detach()}, Visit(0))
    mean = torch.zeros(2, 16, dtype=torch.float64)
    for which, aim in enumerate((-model.weight.detach().flatten().double(), 1e-5 * torch.rand(16, dtype=torch.float64))):
        projection = PROJECTIONS["fastfood"](16, 16, derive(0, "intrinsic", 0, which))
        dense = torch.stack([projection.lift(unit) for unit in torch.eye(16, dtype=torch.float64)], 1)
        mean[which] = torch.linalg.solve(dense, aim)
    change = plugin.lift({"intrinsic.z": mean}, Clock(0))["weight"]
    with torch.no_grad():
        model.weight += change
        plugin.settle(model, Clock(0))
        assert float(model.weight.abs().max()) < 2e-5
        model.weight += 1e-3
    with pytest.raises(ValueError, match="needs the plain average as the server's step"):
        plugin.settle(model, Clock(1))
