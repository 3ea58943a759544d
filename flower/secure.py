"""Secure aggregation: of a round's updates the server sees the sum, and no single one, though clients may vanish on the way.

The protocol of Bonawitz et al. (2017), against a server that follows it and looks at all that it sees: each pair of clients shares a mask,
which one adds and the other subtracts; each client adds one of its own. Of both secrets every client gives the others shares: of those who
answered the own mask is put together, of those who vanished the pairs', never both. Keys, shares and ciphers are Flower's own, as in its
SecAgg+; masks are ChaCha20's, on whole numbers modulo 2⁶⁴, so that sums are what they are without.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from flwr.app import ConfigRecord, Context
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat, share_keys_plaintext_separate
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, generate_key_pairs, public_key_to_bytes
from numpy.typing import NDArray

FEWEST = 3
"""Clients of a sum: of two, each would know the other's update."""

Numbers = NDArray[np.int64]
Told = dict[str, Any]
"""Plain data that JSON can hold."""

STATE, SHARES = "featherlight.secrets", "featherlight.shares"
"""Records of a node's state, and of a message."""


def needed(clients: int) -> int:
    """How many of so many must answer to the end: more than two thirds, so that no two sums of one round can be had."""
    return max(FEWEST, 2 * clients // 3 + 1)


def masks(secret: bytes, size: int) -> Numbers:
    """``(size,)`` numbers, uniform over all 2⁶⁴."""
    stream = Cipher(ChaCha20(hashlib.sha256(b"featherlight" + secret).digest(), bytes(16)), mode=None).encryptor()
    return np.frombuffer(stream.update(bytes(8 * size)), dtype="<i8").astype(np.int64)


def pair(client: int, other: int, key: ec.EllipticCurvePrivateKey, public: str, size: int) -> Numbers:
    """What ``client`` adds for ``other``, whose public key is given."""
    shared = masks(generate_shared_key(key, bytes_to_public_key(public.encode())), size)
    return shared if client < other else -shared


class Secrets:
    """A client's, of one round: they lie in its node's state from message to message, and never leave it but in shares.

    Raises:
        ValueError: the server asks for what would tell more than a sum.
    """

    def __init__(self, client: int, told: Told) -> None:
        self.client, self._own = client, told

    @classmethod
    def kept(cls, client: int, context: Context, round: int) -> Secrets:
        """From a node's state."""
        record: Any = context.state.config_records.get(STATE)
        told = json.loads(record["json"]) if record is not None else {}
        if told.get("round") != round:
            raise ValueError(f"client {client} has no secrets of round {round}: its sum was told already, or its node began anew")
        return cls(client, told)

    def keep(self, context: Context) -> None:
        """Into a node's state."""
        context.state[STATE] = ConfigRecord({"json": json.dumps(self._own)})

    @classmethod
    def begun(cls, client: int, round: int, context: Context | None = None) -> tuple[Secrets, list[str]]:
        """New ones, and their public halves; not of a round whose sum was told already in this run, as ``context`` knows."""
        record: Any = context.state.config_records.get(STATE) if context else None
        before = json.loads(record["json"]).get("told", -1) if record is not None else -1
        if round <= before:
            raise ValueError(f"client {client}: the sum of round {before} was told already, and round {round} is asked for anew")
        ways, public = [], []
        for _ in range(2):  # one to send shares by, one for masks
            key, other = generate_key_pairs()
            ways.append(key.private_numbers().private_value.to_bytes(48).hex())
            public.append(public_key_to_bytes(other).decode())
        return cls(client, {"told": before, "round": round, "keys": ways, "public": public, "own": os.urandom(32).hex()}), public

    def shares(self, public: Mapping[str, list[str]]) -> Told:
        """For each other client, whose public keys are given, its share of both secrets, which nobody else can read."""
        if public.get(str(self.client)) != self._own["public"] or "peers" in self._own:
            raise ValueError(f"client {self.client}: the keys are not those that it sent, or were told twice")
        if len(public) < FEWEST or len({key for keys in public.values() for key in keys}) < 2 * len(public):
            raise ValueError(f"client {self.client}: {len(public)} clients, of whom {FEWEST} or more with keys of their own make a sum")
        order, most = sorted(public, key=int), needed(len(public))
        own, key = (create_shares(bytes.fromhex(secret), most, len(order)) for secret in (self._own["own"], self._own["keys"][1]))
        sent = {}
        for other, of_own, of_key in zip(order, own, key):
            plain = share_keys_plaintext_concat(self.client, int(other), of_own, of_key)
            sent[other] = encrypt(self._way(public[other][0]), plain).decode()
        self._own["peers"] = dict(public)
        self._own["from"] = {str(self.client): sent.pop(str(self.client))}
        return sent

    def masked(self, numbers: Numbers, received: Mapping[str, str]) -> Numbers:
        """``numbers`` under all masks, ``received`` being the shares of those who are still there."""
        peers, given = self._own.get("peers", {}), {**received, **self._own.get("from", {})}
        if len(given) < needed(len(peers)) or not given.keys() <= peers.keys() or "masked" in self._own:
            raise ValueError(f"client {self.client}: {len(given)} of {len(peers)} clients' shares came, or a round is asked for twice")
        self._own |= {"from": given, "masked": True}
        key = _private(bytes.fromhex(self._own["keys"][1]))
        total = numbers + masks(bytes.fromhex(self._own["own"]), len(numbers))
        for other in given.keys() - {str(self.client)}:
            total += pair(self.client, int(other), key, peers[other][1], len(numbers))
        return total

    def revealed(self, survived: Iterable[int]) -> Told:
        """Shares by which the sum of those who ``survived`` can be read: of their own masks, and of the others' keys."""
        there, given = {str(client) for client in survived}, self._own.get("from", {})
        if "masked" not in self._own or not there <= given.keys() or str(self.client) not in there:
            raise ValueError(f"client {self.client} is asked for shares of a sum that it is not in, or of clients that it does not know")
        if len(there) < needed(len(self._own["peers"])):
            raise ValueError(f"client {self.client}: {len(there)} of {len(self._own['peers'])} clients are too few for a sum")
        told = {}
        for other, cipher in given.items():
            source, own, *both = share_keys_plaintext_separate(decrypt(self._way(self._own["peers"][other][0]), cipher.encode()))
            if (source, own) != (int(other), self.client):
                raise ValueError(f"client {self.client}: a share of client {source} for client {own} came as one of client {other}")
            told[other] = both[other not in there].hex()
        self._own = {"told": self._own["round"]}
        return told

    def _way(self, public: str) -> bytes:
        return generate_shared_key(_private(bytes.fromhex(self._own["keys"][0])), bytes_to_public_key(public.encode()))


def unmasked(
    total: Numbers, public: Mapping[str, list[str]], survived: Iterable[int], vanished: Iterable[int], shares: Iterable[Mapping[str, str]]
) -> Numbers:
    """The sum of what the clients who ``survived`` masked.

    Args:
        total: of masked numbers; vanished: whose shares came, and not their numbers; shares: as each told them, by whose they are.

    Raises:
        ValueError: shares do not fit together.
    """
    there, given = sorted(survived), list(shares)
    size = len(total)
    for client in chain(there, gone := sorted(vanished)):
        secret = combine_shares([bytes.fromhex(own[str(client)]) for own in given])
        if client not in gone:
            total = total - masks(secret, size)
            continue
        key = _private(secret)
        if public_key_to_bytes(key.public_key()).decode() != public[str(client)][1]:
            raise ValueError(f"the shares of client {client} do not give its key: somebody sent a wrong one")
        for other in there:
            total = total + pair(client, other, key, public[str(other)][1], size)  # what others added for it is its own, negated
    return total


def check_public(text: str) -> None:
    """Whether ``text`` is a public key as clients here send them.

    Raises:
        ValueError: it is none, or of another kind, or written otherwise.
    """
    try:
        key = bytes_to_public_key(text.encode())
        known = isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name == ec.SECP384R1.name
        same = known and public_key_to_bytes(key).decode() == text
    except Exception as error:  # of a hostile key's encoding the library has many ways to say no
        raise ValueError(f"a public key cannot be read ({type(error).__name__})") from error
    if not same:
        raise ValueError(f"a public key is not of {ec.SECP384R1.name}, or not written as Flower writes it")


def _private(value: bytes) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(int.from_bytes(value), ec.SECP384R1())
