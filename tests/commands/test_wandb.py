"""Weights & Biases by configuration, for real but offline: what its own file holds afterwards."""

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from featherlight.cli import main

FULL, FIRST, LAST, BLOCK = 1, 2, 4, 2**15
FIT = """
trainer:
  max_epochs: 1
  accelerator: cpu
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
  logger:
    - {class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: light, offline: true}}
    - {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: ., name: "", version: csv}}
"""


@pytest.fixture(autouse=True)
def offline(config: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, without a word to the outside."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(config.parent))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.teardown()


def records(path: Path) -> Iterator[Record]:
    """A run's file: seven bytes, then LevelDB's log format: blocks of 2¹⁵ bytes; a piece has checksum, length and kind before it."""
    raw, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(raw):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", raw[place : place + 7])
        whole = (b"" if kind in (FULL, FIRST) else whole) + raw[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST):
            yield Record.FromString(whole)


def read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any], int]:
    """Rows logged, configuration, exit code."""
    rows, config, code = [], {}, -1
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
        elif kind in ("run", "config"):
            update = record.run.config.update if kind == "run" else record.config.update
            config |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in update}
        elif kind == "exit":
            code = record.exit.exit_code
    return rows, config, code


def run(*arguments: object) -> int:
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_federated_rounds_and_their_configuration_and_each_run_its_own(config: Path) -> None:
    """Two runs in one process and one folder are two runs there, too (lightning issue 7679)."""
    logger = "{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {project: light, offline: true}}"
    config.write_text(config.read_text() + f"loggers: [{logger}]\n")
    found: list[Path] = []
    for folder, rounds in (("one", 2), ("other", 3)):
        assert run("federate", "-c", config, "--federation.folder", folder, "--federation.rounds", rounds) == 0
        (path,) = set(config.parent.rglob("run-*.wandb")) - set(found)
        found.append(path)
        rows, told, code = read(path)
        history = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        assert len(history) == rounds
        for logged, row in zip(rows, history, strict=True):
            assert logged["trainer/global_step"] == row.pop("round")
            assert {name: logged[name] for name in row} == row
        assert told["federation"]["rounds"] == rounds
        assert told["model"]["class_path"].endswith("SimCLR")
        assert told["plugins"][0]["init_args"]["periods_per_stage"] == 2
        assert code == 0


def test_fit_logs_its_steps_and_hyperparameters(config: Path) -> None:
    text = config.read_text()
    config.write_text(FIT + text[text.index("model:") : text.index("plugins:")])
    assert run("fit", "-c", config) == 0
    (path,) = config.parent.rglob("run-*.wandb")
    rows, told, code = read(path)
    logged = [(row["trainer/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    with Path("csv/metrics.csv").open() as file:
        wanted = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(wanted) == 8  # 256 images in batches of 32
    assert logged == wanted
    assert told["hidden_dim"] == 16
    assert code == 0
    assert wandb.run is None
