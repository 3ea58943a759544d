"""The ledger against clients whose actual copies of every entry are kept."""

from hypothesis import given, settings
from hypothesis import strategies as st

from featherlight.fed_loop.ledger import Ledger

ENTRIES = ["stem", "a", "b", "c", "head"]
SUBSETS = st.sets(st.sampled_from(ENTRIES))
TURNS = st.tuples(st.integers(0, 2), SUBSETS, SUBSETS, st.booleans())  # client, held, trained, rejected
ROUNDS = st.lists(st.lists(TURNS, max_size=3, unique_by=lambda turn: turn[0]), max_size=8)


@settings(max_examples=300, deadline=None)
@given(ROUNDS, st.booleans(), st.booleans())
def test_what_is_sent_is_what_differs(rounds, resend, resumed):
    """A value is a serial number, new at every change; a client's copy is that number, or a private one once it has trained it."""
    serial = iter(range(1, 10**6))
    server = dict.fromkeys(ENTRIES, 0)
    copies = {client: {} for client in range(3)}
    ledger = Ledger(resend)
    for round, turns in enumerate(rounds):
        changed, kept = set(), {}
        for client, held, trained, rejected in turns:
            sent = ledger.to_send(client, sorted(held))
            differs = {name for name in held if copies[client].get(name) != server[name]}
            assert set(sent) == (held if resend else differs)
            trained &= held
            kept[client] = ledger.after(client, held, trained)
            for name in held:
                copies[client][name] = -next(serial) if name in trained else server[name]
            changed |= set() if rejected else trained
        for client, entries in kept.items():
            ledger.visited(client, entries)
        ledger.changed(changed, round)
        for name in changed:
            server[name] = next(serial)
        if resumed:
            state, ledger = ledger.state_dict(), Ledger(resend)
            ledger.load_state_dict(state)


def test_nothing_is_remembered_where_everything_trains():
    ledger = Ledger()
    for round in range(3):
        for client in range(5):
            assert ledger.to_send(client, ENTRIES) == ENTRIES
            ledger.visited(client, ledger.after(client, ENTRIES, ENTRIES))
        ledger.changed(ENTRIES, round)
    assert ledger.state_dict()["kept"] == {}


def test_a_change_at_the_start_of_a_round_is_sent_in_that_round():
    """``copy_previous`` makes a new block out of the one before, between two rounds."""
    ledger = Ledger()
    ledger.visited(0, ledger.after(0, ["a", "b"], []))
    ledger.changed(["b"], round=4)
    assert ledger.to_send(0, ["a", "b"]) == ["b"]
    ledger.visited(0, ledger.after(0, ["a", "b"], []))
    ledger.changed(["b"], round=5)
    assert ledger.to_send(0, ["a", "b"]) == ["b"]
