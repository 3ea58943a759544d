"""The command line as a person uses it: what it writes, what it says, what it does with bad input."""

import csv
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from featherlight.cli import COMMANDS, main
from featherlight.fed_loop import Federation, Result

REPOSITORY = Path(__file__).parent.parent.parent


def run(*arguments: object) -> int:
    """The exit code of ``featherlight ARGUMENTS``."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- what works -----------------------------------------------------------------------------------------------------
def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['featherlight', '--help']; import runpy\n"
    code += "try: runpy.run_module('featherlight')\nexcept SystemExit: print('torch' in sys.modules, 'lightning' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY.parent).stdout
    assert told.strip().endswith("False False")
    assert all(f"  {command} " in told for command in COMMANDS)


def test_federate_writes_metrics_costs_configuration_and_checkpoints(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("federate", "-c", config) == 0
    folder = config.parent / "runs" / "small"
    history = rows_of(folder / "metrics.jsonl")
    assert [row["stage"] for row in history] == [1, 1, 2, 2]
    assert [row["clients"] for row in history] == [2, 2, 2, 2]
    told = capsys.readouterr().out
    assert f"knn {history[-1]['knn']:.1%}" in told
    assert "saved" in told
    cost = json.loads((folder / "cost.json").read_text())
    assert [row["rounds"] for row in cost["rows"]] == [2, 2]
    assert cost["total"]["bytes_up"] == sum(row["rounds"] * row["bytes_up"] for row in cost["rows"])
    assert sum(row["bytes_up"] for row in history) == 2 * cost["total"]["bytes_up"]  # two clients a round
    assert sorted(path.name for path in folder.glob("*.ckpt")) == ["round-000003.ckpt", "round-000004.ckpt"]
    assert run("federate", "-c", folder / "config.yaml", "--federation.folder", config.parent / "again") == 0
    assert rows_of(config.parent / "again" / "metrics.jsonl")[-1]["loss"] == history[-1]["loss"]


def test_the_configuration_is_written_before_the_first_round(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    go = Federation.run

    def spy(federation: Federation, *arguments: Any, **options: Any) -> Result:
        assert federation.folder is not None
        seen.append((federation.folder / "config.yaml").read_text())
        return go(federation, *arguments, **options)

    monkeypatch.setattr(Federation, "run", spy)
    assert run("federate", "-c", config, "--federation.rounds", 2) == 0
    assert run("federate", "-c", config, "--federation.cohort", 3, "--resume") == 2  # another run: what is there stays
    assert "cohort: 2" in seen[0]
    assert seen[1] == seen[0] == Path("runs/small/config.yaml").read_text()


def test_a_run_that_cannot_start_leaves_no_folder(config: Path) -> None:
    assert run("federate", "-c", config, "--federation.cohort", 9) == 2
    assert not Path("runs/small").exists()


def test_federate_writes_for_tensorboard_unless_told_otherwise(config: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run("federate", "-c", config, "--federation.rounds", 2) == 0
    events = EventAccumulator("runs/small/tensorboard").Reload()
    rows = rows_of(Path("runs/small/metrics.jsonl"))
    told = [(event.step, event.value) for event in events.Scalars("loss")]
    assert told == [(row["round"], pytest.approx(row["loss"])) for row in rows]
    config.write_text(config.read_text() + "loggers: []\n")
    assert run("federate", "-c", config, "--federation.rounds", 1) == 0
    assert Path("runs/small-2/metrics.jsonl").exists()
    assert not Path("runs/small-2/tensorboard").exists()


def test_an_interrupted_run_resumes_to_the_same_figures(config: Path) -> None:
    whole, parts = config.parent / "whole", config.parent / "parts"
    assert run("federate", "-c", config, "--federation.folder", whole) == 0
    assert run("federate", "-c", config, "--federation.folder", parts, "--federation.rounds", 3) == 0
    assert run("federate", "-c", config, "--federation.folder", parts, "--resume") == 0
    left, right = rows_of(whole / "metrics.jsonl"), rows_of(parts / "metrics.jsonl")
    assert [row["loss"] for row in left] == [row["loss"] for row in right]
    end = [torch.load(folder / "round-000004.ckpt", weights_only=True)["server"] for folder in (whole, parts)]
    assert all(torch.equal(value, end[1][name]) for name, value in end[0].items())


def test_cost_predicts_what_federate_measures(config: Path) -> None:
    assert run("cost", "-c", config, "--json", "predicted.json") == 0
    assert run("federate", "-c", config) == 0
    predicted = json.loads(Path("predicted.json").read_text())
    measured = json.loads(Path("runs/small/cost.json").read_text())
    for ours, theirs in zip([*predicted["rows"], predicted["total"]], [*measured["rows"], measured["total"]], strict=True):
        assert theirs.pop("seconds") > 0
        assert ours == theirs  # a prediction has no seconds


def test_cost_merges_files_of_which_the_last_wins(config: Path) -> None:
    Path("one_round.yaml").write_text("federation:\n  rounds: 1\nplugins: []\n")
    Path("plugins.yaml").write_text("plugins:\n- {class_path: Quantization}\n")
    assert run("cost", "-c", config, "-c", "one_round.yaml", "--json", "whole.json") == 0
    assert run("cost", "-c", config, "-c", "one_round.yaml", "-c", "plugins.yaml", "--json", "coded.json") == 0
    whole, coded = (json.loads(Path(name).read_text())["total"] for name in ("whole.json", "coded.json"))
    assert whole["rounds"] == coded["rounds"] == 1
    assert coded["bytes_up"] < whole["bytes_up"] / 2
    assert coded["bytes_down"] == whole["bytes_down"]


def test_cost_of_published_data_needs_no_pictures(config: Path) -> None:
    config.write_text(config.read_text().replace("digits", "cifar10, root: nowhere").replace("image_size: 8", "image_size: 32"))
    config.write_text(config.read_text().replace("in_channels: 1", "in_channels: 3"))
    assert run("cost", "-c", config, "--json", "cost.json") == 0
    assert json.loads(Path("cost.json").read_text())["total"]["params_held"] > 0


def test_compare_puts_runs_side_by_side_and_keeps_what_is_finished(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.parent / "ways"
    folder.mkdir()
    (folder / "a_layerwise.yaml").write_text(config.read_text())
    (folder / "b_whole.yaml").write_text(
        config.read_text().replace("plugins:", "plugins: []\n# plugins:").replace("  - class_path: LayerF", "#")
    )
    lines = (folder / "b_whole.yaml").read_text().splitlines()
    (folder / "b_whole.yaml").write_text("\n".join(line for line in lines if "periods_per_stage" not in line))
    assert run("compare", folder) == 0
    out = config.parent / "runs" / "ways"
    content = json.loads((out / "comparison.json").read_text())
    assert [entry["name"] for entry in content["runs"]] == ["a_layerwise", "b_whole"]
    layerwise, whole = (entry["cost"] for entry in content["runs"])
    assert layerwise["saved_bytes"] < whole["saved_bytes"]
    assert layerwise["bytes_up"] < whole["bytes_up"]
    with (out / "comparison.csv").open() as file:
        assert [float(row["bytes_up"]) for row in csv.DictReader(file)] == [layerwise["bytes_up"], whole["bytes_up"]]
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "a layerwise" in capsys.readouterr().out
    stamp = (out / "a_layerwise" / "run.json").stat().st_mtime_ns
    assert run("compare", folder, "--resume") == 0
    assert (out / "a_layerwise" / "run.json").stat().st_mtime_ns == stamp
    assert run("compare", folder) == 0  # another comparison does not write over the first
    assert (config.parent / "runs" / "ways-2" / "comparison.json").exists()


def test_compare_shows_what_the_server_computed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = config.read_text().replace("rounds: 4", "rounds: 1").replace("limit_train: 256", "limit_train: 256, server_fraction: 0.25")
    Path("calibrated.yaml").write_text(text.replace("federation:", "  - class_path: ServerCalibration\nfederation:"))
    Path("plain.yaml").write_text(text)
    assert run("compare", "calibrated.yaml", "plain.yaml", "--out", "out") == 0
    calibrated, plain = json.loads(Path("out/comparison.json").read_text())["runs"]
    assert calibrated["server"] == json.loads(Path("out/calibrated/cost.json").read_text())["server"]["total"]
    assert "server" not in plain
    rows = list(csv.DictReader(Path("out/comparison.csv").read_text().splitlines()))
    assert [row["server_flops_forward"] for row in rows] == [str(calibrated["server"]["flops_forward"]), ""]
    told = capsys.readouterr().out
    assert all(f"server {name}" in told for name in ("FLOPs fwd", "FLOPs bwd", "s "))


def test_compare_does_not_keep_a_run_whose_file_has_changed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("compare", config, "--out", "out") == 0
    figures = Path("out/small/run.json").read_bytes()
    config.write_text(config.read_text().replace("hidden_dim: 16", "hidden_dim: 32"))
    assert run("compare", config, "--out", "out", "--resume") == 2
    told = capsys.readouterr().err
    assert f"{config} has changed since it ran" in told
    assert "remove out/small" in told
    assert "--out" in told
    assert Path("out/small/run.json").read_bytes() == figures
    Path("out/small/run.json").write_text("{")
    assert run("compare", config, "--out", "out", "--resume") == 2
    assert "is damaged" in capsys.readouterr().err


def test_compare_runs_configurations_of_two_processes(config: Path) -> None:
    folder = config.parent / "ways"
    folder.mkdir()
    text = config.read_text().replace("rounds: 4", "rounds: 1")
    (folder / "one.yaml").write_text(text)
    (folder / "two.yaml").write_text(text.replace("accelerator: cpu", "accelerator: cpu, devices: 2"))
    assert run("compare", folder, "--out", "out") == 0
    one, two = json.loads(Path("out/comparison.json").read_text())["runs"]
    assert one["metrics"] == two["metrics"]
    assert {**one["cost"], "seconds": 0} == {**two["cost"], "seconds": 0}


def test_fit_trains_with_callbacks_probes_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        (REPOSITORY / "configs" / "fit_layerwise.yaml")
        .read_text()
        .replace("max_epochs: 20", "max_epochs: 2")
        .replace("stage: 5", "stage: 1")
    )
    Path("fit.yaml").write_text(text.replace("depth: 4", "depth: 2"))
    assert run("fit", "-c", "fit.yaml", "--trainer.enable_progress_bar=false") == 0
    folder = tmp_path / "runs" / "fit"
    assert 0 <= json.loads((folder / "result.json").read_text())["metrics"]["knn"] <= 1
    measured = json.loads((folder / "cost.json").read_text())
    assert [row["rounds"] for row in measured["rows"]] == [1, 1]
    assert run("cost", "-c", "fit.yaml", "--json", "predicted.json") == 0
    predicted = json.loads(Path("predicted.json").read_text())
    for name in ("params_held", "params_trained", "saved_bytes", "flops_forward", "flops_backward", "bytes_up"):
        assert [row[name] for row in predicted["rows"]] == [row[name] for row in measured["rows"]], name
    before = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert run("fit", "-c", "fit.yaml", "--resume", "--trainer.max_epochs=3", "--trainer.enable_progress_bar=false") == 0
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns > before


def test_print_config_shows_every_default(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("federate", "-c", config, "--print_config") == 0
    told = capsys.readouterr().out
    assert "blocks_per_stage: 1" in told
    assert "local_epochs: 1" in told


@pytest.mark.parametrize(
    "path",
    sorted(path for kind in ("papers/*", "quickstart/*", "*_resnet18", "ecofed_*") for path in REPOSITORY.glob(f"configs/{kind}.yaml")),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_configuration_we_ship_is_understood(path: Path) -> None:
    from featherlight.commands.parsing import Parts, federated_parser, parse

    parser = federated_parser()
    parts = Parts(parser, parse(parser, ["-c", str(path)]))
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in parts.module().parameters()) > 1000
    assert parts.federation().rounds > 0
    assert parts.probes() or parts.federation().evaluate_clients  # somebody judges what comes of it


# -- bad input: one line, exit code 2 ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nonsense"], "there is no command 'nonsense'"),
        (["federat"], "there is no command 'federat' (is it federate?)"),
        (["federate", "-c", "missing.yaml"], "missing.yaml"),
        (["cost", "-c", "missing.yaml"], "missing.yaml"),
        (["compare", "missing"], "missing"),
        (["federate", "-c", "small.yaml", "--plugins.init_args.blocks", "backbone.layr*"], 'block "backbone.layr*" not found'),
        (["federate", "-c", "small.yaml", "--plugins.init_args.periods_per_stage", "[1,1,1]"], "makes 3 stages"),
        (["federate", "-c", "small.yaml", "--federation.cohort", "9"], "cohort=9, but there are 4 clients"),
        (["federate", "-c", "small.yaml", "--federation.rounds", "0"], "rounds=0"),
        (["federate", "-c", "small.yaml", "--federation.rounds", "many"], "rounds"),
        (["federate", "-c", "small.yaml", "--federation.speed", "9"], "speed"),
        (["federate", "-c", "small.yaml", "--data.init_args.num_clients", "300"], "client"),
        (["federate", "-c", "small.yaml", "--data.init_args.dataset", "folder", "--data.init_args.root", "nowhere"], "nowhere"),
        (["federate", "-c", "small.yaml", "--model.init_args.backbone", "vgg99"], "vgg99"),
        (["fit", "-c", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    assert run(*arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("featherlight: error:")]
    assert len(errors) == 1
    assert told in errors[0]
    assert "Traceback" not in errors[0]


def test_a_finished_folder_is_not_written_over(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("federate", "-c", config, "--federation.folder", "here", "--federation.rounds", 1) == 0
    kept = Path("here/round-000001.ckpt").read_bytes()
    assert run("federate", "-c", config, "--federation.folder", "here", "--federation.rounds", 1) == 2
    assert "--resume" in capsys.readouterr().err
    assert Path("here/round-000001.ckpt").read_bytes() == kept


def test_a_checkpoint_of_another_configuration_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("federate", "-c", config, "--federation.folder", "here", "--federation.rounds", 1) == 0
    assert run("federate", "-c", config, "--federation.folder", "here", "--federation.cohort", 3, "--resume") == 2
    assert "cohort was 2, now 3" in capsys.readouterr().err


def test_fewer_rounds_than_are_done_are_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("federate", "-c", config, "--federation.folder", "here", "--federation.rounds", 2) == 0
    before = {path: path.read_bytes() for path in Path("here").glob("*.*")}
    assert run("federate", "-c", config, "--federation.folder", "here", "--federation.rounds", 1, "--resume") == 2
    assert "rounds=1, but 2 are done in" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path("here").glob("*.*")} == before
    assert run("federate", "-c", config, "--federation.folder", "here", "--federation.rounds", 2, "--resume") == 0


class Malice:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


def test_a_malicious_checkpoint_is_refused_and_its_code_not_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("here").mkdir()
    Path("here/round-000002.ckpt").write_bytes(pickle.dumps({"round": 2, "server": Malice()}))
    assert run("federate", "-c", config, "--federation.folder", "here", "--resume") == 2
    assert "cannot be read" in capsys.readouterr().err
    assert not Path("owned").exists()


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("federate", "-c", config, "--federation.folder", "here", "--federation.rounds", 2) == 0
    Path("here/round-000002.ckpt").write_bytes(pickle.dumps({"round": 2, "server": Malice()}))
    assert run("federate", "-c", config, "--federation.folder", "here", "--federation.rounds", 3, "--resume") == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "round-000002.ckpt cannot be read" in told
    assert "going on from the newest that can be read, round-000001.ckpt" in told
    assert not Path("owned").exists()
    assert [row["round"] for row in rows_of(Path("here/metrics.jsonl"))] == [0, 1, 2]
    for path in Path("here").glob("round-*.ckpt"):
        path.write_bytes(path.read_bytes()[:-50])
    assert run("federate", "-c", config, "--federation.folder", "here", "--federation.rounds", 4, "--resume") == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("featherlight: error:")]
    assert len(told) == 1
    assert "no other checkpoint is there" in told[0]


def test_only_the_first_host_writes_the_configuration_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each host's main process has rank 0 on its own host before the processes know of each other."""
    from featherlight.commands.federate import _told_before

    federation = Federation(1, folder=tmp_path / "run", num_nodes=2)
    for node, there in (("1", False), ("0", True)):
        monkeypatch.setenv("NODE_RANK", node)
        with _told_before(federation, "seed: 1\n", given=True):
            assert (tmp_path / "run" / "config.yaml").exists() == there
