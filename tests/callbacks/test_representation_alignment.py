"""Alignment under a Trainer: to the model that the epoch began with."""

import pytest
import torch

from featherlight.callbacks import CostMonitor, LayerFreezing, PluginCallback, RepresentationAlignment
from featherlight.plugins import MOON, FedEMA, Proximal

THROUGH = ["encoder", "dropout", "head"]


def methods():
    return [
        RepresentationAlignment(through=THROUGH),
        LayerFreezing(blocks="encoder.blocks.*", periods_per_stage=1),
        PluginCallback(Proximal(0.1)),
    ]


def state_of(toy, loader, make_trainer, *callbacks, **arguments):
    model = toy(dropout=0.5)
    make_trainer(*callbacks, **arguments).fit(model, loader)
    return model.state_dict()


def test_an_epoch_begins_where_it_is_pulled_to(toy, loader, make_trainer):
    """The first step of an epoch is as without the method by cosine; later ones are not."""
    plain = state_of(toy, loader, make_trainer, max_epochs=1)
    first, whole = (
        state_of(toy, loader, make_trainer, PluginCallback(Proximal(1.0)), max_epochs=1, limit_train_batches=batches) for batches in (1, 3)
    )
    alone = state_of(toy, loader, make_trainer, max_epochs=1, limit_train_batches=1)
    assert all(torch.equal(first[name], alone[name]) for name in first)
    assert not torch.equal(whole["head.weight"], plain["head.weight"])


def test_resumed_within_an_epoch(toy, loader, make_trainer, same_state, tmp_path, positioned):
    """The model that the epoch began with is in the checkpoint, and evaluation in between changes nothing."""
    whole, resumed = toy(), toy()
    paths = []

    class Save(CostMonitor):
        def on_train_batch_end(self, trainer, *arguments):
            super().on_train_batch_end(trainer, *arguments)
            paths.append(tmp_path / f"{len(paths)}.ckpt")
            trainer.save_checkpoint(paths[-1])

    make_trainer(*methods(), Save(show=False), max_epochs=2).fit(whole, positioned(), loader)
    assert torch.load(paths[4], weights_only=True)["featherlight"]["state"]["0"]["received"].keys()
    make_trainer(*methods(), CostMonitor(show=False), max_epochs=2).fit(resumed, positioned(), loader, ckpt_path=paths[4])
    same_state(resumed.state_dict(), whole.state_dict())


def test_what_is_held_counts(toy, loader, make_trainer):
    rows = []
    for callbacks in ([], [RepresentationAlignment(through=THROUGH)]):
        monitor = CostMonitor(show=False)
        make_trainer(*callbacks, monitor, max_epochs=1).fit(toy(), loader)
        rows.append(monitor.table.to_json()["rows"][0])
    plain, aligned = rows
    assert aligned["params_held"] == 2 * plain["params_held"]
    assert aligned["flops_forward"] > 1.9 * plain["flops_forward"]
    assert aligned["peak_bytes"] > plain["peak_bytes"]


@pytest.mark.parametrize("plugin", [MOON(), FedEMA()], ids=lambda plugin: type(plugin).__name__)
def test_what_needs_a_federation_says_so(plugin):
    with pytest.raises(TypeError, match=r"needs what a federation's clients remember .* give it to fed_loop.Federation, or leave it out"):
        PluginCallback(plugin)
