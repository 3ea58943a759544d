"""Secure aggregation over Flower's messages: the weights of a run whose server saw each update, and what nobody is told."""

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed: pip install -e '.[test,flower]'")

from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, RecordDict
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from featherlight.fed_loop import checkpoint
from featherlight.fed_loop.wire import unpack
from featherlight.flower.secure import Secrets, masks, needed, unmasked

FREEZING = {"class_path": "LayerFreezing", "init_args": {"blocks": "backbone.blocks.*", "periods_per_stage": 1}}
NODES = tuple({"partition-id": number, "secure": True} for number in range(4))
OPEN = tuple({"partition-id": number} for number in range(4))
WAYS = {
    "LayerFreezing, depth dropout and top-k": [
        FREEZING,
        {"class_path": "DepthDropout", "init_args": {"blocks": "backbone.blocks.*"}},
        {"class_path": "TopK", "init_args": {"k": 50}},
    ],
    "ClientPrivacy, noise by clients": [
        {"class_path": "IntrinsicProjection", "init_args": {"dim": 50}},
        {"class_path": "ClientPrivacy", "init_args": {"clip": 1.0, "noise_multiplier": 0.1, "shares": 3, "statistics": "stay"}},
    ],
}


def server(folder):
    return checkpoint.read_newest(folder)[1]


@pytest.mark.parametrize("way", WAYS)
def test_the_weights_are_those_of_a_server_that_sees_all(way, configured, serve):
    """A client vanishes in the second round; the others' sum is what it would be."""
    path = configured(*WAYS[way], clients=4, rounds=2)
    seen, _ = serve(path, OPEN, down=[(1, "1")], folder="seen")
    summed, grid = serve(path, NODES, down=[(1, "1")], folder="summed", secure=True)
    one, other = server(seen), server(summed)
    assert not [name for name, value in one["server"].items() if not torch.equal(value, other["server"][name])]
    assert [(row["clients"], row["rejected"]) for row in other["history"]] == [(4, 0), (3, 1)]
    kinds = [kind for kind, round, _ in grid.sent if round == "0"]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(["query.keys", "query.shares", "train", "query.unmask"], 4)


# -- by hand ------------------------------------------------------------------------------------------------------------
SIZE = 3000


@pytest.fixture
def clients():
    """Five that have told keys and shares."""
    made = {number: Secrets.begun(number, 7) for number in range(5)}
    public = {str(number): own for number, (_, own) in made.items()}
    secrets = {number: own for number, (own, _) in made.items()}
    return secrets, public, {number: own.shares(public) for number, own in secrets.items()}


def to(number, shares, of):
    return {str(other): shares[other][str(number)] for other in of if other != number}


@pytest.mark.parametrize("gone", [(), (2,)])
def test_the_sum_is_the_sum_and_nothing_else_can_be_read(clients, gone):
    secrets, public, shares = clients
    draw = np.random.default_rng(3)
    numbers = {number: draw.integers(-(2**50), 2**50, SIZE) for number in secrets}
    masked = {number: own.masked(numbers[number], to(number, shares, secrets)) for number, own in secrets.items()}
    for own in masked.values():  # every bit is set in half of the numbers
        bits = (own[:, None] >> np.arange(64)) & 1
        assert np.all(np.abs(bits.mean(0) - 0.5) < 5 * 0.5 / SIZE**0.5)
    survived = [number for number in secrets if number not in gone]
    total = sum(masked[number] for number in survived)
    told = [secrets[number].revealed(survived) for number in survived]
    found = unmasked(total, public, survived, gone, told[: needed(5)])
    assert np.array_equal(found, sum(numbers[number] for number in survived))
    with pytest.raises(ValueError, match=r"is asked for shares|no secrets"):
        secrets[0].revealed(survived)  # a second time


def test_fewer_than_are_needed_know_nothing(clients):
    secrets, public, shares = clients
    masked = {number: own.masked(np.zeros(SIZE, dtype=np.int64), to(number, shares, secrets)) for number, own in secrets.items()}
    told = [own.revealed([*secrets]) for own in secrets.values()]
    try:
        found = unmasked(sum(masked.values()), public, secrets, (), told[: needed(5) - 1])
    except ValueError:  # shares too few mostly make no secret at all
        return
    assert not np.array_equal(found, np.zeros(SIZE, dtype=np.int64))


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (lambda own, public, shares: own.shares(public), "told twice"),
        (lambda own, public, shares: own.masked(np.zeros(3, dtype=np.int64), to(0, shares, [0, 1])), "2 of 5 clients' shares came"),
        (lambda own, public, shares: own.revealed([0, 1, 2, 3]), "of a sum that it is not in"),
    ],
)
def test_what_a_client_does_not_do(clients, ask, why):
    secrets, public, shares = clients
    with pytest.raises(ValueError, match=why):
        ask(secrets[0], public, shares)


@pytest.mark.parametrize(("survived", "why"), [([1, 2, 3, 4], "not in"), ([0, 1, 2], "3 of 5 clients are too few")])
def test_sums_that_a_client_does_not_help_to_read(clients, survived, why):
    secrets, _, shares = clients
    secrets[0].masked(np.zeros(3, dtype=np.int64), to(0, shares, secrets))
    with pytest.raises(ValueError, match=why):
        secrets[0].revealed(survived)


def test_masks_are_uniform_and_their_own():
    one, other = masks(b"one", 4000), masks(b"other", 4000)
    assert len({*one.tolist(), *other.tolist()}) == 8000
    assert abs(float(one.astype(np.float64).mean())) < 5 * 2**64 / 12**0.5 / 4000**0.5


# -- refused ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("nodes", "secure", "why"),
    [
        (NODES[:3], False, "takes part in secure sums alone, and this is none"),
        (NODES[:2], True, "2 of 2 clients were there, and a sum needs 3"),
    ],
)
def test_where_there_is_no_sum_nothing_is_learned(nodes, secure, why, configured, serve, capsys):
    with pytest.raises(ValueError, match=r"all . updates were rejected"):
        serve(configured(clients=len(nodes), rounds=1), nodes, secure=secure)
    assert why in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize(
    ("methods", "settings", "why"),
    [
        ([{"class_path": "PrismSampling", "init_args": {"keep": 0.5}}], {}, "PrismSampling: what a smaller module sends"),
        ([], {"aggregate": {"class_path": "Median"}}, "aggregate=Median looks at each client's update"),
    ],
)
def test_what_needs_updates_one_by_one_is_refused(methods, settings, why, configured, serve):
    with pytest.raises(ValueError, match=why):
        serve(configured(*methods, clients=4, **settings), NODES, secure=True)


def test_a_client_that_sends_rubbish_spoils_a_round_and_not_the_weights(configured, serve, monkeypatch):
    from featherlight.flower import client

    real, spoilt = client._masked, []

    def masked(number, round, message, context, payload):
        if (number, round) == (2, 1):
            spoilt.append(round)
            payload = client.pack({"whole": unpack(payload)["whole"] + 2**58})
        return real(number, round, message, context, payload)

    monkeypatch.setattr(client, "_masked", masked)
    there, _ = serve(configured(clients=4, rounds=2, checkpoint_every=1), NODES, secure=True)
    first, last = (checkpoint.read(path) for path in checkpoint.existing(there))
    assert spoilt == [1]
    assert [row["clients"] for row in last["history"]] == [4, 0]
    assert all(torch.equal(value, last["server"][name]) for name, value in first["server"].items())


def of_curve(curve):
    return [public_key_to_bytes(ec.generate_private_key(curve).public_key()).decode() for _ in range(2)]


NO_CURVE = "-----BEGIN PUBLIC KEY-----\nMBgwEwYHKoZIzj0CAQYIKoZIzj0DAWMDAQAA\n-----END PUBLIC KEY-----\n"
HOSTILE = {
    "no list": {},
    "no keys": ["no key", "neither"],
    "an unknown curve": [NO_CURVE, NO_CURVE],
    "another curve": of_curve(ec.SECP256R1()),
    "one key twice": of_curve(ec.SECP384R1())[:1] * 2,
    "written otherwise": [key + "\n" for key in of_curve(ec.SECP384R1())],
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_an_answer_that_cannot_be_read_leaves_its_client_out(hostile, configured, serve, monkeypatch):
    from featherlight.flower import client

    class Hostile(Secrets):
        @classmethod
        def begun(cls, number, round, context=None):
            secrets, public = super().begun(number, round, context)
            return secrets, HOSTILE[hostile] if number == 1 else public

    monkeypatch.setattr(client, "Secrets", Hostile)
    there, _ = serve(configured(clients=4, rounds=1), NODES, secure=True)
    assert [(row["clients"], row["rejected"]) for row in server(there)["history"]] == [(3, 1)]


def test_a_round_whose_sum_was_told_is_not_begun_anew(clients):
    secrets, _, shares = clients
    own, context = secrets[0], Context(1, 0, {}, RecordDict(), {})
    own.masked(np.zeros(3, dtype=np.int64), to(0, shares, secrets))
    own.keep(context)
    Secrets.begun(0, 7, context)  # nothing was told
    own.revealed(range(5))
    own.keep(context)
    with pytest.raises(ValueError, match="the sum of round 7 was told already"):
        Secrets.begun(0, 7, context)
    later, _ = Secrets.begun(0, 8, context)
    later.keep(context)
    with pytest.raises(ValueError, match="the sum of round 7 was told already"):
        Secrets.begun(0, 7, context)
