"""LW-FedSSL's and Prog-FedSSL's configurations as a user runs them, at the size of the digits, with each of the three methods."""

import json
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


@pytest.mark.parametrize(("way", "method"), [(LW, "MoCoV3"), (LW, "SimCLR"), (PROG, "BYOL")])
def test_the_configurations_train(way: tuple[str, str], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, growth = way
    options = [f"--{section}.{name}={value}" for section, values in SMALL.items() for name, value in values.items()]
    own = {"model": method} if method != "MoCoV3" else {}
    model = [f"--model={value}" for value in own.values()] + [f"--model.init_args.{name}={value}" for name, value in MODEL.items()]
    model += [f"--model.init_args.backbone_options={json.dumps(VIT)}"]
    stages = [f"--plugins.{growth}.periods_per_stage=1"]
    main(["federate", "-c", str(CONFIGS / f"{config}.yaml"), *model, *options, *stages, "--federation.folder=run"])
    history = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["stage"] for row in history] == [1, 2, 3]
    assert [row["rejected"] for row in history] == [0, 0, 0]
    assert {"knn", "linear"} <= history[-1].keys()
    down = [row["bytes_down"] for row in history]
    assert down[0] < down[1] < down[2]  # the server trains all blocks, so that all of them come down
