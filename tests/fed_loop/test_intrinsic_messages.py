"""What comes down suffices: clients that know θ₀, the seed and their messages, and nothing of the server, have the server's model."""

import pytest
import torch

from featherlight.plugins import DepthDropout, IntrinsicProjection, LayerFreezing, ProgressiveGrowth
from featherlight.plugins.projections import PROJECTIONS
from featherlight.plugins.seeds import derive
from featherlight.plugins.subspaces import step_of

SEED = 3


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


class Client:
    """What one client holds: parameters as it knew them, and vectors with those that the parameters contain already."""

    def __init__(self, start):
        self.start = dict(start)
        self.vectors, self.within, self.past, self.kept = {}, {}, -1, set()


class Literal(IntrinsicProjection):
    """Trains clients on what they make of their messages alone.

    Args:
        start: parameters that every client knows, float64; or nothing.
    """

    def __init__(self, start, **options):
        super().__init__(**options)
        self._start, self._clients, self._shapes = start, {}, {}
        self._told = {"steps": 0, "vectors": 0, "model": 0, "alone": 0, "past": 0, "worst": 0.0}

    def decode_down(self, message, visit):
        # what a schedule tells every client: of each span, which parameters train and how many numbers they have
        self._shapes |= {span.number: (span.names, span.size) for span in self._spans}
        client = self._clients.setdefault(visit.client, Client(self._start))
        own = {name: value for name, value in message.items() if name.startswith("intrinsic.")}
        rest = {name: value for name, value in message.items() if name not in own}
        model = {name: value.double() for name, value in rest.items() if name in self._names}
        marks, alone = {}, client.kept.issuperset(own)  # of intrinsic entries nothing came
        client.kept = set(own)
        for name in sorted(name for name in own if "+" in name):
            part, _, _ = name.removeprefix("intrinsic.").partition("+")
            key = tuple(map(int, part.split(".")))
            client.vectors[key] = client.vectors.get(key, 0) + step_of(own.pop(name), self.dim, self.down_bits)
            self._told["steps"] += 1
        for name, value in own.items():
            middle, _, _ = name.removeprefix("intrinsic.").partition("@")
            if middle in self._names:
                model[middle] = value.double()
            elif middle == "past":
                self._told["past"] += 1
            elif middle != "start":
                marks[tuple(map(int, middle.split(".")))] = value.double()
        client.vectors |= {key: value for key, value in marks.items() if len(value)}
        if model and alone:
            self._told["alone"] += 1
            return rest
        if model:  # with all that was done up to now: of the span under way so much as its vectors say
            client.start |= model
            client.past, client.within = max(self._shapes), dict(client.vectors)
        self._told["model" if model else "vectors"] += 1
        values = {name: value.clone() for name, value in client.start.items()}
        for (span, which), vector in client.vectors.items():
            if span < client.past:
                continue
            names, size = self._shapes[span]
            seed = derive(visit.seed, "intrinsic", span, which)
            parts = PROJECTIONS[self.projection](size, self.dim, seed).lift(vector - client.within.get((span, which), 0 * vector))
            for name, part in zip(names, parts.split([values[name].numel() for name in names])):
                values[name] += part.view_as(values[name])
        held = super().decode_down(message, visit)
        off = [float((values[name] - value).abs().max()) for name, value in held.items() if name in values]
        self._told["worst"] = max([self._told["worst"], *off])
        return rest | {name: values[name] for name in held if name in values}

    @property
    def _names(self):
        return dict(self._model.named_parameters())


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
    "more vectors than parameters": ({"dim": 150, "subspaces": 4, "serve": "all"}, [], {"vectors", "alone"}),
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
def test_messages_suffice(way, net, points, federation):
    options, others, told, rounds = (*WAYS[way], 8)[:4]
    known = options.get("known_start", True)
    start = {name: value.detach().double() for name, value in net(sgd).named_parameters()} if known else {}
    plain, module, data = net(sgd), net(sgd), points([6, 10, 14, 8])
    literal = Literal(start, **options, gain=0.1)
    settings = {"cohort": 2, "seed": SEED}
    one = federation(rounds, **settings).run(plain, data, [IntrinsicProjection(**options, gain=0.1), *[make() for make in others]])
    other = federation(rounds, **settings).run(module, data, [literal, *[make() for make in others]])
    assert told <= {name for name, count in literal._told.items() if count}
    assert literal._told["worst"] < 2e-6
    assert [row["bytes_down"] for row in one.history] == [row["bytes_down"] for row in other.history]
    moved = max(float((value - start).detach().abs().max()) for value, start in zip(plain.parameters(), net(sgd).parameters()))
    assert moved > 1e-3
