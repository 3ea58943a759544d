"""The ``featherlight`` command: what there is, quickly; each subcommand loads what it needs when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module

COMMANDS = {
    "federate": "train over many clients: rounds, cost and features of one configuration",
    "compare": "run several configurations and set them side by side: a table and a picture",
    "flower": "write a configuration as a Flower app: clients on many hosts",
    "cost": "what a configuration will hold, compute and send, without training it",
    "fit": "train on one machine with Lightning's Trainer",
    "validate": "evaluate a checkpoint on validation data",
    "test": "evaluate a checkpoint on test data",
}

USAGE = """\
featherlight: train a large model where only a small one fits

usage: featherlight COMMAND [options]

{commands}

start here:
  featherlight compare configs/quickstart          five ways to train on ten clients, in a few minutes
  featherlight cost -c configs/quickstart/2_layerwise.yaml
  featherlight federate -c configs/quickstart/2_layerwise.yaml --federation.rounds 20
  featherlight fit -c configs/fit_layerwise.yaml

any setting can be overridden behind its file; an item of a list by its class:
  featherlight federate -c configs/quickstart/2_layerwise.yaml --plugins.LayerFreezing.blocks_per_stage 2 --probes.KNN.k 5

  featherlight COMMAND --help          all options of a command
  featherlight COMMAND -c FILE --print_config      the whole configuration, with every default
"""

EXPECTED = ("ValueError", "OSError", "TypeError", "MisconfigurationException", "ArgumentError", "RuntimeError")
"""Errors that a user can cause: told in one line. Anything else is a bug and shows its traceback, as does FEATHERLIGHT_DEBUG=1."""


def usage() -> str:
    """The text of ``featherlight --help``."""
    width = max(map(len, COMMANDS))
    return USAGE.format(commands="\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits with 0, with 2 on bad input, with 130 when interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    command, *rest = arguments
    if command in ("-V", "--version"):
        print(import_module("featherlight").__version__)
        sys.exit(0)
    if command not in COMMANDS:
        near = get_close_matches(command, [*COMMANDS], 1)
        fail(f"there is no command {command!r}{f' (is it {near[0]}?)' if near else ''}; commands: {', '.join(COMMANDS)}")
    module = "lightning_run" if command in ("fit", "validate", "test") else command
    if "-h" in rest or "--help" in rest:
        print("finding all options takes some seconds", file=sys.stderr, flush=True)  # Lightning alone takes most of them
    try:
        run: Callable[[str, list[str]], None] = import_module(f"featherlight.commands.{module}").run
        run(command, rest)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not expected(error):
            raise
        fail(one_line(error))


def expected(error: Exception) -> bool:
    """Whether a user can have caused ``error``, so that one line tells it."""
    return not _debugging() and any(kind.__name__ in EXPECTED for kind in type(error).__mro__)


def one_line(error: Exception) -> str:
    """What ``error`` says, without line breaks, and without what jsonargparse wraps around it."""
    from featherlight.commands.innermost import innermost

    return innermost(str(error)) or type(error).__name__


def fail(message: str) -> None:
    """One line on standard error, and exit code 2."""
    print(f"featherlight: error: {message}", file=sys.stderr)
    sys.exit(2)


def _debugging() -> bool:
    import os

    return bool(os.environ.get("FEATHERLIGHT_DEBUG"))
