"""Messages to SuperNodes, and their answers as they come."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import Message
from flwr.serverapp import Grid

from featherlight.flower.records import read

PAUSE = 0.2
"""Seconds between looks for replies."""

Answer = tuple[str, bytes] | str
"""Header and bytes, or why there are none."""


def ask(grid: Grid, messages: Mapping[int, Message] | Iterable[tuple[int, Message]], patience: float) -> Iterator[tuple[int, Answer]]:
    """Clients' answers.

    Args:
        messages: by client number; patience: seconds to wait for them, 0: as long as it takes.
    """
    waiting: dict[str, int] = {}
    for client, message in (
        messages.items() if isinstance(messages, Mapping) else messages
    ):  # one at a time: they need not lie here together
        [sent] = grid.push_messages([message])
        if sent:
            waiting[sent] = client
        else:
            yield client, "the SuperLink did not take its message"
    until = time.monotonic() + patience if patience else float("inf")
    while waiting and time.monotonic() < until:
        for answer in grid.pull_messages(list(waiting)):
            client = waiting.pop(answer.metadata.reply_to_message_id)
            try:
                yield client, content(answer.metadata.src_node_id, answer)
            except ValueError as error:
                yield client, str(error)
        time.sleep(PAUSE)
    for client in waiting.values():
        yield client, f"no reply within {patience:g} seconds"


def content(node: int, answer: Message) -> tuple[str, bytes]:
    """Of a reply.

    Raises:
        ValueError: it is an error.
    """
    if answer.has_error():
        raise ValueError(f"SuperNode {node}: {answer.error.reason}")
    return read(answer.content)
