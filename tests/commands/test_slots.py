"""Named slots: an argument of one item of a list, changed by the item's class, on the command line of every command."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from featherlight.cli import main

FIT = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger:
    - {class_path: CSVLogger, init_args: {save_dir: here}}
  callbacks:
    - {class_path: LayerFreezing, init_args: {blocks: "backbone.blocks.*"}}
    - {class_path: DepthDropout, init_args: {blocks: "backbone.blocks.*", rate: 0.5}}
probes:
  - class_path: KNN
"""


@pytest.fixture
def files(config: Path) -> None:
    """``federate.yaml``, ``more.yaml`` to go over it, and ``fit.yaml``."""
    text = config.read_text()
    config.rename("federate.yaml")
    Path("more.yaml").write_text(
        """
plugins:
  - {class_path: LayerFreezing, init_args: {blocks: "backbone.blocks.*", periods_per_stage: 3}}
  - {class_path: DepthDropout, init_args: {blocks: "backbone.blocks.*", rate: 0.5}}
probes:
  - class_path: KNN
  - class_path: LinearProbe
loggers:
  - {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: here}}
"""
    )
    Path("fit.yaml").write_text(FIT + text[text.index("model:") : text.index("plugins:")])


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What ``--print_config`` shows."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    told = capsys.readouterr()
    assert not stop.value.code, told.err
    return yaml.safe_load(told.out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error."""
    with pytest.raises(SystemExit) as stop:
        main([*arguments])
    assert stop.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("featherlight: error: "))
    assert len(line) <= 300
    return line.removeprefix("featherlight: error: ")


def arguments_of(items: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {item["class_path"].rpartition(".")[2]: item.get("init_args", {}) for item in items}


@pytest.mark.usefixtures("files")
def test_every_list_of_a_federation_over_two_files(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["federate", "-c", "federate.yaml", "-c", "more.yaml"]
    before = printed(capsys, *command)
    options = [
        *("--plugins.LayerFreezing.blocks_per_stage", "2"),
        *("--plugins.LayerFreezing.stem", "[backbone.stem, '1']"),
        "--plugins.DepthDropout.rate=2e-1",
        "--probes.KNN.k=5",
        *("--loggers.CSVLogger.name", "2024"),
        *("--federation.rounds", "3"),
    ]
    after = printed(capsys, *command, *options)
    plugins, wanted = arguments_of(after["plugins"]), arguments_of(before["plugins"])
    wanted["LayerFreezing"] |= {"blocks_per_stage": 2, "stem": ["backbone.stem", "1"]}
    wanted["DepthDropout"]["rate"] = 0.2
    assert wanted["LayerFreezing"]["periods_per_stage"] == 3  # the second file's, kept
    assert plugins == wanted
    assert [item["class_path"] for item in after["plugins"]] == [item["class_path"] for item in before["plugins"]]
    assert arguments_of(after["probes"])["KNN"]["k"] == 5
    assert arguments_of(after["probes"])["LinearProbe"] == arguments_of(before["probes"])["LinearProbe"]
    assert arguments_of(after["loggers"])["CSVLogger"]["name"] == "2024"  # text is asked for
    assert after["federation"]["rounds"] == 3
    assert after["model"] == before["model"]


@pytest.mark.usefixtures("files")
def test_a_class_added_on_the_command_line_has_slots_too(capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, "federate", "-c", "federate.yaml", "--plugins.TopK.share=0.1", "--plugins+=TopK")
    assert [*arguments_of(told["plugins"])] == ["LayerFreezing", "TopK"]
    assert arguments_of(told["plugins"])["TopK"]["share"] == 0.1
    told = printed(capsys, "federate", "-c", "federate.yaml", "--loggers+=WandbLogger", "--loggers.WandbLogger.group=mine")
    assert arguments_of(told["loggers"])["WandbLogger"]["group"] == "mine"


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.usefixtures("files")
def test_callbacks_and_loggers_of_a_trainer(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.callbacks.DepthDropout.rate=0.25", "--trainer.logger.CSVLogger.name", "mine", "--probes.KNN.k=7"]
    told = printed(capsys, command, "-c", "fit.yaml", *options)
    callbacks = arguments_of(told["trainer"]["callbacks"])
    assert [*callbacks] == ["LayerFreezing", "DepthDropout"]
    assert callbacks["DepthDropout"]["rate"] == 0.25
    assert (
        arguments_of(told["trainer"]["logger"])["CSVLogger"] | {"name": "mine", "save_dir": "here"}
        == (arguments_of(told["trainer"]["logger"])["CSVLogger"])
    )
    assert arguments_of(told["probes"])["KNN"]["k"] == 7


@pytest.mark.usefixtures("files")
def test_a_logger_that_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    one = '--trainer.logger={"class_path": "CSVLogger", "init_args": {"save_dir": "there"}}'
    told = printed(capsys, "fit", "-c", "fit.yaml", one, "--trainer.logger.CSVLogger.name=mine")
    assert told["trainer"]["logger"]["init_args"] == {
        **told["trainer"]["logger"]["init_args"],
        "save_dir": "there",
        "name": "mine",
    }


@pytest.mark.usefixtures("files")
def test_cost_and_federate_and_compare_run_with_them() -> None:
    """Two blocks, both in the first stage, where there were two stages."""
    options = ["--plugins.LayerFreezing.blocks_per_stage", "2", "--federation.rounds=2", "--probes.KNN.k=3"]
    main(["cost", "-c", "federate.yaml", *options, "--json", "cost.json"])
    main(["federate", "-c", "federate.yaml", *options, "--federation.folder=run"])
    main(["compare", "federate.yaml", *options, "--out", "compared"])
    for path in ("cost.json", "run/cost.json", "compared/federate/cost.json"):
        rows = json.loads(Path(path).read_text())["rows"]
        assert [row["rounds"] for row in rows] == [2], path
    assert yaml.safe_load(Path("compared/federate/config.yaml").read_text())["plugins"][0]["init_args"]["blocks_per_stage"] == 2


WRONG = [
    (
        ["--plugins.LayerThawing.rate=1"],
        "--plugins.LayerThawing.rate: there is no LayerThawing in plugins; it has LayerFreezing. Add one with --plugins+=LayerThawing",
    ),
    (["--loggers.WandbLogger.project=x"], "there is no WandbLogger in loggers; it is empty. Add one with --loggers+=WandbLogger"),
    (["--plugins.LayerFreezing.block_per_stage=2"], "LayerFreezing has no block_per_stage (is it blocks_per_stage?); it has blocks, "),
    (["--plugins.LayerFreezing.blocks_per_stage=many"], "--plugins.LayerFreezing.blocks_per_stage: expected an int"),
    (["--probes.KNN.k=1.5"], "--probes.KNN.k: expected an int"),
    (["--probes.KNN.k"], "--probes.KNN.k has no value; write --probes.KNN.k=VALUE"),
    (["--probes.KNN", "5"], "--probes.KNN names no argument: write --probes.KNN.ARGUMENT VALUE"),
    (["--callbacks.KNN.k=5"], "--callbacks.KNN.k: callbacks is no list of classes here; lists: plugins, probes, loggers"),
    (["--model.SimCLR.lr=5"], "model is no list of classes here"),
    (["--plugins+=LayerFreezing", "--plugins.LayerFreezing.grow=false"], "LayerFreezing stands 2 times in plugins"),
    (["--federation.rounds=many", "--probes.KNN.k=5"], "federation.rounds: expected an int, got many"),
    (["--plugins.LayerFreezing.periods_per_stage=0"], "plugins.LayerFreezing.periods_per_stage=0: give a count of at least 1, or a list"),
]


@pytest.mark.parametrize(("options", "expected"), WRONG)
@pytest.mark.usefixtures("files")
def test_what_is_wrong_is_told_in_one_line(options: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in refused(capsys, "federate", "-c", "federate.yaml", *options)


@pytest.mark.usefixtures("files")
def test_what_is_wrong_for_a_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "fit", "-c", "fit.yaml", "--trainer.callbacks.KNN.k=5")
    assert "there is no KNN in trainer.callbacks; it has LayerFreezing, DepthDropout" in told
    told = refused(capsys, "fit", "-c", "fit.yaml", "--trainer.callbacks.DepthDropout.rate=often")
    assert told.startswith("--trainer.callbacks.DepthDropout.rate: expected a float")
    told = refused(capsys, "fit", "-c", "fit.yaml", "--plugins.LayerFreezing.rate=1")
    assert "plugins is no list of classes here; lists: probes, trainer.callbacks, trainer.logger" in told


@pytest.mark.usefixtures("files")
def test_what_a_callback_refuses_is_told_behind_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, "fit", "-c", "fit.yaml", "--trainer.callbacks.LayerFreezing.periods_per_stage=0")
    assert told == "trainer.callbacks.LayerFreezing.periods_per_stage=0: give a count of at least 1, or a list of such counts"
    told = refused(capsys, "fit", "-c", "fit.yaml", "--trainer.callbacks+=PluginCallback", "--trainer.max_epochs=1")
    assert told == "trainer.callbacks: PluginCallback needs plugin; give it with --trainer.callbacks.PluginCallback.plugin=VALUE"


@pytest.mark.usefixtures("files")
def test_what_an_added_class_must_have_comes_with_its_options() -> None:
    from featherlight.commands.lightning_run import _make

    options = ["--trainer.callbacks+=PluginCallback", "--trainer.callbacks.PluginCallback.plugin=featherlight.plugins.Proximal"]
    cli = _make("fit", ["-c", "fit.yaml", *options, "--trainer.callbacks.PluginCallback.plugin.mu=0.3"], run=False)
    assert cli.trainer.callbacks[3].plugin.mu == 0.3


def test_help_teaches_them(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["--help"], ["federate", "--help", "--probes.KNN.k=5"], ["fit", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert not stop.value.code
        assert "LayerFreezing.blocks_per_stage 2" in " ".join(capsys.readouterr().out.split())
