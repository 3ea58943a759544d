"""A run small enough for a test, as a user would write it."""

from pathlib import Path

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
