"""LW-FedSSL's table 2 (arXiv 2401.11647, version 4), MoCo v3 on ViT-Tiny: our methods cost what the paper prints, by its own rule."""

from pathlib import Path

import pytest

from featherlight.commands.cost import predict_config
from featherlight.commands.paper_rule import GB, Rule

PAPERS = Path(__file__).parent.parent.parent / "configs" / "papers"
PRINTED = {"end_to_end": (586, 8.40), "layerwise": (139, 1.66), "progressive": (318, 5.04)}
"""GFLOPs of a batch of 512, GB of a client over 180 rounds."""
WORST_CASE = 3.35
"""GB, layer-wise, with all blocks sent down in every round."""


def path_of(way: str) -> str:
    return str(PAPERS / f"vit_tiny_{way}.yaml")


@pytest.mark.parametrize("way", PRINTED)
def test_flops_and_traffic_are_the_papers(way: str) -> None:
    flops, traffic = Rule(path_of(way)).totals()
    assert (flops, traffic) == pytest.approx(PRINTED[way], rel=0.01)


def test_the_worst_case_is_the_papers() -> None:
    _, traffic = Rule(path_of("layerwise")).totals(resend=True)
    assert traffic == pytest.approx(WORST_CASE, rel=0.01)


def test_what_cost_predicts_is_the_rule_plus_what_the_rule_leaves_out() -> None:
    """The first round as serialised: besides, the heads' biases and statistics, and a header of names, a hundredth in all at most."""
    options = ["--federation.rounds=1"]
    _, counted = Rule(path_of("layerwise"), options).totals()
    total = predict_config(path_of("layerwise"), options).total()
    assert 1 < (total["bytes_down"] + total["bytes_up"]) / (counted * GB) < 1.01
