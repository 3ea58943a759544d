"""Our own modules in random subspaces, federated and under a Trainer: they train there, and targets follow what was projected."""

import lightning.pytorch as pl
import pytest
import torch

from featherlight import callbacks
from featherlight.plugins import IntrinsicProjection, Plugin, find_targets
from featherlight.plugins.projections import PROJECTIONS
from featherlight.plugins.seeds import derive
from featherlight.ssl_models import Classifier

DIM, SEED = 50, 3


def flat(values):
    values = [value.detach().flatten() for value in values]
    return torch.cat(values).double() if values else torch.zeros(0)


@pytest.fixture
def make(ssl):
    def build(name):
        options = {"lr": 0.05, "optimizer": "sgd", "weight_decay": 0.0}
        if name != "classifier":
            return ssl(name, depth=1, **options)
        torch.manual_seed(0)
        backbone = {"depth": 1, "width": 16, "heads": 2, "patch_size": 4, "mlp_ratio": 2.0}
        return Classifier("vit", image_size=8, in_channels=1, backbone_options=backbone, **options)

    return build


def online(module):
    skip = tuple(f"{path}." for path in find_targets(module))
    return [value for name, value in module.named_parameters() if not skip or not name.startswith(skip)]


def targets(module):
    """Every target's parameters, flat, and their online twins'."""
    paths = find_targets(module).items()
    pairs = [(module.get_submodule(target), module.get_submodule(own)) for target, own in paths]
    twins = [(dict(target.named_parameters()), dict(own.named_parameters())) for target, own in pairs]
    return tuple(flat(side[at][name] for side in twins for name in side[0]) for at in (0, 1))


def watched(module):
    """Where targets were before each of their moves, and where online twins and targets were after."""
    moves = []
    if not hasattr(module, "after_optimizer_step"):
        return moves
    move = module.after_optimizer_step

    def after_optimizer_step():
        before = targets(module)[0]
        move()
        after, own = targets(module)
        moves.append((before, own, after))

    module.after_optimizer_step = after_optimizer_step
    return moves


class Federated(Plugin):
    """Weights at the end of every step."""

    def __init__(self):
        self._ends = []

    def attach(self, model):
        self._model = model

    def after_step(self, clock):
        self._ends.append(targets(self._model)[1])


class Fitted(pl.Callback):
    """Weights at the end of every step."""

    def __init__(self):
        self.ends = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.ends.append(targets(pl_module)[1])


def check(module, start, moves, ends):
    moved = flat(online(module)) - start
    projection = PROJECTIONS["fastfood"](len(moved), DIM, derive(SEED, "intrinsic", 0, 0))
    a = torch.stack([projection.lift(unit) for unit in torch.eye(DIM, dtype=torch.float64)], 1)
    inside = a @ torch.linalg.lstsq(a, moved[:, None]).solution[:, 0]
    assert float(moved.norm()) > 1e-3
    assert float((moved - inside).norm() / moved.norm()) < 1e-3
    assert bool(moves) == bool(find_targets(module))
    for before, own, after in moves:
        assert any(torch.equal(own, end) for end in ends), "a target followed weights that no step ended at"
        torch.testing.assert_close(after, before + (1 - module.momentum) * (own - before), rtol=1e-5, atol=1e-7)


MODELS = pytest.mark.parametrize("name", ["simclr", "byol", "mocov3", "classifier"])


@pytest.mark.parametrize("space", ["gradient", "subspace"])
@MODELS
def test_federated(name, space, make, digits, federation):
    module, watch = make(name), Federated()
    start, moves = flat(online(module)), watched(module)
    data = digits(num_clients=2, limit_train=64, views=1 if name == "classifier" else 2)
    result = federation(2, seed=SEED).run(module, data, [watch, IntrinsicProjection(DIM, space=space)])
    assert all(row["rejected"] == 0 for row in result.history)
    check(module, start, moves, watch._ends)


@MODELS
def test_under_a_trainer(name, make, digits, tmp_path):
    module, watch = make(name), Fitted()
    start, moves = flat(online(module)), watched(module)
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    acting = [callbacks.IntrinsicProjection(dim=DIM, seed=SEED), watch]
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=acting, default_root_dir=tmp_path, **silent)
    trainer.fit(module, digits(num_clients=1, limit_train=48, views=1 if name == "classifier" else 2))
    check(module, start, moves, watch.ends)
