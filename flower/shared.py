"""What server and clients make of one configuration, each for itself, and how they find out that it is the same."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

import featherlight
from featherlight.fed_loop.same_run import digest

OF_CLIENTS = ("local_epochs", "seed", "clip", "precision", "threads")
"""Settings of the federation that decide what a client does with what it is sent."""


def arguments(path: Path, *more: Any) -> list[str]:
    """A command line of ``featherlight federate``: the app's configuration, then what each of ``more`` adds."""
    return ["-c", str(path), *(word for text in more for word in shlex.split(str(text or "")))]


def fingerprint(text: str) -> dict[str, str]:
    """Of a configuration as written out: what must be the same on server and clients."""
    content: Mapping[str, Any] = yaml.safe_load(text)
    federation = {name: content["federation"][name] for name in OF_CLIENTS}
    return {
        "model": digest(json.dumps(content["model"], sort_keys=True)),
        "plugins": digest(json.dumps(content["plugins"], sort_keys=True)),
        **{name: str(value) for name, value in federation.items()},
        "featherlight": featherlight.__version__,
        "torch": torch.__version__.partition("+")[0],
    }


def check_same(client: int, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Refuse a client that makes something else of the configuration.

    Raises:
        ValueError: it does; says of what.
    """
    if other := [name for name in ours if theirs.get(name) != ours[name]]:
        told = ", ".join(f"{name} is {theirs.get(name)} there and {ours[name]} on the server" for name in other)
        raise ValueError(f"client {client} is of another federation: {told}; use one configuration, and the same versions, everywhere")
