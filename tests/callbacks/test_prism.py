"""PriSM under a Trainer: an ordinary model before and after, whole whenever somebody looks, and a share of itself in every step."""

from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from group_normed import GroupNormed
from lightly.utils.lars import LARS
from torch import nn

from featherlight.callbacks import CostMonitor, IntrinsicProjection, LayerFreezing, PrismSampling
from featherlight.plugins.sampled_layers import Sampled

pytestmark = pytest.mark.filterwarnings("ignore:batch norm's running statistics")


def watching(layers):
    """A callback that calls ``layers(pl_module, epoch)`` after every step."""

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            layers(pl_module, trainer.current_epoch)

    return Look()


def test_the_model_ends_ordinary_and_trained(grouped, loader, make_trainer):
    model = grouped()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = {path: type(module) for path, module in model.named_modules()}
    make_trainer(PrismSampling(keep=0.5)).fit(model, loader)
    after = model.state_dict()
    assert list(after) == list(before)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name in before:
        assert not torch.equal(before[name], after[name]), name


def test_a_whole_share_trains_as_the_plain_model_does(grouped, loader, make_trainer):
    """κ = 1 under SGD without momentum and decay: the factors move as their product's gradient says, to first order in the step."""
    lr = 1e-4
    changes = []
    for callbacks in ([], [PrismSampling(keep=1.0)]):
        model = grouped(optimizer=lambda parameters: torch.optim.SGD(parameters, lr))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        make_trainer(*callbacks, max_epochs=1, limit_train_batches=1).fit(model, loader)
        changes.append({name: (value - before[name]) / lr for name, value in model.state_dict().items()})
    plain, sampled = changes
    for name in ("encoder.stem.weight", "encoder.blocks.0.0.bias", "encoder.blocks.1.1.weight", "head.weight"):
        torch.testing.assert_close(sampled[name], plain[name], rtol=1e-2, atol=2e-3)
    weight = "encoder.blocks.0.0.weight"  # of the product: u·uᵀ·g + g·vᵀ·v, a positive definite map of the plain gradient
    assert torch.nn.functional.cosine_similarity(sampled[weight].flatten(), plain[weight].flatten(), dim=0) > 0.5


def test_between_steps_the_weight_is_whole_and_current(grouped, loader, make_trainer):
    """What state_dict shows after every step is W + u₀(v − v₀) + (u − u₀)v, and evaluation computes with it."""
    seen = []

    def look(module, epoch):
        layer = module.encoder.blocks[0][0]
        dense = layer.weight.detach().flatten(1).clone()
        dense += layer.u_before @ (layer.v - layer.v_before).flatten(1)
        dense[layer.rows] += (layer.u - layer.u_before[layer.rows]) @ layer.v.flatten(1)
        shown = module.state_dict()["encoder.blocks.0.0.weight"]
        torch.testing.assert_close(shown.flatten(1), dense)
        x = torch.randn(2, 8, 6, 6)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), nn.functional.conv2d(x, shown, layer.bias, padding=1))
        seen.append(shown.clone())

    model = grouped()
    make_trainer(PrismSampling(keep=0.5), watching(look)).fit(model, loader)
    assert len(seen) == 9
    assert all(not torch.equal(one, other) for one, other in pairwise(seen))
    torch.testing.assert_close(model.state_dict()["encoder.blocks.0.0.weight"], seen[-1])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "lars": lambda p: LARS(p, 0.5, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_that_are_not_drawn_do_not_move(optimizer, accumulate, grouped, loader, make_trainer):
    states, moved = {}, {}

    def look(module, epoch):
        for layer, norm in module.encoder.blocks:
            for name, parameter in (("bias", layer.bias), ("weight", norm.weight), ("shift", norm.bias)):
                if parameter is None:
                    continue
                key = epoch, id(norm), name
                idle = torch.ones(8, dtype=torch.bool)
                idle[layer.rows] = False
                first, _ = states.setdefault(key, (parameter.detach().clone(), idle))
                assert torch.equal(parameter[idle], first[idle]), key
                moved[key] = not torch.equal(parameter[~idle], first[~idle])

    model = grouped(optimizer=OPTIMIZERS[optimizer])
    make_trainer(PrismSampling(keep=0.4), watching(look), accumulate_grad_batches=accumulate).fit(model, loader)
    assert moved
    assert sum(moved.values()) > len(moved) / 2


def test_every_epoch_draws_anew_and_momentum_starts_anew(grouped, loader, make_trainer):
    drawn, buffers = [], []

    def look(module, epoch):
        layer = module.encoder.blocks[1][0]
        state = module.trainer.optimizers[0].state[layer.u]["momentum_buffer"]
        if len(drawn) <= epoch:
            drawn.append(layer.rows.clone())
            buffers.append(torch.equal(state, layer.u.grad))  # the first step's momentum is its gradient

    make_trainer(PrismSampling(keep=0.4, seed=5), watching(look), max_epochs=4).fit(grouped(), loader)
    assert len({tuple(rows.tolist()) for rows in drawn}) > 1
    assert buffers == [True] * 4


def test_decay_acts_on_the_product(grouped, loader, make_trainer):
    """With a loss without gradient, a step of SGD is u − lr·wd·u·v·vᵀ, v − lr·wd·uᵀ·u·v, and no decay besides."""
    steps = []

    class Flat(type(grouped())):
        def training_step(self, batch, batch_idx):
            layer = self.encoder.blocks[0][0]
            self.was = layer.u.detach().clone(), layer.v.detach().flatten(1).clone()
            return 0.0 * super().training_step(batch, batch_idx)

    def look(module, epoch):
        layer = module.encoder.blocks[0][0]
        u, v = module.was
        torch.testing.assert_close(layer.u.detach(), u - 0.1 * 0.3 * u @ v @ v.T)
        torch.testing.assert_close(layer.v.detach().flatten(1), v - 0.1 * 0.3 * u.T @ u @ v)
        steps.append(epoch)

    model = Flat(encoder=GroupNormed, optimizer=lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.3))
    model.lr_scheduler_step = lambda *_: None
    make_trainer(PrismSampling(keep=0.5), watching(look), max_epochs=1).fit(model, loader)
    assert len(steps) == 3


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_several_optimizers_the_one_that_steps_decays(order, grouped, loader, make_trainer):
    steps = []

    class Two(type(grouped())):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.automatic_optimization = False

        def configure_optimizers(self):
            rest = [value for name, value in self.named_parameters() if not name.startswith("head")]
            return [torch.optim.SGD(self.head.parameters(), 0.1), torch.optim.SGD(rest, 0.1, weight_decay=0.3)]

        def training_step(self, batch, batch_idx):
            layer, optimizers = self.encoder.blocks[0][0], self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(0.0 * super().training_step(batch, batch_idx))
            u, v = layer.u.detach().clone(), layer.v.detach().flatten(1).clone()
            for index in order:
                optimizers[index].step()
            torch.testing.assert_close(layer.u.detach(), u - 0.1 * 0.3 * u @ v @ v.T)
            torch.testing.assert_close(layer.v.detach().flatten(1), v - 0.1 * 0.3 * u.T @ u @ v)
            steps.append(order)

    make_trainer(PrismSampling(keep=0.5), max_epochs=1).fit(Two(encoder=GroupNormed), loader)
    assert len(steps) == 3


def test_a_momentum_copy_samples_as_its_twin(byol, loader, make_trainer):
    def look(module, epoch):
        for online, target in zip(module.encoder.modules(), module.target.modules()):
            if isinstance(online, Sampled):
                assert torch.equal(online.rows, target.rows)
                assert not target.u.requires_grad

    model = byol(encoder=GroupNormed)
    make_trainer(PrismSampling(keep=0.5), watching(look)).fit(model, loader)
    assert not any(parameter.requires_grad for parameter in model.target.parameters())


def test_of_a_momentum_copy_the_layers_that_are_taken_apart_begin_anew(byol, loader, make_trainer):
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                online, target = pl_module.encoder.state_dict(), pl_module.target.state_dict()
                seen.append({name for name in online if not torch.equal(online[name], target[name])})

    make_trainer(PrismSampling(keep=0.5), Look(), max_epochs=2).fit(byol(encoder=GroupNormed), loader)
    assert not seen[0]
    assert "stem.weight" in seen[1]
    assert not {name for name in seen[1] if name.startswith(("blocks.0.0.", "blocks.1.0."))}


@pytest.mark.parametrize("first", [True, False])
def test_beside_a_projection_on_a_subspace_it_is_refused(first, grouped, loader, make_trainer):
    callbacks = [PrismSampling(keep=0.5), IntrinsicProjection(dim=16)]
    with pytest.raises(ValueError, match=r"IntrinsicProjection needs the same parameters in every period, and PrismSampling trains others"):
        make_trainer(*(callbacks if first else callbacks[::-1])).fit(grouped(), loader)


def test_with_layer_freezing(grouped, loader, make_trainer, snapshots):
    """The first block's weight and bias do not move once it is frozen, though another share of it computes."""
    model = grouped()
    make_trainer(snapshots, PrismSampling(keep=0.5), LayerFreezing(blocks="encoder.blocks.*", periods_per_stage=1), max_epochs=2).fit(
        model, loader
    )
    first, second = snapshots.states
    for name in ("encoder.blocks.0.0.bias", "encoder.blocks.0.1.weight"):
        assert torch.equal(first[name], second[name]), name
    torch.testing.assert_close(first["encoder.blocks.0.0.weight"], second["encoder.blocks.0.0.weight"], rtol=0, atol=1e-6)
    assert not torch.equal(first["encoder.blocks.1.0.weight"], second["encoder.blocks.1.0.weight"])


def test_after_other_methods_it_is_refused(grouped, loader, make_trainer):
    with pytest.raises(ValueError, match="put it first among the plugins"):
        make_trainer(LayerFreezing(blocks="encoder.blocks.*"), PrismSampling()).fit(grouped(), loader)


def test_several_shares_are_refused():
    with pytest.raises(ValueError, match="on one machine there is one client; give it one share"):
        PrismSampling(keep={0.2: 0.5, 0.4: 0.5})


@pytest.mark.parametrize("arguments", [{"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}], ids=str)
def test_clipping_and_precision(arguments, grouped, loader, make_trainer):
    model = grouped()
    make_trainer(PrismSampling(keep=0.5), **arguments).fit(model, loader)
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_a_step_keeps_less_for_backward(grouped, loader, make_trainer):
    costs = []
    for callbacks in ([], [PrismSampling(keep=0.25)]):
        monitor = CostMonitor(show=False)
        make_trainer(*callbacks, monitor, max_epochs=1).fit(grouped(), loader)
        costs.append(monitor.table.total())
    plain, sampled = costs
    assert sampled["saved_bytes"] < plain["saved_bytes"]
    assert sampled["flops_forward"] < plain["flops_forward"]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda width: nn.GroupNorm(2, width)], ids=["batch norm", "group norm"])
def test_evaluation_is_of_the_whole_model(norm, toy, loader, make_trainer):
    """What a Trainer reports after the last epoch, an ordinary copy computes from the state that training leaves."""

    class Encoder(GroupNormed):
        def __init__(self):
            super().__init__()
            for block in self.blocks:
                block[1] = norm(8)

    model = toy(encoder=Encoder)
    trainer = make_trainer(PrismSampling(keep=0.5))
    trainer.fit(model, loader, loader)
    reported = trainer.callback_metrics["loss"]
    other = toy(encoder=Encoder)
    other.load_state_dict(model.state_dict())
    after = make_trainer().validate(other, loader, verbose=False)[0]["loss"]
    torch.testing.assert_close(torch.tensor(after), reported, rtol=1e-5, atol=1e-5)
