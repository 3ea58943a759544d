"""The ClientApp: a client with data of its own, which takes a turn for each message and keeps what it has between them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from featherlight.commands.parsing import Parts, federated_parser, parse
from featherlight.fed_loop.away import Belongings, Reply, Request
from featherlight.fed_loop.away_client import AwayClient
from featherlight.fed_loop.wire import pack, unpack
from featherlight.flower.records import CARRIED, read, written
from featherlight.flower.secure import SHARES, Secrets
from featherlight.flower.shared import arguments, fingerprint
from featherlight.plugins import Visit

NUMBER, OWN, MORE, SECURE = "partition-id", "data-client", "arguments", "secure"
"""Keys of ``--node-config``."""


class OwnData:
    """One client's view of data in which it may have another number.

    Args:
        data: as configured; client: the federation's number; number: the one it has in ``data``.
    """

    def __init__(self, data: Any, client: int, number: int) -> None:
        if not 0 <= number < data.num_clients:
            raise ValueError(
                f"client {client} has number {number} in its data, which have {data.num_clients} clients: give {OWN}=0 to "
                f"{data.num_clients - 1}, or other data"
            )
        self._data, self._number = data, number
        self.on_after_batch_transfer = data.on_after_batch_transfer

    def client_batches(self, visits: Sequence[Visit], epochs: int) -> Iterator[Any]:
        """As its data give them."""
        return self._data.client_batches([visit._replace(client=self._number) for visit in visits], epochs)

    def steps_per_visit(self, client: int, epochs: int) -> int:
        """Steps of one turn."""
        return self._data.steps_per_visit(self._number, epochs)

    def samples(self) -> int:
        """Training samples."""
        return int(self._data.client_sizes()[self._number])


class Configured:
    """What a client makes of the app's configuration and its node's own settings.

    Raises:
        ValueError: the node does not say which client it is, or the configuration is wrong.
    """

    def __init__(self, path: Path, context: Context) -> None:
        node = context.node_config
        if not isinstance(node.get(NUMBER), int):
            raise ValueError(
                f'a SuperNode must say which client it is: start it with --node-config "{NUMBER}=0", each with a number of its own'
            )
        self.number = int(node[NUMBER])
        parser = federated_parser()
        config = parse(parser, arguments(path, context.run_config.get(MORE), node.get(MORE)))
        self.fingerprint = fingerprint(parser.dump(config, skip_none=False, skip_check=True))
        self.parts = Parts(parser, config)
        self.settings = self.parts.federation()
        self.data = OwnData(self.parts.data(), self.number, int(node.get(OWN, self.number)))


def client_app(path: str | Path) -> ClientApp:
    """The ClientApp of a federated configuration.

    A SuperNode's ``--node-config`` says ``partition-id``: which client of the federation it is; and, where it wants, ``data-client``: the
    number that this client has in its own data, if another, ``arguments``: such as ``--data.root=/where/they/are``, and ``secure=true``,
    if it sends nothing but what is added up by secure aggregation.

    Args:
        path: the configuration, a YAML file of ``featherlight federate``.
    """
    app = ClientApp()

    @app.query()
    def who(message: Message, context: Context) -> Message:
        """Which client this is, and how much it has: all that a server learns of its data, but for updates."""
        own = Configured(Path(path), context)
        told = {"client": own.number, "samples": own.data.samples(), "same": own.fingerprint}
        steps = own.data.steps_per_visit(own.number, own.settings.local_epochs)
        return Message(written(json.dumps({**told, "steps": steps})), reply_to=message)

    @app.train()
    def turn(message: Message, context: Context) -> Message:
        own = Configured(Path(path), context)
        request = Request.of(*read(message.content))
        if request.visit.client != own.number:
            raise ValueError(f"a message for client {request.visit.client} came to client {own.number}")
        if request.weight is None and context.node_config.get(SECURE):
            raise ValueError(f"client {own.number} takes part in secure sums alone, and this is none: start the run with secure=true")
        reply, kept = taken(own, request, belongings(context))
        context.state.update(written("", kept.packed()))
        if request.weight is not None and reply.payload:
            reply = reply._replace(payload=_masked(own.number, request.visit.round, message, context, reply.payload))
        return Message(written(reply.header(), reply.payload), reply_to=message)

    @app.query("keys")
    def keys(message: Message, context: Context) -> Message:
        number, told = _asked(message, context)
        secrets, public = Secrets.begun(number, told["round"], context)
        secrets.keep(context)
        return Message(written(json.dumps(public)), reply_to=message)

    @app.query("shares")
    def shares(message: Message, context: Context) -> Message:
        return _of_secrets(message, context, lambda secrets, told: secrets.shares(told["public"]))

    @app.query("unmask")
    def unmask(message: Message, context: Context) -> Message:
        return _of_secrets(message, context, lambda secrets, told: secrets.revealed(told["survived"]))

    return app


def _asked(message: Message, context: Context) -> tuple[int, dict[str, Any]]:
    """Which client this is, and what it is asked."""
    return int(context.node_config[NUMBER]), json.loads(read(message.content)[0])


def _of_secrets(message: Message, context: Context, told_of: Callable[[Secrets, dict[str, Any]], dict[str, Any]]) -> Message:
    """What a client tells of the secrets of the round that it is asked about."""
    number, told = _asked(message, context)
    secrets = Secrets.kept(number, context, told["round"])
    content = told_of(secrets, told)
    secrets.keep(context)
    return Message(written(json.dumps(content)), reply_to=message)


def _masked(client: int, round: int, message: Message, context: Context, payload: bytes) -> bytes:
    """An update's whole numbers under the round's masks."""
    shares: Any = message.content.config_records[SHARES]
    secrets = Secrets.kept(client, context, round)
    numbers = secrets.masked(unpack(payload)["whole"].numpy(), json.loads(shares["json"]))
    secrets.keep(context)
    return pack({"whole": torch.from_numpy(numbers)})


def belongings(context: Context) -> Belongings:
    """What earlier messages have left to this node."""
    return Belongings.unpacked(read(context.state)[1]) if CARRIED in context.state else Belongings()


def taken(own: Configured, request: Request, had: Belongings) -> tuple[Reply, Belongings]:
    """One turn of a client that exists for it."""
    client = AwayClient(own.settings, own.parts.module(), own.data, own.parts.plugins())
    try:
        return client.take(request, had)
    finally:
        client.close()
