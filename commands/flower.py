"""``featherlight flower``: a federated configuration as an app folder for ``flwr run``, and keys to try it with."""

from __future__ import annotations

from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path

from featherlight.commands.parsing import Parts, federated_parser, parse


def run(command: str, arguments: list[str]) -> None:
    """Run ``featherlight flower ARGUMENTS``.

    Raises:
        ValueError: Flower is not installed, the configuration is wrong, or a folder is taken.
    """
    own = ArgumentParser(
        prog="featherlight flower",
        description="Write a federated configuration as a Flower app. All options of featherlight federate are taken, too.",
    )
    own.add_argument("--app", type=Path, required=True, help="the app folder to write; its name is letters, digits and hyphens")
    own.add_argument(
        "--keys", type=Path, help="a folder for keys to try it with: a certificate for the SuperLink, a key for every SuperNode"
    )
    own.add_argument("--hosts", default="localhost,127.0.0.1", help="names and addresses of the SuperLink, for its certificate")
    options, rest = own.parse_known_args(arguments)
    if find_spec("flwr") is None:
        raise ValueError('Flower is not installed: pip install "featherlight[flower]"')
    from featherlight.flower.credentials import write_credentials
    from featherlight.flower.folder import write_app

    parser = federated_parser()
    config = parse(parser, rest)
    stem = Path(str(config.config[-1])).stem if config.config else "federation"
    write_app(options.app, parser.dump(config, skip_none=False, skip_check=True), stem)
    print(f"wrote {options.app}: flwr run {options.app}")
    if options.keys is not None:
        count = Parts(parser, config).data(pictures=False).num_clients
        write_credentials(options.keys, options.hosts.split(","), count)
        print(f"wrote {options.keys}: ca.crt, server.crt, server.key, and node-0 to node-{count - 1}")
