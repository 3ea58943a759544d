"""Whose weights they are, before, while and after PrismSampling trains."""

import lightning.pytorch as pl
import pytest
import torch
from group_normed import GroupNormed
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from featherlight.callbacks import PrismSampling

pytestmark = pytest.mark.filterwarnings("ignore:batch norm's running statistics")


def other_state(grouped):
    torch.manual_seed(7)
    return {name: torch.randn_like(value) for name, value in grouped().state_dict().items()}


def test_what_is_loaded_after_a_fit_is_what_is_evaluated(grouped, loader, make_trainer, same_state):
    """And what a checkpoint holds, which goes on from it."""
    model, loaded = grouped(), other_state(grouped)
    trainer = make_trainer(PrismSampling(keep=0.5), max_epochs=1)
    trainer.fit(model, loader)
    model.load_state_dict(loaded)
    reported = trainer.validate(model, loader, verbose=False)[0]["loss"]
    same_state(model.state_dict(), loaded)
    plain = grouped()
    plain.load_state_dict(loaded)
    assert reported == pytest.approx(make_trainer().validate(plain, loader, verbose=False)[0]["loss"], rel=1e-5)


def test_a_checkpoint_after_a_fit_is_of_what_the_module_has_then(grouped, loader, make_trainer, tmp_path):
    model, loaded = grouped(), other_state(grouped)
    trainer = make_trainer(PrismSampling(keep=0.5), max_epochs=1)
    trainer.fit(model, loader)
    model.load_state_dict(loaded)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    started = []

    class Start(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            started.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    make_trainer(PrismSampling(keep=0.5), Start(), max_epochs=2).fit(grouped(), loader, ckpt_path=tmp_path / "after.ckpt")
    for name, value in loaded.items():
        torch.testing.assert_close(started[0][name], value, rtol=1e-5, atol=1e-5)


def test_a_second_model_starts_from_its_own_weights(grouped, loader, make_trainer):
    callback, started = PrismSampling(keep=0.5), []

    class Start(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            started.append(pl_module.state_dict()["encoder.blocks.0.0.weight"].clone())

    make_trainer(callback, max_epochs=1).fit(grouped(), loader)
    second = grouped()
    second.load_state_dict(other_state(grouped))
    own = second.encoder.blocks[0][0].weight.detach().clone()
    make_trainer(callback, Start(), max_epochs=1).fit(second, loader)
    torch.testing.assert_close(started[0], own, rtol=1e-5, atol=1e-5)


def test_an_ordinary_state_may_be_loaded_while_it_trains(grouped, loader, make_trainer):
    loaded = other_state(grouped)
    seen = []

    class Load(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            pl_module.load_state_dict(loaded)
            now = pl_module.state_dict()
            assert all(torch.equal(now[name], value) for name, value in loaded.items())
            seen.append(now)
            pl_module.load_state_dict(now)  # a state of its own comes back as it was, too
            assert all(torch.equal(pl_module.state_dict()[name], value) for name, value in now.items())

    model = grouped()
    make_trainer(PrismSampling(keep=0.5), Load(), max_epochs=1).fit(model, loader)
    assert len(seen) == 1
    assert torch.equal(model.encoder.blocks[0][0].weight, loaded["encoder.blocks.0.0.weight"])


def test_a_checkpoint_of_weights_alone_is_an_ordinary_module_s(grouped, loader, make_trainer, tmp_path, same_state):
    saving = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    model = grouped()
    make_trainer(PrismSampling(keep=0.5), saving, enable_checkpointing=True, max_epochs=2).fit(model, loader)
    state = torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"]
    assert list(state) == list(grouped().state_dict())
    other = grouped()
    other.load_state_dict(state)
    same_state(other.state_dict(), model.state_dict())


class Encoder(nn.Module):
    """Images (N, 1, 6, 6) as 6 tokens through torch's own encoder; features (N, 4)."""

    def __init__(self, padded):
        super().__init__()
        self.padded, self.embed, self.out = padded, nn.Linear(6, 8), nn.Linear(8, 4)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)

    def forward(self, x):
        mask = (torch.arange(6) > 3).expand(len(x), 6) if self.padded else None
        return self.out(self.layers(self.embed(x[:, 0]), src_key_padding_mask=mask)[:, :4].mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_torch_s_transformer_is_evaluated_with_the_current_weight(padded, toy, loader, make_trainer):
    def model():
        return toy(encoder=lambda: Encoder(padded), optimizer=lambda p: torch.optim.SGD(p, 1.0))

    differences = []

    class Look(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            ordinary = model()
            ordinary.load_state_dict({name: value for name, value in pl_module.state_dict().items() if name in ordinary.state_dict()})
            x = next(iter(loader))[0]
            with torch.no_grad():
                differences.append((pl_module.eval()(x) - ordinary.eval()(x)).abs().max().item())
            pl_module.train()

    trained = model()
    make_trainer(PrismSampling(keep=0.5), Look(), max_epochs=1).fit(trained, loader)
    assert differences[0] < 1e-5
    assert not any(module._forward_pre_hooks for module in trained.modules())


@pytest.mark.parametrize("first", [True, False])
def test_averaging_of_weights_is_refused(first, grouped, loader, make_trainer):
    callbacks = [PrismSampling(keep=0.5), StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)]
    model = grouped()
    with pytest.raises(MisconfigurationException, match=r"StochasticWeightAveraging averages .* parameter by parameter, .* leave it out"):
        make_trainer(*(callbacks if first else callbacks[::-1])).fit(model, loader)
    assert type(model.encoder.blocks[0][0]) is nn.Conv2d


def test_a_run_that_diverged_says_so(grouped, loader, make_trainer):
    class Diverges(type(grouped())):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * float("nan")

    with pytest.raises(ValueError, match=r'layer "encoder\.blocks\.0\.0" is not finite.*: training diverged; lower the learning rate'):
        make_trainer(PrismSampling(keep=0.5)).fit(Diverges(encoder=GroupNormed), loader)


def test_twice_is_refused(make_trainer, toy, loader):
    """Both would decay the same factors."""
    with pytest.raises(ValueError, match="PrismSampling stands twice among the plugins"):
        make_trainer(PrismSampling(keep=0.5), PrismSampling(keep=0.5)).fit(toy(), loader)
