"""LW-FedSSL's table 2 (arXiv 2401.11647, version 4), MoCo v3 on ViT-Tiny: our methods cost what the paper prints, by its own rule."""

from functools import cache
from pathlib import Path

import pytest

from featherlight.commands.cost import predict_config
from featherlight.commands.paper_rule import GB, Rule
from featherlight.fed_loop.predict import Parts

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


@cache
def traffic_of(way: str, only: str = "") -> float:
    return Rule(path_of(way)).totals(only=only)[1]


@pytest.mark.parametrize(("way", "blocks"), [("layerwise_calibrated", 6.5 + 1), ("progressive_calibrated", 13)])
def test_calibrated_traffic_of_the_encoder(way: str, blocks: float) -> None:
    """The abstract's 3.2 and 1.8: all blocks of the stage down, those that trained up; embeddings and norm are half a percent."""
    assert traffic_of("end_to_end", "backbone.") / traffic_of(way, "backbone.") == pytest.approx(24 / blocks, rel=0.01)


@pytest.mark.parametrize(("way", "blocks"), [("layerwise_calibrated", 10.94), ("progressive_calibrated", 16.49)])
def test_calibrated_traffic_of_the_whole_model(way: str, blocks: float) -> None:
    """In blocks of 444,864 parameters: the heads' weights, 753,664, go down and up in every round, and make the ratios smaller."""
    assert traffic_of("end_to_end") / traffic_of(way) == pytest.approx(27.49 / blocks, rel=0.01)


def test_cost_tells_what_travels_of_each_part() -> None:
    """Two rounds of the first stage: all of the encoder down and up in each."""
    told: list[Parts] = []
    predict_config(path_of("layerwise_calibrated"), ["--federation.rounds=2"], parts=told.append)
    block, embeddings, norm = 4 * 444_864, 4 * 22_080, 4 * 384
    assert told[0]["backbone"] == (2 * (block + embeddings + norm), 2 * (block + embeddings + norm))
    assert set(told[0]) == {"backbone", "projector", "predictor"}


def test_what_cost_predicts_is_the_rule_plus_what_the_rule_leaves_out() -> None:
    """The first round as serialised: besides, the heads' biases and statistics, and a header of names, a hundredth in all at most."""
    options = ["--federation.rounds=1"]
    _, counted = Rule(path_of("layerwise"), options).totals()
    total = predict_config(path_of("layerwise"), options).total()
    assert 1 < (total["bytes_down"] + total["bytes_up"]) / (counted * GB) < 1.01
