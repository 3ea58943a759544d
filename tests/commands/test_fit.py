"""``featherlight fit``, ``validate`` and ``test``: what they save, refuse and tell."""

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
    assert "lower the learning rate" in told
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
