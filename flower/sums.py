"""A round by secure aggregation: four messages to each client, in place of one, and one sum."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from featherlight.fed_loop.away import Reply, Request
from featherlight.fed_loop.wire import unpack
from featherlight.flower.asking import ask
from featherlight.flower.records import written
from featherlight.flower.secure import SHARES, check_public, needed, unmasked

Answers = dict[int, tuple[str, bytes]]


class SummedUp:
    """Takes turns to SuperNodes, and learns of what they send no more than the sum.

    Args:
        nodes: by client number; patience: seconds to wait for each of a round's four answers, 0: as long as it takes.
    """

    def __init__(self, grid: Grid, nodes: Sequence[int], patience: float = 0) -> None:
        self._grid, self._nodes, self._patience = grid, nodes, patience

    def summed(self, requests: Sequence[Request], size: int) -> tuple[list[Reply], Tensor | None]:
        """As :class:`~featherlight.fed_loop.away.SumCarrier` says. Clients who vanish before they have sent their numbers are left out; if
        too few are there at any step, nothing of the round can be read, and all are."""
        round, failed = requests[0].visit.round, dict[int, str]()
        by_client = {request.visit.client: request for request in requests}

        def told(kind: str, check: Callable[[int, Any], None], each: Mapping[int, Any]) -> dict[int, Any]:
            contents = {client: written(json.dumps({"round": round, **own})) for client, own in each.items()}
            found: dict[int, Any] = {}
            for client, (text, _) in self._ask(kind, contents, round, failed).items():
                try:
                    if len(text) > 2**16 + 2**12 * len(by_client):
                        raise ValueError(f"{len(text)} characters")
                    found[client] = json.loads(text)
                    check(client, found[client])
                except (ValueError, TypeError, RecursionError) as error:
                    found.pop(client, None)
                    failed[client] = f"its answer to {kind} cannot be read ({type(error).__name__}: {error})"
            return found

        keys = {str(client): own for client, own in told("query.keys", _check_keys, {client: {} for client in by_client}).items()}
        count = Counter(key for own in keys.values() for key in own)
        for name in [name for name, own in keys.items() if any(count[key] > 1 for key in own)]:
            del keys[name]
            failed[int(name)] = "its public key came twice"
        most = needed(len(keys))
        named = partial(_check_named, keys.keys())
        shares = told("query.shares", named, {int(client): {"public": keys} for client in keys}) if len(keys) >= most else {}
        replies: dict[int, Reply] = {}
        total = np.zeros(size, dtype=np.int64)
        if len(shares) >= most:
            messages = {client: self._turn(by_client[client], shares) for client in shares}
            for client, (text, payload) in self._ask("train", messages, round, failed).items():
                reply = _reply(client, text, payload, by_client[client], size)
                replies[client] = reply
                if reply.turn.counts and not reply.lost:
                    total += unpack(payload)["whole"].numpy()
        survived = [client for client, reply in replies.items() if reply.turn.counts and not reply.lost]
        there = len(survived) if len(shares) >= most else len(shares) if len(keys) >= most else len(keys)
        if len(survived) >= most:
            named = partial(_check_named, {str(client) for client in shares})
            given = told("query.unmask", named, {client: {"survived": survived} for client in survived})
            if len(given) >= most:
                try:
                    sum = unmasked(total, keys, survived, shares.keys() - set(survived), list(given.values())[:most])
                    return self._all(by_client, replies, failed, ""), torch.from_numpy(sum)
                except (ValueError, KeyError) as error:
                    return self._all(by_client, replies, failed, f"the sum cannot be read: {error}"), None
            there = len(given)
        return self._all(by_client, replies, failed, f"{there} of {len(by_client)} clients were there, and a sum needs {most}"), None

    def _all(self, requests: Mapping[int, Request], replies: Mapping[int, Reply], failed: Mapping[int, str], why: str) -> list[Reply]:
        """A reply for each request, of which none counts where there is a reason ``why``."""
        every = [replies.get(client) or Reply.failed(client, failed.get(client, why or "no reply came")) for client in requests]
        for reply in every if why else ():
            reply.turn.reject(why, "no_reply")
        return every

    def _turn(self, request: Request, shares: Mapping[int, Mapping[str, str]]) -> RecordDict:
        client = request.visit.client
        content = written(request.header(), request.payload)
        own = {str(other): sent[str(client)] for other, sent in shares.items() if other != client}
        content[SHARES] = ConfigRecord({"json": json.dumps(own)})
        return content

    def _ask(self, kind: str, contents: Mapping[int, RecordDict], round: int, failed: dict[int, str]) -> Answers:
        """What clients answer; why the others do not goes to ``failed``."""
        messages = {client: Message(content, self._nodes[client], kind, group_id=str(round)) for client, content in contents.items()}
        answers: Answers = {}
        for client, answer in ask(self._grid, messages, self._patience):
            if isinstance(answer, str):
                failed[client] = answer
            else:
                answers[client] = answer
        return answers


def _check_keys(client: int, told: Any) -> None:
    """Two public keys.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(told, list) or len(told) != 2 or not all(isinstance(key, str) for key in told):
        raise ValueError("two public keys were asked for")
    for key in told:
        check_public(key)


def _check_named(names: Collection[str], client: int, told: Any) -> None:
    """A text for each of ``names``, or each but the client's own.

    Raises:
        ValueError: it is something else.
    """
    own = {str(client)}
    if not isinstance(told, dict) or told.keys() | own != set(names) | own or not all(isinstance(text, str) for text in told.values()):
        raise ValueError("a text for each client was asked for")


def _reply(client: int, text: str, payload: bytes, request: Request, size: int) -> Reply:
    """What a client sent, read and checked but for what is masked."""
    try:
        reply = Reply.of(text, payload)
        if reply.turn.client != client or reply.round != request.visit.round:
            raise ValueError(f"it answered for client {reply.turn.client} in round {reply.round}")
        if reply.turn.counts and not reply.lost:
            numbers = unpack(payload, limit=8 * size + 2**16).get("whole", torch.zeros(0))
            if numbers.shape != (size,) or numbers.dtype != torch.int64:
                raise ValueError(f"{tuple(numbers.shape)} numbers of {numbers.dtype} came, and {size} whole ones were asked for")
    except ValueError as error:
        return Reply.failed(client, str(error))
    return reply
