"""Weights & Biases by configuration, for real but offline: what its own file holds afterwards."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from lightning.pytorch.loggers import WandbLogger
from lightning_utilities.core.imports import RequirementCache
from wandb.sdk.launch.sweeps import utils as sweeps
from wandb.sdk.lib import config_util

from featherlight.cli import main
from featherlight.commands.logging_ends import ended, has_key
from featherlight.commands.run_logs import COLUMNS

ROOT = Path(__file__).parent.parent.parent
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
LOGGER = "{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: light, offline: true}}"
FIT = f"""
trainer:
  max_epochs: 1
  accelerator: cpu
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    - {LOGGER}
    - {{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: ., name: "", version: csv}}}}
"""
TINY = {
    "federate": {"federation.rounds": 2, "federation.local_epochs": 1, "data.num_clients": 2, "data.limit_train": 192},
    "fit": {"trainer.max_epochs": 2, "data.limit_train": 256, "trainer.enable_progress_bar": False},
}


@pytest.fixture(autouse=True)
def offline(config: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, without a word to the outside."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(config.parent))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def run(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def file_of(path: Path, value: dict[str, Any]) -> Path:
    """The file that a logged table or picture stands for, in the folder of the run whose file is at ``path``."""
    return path.parent / "files" / value["path"]


def table(path: Path, value: dict[str, Any]) -> list[dict[str, Any]]:
    told = json.loads(file_of(path, value).read_text())
    return [dict(zip(told["columns"], row, strict=True)) for row in told["data"]]


def test_federated_rounds_and_their_configuration_and_each_run_its_own(config: Path, logged: Callable[[Path], Any]) -> None:
    """Two runs in one process and one folder are two runs there, too (lightning issue 7679)."""
    config.write_text(config.read_text() + f"loggers: [{LOGGER}]\n")
    found: list[Path] = []
    for folder, rounds in (("one", 2), ("other", 3)):
        assert run("federate", "-c", config, "--federation.folder", folder, "--federation.rounds", rounds) == 0
        (path,) = set(config.parent.rglob("run-*.wandb")) - set(found)
        found.append(path)
        told = logged(path)
        history = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        assert len(history) == rounds
        for row, wanted in zip(told.rows, history):
            assert row["trainer/global_step"] == wanted.pop("round")
            assert {name: row[name] for name in wanted} == wanted
        assert told.config["federation"]["rounds"] == rounds
        assert told.config["model"]["class_path"].endswith("SimCLR")
        assert told.config["plugins"][0]["init_args"]["periods_per_stage"] == 2
        assert told.code == 0
        end = {name: value for row in told.rows[rounds:] for name, value in row.items()}
        cost = json.loads(Path(folder, "cost.json").read_text())
        assert table(path, end["cost_table"]) == [{name: row[name] for name in COLUMNS} for row in cost["rows"]]
        assert end["cost_total/bytes_up"] == cost["total"]["bytes_up"]
        for name in ("labels", "timeline", "progress"):
            (picture,) = end[name]["filenames"]
            assert (path.parent / "files" / picture).read_bytes() == Path(folder, f"{name}.png").read_bytes()


def test_fit_logs_its_steps_hyperparameters_configuration_and_probes(config: Path, logged: Callable[[Path], Any]) -> None:
    text = config.read_text()
    config.write_text(FIT + "probes: [{class_path: KNN}]\n" + text[text.index("model:") : text.index("plugins:")])
    assert run("fit", "-c", config) == 0
    (path,) = config.parent.rglob("run-*.wandb")
    told = logged(path)
    steps = [(row["trainer/global_step"], row["train/loss"]) for row in told.rows if "train/loss" in row]
    with Path("csv/metrics.csv").open() as file:
        wanted = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(wanted) == 8  # 256 images in batches of 32
    assert steps == wanted
    assert told.config["hidden_dim"] == 16
    assert told.config["trainer"]["max_epochs"] == 1
    assert told.config["data"]["init_args"]["limit_train"] == 256
    end = {name: value for row in told.rows for name, value in row.items()}
    assert {"knn": end["knn"]} == json.loads(Path("runs/small/result.json").read_text())["metrics"]
    cost = json.loads(Path("runs/small/cost.json").read_text())
    assert [row["peak_bytes"] for row in table(path, end["cost_table"])] == [row["peak_bytes"] for row in cost["rows"]]
    (picture,) = end["timeline"]["filenames"]
    assert (path.parent / "files" / picture).read_bytes() == Path("runs/small/timeline.png").read_bytes()
    assert told.code == 0
    assert wandb.run is None


def test_a_comparison_is_a_run_too(config: Path, logged: Callable[[Path], Any]) -> None:
    other = config.with_name("other.yaml")
    other.write_text(config.read_text() + f"loggers: [{LOGGER}]\n")
    assert run("compare", config, other, "--federation.rounds=1", "--out", "both") == 0
    files = {told.name: (path, told) for path in config.parent.rglob("run-*.wandb") for told in [logged(path)]}
    assert len(files) == 2  # that of other.yaml, and the comparison's
    path, told = files["both"]
    assert told.project == "light"
    end = {name: value for row in told.rows for name, value in row.items()}
    runs = json.loads(Path("both/comparison.json").read_text())["runs"]
    rows = table(path, end["comparison_table"])
    assert [(row["name"], row["bytes_up"], row["knn"]) for row in rows] == [
        (run["name"], run["cost"]["bytes_up"], run["metrics"]["knn"]) for run in runs
    ]
    (picture,) = end["comparison"]["filenames"]
    assert (path.parent / "files" / picture).read_bytes() == Path("both/comparison.png").read_bytes()


def test_without_a_key_runs_are_offline_and_one_line_says_so(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "none")
    logger = WandbLogger(save_dir="here")
    with ended([logger]):
        logger.log_metrics({"loss": 1.0})
        assert logger.experiment.settings.mode == "offline"
    (line,) = capsys.readouterr().err.splitlines()
    assert "offline" in line
    assert "wandb sync here/wandb/offline-run-*" in line
    assert [*Path().glob("here/wandb/offline-run-*/run-*.wandb")]
    assert "WANDB_MODE" not in os.environ
    Path("keys").write_text("machine api.wandb.ai login user password of-nobody\n")
    monkeypatch.setenv("NETRC", "keys")
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://elsewhere.example")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "of-nobody")
    assert has_key()
    with ended([WandbLogger(save_dir="here")]):
        assert "WANDB_MODE" not in os.environ
    assert not capsys.readouterr().err


@pytest.mark.parametrize("command", ["federate", "fit"])
def test_without_wandb_an_error_says_what_to_install(
    command: str, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", RequirementCache("wandb>=9999"))
    text = config.read_text()
    end = f"loggers: [{LOGGER}]\n" if command == "federate" else ""
    config.write_text(text + end if end else FIT + text[text.index("model:") : text.index("plugins:")])
    assert run(command, "-c", config) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("featherlight: error: "))
    assert "pip install 'featherlight[wandb]'" in line


# -- sweeps ---------------------------------------------------------------------------------------------------------
def first_of(parameter: dict[str, Any]) -> Any:
    """A value that a sweep may choose: the last of several, or the middle of a range."""
    return parameter["values"][-1] if "values" in parameter else (parameter["min"] + parameter["max"]) / 2


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_runs_as_its_agent_runs_it(
    path: Path, config: Path, logged: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line is made as ``wandb agent`` makes it, of W&B's own functions, and W&B's variables are set as it sets them."""
    shutil.copytree(ROOT / "configs", "configs", ignore=shutil.ignore_patterns("__pycache__"))
    sweep = sweeps.load_sweep_config(str(path))
    assert sweep is not None
    chosen = {name: first_of(parameter) for name, parameter in sweep["parameters"].items()}
    kind = next(word for word in sweep["command"] if word in TINY)
    given = {name: {"value": value} for name, value in (chosen | TINY[kind]).items()}
    made: dict[str, list[str]] = sweeps.create_sweep_command_args({"args": given}) | {
        "interpreter": ["python"],
        "program": [sweep["program"]],
        "env": ["/usr/bin/env"],
    }
    command: list[str] = []
    for word in sweeps.create_sweep_command(sweep["command"]):
        command += made[word[2:-1]] if word.startswith("${") else [str(word)]
    parameters = Path("wandb/sweep-s/config-r.yaml").absolute()
    config_util.save_config_file_from_dict(str(parameters), given)
    environment = {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r", "WANDB_SWEEP_PARAM_PATH": str(parameters)}
    path_first = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, env={**os.environ, **environment, "PATH": path_first}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = config.parent.rglob("run-r.wandb")
    told = logged(file)
    assert (told.id, told.code) == ("r", 0)
    end = {name: value for row in told.rows for name, value in row.items()}
    assert 0 < end[sweep["metric"]["name"]] <= 1
    assert end["cost_total/peak_bytes"] > 0
    for name, value in chosen.items():
        assert told.config[name] == value  # as the sweep's page shows it
        if name != "config":
            assert configured(told.config, name) == value  # and as it was run
    (folder,) = Path("runs/sweep-s").iterdir()  # two agents side by side never want the same
    assert folder.name.endswith("-r")
    ran = yaml.safe_load((folder / "config.yaml").read_text())
    assert all(configured(ran, name) == value for name, value in chosen.items() if name != "config")
    if "config" in chosen:
        assert folder.name == f"{Path(chosen['config']).stem}-r"


def configured(config: Any, name: str) -> Any:
    """``plugins.LayerFreezing.rate`` in a whole configuration."""
    for word in name.split("."):
        if isinstance(config, list):
            config = next(item["init_args"] for item in config if item["class_path"].endswith(f".{word}"))
        else:
            config = config[word] if word in config else config["init_args"][word]
    return config


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_is_one_that_wandb_takes(path: Path) -> None:
    """W&B checks a sweep on its server. What it asks there: a method that it has, a metric with a goal, and parameters with values or a
    range that the method can go through."""
    sweep = sweeps.load_sweep_config(str(path))
    assert sweep is not None
    assert {*sweep} <= {"program", "project", "name", "method", "run_cap", "metric", "parameters", "command", "early_terminate"}
    assert sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"]["goal"] in ("minimize", "maximize")
    assert sweep["command"].count("${args}") == 1
    for parameter in sweep["parameters"].values():
        assert {*parameter} in ({"values"}, {"min", "max"}, {"distribution", "min", "max"})
        assert sweep["method"] != "grid" or "values" in parameter
        if "min" in parameter:
            assert parameter["min"] < parameter["max"]
            assert {type(parameter["min"]), type(parameter["max"])} == {float}  # two whole numbers would be drawn from as such
