"""A scaled-down GPT-2 in a federation: bytes really sent are those predicted, in numbers and as serialised."""

import pytest
import torch

from featherlight.fed_loop.predict import predict
from featherlight.plugins import IntrinsicProjection, Visit
from featherlight.ssl_models import LanguageModel, TextData
from featherlight.ssl_models.partitions import Natural

SMALL = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "vocab_size": 256}
METHODS = {
    "subspaces": lambda: [IntrinsicProjection(100, subspaces=3)],
    "every step": lambda: [IntrinsicProjection(100, space="subspace")],
}


@pytest.fixture
def text(tmp_path):
    def make():
        for name, length in (("a", 160), ("b", 220), ("c", 100)):
            (tmp_path / f"{name}.txt").write_bytes(bytes(32 + (7 * place * place + length) % 90 for place in range(length)))
        return TextData("folder", root=str(tmp_path), context=9, batch_size=4, partition=Natural(), test_fraction=0.0)

    return make


def small():
    torch.manual_seed(0)
    return LanguageModel(config=SMALL, optimizer="sgd", lr=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_predicted_is_measured(method, text, federation, cost_of):
    predicted, measured = (
        cost_of(table)
        for table in (
            predict(federation(3, cohort=2), small, text(), METHODS[method]()),
            federation(3, cohort=2).run(small(), text(), METHODS[method]()).cost,
        )
    )
    for ours, theirs in zip([*predicted["rows"], predicted["total"]], [*measured["rows"], measured["total"]]):
        for name in ("bytes_down", "bytes_up", "params_held", "params_trained", "flops_forward", "flops_backward", "saved_bytes"):
            assert ours[name] == theirs[name], name


def test_what_is_sent_is_what_compresses(text, federation):
    """Of K = 3 subspaces of 100: d up, dK down where all go, whatever their names take; the run's bytes are these and a header."""
    traffic = []

    def method():
        return [IntrinsicProjection(100, subspaces=3, gain=0.01, serve="all")]

    predict(federation(2), small, text(), method(), last_traffic=traffic.append)
    size = sum(value.numel() for value in small().parameters())
    (last,) = traffic
    assert last == (3 * 4 * size, 3 * 4 * 300, 3 * 4 * 100)
    assert last.compression == pytest.approx((size / 300, size / 100, 2 * size / 400))
    row = federation(2).run(small(), text(), method()).history[-1]
    assert 0 < row["bytes_up"] - last.up < 3 * 100
    assert 0 < row["bytes_down"] - last.down < 3 * 400


def test_a_plain_run_compresses_nothing(text, federation):
    traffic = []
    predict(federation(2), small, text(), last_traffic=traffic.append)
    assert traffic[0].compression == (1, 1, 1)


def test_in_bfloat16(text, federation):
    """θ₀ + A·Σ to a rounding of bfloat16, although each round's step is far below it."""
    model, start = small().bfloat16(), small().bfloat16()
    plugin = IntrinsicProjection(100, gain=0.01)
    result = federation(4).run(model, text(), [plugin])
    assert all(value.dtype == torch.bfloat16 for value in model.parameters())
    assert result.history[0]["bytes_up"] < 3 * (2 * 100 + 100)  # two bytes a number
    span = plugin._spans[-1]
    assert span.sums.abs().max() > 0
    lifted = plugin._map(0, 0).lift(span.sums[0])
    wanted = torch.cat([value.detach().flatten() for value in start.parameters()]).double() + lifted
    found = torch.cat([value.detach().flatten() for value in model.parameters()])
    assert bool(((found.double() - wanted).abs() <= 2**-8 * wanted.abs() + 1e-7).all())
    assert bool((found != torch.cat([value.detach().flatten() for value in start.parameters()])).any())
    assert plugin._which(Visit(0)) == 0
