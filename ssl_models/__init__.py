"""Self-supervised models made from lightly's parts, backbones as named blocks, data with partitions, and probes.

Names load on first use: importing this package costs nothing, so that ``featherlight --help`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featherlight.ssl_models.backbones import make_backbone as make_backbone
    from featherlight.ssl_models.byol import BYOL as BYOL
    from featherlight.ssl_models.classifier import Accuracy as Accuracy
    from featherlight.ssl_models.classifier import Classifier as Classifier
    from featherlight.ssl_models.classifier import accuracy as accuracy
    from featherlight.ssl_models.data import ImageData as ImageData
    from featherlight.ssl_models.language_model import LanguageModel as LanguageModel
    from featherlight.ssl_models.moco_v3 import MoCoV3 as MoCoV3
    from featherlight.ssl_models.partitions import IID as IID
    from featherlight.ssl_models.partitions import Dirichlet as Dirichlet
    from featherlight.ssl_models.partitions import Natural as Natural
    from featherlight.ssl_models.partitions import Shards as Shards
    from featherlight.ssl_models.probes import KNN as KNN
    from featherlight.ssl_models.probes import FineTune as FineTune
    from featherlight.ssl_models.probes import LinearProbe as LinearProbe
    from featherlight.ssl_models.simclr import SimCLR as SimCLR
    from featherlight.ssl_models.text import TextData as TextData

_HOME = {
    "Accuracy": "classifier",
    "BYOL": "byol",
    "Classifier": "classifier",
    "Dirichlet": "partitions",
    "FineTune": "probes",
    "IID": "partitions",
    "ImageData": "data",
    "KNN": "probes",
    "LanguageModel": "language_model",
    "LinearProbe": "probes",
    "MoCoV3": "moco_v3",
    "Natural": "partitions",
    "Shards": "partitions",
    "SimCLR": "simclr",
    "TextData": "text",
    "accuracy": "classifier",
    "make_backbone": "backbones",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
