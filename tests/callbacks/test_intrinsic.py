"""Training in a subspace under a Trainer: where weights go, what stays, and a run that is resumed."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from featherlight import plugins
from featherlight.callbacks import IntrinsicProjection, LayerFreezing, ProgressiveGrowth
from featherlight.plugins.projections import PROJECTIONS
from featherlight.plugins.seeds import derive

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def dense(size, dim, span=0, kind="fastfood", seed=0):
    projection = PROJECTIONS[kind](size, dim, derive(seed, "intrinsic", span, 0))
    return torch.stack([projection.lift(unit) for unit in torch.eye(dim, dtype=torch.float64)], 1)


def flat(values):
    return torch.cat([value.detach().flatten() for value in values]).double()


def outside(moved, a):
    """Share of ``moved`` that is not in the range of ``a``."""
    inside = a @ torch.linalg.lstsq(a, moved[:, None]).solution[:, 0]
    return float((moved - inside).norm() / moved.norm())


class Moves(pl.Callback):
    """Parameters after every batch, with the epoch."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self.start = flat(pl_module.parameters())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append((trainer.current_epoch, flat(pl_module.parameters())))


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}], ids=["plain", "accumulated, clipped"])
@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_stay_in_the_subspace(optimizer, kind, options, toy, loader, make_trainer):
    model, moves = toy(optimizer=OPTIMIZERS[optimizer]), Moves()
    make_trainer(IntrinsicProjection(dim=30, projection=kind, seed=3), moves, **options).fit(model, loader)
    a = dense(len(moves.start), 30, kind=kind, seed=3)
    assert len(moves.seen) == 9
    steps = {tuple(values.tolist()) for _, values in moves.seen}
    assert len(steps) == (7 if options else 9)  # two of three micro-batches end in a step; before the first, the start
    for _, values in moves.seen:
        moved = values - moves.start
        if float(moved.norm()):
            assert outside(moved, a) < 1e-3
    assert outside(torch.randn_like(moved), a) > 0.9


def test_one_step_by_hand(toy, loader, make_trainer):
    """θ − γ·lr·A·Aᵀ·g of plain SGD, γ = √(d/D)."""
    model, plain = (toy(optimizer=lambda p: torch.optim.SGD(p, 0.1)) for _ in range(2))
    start = flat(model.parameters())
    make_trainer(IntrinsicProjection(dim=40), max_steps=1).fit(model, loader)
    make_trainer(max_steps=1).fit(plain, loader)
    a = dense(len(start), 40)
    wanted = start + (40 / len(start)) ** 0.5 * a @ (a.T @ (flat(plain.parameters()) - start))
    torch.testing.assert_close(flat(model.parameters()), wanted, rtol=1e-5, atol=1e-6)
    for name, value in plain.named_buffers():
        assert torch.equal(model.get_buffer(name), value), name


def test_a_span_is_a_subspace(toy, loader, make_trainer):
    """Epochs 0 and 1 in one subspace, epoch 2 in another."""
    model, moves = toy(), Moves()
    make_trainer(IntrinsicProjection(dim=20, periods_per_span=2), moves).fit(model, loader)
    first, second = (dense(len(moves.start), 20, span) for span in (0, 1))
    assert outside(moves.seen[5][1] - moves.start, first) < 1e-3
    later = moves.seen[8][1] - moves.seen[5][1]
    assert outside(later, second) < 1e-3
    assert outside(later, first) > 0.5


def test_frozen_things_stay(toy, loader, make_trainer):
    model = toy()
    model.encoder.stem.requires_grad_(False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    make_trainer(IntrinsicProjection(dim=20)).fit(model, loader)
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == name.startswith("encoder.stem"), name


def test_with_layer_freezing(toy, loader, make_trainer, snapshots):
    """A stage's own subspace: what is frozen or not there yet does not move."""
    model = toy()
    states = [{name: value.clone() for name, value in model.state_dict().items()}]
    make_trainer(snapshots, IntrinsicProjection(dim=20), LayerFreezing(blocks="encoder.blocks.*")).fit(model, loader)
    states += snapshots.states
    for stage in range(3):
        trained = ("head", f"encoder.blocks.{stage}", *(["encoder.stem"] if stage == 0 else []))
        names = [name for name, _ in model.named_parameters() if name.startswith(trained)]
        before, after = states[stage], states[stage + 1]
        for name, _ in model.named_parameters():
            assert torch.equal(before[name], after[name]) == (name not in names), (stage, name)
        moved = flat(after[name] for name in names) - flat(before[name] for name in names)
        assert outside(moved, dense(len(moved), 20, stage)) < 1e-3


def test_momentum_copies_are_no_part_of_it(byol, loader, make_trainer):
    model = byol()
    make_trainer(IntrinsicProjection(dim=20)).fit(model, loader)
    assert not torch.equal(model.target.stem[0].weight, model.encoder.stem[0].weight)
    assert not any(parameter.requires_grad for parameter in model.target.parameters())


def test_an_ordinary_model_afterwards(toy, loader, make_trainer, same_state):
    """Detached: the next run of the module trains all of it, as another module of the same weights does."""
    model, other = toy(), toy()
    keys = list(model.state_dict())
    make_trainer(IntrinsicProjection(dim=10)).fit(model, loader)
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        make_trainer(max_epochs=1).fit(one, loader)
    same_state(model.state_dict(), other.state_dict())


def test_a_callback_used_again_begins_anew(toy, loader, make_trainer, same_state):
    callback, one, other = IntrinsicProjection(dim=10, periods_per_span=1), toy(), toy()
    make_trainer(callback).fit(toy(blocks=2), loader)
    make_trainer(callback).fit(one, loader)
    make_trainer(IntrinsicProjection(dim=10, periods_per_span=1)).fit(other, loader)
    same_state(one.state_dict(), other.state_dict())


def test_what_is_of_federations_is_no_option_here():
    with pytest.raises(ValueError, match="subspaces=2: on one machine there is one client"):
        plugins.IntrinsicProjection(dim=10, subspaces=2).in_place()
    for name, value in (("subspaces", 2), ("space", "gradient"), ("draw", "round"), ("known_start", False), ("momentum", 0.9)):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            IntrinsicProjection(dim=10, **{name: value})


class States(pl.Callback):
    """For each epoch, how many parameters the optimizer remembers when it begins."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.seen.append(len(trainer.optimizers[0].state))


def test_an_optimizer_begins_anew_in_a_new_subspace(toy, loader, make_trainer):
    states, model = States(), toy()
    make_trainer(IntrinsicProjection(dim=20, periods_per_span=2), states, max_epochs=5).fit(model, loader)
    count = len(list(model.parameters()))
    assert states.seen == [0, count, 0, count, 0]


@pytest.mark.parametrize("gain", ["length", "projection"])
def test_half_precision_stays_in_the_subspace(gain, toy, loader, make_trainer):
    """Weights are θ₀ + A·Σ, rounded once, after every step."""
    model, callback, sums = toy(optimizer=lambda p: torch.optim.SGD(p, 0.1)), IntrinsicProjection(dim=30, gain=gain), []

    class Sums(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            lifted = callback.plugin._map(0, 0).lift(callback.plugin._spans[0].sums[0].float())
            sums.append((lifted, flat(pl_module.parameters())))

    make_trainer(callback, Sums(), precision="bf16-true").fit(model, loader)
    start = flat(toy().bfloat16().parameters()).float()
    assert len(sums) == 9
    for lifted, found in sums:
        assert torch.equal((start + lifted).bfloat16().double(), found)
    assert float(sums[-1][0].norm()) > 1e-3
    assert all(value.dtype == torch.bfloat16 for value in model.parameters())


def test_half_precision_resumed(toy, loader, make_trainer, same_state, tmp_path, positioned):
    saving, whole = SaveAlways(tmp_path), toy()
    make_trainer(IntrinsicProjection(dim=20, periods_per_span=2), saving, precision="bf16-true").fit(whole, positioned())
    for path in saving.paths[2:9:3]:
        resumed = toy()
        trainer = make_trainer(IntrinsicProjection(dim=20, periods_per_span=2), precision="bf16-true")
        trainer.fit(resumed, positioned(), ckpt_path=path)
        same_state(resumed.state_dict(), whole.state_dict())


# -- resuming ---------------------------------------------------------------------------------------------------------
class SaveAlways(pl.Callback):
    """A checkpoint after every batch and every epoch."""

    def __init__(self, folder):
        self.folder, self.paths = folder, []

    def save(self, trainer, name):
        self.paths.append(self.folder / f"{trainer.current_epoch}-{name}.ckpt")
        trainer.save_checkpoint(self.paths[-1])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.save(trainer, f"batch-{batch_idx}")

    def on_train_epoch_end(self, trainer, pl_module):
        self.save(trainer, "end")


METHODS = {
    "static": lambda: [IntrinsicProjection(dim=20)],
    "time-varying": lambda: [IntrinsicProjection(dim=20, periods_per_span=2, projection="sparse_signs")],
    "layer-wise": lambda: [IntrinsicProjection(dim=20), LayerFreezing(blocks="encoder.blocks.*")],
    "warm-up": lambda: [IntrinsicProjection(dim=20), ProgressiveGrowth(blocks="encoder.blocks.*", periods_per_stage=2, warmup_periods=1)],
}


@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_uninterrupted(method, toy, loader, make_trainer, same_state, tmp_path, positioned):
    """After every batch and at every epoch's end; which subspace comes next depends on how many there were."""
    saving, whole, epochs = SaveAlways(tmp_path), toy(), 4 if method == "warm-up" else 3
    make_trainer(*METHODS[method](), saving, max_epochs=epochs).fit(whole, positioned())
    assert len(saving.paths) == 4 * epochs
    for path in saving.paths[1:-1:2]:
        resumed = toy()
        make_trainer(*METHODS[method](), max_epochs=epochs).fit(resumed, positioned(), ckpt_path=path)
        same_state(resumed.state_dict(), whole.state_dict())


def test_saved_after_training_and_gone_on_with(toy, loader, make_trainer, same_state, tmp_path):
    whole, rest = toy(), toy()
    make_trainer(*METHODS["time-varying"]()).fit(whole, loader)
    first = make_trainer(*METHODS["time-varying"](), max_epochs=2)
    first.fit(toy(), loader)
    first.save_checkpoint(tmp_path / "after.ckpt")
    make_trainer(*METHODS["time-varying"]()).fit(rest, loader, ckpt_path=tmp_path / "after.ckpt")
    same_state(rest.state_dict(), whole.state_dict())


def test_a_checkpoint_holds_no_second_model(toy, loader, make_trainer, tmp_path):
    """Plain data, the module's own keys, and of the subspaces a few numbers for each dimension."""
    trainer = make_trainer(IntrinsicProjection(dim=5), ModelCheckpoint(tmp_path, save_last=True), max_epochs=1, enable_checkpointing=True)
    trainer.fit(toy(), loader)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"].keys() == toy().state_dict().keys()
    (state,) = checkpoint["featherlight"]["state"].values()
    assert sum(value.numel() for span in state["spans"] for value in span.values() if isinstance(value, torch.Tensor)) <= 5


def test_more_dimensions_than_a_later_stage_trains(toy, loader, make_trainer):
    """Found before the first step; a resumed run looks at what is to come, and goes on as if it had not (test_resumed_is_uninterrupted)."""
    moves = Moves()
    with pytest.raises(ValueError, match="dim=200: 167 parameters train in stage 2; give that many or fewer"):
        make_trainer(LayerFreezing(blocks="encoder.blocks.*"), IntrinsicProjection(dim=200), moves, max_epochs=3).fit(toy(), loader)
    assert not moves.seen


def test_looking_ahead_leaves_no_trace(toy, loader, make_trainer):
    """What trains in the first stage, and which modules evaluate."""

    class Modes(pl.Callback):
        seen = None

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            own = [module.training for module in pl_module.modules()], [p.requires_grad for p in pl_module.parameters()]
            self.seen = self.seen or own

    found = []
    for looking in ([], [IntrinsicProjection(dim=20)]):
        modes, model = Modes(), toy()
        for block in model.encoder.blocks:  # their owner's wish, in blocks that train
            for inner in block.children():
                inner.eval()
        make_trainer(LayerFreezing(blocks="encoder.blocks.*"), *looking, modes).fit(model, loader)
        found.append(modes.seen)
    assert found[0] == found[1]
    assert len(set(found[0][0])) == 2


def test_stages_behind_the_last_step_are_nobodys_concern(toy, loader, make_trainer):
    moves = Moves()
    freezing = LayerFreezing(blocks="encoder.blocks.*", periods_per_stage=5)
    make_trainer(freezing, IntrinsicProjection(dim=200), moves, max_epochs=-1, max_steps=2).fit(toy(), loader)
    assert len(moves.seen) == 2
