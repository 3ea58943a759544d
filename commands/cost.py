"""``featherlight cost``: what a configuration will hold, compute and send, without training it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import Progress

from featherlight.commands.parsing import Parts as Configured
from featherlight.commands.parsing import federated_parser, is_federated, parse
from featherlight.commands.tables import compression_line, cost_table, parts_line, privacy_line, server_table
from featherlight.fed_loop.report import valid
from featherlight.fed_loop.whole_files import write_text
from featherlight.plugins.cost_table import HEADINGS, CostTable

if TYPE_CHECKING:
    from featherlight.fed_loop.accounting import Account
    from featherlight.fed_loop.predict import Parts, Traffic


def run(command: str, arguments: list[str]) -> None:
    """Run ``featherlight cost ARGUMENTS``."""
    parser = ArgumentParser(
        prog="featherlight cost",
        description="Predict what a configuration costs, per stage, without training and without the memory it describes. "
        "Other options (such as --federation.rounds 10) override the file, as they do for federate or fit.",
        exit_on_error=False,
    )
    parser.add_argument(
        "-c", "--config", required=True, action="append", help="a YAML file, as federate or fit takes it; several are merged, the last wins"
    )
    parser.add_argument("--epsilon", type=float, default=None, help="also find the noise multiplier with which ClientPrivacy ends there")
    parser.add_argument("--json", type=str, default=None, help="write rows and total to this file, too")
    if "-h" in arguments or "--help" in arguments:
        parser.print_help()
        return
    known, rest = _split(arguments)
    config = parse(parser, known)
    traffic: list[Traffic] = []
    parts: dict[str, tuple[int, int]] = {}
    accounts: list[Account] = []
    table = predict_config(config.config, rest, traffic.append, parts.update, accounts.append)
    if config.epsilon is not None and not accounts:
        raise ValueError(f"--epsilon={config.epsilon}: there is no ClientPrivacy among the plugins, whose noise it could be")
    shown = [name for name in HEADINGS if name != "seconds"]
    Console().print(cost_table(table, f"{', '.join(config.config)}: cost of one client in one round, by stage; total over the run", shown))
    if table.server is not None:
        Console().print(server_table(table.server, shown))
    for last in traffic:
        if last.down + last.up < 2 * last.whole:
            Console().print(compression_line(last.compression))
    if len(parts) > 1:
        Console().print(parts_line(parts))
    private = [account.told(account.rounds) for account in accounts]
    for account, own in zip(accounts, private):
        Console().print(privacy_line(own))
        if config.epsilon is not None:
            Console().print(f"noise_multiplier {account.noise_for(config.epsilon):g} ends at ε = {config.epsilon:g}")
    if config.json:
        told = {name: {"bytes_down": down, "bytes_up": up} for name, (down, up) in sorted(parts.items())}
        more = {**({"parts": told} if told else {}), **({"privacy": valid(private[0])} if private else {})}
        write_text(Path(config.json), json.dumps({**_predicted(table), **more}, indent=2))


def predict_config(
    paths: str | list[str],
    arguments: list[str],
    last_traffic: Callable[[Traffic], None] = lambda traffic: None,
    parts: Callable[[Parts], None] = lambda parts: None,
    account: Callable[[Account], None] = lambda account: None,
) -> CostTable:
    """The predicted cost table of a configuration (a file, or several to merge), federated or for a Trainer; ``last_traffic`` is told of
    a last round, ``parts`` of what travels of each part of the model, ``account`` of who counts ε, where a plugin makes rounds private."""
    from featherlight.fed_loop.accounting import account_of
    from featherlight.fed_loop.predict import predict
    from featherlight.plugins import Chain

    paths = paths if isinstance(paths, list) else [paths]
    arguments = [*(word for path in paths for word in ("-c", path)), *arguments]
    federated = [is_federated(path) for path in paths]  # each is read: one that is not there is told of
    if not any(federated):
        from featherlight.commands.lightning_run import predict_fit

        return predict_fit(arguments)
    parser = federated_parser()
    config = Configured(parser, parse(parser, arguments))
    federation = config.federation()
    with Progress(transient=True) as progress:
        task = progress.add_task("rounds", total=federation.rounds)
        data, plugins = config.data(pictures=False), config.plugins()
        make = config.module
        if (own := account_of(federation, Chain(plugins), data.num_clients)) is not None:
            account(own)
        return predict(federation, make, data, plugins, lambda done: progress.update(task, completed=done), last_traffic, parts)


def _predicted(table: CostTable) -> dict[str, Any]:
    """Rows and total without seconds, which nobody has predicted."""
    told = table.to_json()
    for part in (told, *([told["server"]] if "server" in told else [])):
        for row in (*part["rows"], part["total"]):
            del row["seconds"]
    return told


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own options, and the rest, which belongs to the configuration."""
    own: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        name = word.split("=", 1)[0]
        if name in ("-c", "--config", "--json", "--epsilon"):
            own.append(word)
            if "=" not in word:
                own += [value for value in [next(words, None)] if value is not None]
        else:
            rest.append(word)
    return own, rest
