"""Losses of self-supervision against loops over pairs, and against lightly's."""

import math

import pytest
import torch
from lightly.loss import NTXentLoss
from torch import Tensor
from torch.nn.functional import normalize

from featherlight.ssl_models import BYOL, MoCoV3, SimCLR
from featherlight.ssl_models.moco_v3 import info_nce
from featherlight.ssl_models.ssl import SelfSupervised

SMALL = {
    "backbone": "vit",
    "image_size": 8,
    "in_channels": 1,
    "backbone_options": {"depth": 2, "width": 16, "heads": 2, "patch_size": 4},
}
HEADS = {"hidden_dim": 32, "output_dim": 16}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def small(model: type[SelfSupervised], **options) -> SelfSupervised:
    return model(**SMALL, **HEADS, **options)


def unit_rows(x: Tensor) -> list[list[float]]:
    return [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in x.tolist()]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b))


def test_simclr_loss_is_the_loop_over_all_views() -> None:
    model = small(SimCLR, temperature=0.3).eval()
    x0, x1 = torch.randn(2, 5, 1, 8, 8)
    with torch.no_grad():
        z = unit_rows(torch.cat([model.projector(model.features(x)) for x in (x0, x1)]))
        loss = model.view_loss(x0, x1)
    expected = 0.0
    for i in range(10):
        others = [math.exp(dot(z[i], z[j]) / 0.3) for j in range(10) if j != i]
        expected -= math.log(math.exp(dot(z[i], z[(i + 5) % 10]) / 0.3) / sum(others)) / 10
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale_by_2tau", [False, True])
def test_moco_loss_is_the_loop_over_queries_and_keys(scale_by_2tau: bool) -> None:
    model = small(MoCoV3, temperature=0.2, scale_by_2tau=scale_by_2tau).eval()
    with torch.no_grad():
        for parameter in model.backbone_target.parameters():
            parameter.add_(0.05)  # a target that differs from the online branch
        views = x0, x1 = torch.randn(2, 5, 1, 8, 8)
        q = [unit_rows(model.predictor(model.projector(model.features(x)))) for x in views]
        k = [unit_rows(model.projector_target(model.backbone_target(x))) for x in views]
        loss = model.view_loss(x0, x1)
    expected = 0.0
    for queries, keys in ((q[0], k[1]), (q[1], k[0])):
        for i in range(5):
            all_keys = [math.exp(dot(queries[i], key) / 0.2) for key in keys]
            expected -= math.log(all_keys[i] / sum(all_keys)) / 5
    assert loss.item() == pytest.approx(expected * (2 * 0.2 if scale_by_2tau else 1), rel=1e-5)


def test_a_queue_gives_the_negatives_as_in_lightlys_loss() -> None:
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(7, 16))
    queries, keys = torch.randn(2, 5, 16)
    torch.testing.assert_close(info_nce(queries, keys, 0.2, theirs.memory_bank.bank.clone()), theirs(queries, keys))


def test_the_queue_holds_the_newest_keys_of_training() -> None:
    model = small(MoCoV3, queue_size=12)
    before = model.queue.clone()
    assert torch.allclose(before.norm(dim=1), torch.ones(12))
    x0, x1 = torch.randn(2, 5, 1, 8, 8)
    model.eval()
    model.view_loss(x0, x1)
    assert torch.equal(model.queue, before)
    model.train()
    model.view_loss(x0, x1).backward()
    with torch.no_grad():
        keys = torch.cat([model.projector_target(model.backbone_target(x)) for x in (x0, x1)])
    torch.testing.assert_close(model.queue[:10], normalize(keys, dim=1))
    assert torch.equal(model.queue[10:], before[:2])
    assert "queue" in model.state_dict()
    assert "queue" not in small(MoCoV3).state_dict()
    with pytest.raises(ValueError, match="queue_size=-1: give how many keys are kept"):
        small(MoCoV3, queue_size=-1)


def test_info_nce_is_not_ntxent() -> None:
    from lightly.loss import NTXentLoss

    queries, keys = torch.randn(2, 8, 4)
    assert abs(info_nce(queries, keys, 0.5) - NTXentLoss(0.5)(queries, keys)) > 0.1


def test_byol_loss_is_the_squared_distance_of_unit_vectors() -> None:
    model = small(BYOL).eval()
    views = x0, x1 = torch.randn(2, 5, 1, 8, 8)
    with torch.no_grad():
        p = [unit_rows(model.predictor(model.projector(model.features(x)))) for x in views]
        t = [unit_rows(model.projector_target(model.backbone_target(x))) for x in views]
        loss = model.view_loss(x0, x1)
    squared = [sum((a - b) ** 2 for a, b in zip(*rows)) for rows in (*zip(p[0], t[1]), *zip(p[1], t[0]))]
    assert loss.item() == pytest.approx(sum(squared) / 5, rel=1e-5)


def test_simclr_loss_is_lightlys() -> None:
    from lightly.loss import NTXentLoss

    from featherlight.ssl_models.simclr import nt_xent

    z0, z1 = torch.randn(2, 6, 9)
    torch.testing.assert_close(nt_xent(z0, z1, 0.2), NTXentLoss(0.2)(z0, z1))
