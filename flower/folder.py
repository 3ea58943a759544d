"""The app folder that ``flwr run`` takes: a configuration, ten lines of Python, and what Flower wants to know."""

from __future__ import annotations

import re
from pathlib import Path

CODE = '''\
"""The federation of {file}, as a Flower app."""

from pathlib import Path

from featherlight.flower import client_app, server_app

CONFIGURATION = Path(__file__).parent / "{file}"

server = server_app(CONFIGURATION)
client = client_app(CONFIGURATION)
'''

PROJECT = """\
[project]
name = "{name}"
version = "1.0.0"
description = "The federation of {file}, by featherlight"
license = "Apache-2.0"
dependencies = []  # hosts have featherlight[flower] installed, each in a version that it trusts

[tool.flwr.app]
publisher = "featherlight"

[tool.flwr.app.components]
serverapp = "federation:server"
clientapp = "federation:client"

[tool.flwr.app.config]
arguments = ""  # more of featherlight federate's, for server and clients alike
resume = false
wait = 600  # seconds in which all clients must have come
patience = 0  # seconds that a round waits for its clients; 0: as long as it takes
secure = false  # true: of a round's updates the server learns the sum alone
"""

NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,31}")


def write_app(folder: Path, configuration: str, stem: str) -> None:
    """Write a new app folder.

    Args:
        configuration: YAML of ``featherlight federate``; stem: the name of its file.

    Raises:
        ValueError: Flower does not take the folder's name, or something is in the folder.
    """
    if not NAME.fullmatch(folder.name):
        raise ValueError(f"{folder.name!r} is no name for a Flower app: give at most 32 letters, digits and hyphens, a letter first")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    names = {"file": f"{stem}.yaml", "name": folder.name}
    (folder / names["file"]).write_text(configuration)
    (folder / "federation.py").write_text(CODE.format(**names))
    (folder / "pyproject.toml").write_text(PROJECT.format(**names))
