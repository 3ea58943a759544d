"""Secure aggregation's rule: a server that sees but sums of masked whole numbers, modulo 2⁶⁴, comes to the same weights, bit for bit.

Each pair of a round's clients shares a mask, which one adds and the other subtracts: of a single message nothing can be read, in the sum
of all of them masks cancel. (How two clients come to a secret of their own, and what is done where one vanishes, is a protocol's business:
Bonawitz et al., 2017.)
"""

import copy

import pytest
import torch
from torch import nn

from featherlight.fed_loop import weighing
from featherlight.fed_loop.aggregate import Mean
from featherlight.fed_loop.weighing import FixedMean
from featherlight.plugins import (
    MOON,
    ClientPrivacy,
    DepthDropout,
    FedEMA,
    FetchSGD,
    IntrinsicProjection,
    LayerFreezing,
    NormClipping,
    PrismSampling,
    ProgressiveGrowth,
    Proximal,
    Quantization,
    RepresentationAlignment,
    TopK,
)
from featherlight.plugins.seeds import generator

SIZES = [10, 3, 14, 6]
THROUGH = ["stem", "blocks", "dropout", "head"]
BY_SUMS = {
    "averaging": lambda: [],
    "LayerFreezing": lambda: [LayerFreezing("blocks.*")],
    "ProgressiveGrowth": lambda: [ProgressiveGrowth("blocks.*")],
    "DepthDropout": lambda: [DepthDropout("blocks.*")],
    "PrismSampling": lambda: [PrismSampling({0.3: 0.5, 0.6: 0.5}, layers="blocks.*")],
    "IntrinsicProjection": lambda: [IntrinsicProjection(20, subspaces=2, periods_per_span=2)],
    "FetchSGD": lambda: [FetchSGD(20, 3, 10)],
    "TopK, read before it is masked": lambda: [TopK(20)],
    "Quantization, read before it is masked": lambda: [Quantization()],
    "NormClipping, of clients that keep to it": lambda: [NormClipping(0.5)],
    "ClientPrivacy, noise by clients": lambda: [ClientPrivacy(0.5, 0.1, delta=1e-3, shares=4, statistics="stay")],
    "ClientPrivacy, noise by the server": lambda: [IntrinsicProjection(20), ClientPrivacy(0.5, 0.1, delta=1e-3, statistics="stay")],
    "held near": lambda: [FedEMA(of="blocks"), RepresentationAlignment(through=THROUGH), MOON(through=THROUGH), Proximal(0.1)],
}


def mask(pair, shape):
    """Uniform over all 2⁶⁴ values."""
    halves = torch.randint(0, 2**32, (2, *shape), generator=generator("pair", *pair), dtype=torch.int64)
    return (halves[0] << 32) + halves[1]


class Masked:
    """In place of sums: every client's own, as whole numbers, masked; the server has but their total.

    Args:
        clients: how many there are.
    """

    clients = len(SIZES)

    def __init__(self, *args):
        super().__init__(*args)
        self.number, self.blank, self.total = 0, copy.deepcopy(self), []

    def add(self, update, weight=0.0):
        client, own = copy.deepcopy(self.blank), []
        super(Masked, client).add(update, weight)
        super(Masked, client).reduce(lambda numbers: own.append(numbers) or numbers)
        masked = []
        for part, value in enumerate(own):
            for other in range(self.clients):
                if other != self.number:
                    pair = (part, min(self.number, other), max(self.number, other))
                    value = value + (1 if self.number < other else -1) * mask(pair, value.shape)
            masked.append(value)
        assert {value.dtype for value in masked} == {torch.int64}
        assert not any(torch.equal(value, plain) for value, plain in zip(masked, own) if value.numel())
        self.total = [had + value for had, value in zip(self.total, masked)] or masked
        self.number += 1

    def result(self):
        parts = iter(self.total)
        super().reduce(lambda _: next(parts))
        return super().result()


class MaskedMean(Masked, Mean):
    pass


class MaskedFixedMean(Masked, FixedMean):
    pass


@pytest.mark.parametrize("way", BY_SUMS)
def test_masked_sums_give_the_same_weights(way, federation, net, points, same, monkeypatch):
    def run():
        module = net()
        done = federation(3, seed=3).run(module, points(SIZES), BY_SUMS[way]())
        assert done.rejected == 0
        return module.state_dict()

    plain = run()
    monkeypatch.setattr(weighing, "Mean", MaskedMean)
    monkeypatch.setattr(weighing, "FixedMean", MaskedFixedMean)
    same(run(), plain)


def test_a_masked_message_looks_like_nothing():
    """Of one client's numbers, all zeros: every bit is set in half of them, and no two are alike."""
    mean = MaskedMean({"w": torch.zeros(4000)})
    mean.add({"w": torch.zeros(4000)}, 0.25)
    seen = mean.total[0][0]
    bits = torch.stack([(seen >> bit) & 1 for bit in range(64)]).double().mean(1)
    assert bool(((bits - 0.5).abs() < 5 * 0.5 / 4000**0.5).all())
    assert len(seen.unique()) == 4000


def test_where_one_is_missing_nothing_can_be_read():
    """Masks of those who came do not cancel, and what is read is far from any mean."""
    mean = MaskedMean({"w": torch.zeros(1000)})
    for _ in range(3):
        mean.add({"w": torch.ones(1000)}, 0.25)
    assert float((mean.total[0][0].double() / 2**30).abs().median()) > 2**20


def test_networks_without_statistics_too(federation, net, points, same, monkeypatch):
    """Counts of batches, which are whole numbers, are among what is summed above; here there are none."""

    def run():
        module = net()
        for block in module.blocks:
            block.norm = nn.LayerNorm(8)
        federation(2, cohort=4).run(module, points(SIZES), [])
        return module.state_dict()

    plain = run()
    monkeypatch.setattr(weighing, "Mean", MaskedMean)
    same(run(), plain)
