"""Pictures of a run: what is drawn is what was configured and measured."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from featherlight.cli import main
from featherlight.commands import picture
from featherlight.commands.run_pictures import (
    ABSENT,
    FROZEN,
    TRAINS,
    label_counts,
    labels_figure,
    mixed,
    progress_figure,
    stages_figure,
    timeline_figure,
)
from featherlight.fed_loop import Federation
from featherlight.fed_loop.timeline import MOST_ROUNDS, Timeline, timeline
from featherlight.plugins import DepthDropout, LayerFreezing, PartitionedTraining, Plugin, PrismSampling, ProgressiveGrowth
from featherlight.plugins.cost_table import CostTable, TurnCost
from featherlight.ssl_models import Classifier, ImageData, Shards, SimCLR
from featherlight.ssl_models.text import TextData


def model() -> SimCLR:
    options = {"depth": 4, "width": 16, "heads": 2, "patch_size": 4}
    return SimCLR("vit", image_size=8, in_channels=1, backbone_options=options, hidden_dim=16, output_dim=8)


def of_blocks(told: Timeline) -> tuple[list[list[float]], list[list[float]]]:
    places = [told.parts.index(f"backbone.blocks.{block}") for block in range(4)]
    return [told.trained[place] for place in places], [told.frozen[place] for place in places]


def shares(rounds: int, plugins: list[Plugin], cohort: int | None = None) -> Timeline:
    told = timeline(Federation(rounds, cohort), model, 4, plugins)
    assert told is not None
    return told


# -- which part trains when -------------------------------------------------------------------------------------------
def test_layer_freezing_trains_a_block_a_stage_behind_frozen_ones() -> None:
    told = shares(8, [LayerFreezing("backbone.blocks.*", periods_per_stage=2)])
    trained, frozen = of_blocks(told)
    assert trained == [[float(round // 2 == block) for round in range(8)] for block in range(4)]
    assert frozen == [[float(round // 2 > block) for round in range(8)] for block in range(4)]
    assert told.trained[told.parts.index("projector")] == [1.0] * 8
    assert told.trained[told.parts.index("backbone.patch_embed")] == [1.0, 1.0] + [0.0] * 6  # the stem, in the first stage only
    assert told.frozen[told.parts.index("backbone.patch_embed")] == [0.0, 0.0] + [1.0] * 6


def test_growth_trains_all_that_is_there_and_without_plugins_all_trains() -> None:
    trained, frozen = of_blocks(shares(4, [ProgressiveGrowth("backbone.blocks.*", periods_per_stage=1)]))
    assert trained == [[float(round >= block) for round in range(4)] for block in range(4)]
    assert not np.any(frozen)
    told = shares(2, [])
    assert told.trained == [[1.0, 1.0]] * len(told.parts)


def test_depth_dropout_leaves_a_share_of_the_blocks_to_each_client() -> None:
    plugins = [LayerFreezing("backbone.blocks.*", periods_per_stage=1), DepthDropout("backbone.blocks.*", rate=0.5)]
    trained, frozen = of_blocks(shares(8, plugins))
    assert trained[3][3:] == [1.0] * 5  # the active one is never left out
    held = [sum(column) for column in zip(*frozen)]
    assert held[3:] == [1.0] * 5  # of three frozen blocks every client holds one: round(0.5 · 3) = 2 are left out
    assert any(0 < share < 1 for row in frozen for share in row)


def test_a_smaller_model_of_a_client_has_the_same_parts() -> None:
    told = shares(2, [PrismSampling(keep=0.5)])
    assert told.trained == [[1.0, 1.0]] * len(told.parts)


def test_long_runs_are_looked_at_evenly() -> None:
    told = timeline(Federation(1000, 2), model, 1000, [LayerFreezing("backbone.blocks.*", periods_per_stage=250)])
    assert told is not None
    assert len(told.rounds) == MOST_ROUNDS
    assert (told.rounds[0], told.rounds[-1]) == (0, 999)
    assert of_blocks(told)[0][3] == [float(round >= 750) for round in told.rounds]


def test_a_divided_model_has_no_timeline_of_parts() -> None:
    def make() -> Classifier:
        return Classifier("resnet9", image_size=8, in_channels=1, num_classes=10)

    assert timeline(Federation(2), make, 4, [PartitionedTraining(cut="backbone.layer1", way="split")]) is None


# -- what is drawn ----------------------------------------------------------------------------------------------------
def test_a_timeline_is_drawn_as_told() -> None:
    told = Timeline([0, 1], ["stem", "block"], [[1.0, 0.0], [0.0, 0.25]], [[0.0, 1.0], [0.0, 0.25]])
    cost = CostTable()
    for round in (0, 1):
        cost.add(round, round, TurnCost(peak_bytes=(round + 1) * 2**20, flops_forward=1e9, flops_backward=round * 1e9))
    row = {"clients": 1, "rejected": 1, "bytes_up": 2**20}
    history = [{**row, "round": round, "stage": round + 1, "bytes_down": (round + 1) * 2**21} for round in (0, 1)]
    parts, traffic, memory, compute = timeline_figure(told, history, cost).axes
    (image,) = parts.get_images()
    quarter = [0.25 * one + 0.25 * other + 0.5 * none for one, other, none in zip(TRAINS, FROZEN, ABSENT)]
    np.testing.assert_allclose(image.get_array(), [[TRAINS, FROZEN], [ABSENT, quarter]], atol=1e-6)
    assert image.get_extent() == [-0.5, 1.5, -0.5, 1.5]
    assert image.origin == "lower"  # the input below
    assert [label.get_text() for label in parts.get_yticklabels()] == ["stem", "block"]
    assert [text.get_text() for text in parts.get_legend().get_texts()] == ["trains", "frozen", "left out"]
    received, sent = (one.get_data() for one in traffic.patches)
    assert [*received.values] == [*sent.baseline] == [1, 2]  # MiB a client, of two
    assert [*sent.values] == [1.5, 2.5]  # on top of it
    assert [*received.edges] == [-0.5, 0.5, 1.5]
    assert [*memory.patches[0].get_data().values] == [1, 2]
    assert [*compute.patches[1].get_data().values] == [1, 2]  # backward on top of forward
    assert len(timeline_figure(None, history, cost).axes) == 3


def test_accuracy_is_drawn_against_what_was_paid_by_then() -> None:
    """Two rounds of one stage and one of the next; the first is not evaluated."""
    cost = CostTable()
    for round, stage in enumerate((0, 0, 1)):
        own = {"bytes_down": 2**20, "bytes_up": (stage + 1) * 2**20, "flops_forward": 1e9, "flops_backward": stage * 1e9}
        cost.add(stage, round, TurnCost(peak_bytes=(2 - stage) * 2**20, **own))
    history = [{"round": 0, "stage": 1}, {"round": 1, "stage": 1, "knn": 0.5, "loss": 3}, {"round": 2, "stage": 2, "knn": 0.75, "loss": 2}]
    figure = progress_figure(history, cost, {"knn": 0.75, "loss": 2.0})
    assert figure is not None
    drawn = [[*zip(*panel.lines[0].get_data())] for panel in figure.axes]
    assert drawn[:3] == [
        [(4, 50), (7, 75)],
        [(2, 50), (2, 75)],
        [(2, 50), (4, 75)],
    ]  # MiB, peak MiB, GFLOPs; the peak is the largest so far
    assert drawn[3] == [(4, 3), (7, 2)]
    assert [panel.get_ylabel() for panel in figure.axes[::3]] == ["knn accuracy (%)", "loss"]
    assert drawn[0][-1][0] * 2**20 == cost.total()["bytes_down"] + cost.total()["bytes_up"]
    assert len(progress_figure(history[2:], cost, {"knn": 0.75}).axes[0].lines[0].get_xdata()) == 1  # type: ignore[union-attr]
    assert progress_figure(history, cost, {}) is None


@pytest.mark.parametrize("clients", [10, 1000])
def test_labels_are_drawn_as_counted(clients: int) -> None:
    counts = torch.randint(0, 50, (clients, 10), generator=torch.Generator().manual_seed(0)).tolist()
    totals, cells, bar = labels_figure(counts).axes
    np.testing.assert_array_equal(cells.get_images()[0].get_array(), np.array(counts).T)
    assert [*totals.patches[0].get_data().values] == [sum(row) for row in counts]
    written = [int(text.get_text()) for text in cells.texts]
    assert written == ([count for row in counts for count in row] if clients == 10 else [])
    assert bar.get_ylabel() == "samples"


def test_labels_of_data_and_data_without_labels() -> None:
    data = ImageData("digits", num_clients=5, partition=Shards(2), batch_size=8)
    data.setup("fit")
    counts = label_counts(data)
    assert [sum(row) for row in counts] == list(data.client_sizes())
    assert all(sum(count > 0 for count in row) <= 4 for row in counts)  # two shards each, which seldom end where a label does
    assert label_counts(TextData.__new__(TextData)) == []


def test_colours_are_apart_in_brightness_too() -> None:
    def brightness(colour: tuple[float, ...]) -> float:
        return float(np.dot(colour, (0.2126, 0.7152, 0.0722)))

    shades = sorted(map(brightness, (TRAINS, FROZEN, ABSENT)))
    assert min(np.diff(shades)) > 0.2
    assert mixed(0.0, 0.0) == ABSENT
    assert len({to_rgb(colour) for colour in picture.COLOURS}) == len(picture.MARKERS) == 8


def test_a_comparison_is_drawn_as_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "close", shown.append)
    cost = {"peak_bytes": 2**20, "saved_bytes": 2**19, "flops_forward": 1e9, "flops_backward": 2e9, "bytes_down": 2**20, "bytes_up": 2**21}
    runs = [{"name": f"run_{number}", "metrics": {"knn": number / 100}, "cost": cost} for number in range(9)]
    picture.draw(runs, tmp_path / "comparison.png")
    monkeypatch.undo()
    figure = shown[0]
    pyplot.close(figure)
    for panel, wanted, label in zip(figure.axes, (1, 0.5, 3, 3), ("peak memory", "kept", "computed", "sent and received")):
        assert label in panel.get_xlabel()
        points = [tuple(np.ravel(points.get_offsets())) for points in panel.collections]
        assert points == [(pytest.approx(wanted), pytest.approx(number)) for number in range(9)]
    looks = {(to_rgb(points.get_facecolor()[0][:3]), points.get_paths()[0].vertices.tobytes()) for points in figure.axes[0].collections}
    assert len(looks) == 9
    assert (tmp_path / "comparison.png").stat().st_size > 1000


def test_a_trainer_s_stages_are_drawn_as_measured() -> None:
    cost = CostTable()
    for epoch, stage in enumerate((0, 0, 1)):
        turn = TurnCost(saved_bytes=2**19 * (stage + 1), peak_bytes=2**20 * (stage + 1), flops_forward=1e9, flops_backward=stage * 1e9)
        cost.add(stage, epoch, turn)
    told = shares(3, [LayerFreezing("backbone.blocks.*", periods_per_stage=[2, 1, 1, 1])])
    parts, memory, compute = stages_figure(told, cost).axes
    assert parts.images[0].get_array().shape[:2] == (len(told.parts), 3)
    peak, saved = ([*step.get_data().values] for step in memory.patches)
    assert (peak, saved) == ([1, 1, 2], [0.5, 0.5, 1])
    assert [*compute.patches[1].get_data().values] == [1, 1, 2]
    assert len(stages_figure(None, cost).axes) == 2


# -- by command -------------------------------------------------------------------------------------------------------
def test_a_run_has_its_pictures_and_says_what_it_could_not_draw(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["federate", "-c", str(config), "--federation.folder=images", "--federation.rounds=1", "--probes=[]"])
    assert {path.name for path in Path("images").glob("*.png")} == {"labels.png", "timeline.png"}
    assert "not drawn" not in capsys.readouterr().err
    folder = Path("pictures/train")
    from PIL import Image

    for number in range(64):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    text = config.read_text().replace("dataset: digits", "dataset: folder, root: pictures").replace("in_channels: 1", "in_channels: 3")
    config.write_text(text[: text.index("probes:")])
    main(["federate", "-c", str(config), "--federation.folder=unlabelled", "--federation.rounds=1"])
    assert {path.name for path in Path("unlabelled").glob("*.png")} == {"timeline.png"}
    assert "labels.png is not drawn: the data have no labels" in capsys.readouterr().err
    assert json.loads(Path("unlabelled/result.json").read_text())["rounds"] == 1


def test_a_run_that_is_evaluated_draws_accuracy_against_cost(config: Path) -> None:
    main(["federate", "-c", str(config), "--federation.folder=judged", "--federation.rounds=2", "--federation.evaluate_every=1"])
    assert {path.name for path in Path("judged").glob("*.png")} == {"labels.png", "timeline.png", "progress.png"}
    assert all("knn" in json.loads(line) for line in Path("judged/metrics.jsonl").read_text().splitlines())


def test_fit_draws_its_epochs(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = config.read_text()
    callback = '{class_path: featherlight.callbacks.LayerFreezing, init_args: {blocks: "backbone.blocks.*"}}'
    trainer = f"trainer: {{max_epochs: 2, accelerator: cpu, logger: false, enable_progress_bar: false, callbacks: [{callback}]}}\n"
    config.write_text(trainer + text[text.index("model:") : text.index("plugins:")])
    main(["fit", "-c", str(config)])
    assert [path.name for path in Path("runs/small").glob("*.png")] == ["timeline.png"]
    assert "shows cost alone" not in capsys.readouterr().err
