"""Whatever option is bad: one line of at most 300 characters, which names the option and what is wrong with it, and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from featherlight.cli import main

LONGEST = 300
FIT = """
trainer: {max_epochs: 1, accelerator: cpu, logger: false}
model: {class_path: SimCLR, init_args: {backbone: resnet9, image_size: 8, in_channels: 1}}
data: {class_path: ImageData, init_args: {dataset: digits, batch_size: 32, limit_train: 128}}
"""

BOTH = [
    ("--data.init_args.batch_size 1", "batch_size=1; two views are compared within a batch"),
    ("--data.init_args.num_workers many", "data.num_workers: expected an int, got many"),
    ("--data.init_args.augmentation.flip often", "data.augmentation.flip: expected a float, got often"),
    ("--data.init_args.partition Nope", "data.partition: Nope is not a class that is known here"),
    ("--model.init_args.backbone vgg99", 'backbone "vgg99" not found'),
    ("--model.init_args.lrr 3", "model: Option 'lrr' is not accepted (is it lr?)"),
    ("--model.init_args.backbone_options 3", "model.backbone_options: expected a dict, got 3"),
    ("--model Foo", "model: Foo is not a class that is known here"),
]
FEDERATE = [
    ("--data.init_args.partition Dirichlet --data.init_args.partition.alpha -1", "alpha=-1.0"),
    ("--federation.server Sgd", "federation.server: Sgd is not a class that is known here"),
    ("--federation.server Average --federation.server.lr no", "federation.server.lr: expected a float"),
    ("--federation.server Average --federation.server.lr -1", "federation: lr=-1.0"),
    ("--federation.roundz 3", "unrecognized arguments: --federation.roundz 3 (is it --federation.rounds?)"),
    ("--federation.rounds many", "federation.rounds: expected an int, got many"),
    ("--federation.rounds 0", "rounds=0: give 1 or more"),
    ("--plugins.init_args.periods_per_stage x", "plugins.periods_per_stage: expected an int, or expected a Sequence, got x"),
    ("--plugins+=Nonsense", "plugins: Nonsense is not a class that is known here"),
    ("--plugins+=LayerFreezin", "plugins: LayerFreezin is not a class that is known here (is it LayerFreezing?)"),
    ("--plugins+=CostMonitor", "plugins: CostMonitor is a callback, for trainer.callbacks of featherlight fit"),
    ("--federation.round 3", "unrecognized arguments: --federation.round 3 (is it --federation.rounds?)"),
    ("--plugins LayerFreezing", "plugins: expected a list, got LayerFreezing"),
    ("--probes Foo", "probes: expected a list, got Foo"),
]
TRAINER = [
    ("--trainer.precision 7", "trainer.precision: expected one of 64, 32, 16"),
    ("--trainer.max_epochs many", "trainer.max_epochs: expected an int, got many"),
    ("--trainer.callbacks+=Nope", "trainer.callbacks: Nope is not a class that is known here"),
    ("--trainer.accelerator moon", "moon"),
    ("--trainer.speed 3", "--trainer.speed"),
    ("--trainer.max_epoch=2", "unrecognized arguments: --trainer.max_epoch=2 (is it --trainer.max_epochs?)"),
    ("--trainer.callbacks+=TopK", "trainer.callbacks: TopK changes what clients and server of a federation send each other"),
    ("--trainer.callbacks+=Proximal", "--trainer.callbacks+=PluginCallback --trainer.callbacks.PluginCallback.plugin=Proximal"),
    ("--trainer.logger=WandbLoger", "trainer.logger: WandbLoger is not a class that is known here (is it WandbLogger?)"),
]


def told(command: str, options: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([command, "-c", f"{command}.yaml", *options.split()])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("featherlight: error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("command", "options", "expected"), [("federate", *case) for case in BOTH + FEDERATE] + [("fit", *case) for case in BOTH + TRAINER]
)
def test_a_bad_option_is_named_in_few_words(
    command: str, options: str, expected: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.rename("federate.yaml")
    Path("fit.yaml").write_text(FIT)
    line = told(command, options, capsys)
    assert expected in line
    assert "Union" not in line
    assert "Namespace(" not in line
    assert len(line) <= LONGEST


def test_a_file_of_another_kind_or_none_is_told(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.rename("fit.yaml")
    Path("federate.yaml").write_text(FIT)
    assert "the file configures a federation: it is for featherlight federate" in told("fit", "", capsys)
    assert "the file configures a Trainer: it is for featherlight fit" in told("federate", "", capsys)
    assert "nowhere.yaml: there is no such file" in told("federate", "-c nowhere.yaml", capsys)


def test_a_key_of_a_file_that_is_not_there_is_told_with_the_nearest(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.rename("federate.yaml")
    for text, near in (("federation: {round: 3}", "rounds"), ("federatio: {rounds: 3}", "federation.rounds")):
        Path("more.yaml").write_text(text)
        assert f"(is it {near}?)" in told("federate", "-c more.yaml", capsys)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.init_args.lr 0.5", "model.lr was 0.001, now 0.5;"),
        ("--model.init_args.hidden_dim 32", "model.hidden_dim was 16, now 32;"),
        ("--data.init_args.num_clients 3", "clients was 4, now 3"),
        ("--plugins.init_args.periods_per_stage 1", "periods_per_stage was 2, now 1;"),
        ("--data.init_args.seed 5", "data.seed was 0, now 5"),
    ],
)
def test_a_checkpoint_of_another_run_names_what_differs(
    option: str, expected: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.rename("federate.yaml")
    main(["federate", "-c", "federate.yaml", "--federation.folder", "here", "--federation.rounds", "1"])
    capsys.readouterr()
    line = told("federate", f"--federation.folder here --resume {option}", capsys)
    assert expected in line
    assert len(line) <= LONGEST


@pytest.mark.parametrize("option", ["--federation.cohort=9"])
def test_several_processes_tell_of_an_error_once(option: str, config: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "featherlight", "federate", "-c", config, "--federation.devices=2", option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.count("featherlight: error:") == 1
    assert "Traceback" not in done.stderr
