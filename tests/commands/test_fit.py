"""``featherlight fit``, ``validate`` and ``test``: what they save, refuse and tell."""

import errno
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from featherlight.cli import main

CONFIG = """
trainer: {max_epochs: 1, accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}
model:
  class_path: SimCLR
  init_args:
    backbone: vit
    backbone_options: {depth: 1, width: 16, heads: 2, patch_size: 4}
    image_size: 8
    in_channels: 1
    hidden_dim: 16
    output_dim: 8
    optimizer: sgd
    lr: 1.0e-3
data:
  class_path: ImageData
  init_args: {dataset: digits, batch_size: 32, limit_train: 128}
probes:
  - class_path: KNN
"""
LAST = Path("runs/small/checkpoints/last.ckpt")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(CONFIG)


def run(*arguments: object) -> int:
    """The exit code of ``featherlight ARGUMENTS``."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that tells what was wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("featherlight: error:")]
    assert len(lines) == 1
    return lines[0]


def weights() -> dict[str, Any]:
    return torch.load(LAST, weights_only=True)["state_dict"]


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_last_good_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    """The last batch of the first epoch is finite, as are the weights after it; the learning rate then goes through the roof."""
    assert run("fit", "-c", "small.yaml") == 0
    before = LAST.read_bytes()
    checkpoint = torch.load(LAST, weights_only=True)
    groups, schedule = checkpoint["optimizer_states"][0]["param_groups"], checkpoint["lr_schedulers"][0]
    for group in groups:
        group["lr"] = group["initial_lr"] = 1e38
    schedule["base_lrs"] = [1e38] * len(groups)
    torch.save(checkpoint, LAST)
    steep = LAST.read_bytes()
    assert before != steep
    assert run("fit", "-c", "small.yaml", "--resume", "--trainer.max_epochs", 3) == 2
    told = error(capsys)
    assert "is not finite at epoch 1, step" in told
    assert "lower learning rate" in told
    assert str(LAST) in told
    assert LAST.read_bytes() == steep
    assert all(value.isfinite().all() for value in weights().values())


@pytest.mark.parametrize("steps", [1, 4])
def test_no_weights_are_saved_that_are_not_finite(steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    """With one step an epoch the loss is still finite when the weights no longer are."""
    options = ["--model.init_args.lr", "1e38", "--trainer.max_epochs", 3, "--trainer.limit_train_batches", steps]
    assert run("fit", "-c", "small.yaml", *options) == 2
    assert "is not finite at epoch" in error(capsys)
    for path in Path("runs").rglob("*.ckpt"):
        assert all(value.isfinite().all() for value in torch.load(path, weights_only=True)["state_dict"].values())


class Malice:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("content", [b"", pickle.dumps(Malice()), b"PK\x03\x04 cut"], ids=["empty", "malicious", "cut"])
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_a_damaged_or_malicious_checkpoint_is_refused(command: str, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    LAST.parent.mkdir(parents=True)
    LAST.write_bytes(content)
    assert run(command, "-c", "small.yaml", *(["--resume"] if command == "fit" else ["--ckpt_path", LAST])) == 2
    assert "cannot be read: damaged, or not tensors and plain data alone" in error(capsys)
    assert not Path("owned").exists()


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_code_inside_a_zip_checkpoint_is_not_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    LAST.parent.mkdir(parents=True)
    torch.save({"state_dict": {}, "more": Malice()}, LAST)
    assert run(command, "-c", "small.yaml", *(["--resume"] if command == "fit" else ["--ckpt_path", LAST])) == 2
    assert "cannot be read" in error(capsys)
    assert not Path("owned").exists()


def test_a_checkpoint_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", "-c", "small.yaml", "--ckpt_path", "nowhere.ckpt") == 2
    assert "nowhere.ckpt does not exist" in error(capsys)


def test_a_run_goes_on_only_with_its_own_model_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "-c", "small.yaml") == 0
    for option, value, told in [
        ("--model.init_args.optimizer", "adamw", "model.init_args.optimizer was sgd, now adamw"),
        ("--data.init_args.batch_size", 64, "data.init_args.batch_size was 32, now 64"),
        ("--trainer.precision", "bf16", "trainer.precision was 32-true, now bf16-mixed"),
        ("--trainer.gradient_clip_val", 0.5, "trainer.gradient_clip_val was 0, now 0.5"),
        ("--trainer.gradient_clip_algorithm", "value", "trainer.gradient_clip_algorithm was norm, now value"),
        ("--trainer.accumulate_grad_batches", 2, "trainer.accumulate_grad_batches was 1, now 2"),
    ]:
        capsys.readouterr()
        assert run("fit", "-c", "small.yaml", "--resume", option, value) == 2
        assert told in error(capsys)
    assert (
        run("fit", "--config=small.yaml", "--resume", "--trainer.max_epochs=2", "--data.init_args.root=elsewhere", "--trainer.precision=32")
        == 0
    )
    assert torch.load(LAST, weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("command", ["validate", "test"])
def test_probes_judge_the_loaded_checkpoint(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "-c", "small.yaml", "--model.init_args.lr=0.1") == 0
    told = capsys.readouterr().out.split()
    figure = told[told.index("knn") + 1]
    assert run(command, "-c", "small.yaml", "--ckpt_path", LAST) == 0
    told = capsys.readouterr().out.split()
    assert told[told.index("knn") + 1] == figure


def test_help_of_fit_tells_of_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "--help") == 0
    told = capsys.readouterr()
    assert "--resume" in told.out
    assert "finding all options takes some seconds" in told.err


@pytest.mark.parametrize("words", [["-c", "a/way.yaml"], ["-c=a/way.yaml"], ["--config=a/way.yaml"], ["--config", "a/way.yaml"]])
def test_a_run_is_named_after_its_file_however_that_is_given(words: list[str]) -> None:
    from featherlight.commands.lightning_run import _name

    assert _name(["--trainer.max_epochs=1", *words, "--trainer.devices", "1"]) == "way"
    assert _name(["--trainer.max_epochs=1"]) == "fit"


def test_a_full_disk_leaves_the_last_good_checkpoint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "-c", "small.yaml") == 0
    before = weights()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run("fit", "-c", "small.yaml", "--resume", "--trainer.max_epochs=9") == 2
    assert "No space left on device" in error(capsys)
    assert all(torch.equal(value, before[name]) for name, value in weights().items())
    assert not list(LAST.parent.glob(".*partial"))


# -- resuming ---------------------------------------------------------------------------------------------------------
def history(told: str) -> str:
    """Standard error in one line."""
    return " ".join(told.split())


def test_where_the_disk_was_full_before_last_the_run_goes_on_from_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first epoch's own checkpoint is written; last.ckpt never is."""
    real = os.fsync

    def full(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(".last.ckpt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        assert run("fit", "-c", "small.yaml", "--trainer.max_epochs=2") == 2
    assert not LAST.exists()
    (epoch,) = LAST.parent.glob("epoch=0-*.ckpt")
    assert re.search(rf"cannot write checkpoint .*last.ckpt .*; the last good checkpoint is .*{epoch}$", error(capsys))
    assert run("fit", "-c", "small.yaml", "--resume", "--trainer.max_epochs=2") == 0
    assert f"going on from runs/small/checkpoints/{epoch.name}" in history(capsys.readouterr().err)
    end = weights()
    assert run("fit", "-c", "small.yaml", "--trainer.max_epochs=2") == 0
    again = torch.load("runs/small-2/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, end[name]) for name, value in again.items())


def test_a_run_goes_on_after_most_steps_whatever_file_was_touched_last(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint.save_top_k=-1", "--checkpoint.every_n_epochs=1"]
    assert run("fit", "-c", "small.yaml", "--trainer.max_epochs=2", *options) == 0
    (first,) = LAST.parent.glob("epoch=0-*.ckpt")
    LAST.unlink()
    first.touch()
    assert run("fit", "-c", "small.yaml", "--resume", "--trainer.max_epochs=3", *options) == 0
    assert "going on from runs/small/checkpoints/epoch=1-" in history(capsys.readouterr().err)


def test_a_damaged_checkpoint_is_told_and_set_aside_and_the_one_before_it_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "-c", "small.yaml") == 0
    LAST.write_bytes(LAST.read_bytes()[:-100])
    assert run("fit", "-c", "small.yaml", "--resume", "--trainer.max_epochs=2") == 0
    told = history(capsys.readouterr().err)
    assert "last.ckpt cannot be read: damaged" in told
    assert "set aside as last.ckpt.damaged" in told
    assert "going on from runs/small/checkpoints/epoch=0-" in told
    assert torch.load(LAST, weights_only=True)["epoch"] == 1


def test_where_there_is_no_checkpoint_to_resume_from_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("fit", "-c", "small.yaml", "--resume") == 0
    assert "there is no checkpoint in runs/small/checkpoints: starting anew" in history(capsys.readouterr().err)


@pytest.mark.parametrize("command", ["fit", "compare"])
def test_ctrl_c_says_how_to_go_on_and_resume_does(command: str) -> None:
    """A real one, to a process of its own, after the first epoch."""
    words = ["fit", "-c", "small.yaml"] if command == "fit" else ["compare", "small.yaml"]
    Path("small.yaml").write_text(CONFIG.replace("max_epochs: 1", "max_epochs: 1000"))
    last = LAST if command == "fit" else Path("runs/small/small/checkpoints/last.ckpt")
    process = subprocess.Popen([sys.executable, "-m", "featherlight", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = history(process.communicate(timeout=60)[1])
    assert process.returncode == 130
    assert f"interrupted; the newest checkpoint is {last.parent}/" in told
    assert "Start again with --resume to go on." in told
    epochs = torch.load(last, weights_only=True)["epoch"] + 3
    if command == "fit":
        assert run(*words, "--resume", f"--trainer.max_epochs={epochs}") == 0
        assert torch.load(last, weights_only=True)["epoch"] == epochs - 1
