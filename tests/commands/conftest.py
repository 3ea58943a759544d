"""A run small enough for a test, as a user would write it; and what a W&B run's own file holds, read without W&B's server."""

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CONFIG = """
model:
  class_path: SimCLR
  init_args:
    backbone: vit
    backbone_options: {depth: 2, width: 16, heads: 2, patch_size: 4}
    image_size: 8
    in_channels: 1
    hidden_dim: 16
    output_dim: 8
data:
  class_path: ImageData
  init_args: {dataset: digits, batch_size: 32, num_clients: 4, limit_train: 256}
plugins:
  - class_path: LayerFreezing
    init_args: {blocks: "backbone.blocks.*", periods_per_stage: 2}
federation: {rounds: 4, cohort: 2, checkpoint_every: 1, accelerator: cpu, progress: false}
probes:
  - class_path: KNN
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration in a folder of its own, which is also where the test runs."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


FULL, FIRST, LAST, BLOCK = 1, 2, 4, 2**15


class Logged(NamedTuple):
    """Rows, configuration, exit code, the run's id, its project and its name."""

    rows: list[dict[str, Any]]
    config: dict[str, Any]
    code: int
    id: str
    project: str
    name: str


def records(path: Path) -> Iterator[Any]:
    """A run's file: seven bytes, then LevelDB's log format: blocks of 2¹⁵ bytes; a piece has checksum, length and kind before it."""
    from wandb.proto.wandb_internal_pb2 import Record

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


def read(path: Path) -> Logged:
    rows, config, code, run = [], {}, -1, None
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(_nested(record.history.item))
        elif kind in ("run", "config"):
            run = record.run if kind == "run" else run
            update = record.run.config.update if kind == "run" else record.config.update
            config |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in update}
        elif kind == "exit":
            code = record.exit.exit_code
    assert run is not None
    return Logged(rows, config, code, run.run_id, run.project, run.display_name)


def _nested(items: Iterable[Any]) -> dict[str, Any]:
    """A table or a picture comes in parts: ``["cost_table", "path"]`` and its value."""
    row: dict[str, Any] = {}
    for item in items:
        *outer, last = item.nested_key or [item.key]
        inner = row
        for word in outer:
            inner = inner.setdefault(word, {})
        inner[last] = json.loads(item.value_json)
    return row


@pytest.fixture
def logged() -> Callable[[Path], Logged]:
    """A W&B run's file → what it holds."""
    return read
