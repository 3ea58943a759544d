"""The EcoFed example as a user runs it: a front from `fit`, then the four ways by one `compare`, on a folder of small images."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from featherlight.cli import main

CONFIGS = Path(__file__).parent.parent.parent / "configs"
WAYS = ["ecofed_vgg11", "ecofed_vgg11_classic", "ecofed_vgg11_local_loss", "ecofed_vgg11_vanilla"]
FRONT = "backbone.blocks.1.conv.weight"


def write_images(root: Path) -> None:
    """Pictures of 8 px in three classes, each around a colour of its own."""
    random = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 4)):
        for place, name in enumerate(("blue", "green", "red")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(100, (8, 8, 3), generator=random)
                pixels[..., 2 - place] += 150
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / part / name / f"{number}.jpg")


def test_the_example_trains_as_its_comments_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images")
    images = ["--data.init_args.dataset", "folder", "--data.init_args.root", "images", "--data.init_args.image_size", "8"]
    small = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["fit", "-c", str(CONFIGS / "pretrain_vgg11.yaml"), *small, "--data.init_args.batch_size", "16", *images])
    front = torch.load("runs/pretrain_vgg11/checkpoints/last.ckpt", weights_only=True)["state_dict"]

    small = ["--federation.rounds", "2", "--federation.cohort=1", "--federation.accelerator=cpu", "--data.init_args.num_clients", "4"]
    small += ["--model.init_args.num_classes=3", "--model.init_args.backbone_options.fully_connected", "false"]
    files = [str(CONFIGS / f"{way}.yaml") for way in WAYS]
    main(["compare", *files, "--out", "out", *small, *images])
    runs = {entry["name"]: entry for entry in json.loads(Path("out/comparison.json").read_text())["runs"]}
    assert list(runs) == WAYS
    assert not [run["failed"] for run in runs.values() if "failed" in run]
    sent = {name: run["cost"]["bytes_down"] + run["cost"]["bytes_up"] for name, run in runs.items()}
    assert sorted(sent, key=lambda name: sent[name]) == [
        "ecofed_vgg11",
        "ecofed_vgg11_local_loss",
        "ecofed_vgg11_vanilla",
        "ecofed_vgg11_classic",
    ]
    assert all(run["metrics"]["accuracy"] * 12 == pytest.approx(round(run["metrics"]["accuracy"] * 12)) for run in runs.values())
    for way in WAYS:
        weights = torch.load(f"out/{way}/round-000002.ckpt", weights_only=True)["server"][FRONT]
        distance = float((weights - front[FRONT]).abs().max())
        assert distance == 0 if way == "ecofed_vgg11" else 0 < distance < 0.2, way  # all begin at it, one stays

    with pytest.raises(SystemExit):
        main(["compare", *files, "--out", "out", *small, *images, "--federation.seed=1", "--resume"])
    told = " ".join(capsys.readouterr().err.split())
    assert "ecofed_vgg11.yaml ran with other options (--federation.rounds=2 --federation.cohort=1" in told
    assert "--out" in told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--federation.folder=x"], "--federation.folder is each run's own, below the comparison's: give that with --out"),
        (["--federation.rounds"], "--federation.rounds has no value"),
        (["--federation.rounds", "--resume"], "--federation.rounds has no value"),
    ],
)
def test_options_that_runs_cannot_share(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", str(CONFIGS / "ecofed_vgg11.yaml"), *options])
    assert message in capsys.readouterr().err
