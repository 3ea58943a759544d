"""A frozen weight, its norm's statistics and its optimizer state do not move, whatever trains around it."""

import lightning.pytorch as pl
import pytest
import torch
from lightly.utils.lars import LARS
from torch import nn

from featherlight.callbacks import LayerFreezing, ProgressiveGrowth

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "lars": lambda p: LARS(p, 0.5, momentum=0.9, weight_decay=0.1),
}


def freezing(**arguments):
    return LayerFreezing(blocks="encoder.blocks.*", periods_per_stage=1, **arguments)


def below(prefixes, names):
    return {name for name in names if name.startswith(prefixes)}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_nothing_frozen_moves(optimizer, accumulate, toy, loader, make_trainer, snapshots):
    model = toy(OPTIMIZERS[optimizer])
    make_trainer(snapshots, freezing(), accumulate_grad_batches=accumulate).fit(model, loader)
    first, second, third = snapshots.states
    for before, after, frozen, absent, active in (
        (first, second, ("encoder.stem", "encoder.blocks.0"), ("encoder.blocks.2",), "encoder.blocks.1.conv.weight"),
        (second, third, ("encoder.stem", "encoder.blocks.0", "encoder.blocks.1"), (), "encoder.blocks.2.conv.weight"),
    ):
        for name in below(frozen + absent, before):
            assert torch.equal(before[name], after[name]), name
        for name in (active, active.replace("conv.weight", "norm.running_mean"), "head.weight"):
            assert not torch.equal(before[name], after[name]), name
    assert not below(("encoder.stem", "encoder.blocks.0"), snapshots.with_state[1])
    assert below(("encoder.blocks.1",), snapshots.with_state[1])
    assert not below(("encoder.stem", "encoder.blocks.0", "encoder.blocks.1"), snapshots.with_state[2])


@pytest.mark.parametrize("arguments", [{"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}], ids=str)
def test_clipping_and_precision(arguments, toy, loader, make_trainer, snapshots):
    model = toy()
    make_trainer(snapshots, freezing(), **arguments).fit(model, loader)
    first, _, third = snapshots.states
    for name in below(("encoder.stem", "encoder.blocks.0"), first):
        assert torch.equal(first[name], third[name]), name
    assert not torch.equal(first["encoder.blocks.2.conv.weight"], third["encoder.blocks.2.conv.weight"])
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class Manual(pl.LightningModule):
    """Two optimizers and two schedulers, stepped by hand; toggling switches requires_grad on and off."""

    def __init__(self, toy):
        super().__init__()
        self.automatic_optimization = False
        own = toy()
        self.encoder, self.head = own.encoder, own.head

    def training_step(self, batch, batch_idx):
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers()):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.head(self.encoder(batch[0])), batch[1]))
            self.clip_gradients(optimizer, 1.0, "norm")
            optimizer.step()
            scheduler.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        optimizers = [OPTIMIZERS["adamw"](self.encoder.parameters()), OPTIMIZERS["sgd"](self.head.parameters())]
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(each, lambda step: 0.9**step) for each in optimizers]


def test_manual_optimization_with_two_optimizers(toy, loader, make_trainer, snapshots):
    make_trainer(snapshots, freezing()).fit(Manual(toy), loader)
    first, second, _ = snapshots.states
    for name in below(("encoder.stem", "encoder.blocks.0", "encoder.blocks.2"), first):
        assert torch.equal(first[name], second[name]), name
    assert not torch.equal(first["encoder.blocks.1.conv.weight"], second["encoder.blocks.1.conv.weight"])
    assert not torch.equal(first["head.weight"], second["head.weight"])


def by_hand(model, loader, trains):
    """The loop a person would write: ``trains(epoch)`` gives the blocks in the forward pass, and those that train."""
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for epoch in range(3):
        present, training = trains(epoch)
        encoder = model.encoder
        for part, on in [(encoder.stem, 0 in training), *[(block, i in training) for i, block in enumerate(encoder.blocks)]]:
            part.train(on)
            for parameter in part.parameters():
                parameter.requires_grad_(on)
                if not on:
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)
        for images, labels in loader:
            optimizer.zero_grad()
            features = encoder.stem(images)
            for index in present:
                features = encoder.blocks[index](features)
            nn.functional.cross_entropy(model.head(features.mean(dim=(2, 3))), labels).backward()
            optimizer.step()
        scheduler.step()
    return model.state_dict()


@pytest.mark.parametrize("method", [LayerFreezing, ProgressiveGrowth])
def test_equals_the_loop_written_by_hand(method, toy, loader, make_trainer, same_state):
    model = toy()
    make_trainer(method(blocks="encoder.blocks.*", periods_per_stage=1)).fit(model, loader)

    def trains(epoch):
        newest = [epoch] if method is LayerFreezing else range(epoch + 1)
        return range(epoch + 1), list(newest)

    same_state(model.state_dict(), by_hand(toy(), loader, trains))


def test_a_target_that_is_a_deep_copy_follows(byol, loader, make_trainer, snapshots):
    model = byol()
    make_trainer(snapshots, freezing()).fit(model, loader)
    _, second, third = snapshots.states
    for state, frozen in ((second, ("stem", "blocks.0")), (third, ("stem", "blocks.0", "blocks.1"))):
        for name in below(tuple(f"encoder.{part}" for part in frozen), state):
            assert torch.equal(state[name], state[name.replace("encoder", "target", 1)]), name
    newest = "blocks.2.conv.weight"
    assert not torch.equal(third[f"encoder.{newest}"], third[f"target.{newest}"])
    assert not torch.equal(second[f"target.{newest}"], third[f"target.{newest}"])
    assert not any(p.requires_grad for p in model.target.parameters())
    assert all(p.requires_grad for p in model.encoder.parameters())
    assert type(model.encoder.blocks[0]).__name__ == type(model.target.blocks[0]).__name__ == "Residual"
