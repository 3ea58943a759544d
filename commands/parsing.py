"""Configurations as files: what a federated run is made of, read by jsonargparse with short names for our classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger, TensorBoardLogger

import featherlight.ssl_models.byol
import featherlight.ssl_models.classifier
import featherlight.ssl_models.data
import featherlight.ssl_models.language_model
import featherlight.ssl_models.moco_v3
import featherlight.ssl_models.simclr
import featherlight.ssl_models.text  # noqa: F401  imported, so that configurations may name the classes without their modules
from featherlight.commands.logging_ends import check_installed
from featherlight.commands.near import to_blame, told
from featherlight.commands.slots import HELP, spelled_out
from featherlight.fed_loop import Federation
from featherlight.plugins import Plugin
from featherlight.plugins.seeds import derive
from featherlight.ssl_models.probes import Probe


def federated_parser() -> ArgumentParser:
    """The parser of a federated configuration."""
    parser = ArgumentParser(
        prog="featherlight federate",
        description="Train a model over many clients. Everything below can stand in a YAML file and be overridden here. "
        + HELP.format(example="--plugins.LayerFreezing.blocks_per_stage 2 or --probes.KNN.k 5"),
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="a YAML file; several are merged, the last wins")
    parser.add_subclass_arguments(LightningModule, "model", required=True, help="what is trained")
    parser.add_subclass_arguments(LightningDataModule, "data", required=True, help="images or text, and who has which")
    parser.add_argument("--plugins", type=list[Plugin], default=[], help="methods, in the order in which they encode what travels")
    parser.add_class_arguments(Federation, "federation")
    parser.add_argument("--probes", type=list[Probe], default=[], help="how the features are judged")
    parser.add_argument(
        "--loggers",
        type=list[Logger] | None,
        default=None,
        help="Lightning loggers, such as WandbLogger; TensorBoard in the run's folder if left out, none if []",
    )
    return parser


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse, named slots too, with one line for what is wrong.

    Raises:
        ValueError: unknown names, wrong types, missing values.
    """
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(spelled_out(parser, arguments))
    except ArgumentError as error:
        raise ValueError(told(str(error), parser)) from error


def is_federated(path: str | Path) -> bool:
    """Whether a file configures a federation (it has a ``federation`` section) rather than a Trainer.

    Raises:
        ValueError: no such file, or no YAML mapping in it.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no configuration: a mapping with model, data, and federation or trainer is needed")
    return "federation" in content


class Parts:
    """What a federated configuration describes, built piece by piece."""

    def __init__(self, parser: ArgumentParser, config: Namespace) -> None:
        self._parser = parser
        self._config = config

    def module(self) -> LightningModule:
        """The model, its weights drawn from the run's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self._config.federation.seed, "initial weights"))
            return self._build("model")

    def data(self, pictures: bool = True) -> Any:
        """The data, ready; without ``pictures``, only their number and size where that is known."""
        data = self._build("data")
        if pictures:
            data.prepare_data()
        elif hasattr(data, "without_pictures"):
            data.without_pictures()
        data.setup("fit")
        return data

    def plugins(self) -> list[Plugin]:
        return self._build("plugins")

    def federation(self) -> Federation:
        return self._build("federation")

    def probes(self) -> list[Probe]:
        return self._build("probes")

    def loggers(self) -> list[Logger]:
        """As configured; by default TensorBoard's, in the run's folder, which is opened at the first row."""
        folder = self._config.federation.folder
        if self._config.loggers is None:
            return [TensorBoardLogger(folder, name="", version="tensorboard")] if folder is not None else []
        check_installed(self._config.loggers)
        return self._build("loggers")

    def _build(self, name: str) -> Any:
        only = Namespace(**{name: self._config[name]})
        single = ArgumentParser(exit_on_error=False)
        _add_one(single, name)
        try:
            return single.instantiate_classes(only)[name]
        except ValueError as error:
            said = to_blame(error, self._config, [name])
            raise ValueError(said if said.startswith(name) else f"{name}: {said}") from error


def _add_one(parser: ArgumentParser, name: str) -> None:
    kinds: dict[str, Any] = {"plugins": list[Plugin], "probes": list[Probe], "loggers": list[Logger] | None}
    if name in kinds:
        parser.add_argument(f"--{name}", type=kinds[name])
    elif name == "federation":
        parser.add_class_arguments(Federation, name)
    else:
        parser.add_subclass_arguments(LightningModule if name == "model" else LightningDataModule, name)
