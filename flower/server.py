"""The ServerApp: ``featherlight federate``, whose clients' turns are taken on SuperNodes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from featherlight.commands.federate import federate, tell
from featherlight.fed_loop import Federation
from featherlight.fed_loop.away import Reply, Request
from featherlight.flower.asking import PAUSE, ask, content
from featherlight.flower.records import written
from featherlight.flower.shared import arguments, check_same, fingerprint
from featherlight.flower.sums import SummedUp


def server_app(path: str | Path) -> ServerApp:
    """The ServerApp of a federated configuration.

    ``flwr run --run-config`` may set ``arguments`` (more of ``featherlight federate``'s, for server and clients alike), ``resume``,
    ``wait`` (seconds in which all clients must have come), ``patience`` (seconds that a round waits for its clients, 0: no limit) and
    ``secure`` (of a round's updates the server learns the sum alone).

    Args:
        path: the configuration, a YAML file of ``featherlight federate``.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        options = context.run_config

        def away(settings: Federation, data: Any, text: str) -> tuple[Any, Carried | SummedUp]:
            clients = gather(grid, data.num_clients, fingerprint(text), float(options.get("wait", 600)))
            kind = SummedUp if options.get("secure", False) else Carried
            return ServerData(data, clients), kind(grid, [told["node"] for told in clients], float(options.get("patience", 0)))

        line = arguments(Path(path), options.get("arguments"))
        result, folder, _ = federate(line, resume=bool(options.get("resume", False)), away=away)
        tell(result, folder)

    return app


class ServerData:
    """The server's own data, and of clients' what they told.

    Args:
        own: what the server evaluates and, where a method says so, trains on.
        clients: of each, by number, ``samples`` and ``steps``.
    """

    def __init__(self, own: Any, clients: Sequence[Mapping[str, Any]]) -> None:
        self._own, self._clients = own, clients
        self.num_clients = len(clients)

    def client_sizes(self) -> list[int]:
        """Training samples of each client."""
        return [int(told["samples"]) for told in self._clients]

    def steps_per_visit(self, client: int, epochs: int) -> int:
        """Steps of one turn."""
        return int(self._clients[client]["steps"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def gather(grid: Grid, count: int, ours: Mapping[str, str], wait: float) -> list[dict[str, Any]]:
    """Ask every SuperNode who it is, until all ``count`` clients are there.

    Returns:
        By client number, what it told, and its ``node``.

    Raises:
        ValueError: some do not come within ``wait`` seconds, or are of another federation, or two are one client.
    """
    asked: set[int] = set()
    waiting: dict[str, int] = {}
    clients: dict[int, dict[str, Any]] = {}
    until = time.monotonic() + wait
    while len(clients) < count:
        for node in grid.get_node_ids():
            if node not in asked:
                asked.add(node)
                waiting |= {sent: node for sent in grid.push_messages([Message(written("{}"), node, "query")]) if sent}
        for answer in grid.pull_messages(list(waiting)) if waiting else ():
            node = waiting.pop(answer.metadata.reply_to_message_id)
            told = {**json.loads(content(node, answer)[0]), "node": node}
            client = int(told["client"])
            if not 0 <= client < count:
                raise ValueError(f"a SuperNode says that it is client {client}; the configuration has clients 0 to {count - 1}")
            if client in clients:
                raise ValueError(f"two SuperNodes say that they are client {client}: give each a partition-id of its own")
            check_same(client, told["same"], ours)
            clients[client] = told
        missing = [client for client in range(count) if client not in clients]
        if missing and time.monotonic() > until:
            raise ValueError(f"clients {missing} did not come within {wait:g} seconds: start their SuperNodes, or wait longer (wait=…)")
        time.sleep(PAUSE)
    return [clients[client] for client in range(count)]


class Carried:
    """Takes turns to SuperNodes.

    Args:
        nodes: by client number; patience: seconds to wait for a round's replies, 0: as long as it takes.
    """

    def __init__(self, grid: Grid, nodes: Sequence[int], patience: float = 0) -> None:
        self._grid, self._nodes, self._patience = grid, nodes, patience

    def exchange(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """A reply for every request; one that says so where none comes, or an error."""
        for client, answer in ask(self._grid, self._messages(requests), self._patience):
            yield Reply.failed(client, answer) if isinstance(answer, str) else self._reply(client, *answer)

    def _messages(self, requests: Iterable[Request]) -> Iterator[tuple[int, Message]]:
        for request in requests:
            client, round = request.visit.client, str(request.visit.round)
            yield client, Message(written(request.header(), request.payload), self._nodes[client], "train", group_id=round)

    def _reply(self, client: int, header: str, payload: bytes) -> Reply:
        try:
            reply = Reply.of(header, payload)
        except (ValueError, KeyError, TypeError) as error:
            return Reply.failed(client, str(error))
        return reply if reply.turn.client == client else Reply.failed(client, f"it answered for client {reply.turn.client}")
