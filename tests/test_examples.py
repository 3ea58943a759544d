"""The examples run as they are started, in a small size, and what they print was saved."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
WAYS = ("LayerFreezing", "LayerFreezing + DepthDropout", "ProgressiveGrowth", "DepthDropout", "IntrinsicProjection")
SMALL = ["--image_size", "32", "--batch_size", "2", "--steps", "1", "--accelerator", "cpu"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as ``python examples/NAME.py ARGUMENTS`` does; its totals by way, and the names in its table."""

    def go(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        totals = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()
        return totals, capsys.readouterr().out

    return go


def less(totals, way, figure):
    return totals[way][figure] < totals["as it is"][figure]


def test_resnet50_on_a_folder_of_pictures(run, tmp_path):
    random = np.random.default_rng(0)
    for name in ("cat/1.png", "dog/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.fromarray(random.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / name)
    totals, told = run("resnet50", "--data", tmp_path, *SMALL, "--ways", "LayerFreezing")
    assert less(totals, "LayerFreezing", "mean_saved_bytes")
    assert less(totals, "LayerFreezing", "flops_backward")
    assert "LayerFreezing" in told
    assert "x less" in told


def in_every_way(totals, told, dim):
    """The first epoch of a classifier's ways."""
    assert totals.keys() == {"as it is", *WAYS, "PrismSampling", "RepresentationAlignment"}
    for way in WAYS[:3]:
        assert all(less(totals, way, figure) for figure in ("params_trained", "mean_saved_bytes", "flops_forward", "bytes_up")), way
    assert less(totals, "DepthDropout", "flops_forward")
    assert less(totals, "PrismSampling", "params_trained")
    assert less(totals, "PrismSampling", "bytes_up")
    projected, whole = totals["IntrinsicProjection"], totals["as it is"]
    assert 4 * dim <= projected["bytes_up"] < whole["bytes_up"] / 20  # d numbers of float32, and what batch norm counts
    aligned = totals["RepresentationAlignment"]
    assert aligned["flops_forward"] > whole["flops_forward"]
    assert aligned["bytes_up"] == whole["bytes_up"]
    (line,) = (line for line in told.splitlines() if line.startswith("RepresentationAlignment"))
    assert line.endswith("(the same)")
    assert "x more" in line


def test_timm_vit_in_every_way(run):
    totals, told = run("timm_vit", *SMALL, "--epochs", 1)
    in_every_way(totals, told, dim=16384)
    assert totals["IntrinsicProjection"]["bytes_up"] == 4 * 16384


def test_resnet50_in_every_way(run):
    in_every_way(*run("resnet50", *SMALL, "--epochs", 1), dim=65536)


def test_hugging_face_gpt2_in_every_way(run, tmp_path):
    (tmp_path / "text").write_bytes(bytes(range(256)) * 2)
    totals, told = run("hugging_face_gpt2", *SMALL, "--text", tmp_path / "text", "--width", 32, "--context", 64)
    assert totals.keys() == {"as it is", *WAYS}
    assert all(less(totals, way, "flops_forward") for way in WAYS[:-1])
    projected, whole = totals["IntrinsicProjection"], totals["as it is"]
    assert projected["flops_forward"] == whole["flops_forward"]
    assert projected["flops_backward"] > whole["flops_backward"]  # Fastfood's products count, too
    assert projected["bytes_up"] == 2 * 4 * 4096  # two epochs, float32
    lines = {line.partition("  ")[0]: line for line in told.splitlines()}
    assert lines["LayerFreezing"].count("x less") == 6
    assert lines["IntrinsicProjection"].endswith("x less)")
    assert "x more" in lines["IntrinsicProjection"]  # and no "0.7x less"
    assert not [line for line in lines.values() if "(0." in line]


def test_lightly_simclr(run):
    totals, _ = run("lightly_simclr", *SMALL, "--ways", "PrismSampling", "--epochs", 1)
    assert less(totals, "PrismSampling", "params_trained")
    assert less(totals, "PrismSampling", "flops_forward")


def test_lightly_byol(run):
    totals, _ = run("lightly_byol", *SMALL, "--ways", "ProgressiveGrowth", "RepresentationAlignment")
    assert less(totals, "ProgressiveGrowth", "flops_forward")
    assert totals["ProgressiveGrowth"]["params_held"] == totals["as it is"]["params_held"]  # the last stage is the whole model
    aligned, whole = totals["RepresentationAlignment"], totals["as it is"]
    assert aligned["flops_forward"] > whole["flops_forward"]  # it is for accuracy: a pass of the epoch's first model more, and its weights
    assert aligned["params_held"] > whole["params_held"]


def shell(name, folder, *arguments, **environment):
    """``bash examples/NAME.sh FOLDER ARGUMENTS``, by this Python."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", str(EXAMPLES / f"{name}.sh"), str(folder), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env={**os.environ, "PATH": path, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_command_line(tmp_path):
    shell("command_line", tmp_path)
    whole = yaml.safe_load((tmp_path / "whole.yaml").read_text())
    (freezing,) = (one["init_args"] for one in whole["trainer"]["callbacks"] if one["class_path"].endswith("LayerFreezing"))
    assert (freezing["periods_per_stage"], freezing["blocks"]) == (1, "backbone.blocks.*")  # the command line's, the first file's
    assert whole["data"]["init_args"]["limit_train"] == 256  # the second file's
    assert whole["data"]["init_args"]["dataset"] == "digits"
    rows = json.loads((tmp_path / "runs" / "whole" / "cost.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == [1, 2]  # the second in the resumed run, which keeps the first


def test_wandb_sweep(tmp_path):
    pytest.importorskip("wandb", reason="W&B is not installed: pip install -e '.[wandb]'")
    told = shell("wandb_sweep", tmp_path)
    folders = sorted((tmp_path / "runs" / "sweep-example").iterdir())
    configured = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders]
    assert [one["plugins"][0]["init_args"]["blocks_per_stage"] for one in configured] == [1, 2]
    scores = [json.loads((folder / "result.json").read_text())["metrics"]["knn"] for folder in folders]
    assert all(0 < score <= 1 for score in scores)
    assert len([*tmp_path.glob("wandb/offline-run-*/run-*.wandb")]) == 2
    assert "wandb sync" in told


@pytest.mark.skipif(
    not os.environ.get("FEATHERLIGHT_SUPERLINK") or shutil.which("flwr") is None,
    reason="needs Flower (pip install -e '.[flower]') and minutes, a process a message: FEATHERLIGHT_SUPERLINK=1 runs it",
)
def test_flower_app(tmp_path):
    shell("flower_app", tmp_path)
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["rounds"] == 2


def test_flower_app_is_written_as_the_script_says():
    subprocess.run(["bash", "-n", str(EXAMPLES / "flower_app.sh")], check=True)


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    for script in EXAMPLES.glob("*.py"):
        assert f'run("{script.stem}"' in text or script.stem == "shared"
    for script in EXAMPLES.glob("*.sh"):
        assert f'shell("{script.stem}"' in text
