"""Interrupted and resumed equals uninterrupted, bit for bit, at every moment at which a checkpoint can be written."""

import os
import random
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from featherlight.callbacks import CostMonitor, DepthDropout, FreshStart, LayerFreezing, PrismSampling, ProgressiveGrowth


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


STAGES = {"blocks": "encoder.blocks.*", "periods_per_stage": 1}
METHODS = {
    "freezing": lambda: [LayerFreezing(**STAGES, init="copy_previous")],
    "two epochs a stage": lambda: [LayerFreezing(blocks="encoder.blocks.*", periods_per_stage=2, init="copy_previous")],
    "growth with dropout of blocks": lambda: [
        ProgressiveGrowth(blocks="encoder.blocks.*", periods_per_stage=[1, 1, 2], warmup_periods=1),
        DepthDropout(blocks="encoder.blocks.*", every="batch"),
    ],
    "sampling": lambda: [PrismSampling(keep=0.5, warmup_periods=1), LayerFreezing(**STAGES)],
    "the module's own dropout": lambda: [LayerFreezing(**STAGES, init="copy_previous"), DepthDropout(blocks="encoder.blocks.*")],
    "fresh starts": lambda: [FreshStart(), LayerFreezing(**STAGES), DepthDropout(blocks="encoder.blocks.*")],
}


@pytest.mark.parametrize("method", METHODS)
def test_resumed_is_uninterrupted(method, byol, toy, loader, make_trainer, same_state, tmp_path, positioned):
    def model():
        return toy(dropout=0.5) if method in ("fresh starts", "the module's own dropout") else byol(dropout=0.5)

    def run(*more, ckpt_path=None):
        trained, cost = model(), CostMonitor(show=False)
        make_trainer(*METHODS[method](), cost, *more).fit(trained, positioned(), ckpt_path=ckpt_path)
        for row in (rows := cost.table.to_json())["rows"] + [rows["total"]]:
            del row["seconds"]
        return trained.state_dict(), rows

    saving = SaveAlways(tmp_path)
    whole, cost = run(saving)
    assert len(saving.paths) == 12
    for path in saving.paths[:-1]:
        # a copy at the start of a stage, done twice, would lose what the first batches had learned
        resumed, resumed_cost = run(ckpt_path=path)
        same_state(resumed, whole)
        assert resumed_cost == cost, path


@pytest.mark.parametrize("plugins", [lambda: [], METHODS["the module's own dropout"]], ids=["none", "a method"])
def test_resumed_from_what_a_resumed_run_has_written(plugins, toy, make_trainer, same_state, tmp_path, positioned):
    """At an epoch's end Lightning itself loses count of epochs."""

    def run(folder, ckpt_path=None):
        folder.mkdir()
        trained, saving = toy(), SaveAlways(folder)
        trainer = make_trainer(*plugins(), CostMonitor(show=False), saving)
        trainer.fit(trained, positioned(), ckpt_path=ckpt_path)
        return trained.state_dict(), saving.paths, (trainer.current_epoch, trainer.global_step)

    whole, paths, ended = run(tmp_path / "whole")
    for place, path in enumerate(path for path in paths if path.name in ("0-batch-2.ckpt", "0-end.ckpt", "1-batch-0.ckpt")):
        _, later, again = run(tmp_path / f"{place}", path)
        assert again == ended
        for number, own in enumerate(later):
            resumed, _, again = run(tmp_path / f"{place} {number}", own)
            assert again == ended, (path.name, own.name)
            same_state(resumed, whole)


def test_resumed_with_max_steps(toy, loader, make_trainer, same_state, tmp_path, positioned):
    saving = SaveAlways(tmp_path)
    whole = toy()
    make_trainer(*METHODS["freezing"](), saving, max_steps=8, max_epochs=-1).fit(whole, positioned())
    within = [
        path for path in saving.paths[:-2] if "batch" in path.name
    ]  # at an epoch's end Lightning itself repeats that end's schedulers
    for path in within:
        resumed = toy()
        make_trainer(*METHODS["freezing"](), max_steps=8, max_epochs=-1).fit(resumed, positioned(), ckpt_path=path)
        same_state(resumed.state_dict(), whole.state_dict())


def test_saved_after_training_and_gone_on_with(toy, loader, make_trainer, same_state, tmp_path):
    whole, part, rest = toy(), toy(), toy()
    make_trainer(*METHODS["freezing"]()).fit(whole, loader)
    first = make_trainer(*METHODS["freezing"](), max_epochs=2)
    first.fit(part, loader)
    first.save_checkpoint(tmp_path / "after.ckpt")
    make_trainer(*METHODS["freezing"]()).fit(rest, loader, ckpt_path=tmp_path / "after.ckpt")
    same_state(rest.state_dict(), whole.state_dict())


def test_killed_at_a_random_moment(tmp_path, same_state):
    """A fresh interpreter forks the runs: what kills one of them must not be near pytest's own threads."""
    seed = os.environ.get("PYTEST_SEED", str(random.randrange(10**6)))
    print(f"PYTEST_SEED={seed}")
    subprocess.run([sys.executable, "-W", "ignore", Path(__file__).parent / "kill_and_resume.py", tmp_path, seed], check=True, timeout=200)
    whole, resumed = (torch.load(tmp_path / name / "done.pt") for name in ("whole", "killed"))
    same_state(resumed, whole)


def test_another_configuration_is_named(toy, loader, make_trainer, tmp_path):
    trainer = make_trainer(*METHODS["freezing"](), max_epochs=1)
    trainer.fit(toy(), loader)
    trainer.save_checkpoint(path := tmp_path / "one.ckpt")

    def resume(*callbacks):
        make_trainer(*callbacks).fit(toy(), loader, ckpt_path=path)

    with pytest.raises(ValueError, match=r"periods_per_stage=1 of LayerFreezing, this run has 5: resume with the same"):
        resume(LayerFreezing(blocks="encoder.blocks.*", periods_per_stage=5, init="copy_previous"))
    with pytest.raises(ValueError, match="made with LayerFreezing, this run has LayerFreezing, DepthDropout"):
        resume(*METHODS["freezing"](), DepthDropout(blocks="encoder.blocks.*"))
    with pytest.raises(ValueError, match="seed=0 of the run, this run has 7"):
        resume(LayerFreezing(**STAGES, init="copy_previous", seed=7))
    plain = make_trainer(max_epochs=1)
    plain.fit(toy(), loader)
    plain.save_checkpoint(path)
    with pytest.raises(ValueError, match="made with no plugins, this run has LayerFreezing"):
        resume(*METHODS["freezing"]())


def test_checkpoints_hold_plain_data_and_load_without_code(toy, loader, make_trainer, tmp_path):
    trainer = make_trainer(
        *METHODS["fresh starts"](),
        CostMonitor(show=False),
        ModelCheckpoint(tmp_path, save_last=True),
        max_epochs=1,
        enable_checkpointing=True,
    )
    trainer.fit(toy(), loader)
    entry = torch.load(tmp_path / "last.ckpt", weights_only=True)["featherlight"]
    assert [plugin["plugin"] for plugin in entry["plugins"]] == ["LayerFreezing", "DepthDropout"]
