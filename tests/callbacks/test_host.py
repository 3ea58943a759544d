"""Any LightningModule, whatever it builds when; evaluation; losses that are added; errors in one clear line."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from featherlight.callbacks import DepthDropout, LayerFreezing, PluginCallback, ProgressiveGrowth
from featherlight.callbacks.parallel import refuse_untested
from featherlight.plugins import Plugin, Quantization, ServerCalibration

BLOCKS = {"blocks": "encoder.blocks.*"}


class Widening(nn.Module):
    """Blocks of widths 2, 4, 4: stage 1 needs a width adapter."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)
        self.blocks = nn.Sequential(*[nn.Conv2d(i, o, 3, padding=1) for i, o in ((2, 2), (2, 4), (4, 4))])

    def forward(self, x):
        return self.blocks(self.stem(x)).mean(dim=(2, 3))


def count_calls(model):
    """How often each block really computes: a block that is left out hands its input on without asking its convolution."""
    calls = [0] * len(model.encoder.blocks)
    for index, block in enumerate(model.encoder.blocks):

        def count(*_, index=index):
            calls[index] += 1

        block.conv.register_forward_hook(count)
    return calls


def test_evaluation_runs_all_blocks_that_are_there(toy, loader, make_trainer):
    """Four validation batches in all (one at the start, one after each step) see what the three training batches do not."""
    model = toy()
    calls = count_calls(model)
    dropping = DepthDropout(**BLOCKS, rate=0.99)
    make_trainer(dropping, max_epochs=1, val_check_interval=1, limit_val_batches=1, num_sanity_val_steps=1).fit(model, loader, loader)
    assert calls == [4, 4, 7]
    model = toy()
    calls = count_calls(model)
    growing = LayerFreezing(**BLOCKS, periods_per_stage=1)
    make_trainer(growing, max_epochs=2, limit_val_batches=1, num_sanity_val_steps=1).fit(model, loader, loader)
    assert calls == [1 + 4 + 4, 4, 0]


@pytest.mark.parametrize("built_in", ["setup", "configure_model"])
def test_layers_made_late(built_in, toy, loader, make_trainer, same_state, tmp_path):
    class Late(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = None

        training_step, forward, configure_optimizers = toy.training_step, toy.forward, toy.configure_optimizers

    def build(self, *_, **__):
        if self.encoder is not None:
            return
        own = toy()
        self.encoder, self.head, self.dropout, self.optimizer = own.encoder, own.head, own.dropout, own.optimizer

    setattr(Late, built_in, build)
    late, resumed, usual = Late(), Late(), toy()
    trainer = make_trainer(LayerFreezing(**BLOCKS), max_epochs=2)
    trainer.fit(late, loader)
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    make_trainer(LayerFreezing(**BLOCKS)).fit(resumed, loader, ckpt_path=tmp_path / "late.ckpt")
    make_trainer(LayerFreezing(**BLOCKS)).fit(usual, loader)
    same_state(resumed.state_dict(), usual.state_dict())
    assert torch.load(tmp_path / "late.ckpt", weights_only=True)["state_dict"].keys() == usual.state_dict().keys()


def test_a_checkpoint_is_evaluated_at_its_own_stage_and_has_the_module_s_keys(toy, loader, make_trainer, tmp_path):
    def callbacks():
        return [LayerFreezing(**BLOCKS, periods_per_stage=2)]

    model, path = toy(encoder=Widening), tmp_path / "one.ckpt"
    trainer = make_trainer(*callbacks(), max_epochs=2)
    trainer.fit(model, loader, loader)
    trainer.save_checkpoint(path)
    during = trainer.callback_metrics["loss"]
    assert torch.load(path, weights_only=True)["state_dict"].keys() == toy(encoder=Widening).state_dict().keys()
    assert model.state_dict().keys() == toy(encoder=Widening).state_dict().keys()
    other = toy(encoder=Widening)
    (after,) = make_trainer(*callbacks()).test(other, loader, ckpt_path=path, verbose=False)
    assert after["loss"] == pytest.approx(during.item())
    assert not hasattr(other, "width_adapters")
    (same_trainer,) = trainer.test(model, loader, ckpt_path=path, verbose=False)
    assert same_trainer == after
    (full_depth,) = make_trainer(*callbacks()).test(other, loader, verbose=False)
    assert full_depth["loss"] != pytest.approx(during.item())


def test_a_checkpoint_of_weights_alone_has_no_adapters(toy, loader, make_trainer, tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    trainer = make_trainer(ProgressiveGrowth(**BLOCKS, periods_per_stage=[2, 1, 1]), saving, enable_checkpointing=True, max_epochs=1)
    trainer.fit(toy(encoder=Widening), loader)
    toy(encoder=Widening).load_state_dict(torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"])


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_adapters_survive_a_resume(epochs, toy, loader, make_trainer, same_state, tmp_path):
    def run(upto, ckpt_path=None, save=None):
        model = toy(encoder=Widening)
        trainer = make_trainer(ProgressiveGrowth(**BLOCKS, periods_per_stage=[2, 1, 1]), max_epochs=upto)
        trainer.fit(model, loader, ckpt_path=ckpt_path)
        if save:
            trainer.save_checkpoint(save)
        return model.state_dict()

    run(epochs, save=tmp_path / "part.ckpt")
    same_state(run(4, tmp_path / "part.ckpt"), run(4))


# -- a fit that ends before the last stage ----------------------------------------------------------------------------
BLOCK = 4 * 4 * 9 + 2 * 4  # convolution without bias, batch norm


def untrained(recorded):
    return [str(warning.message) for warning in recorded if "never trained" in str(warning.message)]


def test_a_fit_that_ends_before_the_last_stage_says_so_once(toy, loader, make_trainer, recwarn):
    """Three blocks, two epochs a stage: the last stage begins with epoch 4."""
    callbacks = [LayerFreezing(**BLOCKS, periods_per_stage=2), DepthDropout(**BLOCKS, rate=0.99)]
    make_trainer(*callbacks, max_epochs=2).fit(toy(), loader)
    (first,) = untrained(recwarn)
    assert f"training ended in stage 1 of 3, so that {2 * BLOCK} parameters were never trained" in first
    assert "set max_epochs above 4" in first
    assert "trainer.test(ckpt_path=...)" in first
    recwarn.clear()
    make_trainer(LayerFreezing(**BLOCKS, periods_per_stage=2), max_epochs=4).fit(toy(), loader)
    (second,) = untrained(recwarn)
    assert f"training ended in stage 2 of 3, so that {BLOCK} parameters" in second


def test_an_adapter_of_an_earlier_stage_is_not_missed(toy, loader, make_trainer, recwarn):
    make_trainer(ProgressiveGrowth(**BLOCKS), max_epochs=2).fit(toy(encoder=Widening), loader)
    (message,) = untrained(recwarn)
    assert f"stage 2 of 3, so that {4 * 4 * 9 + 4} parameters" in message


@pytest.mark.parametrize(
    ("method", "epochs"),
    [
        (lambda: LayerFreezing(**BLOCKS), 3),  # its last stage has begun
        (lambda: LayerFreezing(**BLOCKS, grow=False), 1),  # everything trained in the first stage
        (lambda: DepthDropout(**BLOCKS, rate=0.99), 1),  # left out by a draw, and not by a stage
        (lambda: PluginCallback(Plugin()), 1),
    ],
)
def test_a_fit_that_trained_every_block_says_nothing(method, epochs, toy, loader, make_trainer, recwarn):
    trainer = make_trainer(method(), max_epochs=epochs)
    trainer.fit(toy(), loader)
    trainer.validate(toy(), loader, verbose=False)
    assert not untrained(recwarn)


def test_a_run_that_is_resumed_with_nothing_left_to_do_says_so_again(toy, loader, make_trainer, tmp_path):
    trainer = make_trainer(LayerFreezing(**BLOCKS), max_epochs=1)
    trainer.fit(toy(), loader)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.warns(UserWarning, match="training ended in stage 1 of 3"):
        make_trainer(LayerFreezing(**BLOCKS), max_epochs=1).fit(toy(), loader, ckpt_path=tmp_path / "one.ckpt")


class Pull(Plugin):
    """Adds the square of one weight, and the batch's length, to the loss."""

    def __init__(self, strength):
        self.strength = strength

    def extra_loss(self, model, batch):
        return self.strength * model.head.weight.square().sum() + 0 * len(batch[0])


@pytest.mark.parametrize("returns_dict", [False, True])
def test_an_added_loss_is_weight_decay(returns_dict, toy, loader, make_trainer, same_state):
    class Module(toy):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"loss": loss, "more": 1} if returns_dict else loss

    def plain(parameters):
        return torch.optim.SGD(parameters, 0.1)

    def decaying(parameters):
        parameters = list(parameters)
        last = [p for p in parameters if p.shape == (3, 4)]
        return torch.optim.SGD([{"params": [p for p in parameters if p is not last[0]]}, {"params": last, "weight_decay": 0.6}], 0.1)

    pulled, decayed = Module(plain), Module(decaying)
    make_trainer(PluginCallback(Pull(0.1)), PluginCallback(Pull(0.2))).fit(pulled, loader)
    make_trainer().fit(decayed, loader)
    for name, value in decayed.state_dict().items():
        torch.testing.assert_close(pulled.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert "training_step" not in vars(pulled)


class Order(Plugin):
    """Writes down every verb."""

    def __init__(self):
        self.verbs = []

    def attach(self, model):
        self.verbs.append("attach")

    def advance(self, clock):
        self.verbs.append(f"advance {clock.period}")
        return super().advance(clock)

    def visit(self, visit):
        self.verbs.append(f"visit {visit.round} {visit.seed}")

    def before_forward(self, clock):
        self.verbs.append(f"forward {clock.step}")

    def after_backward(self, clock):
        self.verbs.append("backward")

    def after_update(self, clock):
        self.verbs.append("update")

    def after_step(self, clock):
        self.verbs.append("step")

    def detach(self):
        self.verbs.append("detach")

    def describe(self):
        return {}


def test_order_of_the_verbs(toy, loader, make_trainer):
    """Gradients are complete after every second batch and after the last."""
    callback = PluginCallback(Order(), seed=5)
    make_trainer(callback, max_epochs=2, accumulate_grad_batches=2).fit(toy(), loader)
    steps = ["forward 0", "step", "forward 1", "backward", "update", "step", "forward 2", "backward", "update", "step"]
    epochs = [f"{verb} {epoch}{seed}" for epoch in (0, 1) for verb, seed in (("advance", ""), ("visit", " 5"))]
    assert callback.plugin.verbs == ["attach", *epochs[:2], *steps, *epochs[2:], *steps, "detach"]


def test_an_exception_leaves_an_ordinary_module(toy, loader, make_trainer):
    class Breaks(toy):
        def training_step(self, batch, batch_idx):
            if self.current_epoch == 1 and batch_idx == 1:
                raise ArithmeticError
            return super().training_step(batch, batch_idx)

    model = Breaks(encoder=Widening)
    with pytest.raises(ArithmeticError):
        make_trainer(LayerFreezing(**BLOCKS), PluginCallback(Pull(0.1))).fit(model, loader)
    assert all(p.requires_grad for p in model.parameters())
    assert {type(block) for block in model.encoder.blocks} == {nn.Conv2d}
    assert model.state_dict().keys() == toy(encoder=Widening).state_dict().keys()
    assert not {"training_step", "configure_model"} & vars(model).keys()


def test_a_run_that_fails_before_it_begins_can_be_started_again(toy, loader, make_trainer, same_state):
    class Fails(pl.Callback):
        def setup(self, *_, **__):
            raise ArithmeticError

    model, usual = toy(), toy()
    with pytest.raises(ArithmeticError):
        make_trainer(LayerFreezing(**BLOCKS), Fails()).fit(model, loader)
    with pytest.raises(ValueError, match="blocks_per_stage=4"):
        make_trainer(LayerFreezing(**BLOCKS, blocks_per_stage=4)).fit(model, loader)
    for each in (model, usual):
        make_trainer(LayerFreezing(**BLOCKS)).fit(each, loader)
    same_state(model.state_dict(), usual.state_dict())
    assert {type(block).__name__ for block in model.encoder.blocks} == {"Residual"}


def test_manual_optimization_cannot_be_added_to(toy, loader, make_trainer):
    model = toy()
    model.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="Pull adds to the loss, which needs automatic optimization"):
        make_trainer(PluginCallback(Pull(0.1))).fit(model, loader)


def test_an_optimizer_that_knows_only_some_parameters_is_refused(toy, loader, make_trainer):
    class Filtered(toy):
        def configure_optimizers(self):
            return torch.optim.SGD([*self.encoder.stem.parameters(), *self.encoder.blocks[:2].parameters(), *self.head.parameters()], 0.1)

    with pytest.raises(ValueError, match=r"encoder.blocks.2.conv.weight.*is in no optimizer; give configure_optimizers every"):
        make_trainer(LayerFreezing(**BLOCKS)).fit(Filtered(), loader)


def test_unknown_block_lists_what_there_is(toy, loader, make_trainer):
    with pytest.raises(ValueError, match=r'block "encoder.layer\*" not found; this Toy has inside "encoder": stem, blocks'):
        make_trainer(LayerFreezing(blocks="encoder.layer*")).fit(toy(), loader)


def test_two_seeds_are_refused(toy, loader, make_trainer):
    with pytest.raises(MisconfigurationException, match="seeds 1, 2, but a run has one"):
        make_trainer(LayerFreezing(**BLOCKS, seed=1), DepthDropout(**BLOCKS, seed=2)).fit(toy(), loader)


def test_the_seed_is_seed_everything_s(toy, loader, make_trainer, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    callback = PluginCallback(Order())
    make_trainer(callback, max_epochs=1).fit(toy(), loader)
    assert "visit 0 11" in callback.plugin.verbs


def test_sharding_strategies_are_refused(toy, loader, make_trainer, monkeypatch):
    for allowed in (SingleDeviceStrategy(), DDPStrategy()):
        refuse_untested(allowed)
    for sharding in (FSDPStrategy(), ModelParallelStrategy(), object.__new__(DeepSpeedStrategy)):
        with pytest.raises(MisconfigurationException, match=rf"under {type(sharding).__name__}.*use one device or strategy='ddp'"):
            refuse_untested(sharding)
    trainer = make_trainer(LayerFreezing(**BLOCKS))
    monkeypatch.setattr(type(trainer), "strategy", FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="under FSDPStrategy"):
        trainer.callbacks[0].setup(trainer, toy(), "fit")


def test_an_evaluated_module_without_a_checkpoint_is_left_as_it_is(toy, loader, make_trainer):
    model = toy()
    calls = count_calls(model)
    make_trainer(LayerFreezing(**BLOCKS)).test(model, loader, verbose=False)
    assert calls == [3, 3, 3]


def test_what_only_travels_is_refused():
    with pytest.raises(TypeError, match=r"Quantization changes what clients and server .* nothing travels: give it to fed_loop.Federation"):
        PluginCallback(Quantization())
    with pytest.raises(TypeError, match="ServerCalibration trains on the server of a federation"):
        PluginCallback(ServerCalibration())
