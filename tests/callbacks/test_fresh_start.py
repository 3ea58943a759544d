"""With FreshStart, a Trainer's epochs are the turns of a federation's only client, bit for bit."""

import lightning.pytorch as pl
import torch

from featherlight.callbacks import DepthDropout, FreshStart, LayerFreezing
from featherlight.plugins import Chain, Clock, Visit
from featherlight.plugins.seeds import derive

BLOCKS = {"blocks": "encoder.blocks.*"}


def callbacks():
    return [LayerFreezing(**BLOCKS, periods_per_stage=1, init="copy_previous", seed=3), DepthDropout(**BLOCKS)]


def by_turns(model, loader):
    """What a client does: a new optimizer each round, torch's generator seeded by (seed, round, client)."""
    chain = Chain(callback.plugin for callback in callbacks())
    chain.attach(model)
    for round in range(3):
        chain.advance(Clock(round, 0))
        chain.visit(Visit(round, 0, seed=3))
        (optimizer,), _ = model.configure_optimizers()
        optimizer.param_groups[0]["lr"] *= 0.9**round
        torch.manual_seed(derive(3, round, 0, "model"))
        for step, batch in enumerate(loader):
            chain.before_forward(Clock(round, step))
            optimizer.zero_grad()
            model.training_step(batch, step).backward()
            optimizer.step()
            chain.after_update(Clock(round, step))
            chain.after_step(Clock(round, step))
    chain.detach()
    return model.state_dict()


def test_epochs_are_turns(toy, loader, make_trainer, same_state):
    loader.generator = torch.Generator()  # its draws, one at the start of each pass, must not come from the model's stream
    model = toy(dropout=0.5)
    make_trainer(FreshStart(), *callbacks()).fit(model, loader)
    same_state(model.state_dict(), by_turns(toy(dropout=0.5), loader))


def test_targets_begin_each_epoch_as_their_online_branch(byol, loader, make_trainer):
    class Look(pl.Callback):
        def __init__(self):
            self.equal = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            online, target = pl_module.encoder.state_dict(), pl_module.target.state_dict()
            self.equal.append(all(torch.equal(online[name], target[name]) for name in online))

    look = Look()
    make_trainer(*callbacks(), FreshStart(), look, max_epochs=2).fit(byol(), loader)
    assert look.equal == [True, False, False] * 2
