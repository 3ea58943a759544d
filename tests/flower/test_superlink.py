"""On a real SuperLink with SuperNodes, TLS and authentication: the weights, bit for bit, and the figures of the built-in loop.

A process starts for every message, most of all to import torch: minutes of a core. It is run by itself, where it is asked for.
``benchmarks/on_superlink.py`` runs every method so.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed: pip install -e '.[test]'")

from featherlight.flower.credentials import write_credentials

SPEC = importlib.util.spec_from_file_location("on_superlink", Path(__file__).parents[2] / "benchmarks" / "on_superlink.py")
on_superlink = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(on_superlink)

pytestmark = pytest.mark.skipif(
    not os.environ.get("FEATHERLIGHT_SUPERLINK"),
    reason="a process for every message, minutes: FEATHERLIGHT_SUPERLINK=1 pytest tests/flower/test_superlink.py runs it",
)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    """One for all."""
    with on_superlink.deployed(tmp_path_factory.mktemp("superlink")) as started:
        yield started


def rows(folder):
    """What was told of each round, but for times."""
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("seconds")} for row in told]


@pytest.mark.parametrize("way", [on_superlink.ALL_METHODS[0], "IntrinsicProjection"])
def test_three_rounds_on_a_superlink_are_those_of_the_built_in_loop(way, deployment):
    compared = on_superlink.compare(deployment, way)
    assert compared.there is not None, compared.said
    assert compared.there["round"] == compared.here["round"] == 3
    assert compared.apart() <= on_superlink.WAYS[way].tolerance
    there, here = compared.traffic()
    assert there == here
    if way != "IntrinsicProjection":
        (there,) = deployment.folder.glob("LayerFreezing*/there")
        assert rows(there) == rows(there.parent / "here")


def test_what_is_refused_is_refused_with_the_reason(deployment):
    compared = on_superlink.compare(deployment, "PartitionedTraining")
    assert compared.there is None
    assert on_superlink.WAYS["PartitionedTraining"].refused in compared.said


def test_a_supernode_with_a_key_of_its_own_is_not_let_in(deployment, tmp_path):
    write_credentials(tmp_path / "stranger", ["127.0.0.1"], 1)
    code, said = deployment.try_node(tmp_path / "stranger" / "node-0")
    assert code
    assert "SuperNode ID" not in said
