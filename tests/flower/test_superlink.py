"""On a real SuperLink with SuperNodes, TLS and authentication: the weights, bit for bit, and the figures of the built-in loop.

A process starts for every message, most of all to import torch: minutes of a core. It is run by itself, where it is asked for.
"""

import json
import os

import pytest
import torch
import yaml

pytest.importorskip("flwr", reason="Flower is not installed: pip install -e '.[test,flower]'")

from featherlight.commands.federate import federate
from featherlight.fed_loop import checkpoint
from featherlight.flower.credentials import write_credentials
from featherlight.flower.folder import write_app

CLIENTS = 2
CONFIGURATION = {
    "model": {
        "class_path": "SimCLR",
        "init_args": {
            "backbone": "vit",
            "backbone_options": {"depth": 2, "width": 16, "heads": 2, "patch_size": 4},
            "image_size": 8,
            "in_channels": 1,
            "hidden_dim": 16,
            "output_dim": 8,
        },
    },
    "data": {"class_path": "ImageData", "init_args": {"dataset": "digits", "batch_size": 16, "num_clients": CLIENTS, "limit_train": 64}},
    "plugins": [
        {"class_path": "LayerFreezing", "init_args": {"blocks": "backbone.blocks.*", "periods_per_stage": 2}},
        {"class_path": "FedEMA"},
        {"class_path": "Quantization"},
    ],
    "federation": {"rounds": 3, "seed": 5, "accelerator": "cpu", "progress": False},
    "loggers": [],
}


pytestmark = pytest.mark.skipif(
    not os.environ.get("FEATHERLIGHT_SUPERLINK"),
    reason="a process for every message, minutes: FEATHERLIGHT_SUPERLINK=1 pytest tests/flower/test_superlink.py runs it",
)


def rows(folder):
    """What was told of each round, but for times."""
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in told]


def test_three_rounds_on_a_superlink_are_those_of_the_built_in_loop(tmp_path, superlink, capsys):
    text = yaml.safe_dump(CONFIGURATION)
    (tmp_path / "config.yaml").write_text(text)
    here, there = tmp_path / "here", tmp_path / "there"
    federate(["-c", str(tmp_path / "config.yaml")], folder=here)
    write_app(tmp_path / "app", text, "small")
    with superlink(tmp_path, CLIENTS) as deployment:
        deployment.run(tmp_path / "app", "--run-config", f'arguments="--federation.folder={there}"')
        deployment.until(checkpoint.path_of(there, 3).exists, "three rounds are over")
        write_credentials(tmp_path / "stranger", ["127.0.0.1"], 1)
        code, said = deployment.try_node(tmp_path / "stranger" / "node-0")
    one, other = (checkpoint.read_newest(folder)[1] for folder in (here, there))
    assert one["round"] == other["round"] == 3
    assert one["server"].keys() == other["server"].keys()
    assert not [name for name, value in one["server"].items() if not torch.equal(value, other["server"][name])]
    assert rows(here) == rows(there)
    assert code
    assert "SuperNode ID" not in said
