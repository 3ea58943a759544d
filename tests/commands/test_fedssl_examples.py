"""LW-FedSSL's and Prog-FedSSL's configurations as a user runs them, at the size of the digits, with each of the three methods."""

import json
import tempfile
from pathlib import Path

import pytest

from featherlight.cli import main

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SMALL = {
    "data.init_args": {"dataset": "digits", "batch_size": 16, "num_clients": 2, "limit_train": 80},
    "federation": {"rounds": 3, "cohort": 2, "local_epochs": 1, "accelerator": "cpu", "evaluate_every": 0},
}
MODEL = {"backbone": "vit", "image_size": 8, "in_channels": 1, "hidden_dim": 16, "output_dim": 8}
VIT = {"depth": 3, "width": 16, "heads": 2, "patch_size": 4}


LW, PROG = ("lw_fedssl", "LayerFreezing"), ("prog_fedssl", "ProgressiveGrowth")


def train(way: tuple[str, str], method: str, *more: str) -> list[dict[str, float]]:
    config, growth = way
    options = [f"--{section}.{name}={value}" for section, values in SMALL.items() for name, value in values.items()]
    own = {"model": method} if method != "MoCoV3" else {}
    model = [f"--model={value}" for value in own.values()] + [f"--model.init_args.{name}={value}" for name, value in MODEL.items()]
    model += [f"--model.init_args.backbone_options={json.dumps(VIT)}"]
    stages = [] if "--plugins=[]" in more else [f"--plugins.{growth}.periods=3"]
    folder = Path(tempfile.mkdtemp(dir="."))
    main(["federate", "-c", str(CONFIGS / f"{config}.yaml"), *model, *options, *stages, f"--federation.folder={folder}", *more])
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["rejected"] for row in history] == [0, 0, 0]
    assert {"knn", "linear"} <= history[-1].keys()
    return history


@pytest.mark.parametrize(("way", "method"), [(LW, "MoCoV3"), (LW, "SimCLR"), (PROG, "BYOL")])
def test_the_configurations_train(way: tuple[str, str], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    history = train(way, method)
    assert [row["stage"] for row in history] == [1, 2, 3]
    down = [row["bytes_down"] for row in history]
    assert down[0] < down[1] < down[2]  # the server trains all blocks, so that all of them come down


def test_parts_are_switched_by_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    off = ("--plugins.ServerCalibration.epochs=0", "--plugins.RepresentationAlignment.weight=0")
    cached, resent = (train(LW, "SimCLR", *off, *more) for more in ((), ("--federation.resend=true",)))
    assert [row["loss"] for row in cached] == [row["loss"] for row in resent]
    assert cached[2]["bytes_down"] < resent[2]["bytes_down"]
    assert not any(name.startswith("server") for name in cached[0])
    two = train(LW, "SimCLR", "--plugins.LayerFreezing.blocks_per_stage=2", "--federation.cohort=1", "--federation.dropout=0.2")
    assert [row["stage"] for row in two] == [1, 1, 2]
    assert [row["clients"] for row in two] == [1, 1, 1]
    depth = ("--plugins+=DepthDropout", "--plugins.DepthDropout.blocks=backbone.blocks.*", "--plugins.DepthDropout.rate=0.5")
    assert [row["stage"] for row in train(PROG, "SimCLR", *depth)] == [1, 2, 3]
    whole = train(LW, "SimCLR", "--plugins=[]", "--data.init_args.server_fraction=0")
    assert [row["stage"] for row in whole] == [1, 1, 1]
    assert whole[1]["bytes_down"] == whole[0]["bytes_down"] > cached[0]["bytes_down"]
