"""What comes down suffices: clients that know θ₀, the seed and their messages, and nothing of the server, end with its weights."""

import re

import pytest
import torch

from featherlight.plugins import DepthDropout, IntrinsicProjection, LayerFreezing, ProgressiveGrowth

SEED = 3


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def kinds(names):
    """What a message brought of the model."""
    whole = not names.isdisjoint(("stem.weight", "blocks.0.linear.weight", "head.weight"))
    own = any(name.startswith("intrinsic.") for name in names)
    past = {"past"} if any(name.startswith("intrinsic.past@") for name in names) else set()
    if whole:
        return past | {"model" if own else "alone"}
    found = {"steps": r"intrinsic\.\d+\.\d+\+", "vectors": r"intrinsic\.\d+\.\d+@"}
    return past | {kind for kind, pattern in found.items() if any(re.match(pattern, name) for name in names)}


WAYS = {
    "static": ({"dim": 40}, [], {"vectors"}),
    "sparse": ({"dim": 40, "projection": "sparse_signs"}, [], {"vectors"}),
    "subspaces": ({"dim": 20, "subspaces": 3}, [], {"vectors"}),
    "drawn once a round": ({"dim": 20, "subspaces": 3, "draw": "round"}, [], {"vectors"}),
    "time-varying": ({"dim": 20, "periods_per_span": 1}, [], {"vectors"}),
    "both": ({"dim": 10, "subspaces": 2, "periods_per_span": 2}, [], {"vectors"}),
    "every step": ({"dim": 20, "space": "subspace"}, [], {"vectors"}),
    "long away": ({"dim": 120, "periods_per_span": 1}, [], {"vectors", "model", "past"}),
    "long away, within a span": ({"dim": 174, "subspaces": 2, "periods_per_span": 2}, [], {"vectors", "model"}),
    "unknown start": ({"dim": 20, "known_start": False}, [], {"vectors", "model"}),
    "unknown start, spans": ({"dim": 20, "known_start": False, "periods_per_span": 3}, [], {"vectors", "model"}),
    "more vectors than parameters": ({"dim": 150, "subspaces": 4, "serve": "all"}, [], {"alone"}),
    "more vectors than parameters, now and then": ({"dim": 150, "subspaces": 3}, [], {"vectors", "alone"}),
    "more vectors than parameters, unknown start": (
        {"dim": 150, "subspaces": 4, "known_start": False, "periods_per_span": 4},
        [],
        {"vectors", "model", "alone"},
        16,
    ),
    "more vectors than parameters, freezing": (
        {"dim": 100, "subspaces": 4, "periods_per_span": 3},
        [lambda: LayerFreezing("blocks.*", periods_per_stage=5)],
        {"vectors", "model", "alone"},
        16,
    ),
    "more steps than parameters": (
        {"dim": 150, "subspaces": 6, "down_bits": 8, "known_start": False, "periods_per_span": 6},
        [],
        {"vectors", "steps", "model", "alone"},
        18,
    ),
    "in steps of 4 bits": ({"dim": 80, "down_bits": 4}, [], {"vectors", "steps"}),
    "in steps of 8 bits, momentum": ({"dim": 80, "down_bits": 8, "momentum": 0.5, "subspaces": 2}, [], {"vectors", "steps"}),
    "in steps of 3 bits, time-varying": ({"dim": 60, "down_bits": 3, "periods_per_span": 2}, [], {"vectors", "steps"}),
    "in steps, unknown start": ({"dim": 60, "down_bits": 6, "known_start": False}, [], {"vectors", "steps", "model"}),
    "in steps, long away": ({"dim": 140, "down_bits": 8, "periods_per_span": 1}, [], {"vectors", "steps"}),
    "in steps, away for ever": ({"dim": 170, "down_bits": 8, "periods_per_span": 1}, [], {"vectors", "steps", "model", "past"}, 24),
    "subspaces, away for ever": (
        {"dim": 60, "subspaces": 2, "periods_per_span": 1, "known_start": False},
        [lambda: LayerFreezing("blocks.*", periods_per_stage=9)],
        {"vectors", "model", "past"},
        24,
    ),
    "frozen": ({"dim": 20}, [lambda: LayerFreezing("blocks.*", periods_per_stage=2)], {"vectors"}),
    "frozen, long away": (
        {"dim": 100, "periods_per_span": 1},
        [lambda: LayerFreezing("blocks.*", periods_per_stage=2)],
        {"vectors", "model"},
    ),
    "growing": ({"dim": 20, "periods_per_span": 2}, [lambda: ProgressiveGrowth("blocks.*", periods_per_stage=2)], {"vectors"}),
    "growing, unknown start": (
        {"dim": 20, "known_start": False},
        [lambda: ProgressiveGrowth("blocks.*", periods_per_stage=2)],
        {"vectors", "model"},
    ),
    "growing in steps, unknown start": (
        {"dim": 60, "known_start": False, "down_bits": 3, "subspaces": 2, "draw": "round"},
        [lambda: ProgressiveGrowth("blocks.*", periods_per_stage=3)],
        {"vectors", "model", "steps"},
    ),
    "freezing, unknown start": (
        {"dim": 20, "known_start": False},
        [lambda: LayerFreezing("blocks.*", periods_per_stage=2)],
        {"vectors", "model"},
    ),
    "with depth dropout": ({"dim": 20}, [lambda: DepthDropout("blocks.*")], {"vectors"}),
    "depth dropout, unknown start": ({"dim": 20, "known_start": False}, [lambda: DepthDropout("blocks.*")], {"vectors", "model"}),
    "depth dropout, long away": ({"dim": 120, "periods_per_span": 1}, [lambda: DepthDropout("blocks.*")], {"vectors", "model"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_messages_suffice(way, net, points, federation, mail):
    options, others, told, rounds = (*WAYS[way], 8)[:4]
    plugins = lambda: [IntrinsicProjection(**options, gain=0.1), *[make() for make in others]]  # noqa: E731
    here, away, data = net(sgd), net(sgd), points([6, 10, 14, 8])
    settings = {"cohort": 2, "seed": SEED}
    one = federation(rounds, **settings).run(here, data, plugins())
    known = options.get("known_start", True)  # if not, clients begin with something else
    carrier = mail(federation(rounds, **settings), lambda: net(sgd, seed=0 if known else 7), data, plugins, server=away)
    other = federation(rounds, **settings).run(away, data, plugins(), carrier=carrier)
    assert told <= set().union(*map(kinds, carrier.sent))
    assert [row["bytes_down"] for row in one.history] == [row["bytes_down"] for row in other.history]
    assert carrier.off < 2e-6, carrier.off
    moved = max(float((value - start).detach().abs().max()) for value, start in zip(here.parameters(), net(sgd).parameters()))
    assert moved > 1e-3
