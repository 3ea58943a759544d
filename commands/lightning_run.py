"""``featherlight fit``, ``validate`` and ``test``: LightningCLI with our callbacks, models and data under short names."""

from __future__ import annotations

import copy
import json
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from rich.console import Console

import featherlight.commands.parsing  # noqa: F401  brings our models and data under their short names
from featherlight.callbacks import CostMonitor
from featherlight.callbacks.host import PluginCallback
from featherlight.commands.folders import folder_for
from featherlight.commands.guards import FiniteGuard
from featherlight.commands.logging_ends import check_installed, ended, offline_without_key
from featherlight.commands.near import to_blame, told
from featherlight.commands.run_logs import draw_stages, log_end, takers
from featherlight.commands.slots import HELP, spelled_out
from featherlight.commands.tables import metrics_line
from featherlight.commands.trainer_checkpoint import WholeFiles, check_readable, check_same_run, existing, read_newest
from featherlight.fed_loop.checkpoint import set_aside
from featherlight.fed_loop.whole_files import write_text
from featherlight.plugins.cost_table import CostTable
from featherlight.ssl_models.probes import Probe


class SaveConfig(SaveConfigCallback):
    """Writes the configuration into the run's folder, too, once all processes know which that is; resuming compares with it."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            text = self.parser.dump(self.config, skip_none=False)
            write_text(Path(trainer.default_root_dir) / "config.yaml", text)
            for logger in takers(trainer.loggers):
                logger.log_hyperparams(yaml.safe_load(text))


class CLI(LightningCLI):
    """Adds probes after training, a checkpoint at every epoch's end, and a CostMonitor where none is configured."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        chosen = [args[0]] if hasattr(self, "_subcommand_parsers") else []  # a parser of its own, as chosen by the first word
        own_parser = self._subcommand_parsers[args[0]] if chosen else parser
        try:
            super().parse_arguments(parser, [*chosen, *spelled_out(own_parser, args[len(chosen) :])])
        except ArgumentError as error:
            raise ValueError(told(str(error), own_parser)) from error
        own = self.config.get(str(self.config.get("subcommand")), self.config)
        check_installed(own.get("trainer.logger"))
        path = own.get("ckpt_path")
        if path and path not in ("best", "last", "hpc"):
            check_readable(Path(path))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ValueError, TypeError) as error:
            raise ValueError(to_blame(error, self.config.get(str(self.config.get("subcommand")), self.config))) from error

    def after_validate(self) -> None:
        """Probe what was validated: models that learn without labels have no other figure."""
        if self.trainer.is_global_zero:
            metrics: dict[str, float] = {}
            for probe in self._get(self.config_init, "probes", []):
                metrics |= probe(self.model, self.datamodule)
            if metrics:
                Console().print(metrics_line(metrics))

    after_test = after_validate

    def before_validate(self) -> None:
        offline_without_key(self.trainer.loggers)

    before_test = before_validate

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.description = f"{parser.description} {HELP.format(example='--trainer.callbacks.LayerFreezing.blocks_per_stage 2')}"
        parser.add_argument("--probes", type=list[Probe], default=[], help="how the features are judged after training")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True})

    def instantiate_trainer(self, **options: Any) -> Trainer:
        trainer = super().instantiate_trainer(**options)
        if not any(isinstance(callback, CostMonitor) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.append(CostMonitor())  # type: ignore[attr-defined]
        trainer.callbacks.insert(0, FiniteGuard())  # type: ignore[attr-defined]  # ahead of ModelCheckpoint, which is last
        trainer.strategy.checkpoint_io = WholeFiles()
        return trainer


def run(command: str, arguments: list[str]) -> None:
    """Run ``featherlight fit|validate|test ARGUMENTS``."""
    resume = "--resume" in arguments
    arguments = [argument for argument in arguments if argument != "--resume"]
    if "-h" in arguments or "--help" in arguments:
        _make(command, arguments, run=True)
    elif "--print_config" in arguments:
        _make(command, arguments, run=command != "fit")  # as it is read again by the same command
    elif command == "fit":
        _, metrics = fit(arguments, None, resume)
        if metrics:
            Console().print(metrics_line(metrics))
    else:
        _make(command, arguments, run=True)


def fit(arguments: list[str], folder: Path | None, resume: bool) -> tuple[dict[str, float], dict[str, float]]:
    """Train as configured, then probe.

    Args:
        folder: where to write; by default runs/NAME, numbered.
        resume: go on from the newest checkpoint in that folder, if there is one.

    Returns:
        The cost's total, and the probes' figures.
    """
    if folder is None:
        folder = folder_for(_name(arguments), resume)
    checkpoints = folder / "checkpoints"
    placed = [f"--trainer.default_root_dir={folder}", f"--checkpoint.dirpath={checkpoints}"]
    cli = _make("fit", [*arguments, *placed], run=False)
    probes = cli._get(cli.config_init, "probes") if hasattr(cli, "config_init") else []
    start = _go_on_from(checkpoints, cli) if resume else None
    if probes and cli.trainer.is_global_zero:  # what would fail at the end is better found now
        cli.datamodule.prepare_data()
        cli.datamodule.setup("fit")
        for probe in probes:
            probe.check(cli.datamodule)
    plugins = copy.deepcopy([callback.plugin for callback in cli.trainer.callbacks if isinstance(callback, PluginCallback)])
    with ended(cli.trainer.loggers), _interrupts_told(cli.trainer, checkpoints):
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=start, weights_only=True)
        monitor = next(callback for callback in cli.trainer.callbacks if isinstance(callback, CostMonitor))  # type: ignore[attr-defined]
        metrics: dict[str, float] = {}
        if cli.trainer.is_global_zero:
            for probe in probes:
                metrics |= probe(cli.model, cli.datamodule)
            for logger in cli.trainer.loggers if metrics else []:
                logger.log_metrics(metrics, step=cli.trainer.global_step)
                logger.save()
            drawn, untold = draw_stages(lambda: _build(cli, "model"), plugins, monitor.table, folder / "timeline.png")
            for why in untold:
                print(why, file=sys.stderr)
            log_end(cli.trainer.loggers, monitor.table, drawn, cli.trainer.global_step)
    if cli.trainer.is_global_zero:
        write_text(folder / "cost.json", json.dumps(monitor.table.to_json(), indent=2))
        write_text(folder / "result.json", json.dumps({"metrics": metrics}, indent=2))
    return monitor.table.total(), metrics


def _go_on_from(checkpoints: Path, cli: Any) -> Path | None:
    """The newest checkpoint that can be read; what else is found there, a person is told."""
    path, damaged = read_newest(checkpoints)
    if path is not None:
        check_same_run(checkpoints.parent / "config.yaml", cli.parser.dump(cli.config, skip_none=False))
    if not cli.trainer.is_global_zero:
        return path
    for other, why in damaged.items():
        print(f"{why}; set aside as {set_aside(other).name}", file=sys.stderr)
    told = f"there is no checkpoint in {checkpoints}: starting anew" if path is None else f"going on from {path}"
    print(told, file=sys.stderr)
    return path


@contextmanager
def _interrupts_told(trainer: Trainer, checkpoints: Path) -> Iterator[None]:
    """Lightning leaves by ``sys.exit(1)`` after Ctrl-C, and is deaf to the next one; we say how to go on.

    Raises:
        KeyboardInterrupt: in place of that exit.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, before)
        if trainer.is_global_zero:
            path = next(iter(existing(checkpoints)), None)
            left = f"the newest checkpoint is {path}. Start again with --resume to go on." if path else "no checkpoint was written yet."
            print(f"interrupted; {left}", file=sys.stderr)
        raise KeyboardInterrupt from None


def predict_fit(arguments: list[str]) -> CostTable:
    """The cost of a Trainer run, predicted: as one client that holds all data, whose rounds are epochs and whose wire is not counted."""
    from featherlight.fed_loop import Federation
    from featherlight.fed_loop.predict import predict

    cli = _make("fit", arguments, run=False, build=False)
    config = cli.config
    rounds = config.trainer.max_epochs
    if not rounds or rounds < 1:
        raise ValueError(f"trainer.max_epochs={rounds}: to predict a run's cost, say how many epochs it has")
    callbacks = cli.parser.instantiate_classes(_only(cli, "trainer")).trainer.get("callbacks") or []
    plugins = [callback.plugin for callback in callbacks if isinstance(callback, PluginCallback)]
    data = _build(cli, "data")
    if hasattr(data, "without_pictures"):
        data.without_pictures()
    data.setup("fit")
    table = predict(Federation(rounds=rounds, seed=0), lambda: _build(cli, "model"), data, plugins)
    return _without_wire(table)


def _without_wire(table: CostTable) -> CostTable:
    state = table.state_dict()
    for stage in state.values():
        stage["sums"] |= {"bytes_down": 0, "bytes_up": 0}
    local = CostTable()
    local.load_state_dict(state)
    return local


def _make(command: str, arguments: list[str], run: bool, build: bool = True) -> Any:
    class Unbuilt(CLI):
        def instantiate_classes(self) -> None:
            """Parsed only: whoever asked builds what it needs, where it needs it."""

    class Helping(CLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            super().add_arguments_to_parser(parser)
            parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run's folder")

    helping = command == "fit" and any(word in ("-h", "--help") for word in arguments)
    kind = Helping if helping else CLI if build else Unbuilt

    named = {"exit_on_error": False, "allow_abbrev": False, "prog": f"featherlight {command}"}
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # we give it the command line's own, without our options
    try:
        return kind(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs=named | {command: named} if run else named,
            args=[command, *arguments] if run else arguments,
            run=run,
        )
    except ArgumentError as error:
        raise ValueError(str(error)) from error


def _only(cli: Any, name: str) -> Any:
    from jsonargparse import Namespace

    return Namespace(**{name: cli.config[name]})


def _build(cli: Any, name: str) -> Any:
    return cli.parser.instantiate_classes(_only(cli, name))[name]


def _name(arguments: list[str]) -> str:
    names = [
        Path(word.split("=", 1)[1] if "=" in word else after).stem
        for word, after in zip(arguments, [*arguments[1:], "fit"])
        if word.split("=", 1)[0] in ("-c", "--config")
    ]
    return names[0] if names else "fit"


__all__ = ["fit", "predict_fit", "run"]
