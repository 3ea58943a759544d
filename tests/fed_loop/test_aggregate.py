"""The exact mean: against fractions, in any order, in any split; and what it refuses."""

import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherlight.fed_loop.aggregate import BOUND, Mean, weigh
from featherlight.fed_loop.exact_sums import COARSE, ExactSums

FLOATS = st.floats(-1e6, 1e6, width=32)
ROWS = st.integers(1, 5).flatmap(
    lambda size: st.lists(st.tuples(st.lists(FLOATS, min_size=size, max_size=size), st.integers(1, 1000)), min_size=1, max_size=8)
)


def mean_of(rows, like, **options):
    mean = Mean(like, **options)
    for update, weight in rows:
        mean.add(update, weight)
    return mean


def shares(rows):
    total = sum(count for _, count in rows)
    return [({"w": torch.tensor(values)}, count / total) for values, count in rows]


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_against_fractions(rows):
    """Weights are rounded to 2⁻³⁰, so the mean is within 2⁻³⁰ · n of the exact one, in units of the largest value and of n weights."""
    result = mean_of(shares(rows), {"w": torch.zeros(len(rows[0][0]))}).result()["w"]
    total = sum(count for _, count in rows)
    for place, value in enumerate(result.tolist()):
        exact = sum(Fraction(values[place]) * count for values, count in rows) / total
        largest = max(abs(values[place]) for values, _ in rows)
        assert abs(Fraction(value) - exact) <= Fraction(largest) * len(rows) / 2**29 + Fraction(1, 2**70)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.randoms(use_true_random=False), st.integers(1, 4))
def test_any_order_and_any_split_give_the_same_bits(rows, random, parts):
    like = {"w": torch.zeros(len(rows[0][0]))}
    updates = shares(rows)
    whole = mean_of(updates, like).result()["w"]
    random.shuffle(updates)
    piles = [[] for _ in range(parts)]
    for update in updates:
        random.choice(piles).append(update)
    partial = [mean_of(pile, like) for pile in piles]
    told = [[] for _ in partial]  # what each process has to say, in turn
    for mean, own in zip(partial, told):
        mean.reduce(lambda value, own=own: own.append(value) or value)
    waiting = [sum(values) for values in zip(*told)]
    partial[0] = mean_of(piles[0], like)
    partial[0].reduce(lambda _: waiting.pop(0))
    assert torch.equal(partial[0].result()["w"], whole)


@settings(max_examples=300, deadline=None)
@given(st.integers(-53, 21), st.integers(0, 2**23 - 1), st.booleans(), st.integers(1, 2**20))
def test_a_value_of_one_client_alone_comes_back_bit_for_bit(exponent, mantissa, negative, parts):
    """Any float32 from 2⁻⁵³ to 2²² comes back from a client that is alone; smaller ones are rounded to multiples of 2⁻⁷⁶.

    A client of a share w keeps all 24 bits as long as they lie above 2⁻⁷⁷/w.
    """
    bits = (negative << 31) | ((exponent + 127) << 23) | mantissa
    (value,) = struct.unpack("<f", struct.pack("<I", bits))
    update = torch.tensor([value])
    assert update.dtype == torch.float32
    alone = mean_of([({"w": update}, 1.0)], {"w": update}).result()["w"]
    assert torch.equal(alone.float(), update)
    if exponent > -30:
        one_of_many = mean_of([({"w": update}, 1 / parts)], {"w": update}).result()["w"]
        assert torch.equal(one_of_many.float(), update)


def test_below_the_limit_values_are_rounded():
    tiny = torch.tensor([(1 + 2**-23) * 2.0**-54])  # its last bit is worth 2⁻⁷⁷
    back = mean_of([({"w": tiny}, 1.0)], {"w": tiny}).result()["w"]
    assert back.item() != tiny.item()
    assert abs(back.item() - tiny.double().item()) <= 2.0**-77


@pytest.mark.parametrize("clients", [3, 1000, 60000])
def test_what_all_clients_agree_on_is_the_mean(clients):
    """Shares of 1/60000 are rounded by 2⁻³¹, which is 2·10⁻⁵ of them: the mean must not be off by as much."""
    value = {"w": torch.tensor([0.1, -1234.5678, 3e-5])}
    mean = Mean(value)
    mean.add(value, 1 / clients)
    mean.reduce(lambda value: value * clients)  # as many processes with a client each
    assert torch.equal(mean.result()["w"].float(), value["w"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.tuples(FLOATS, st.sampled_from([0.0, 0.25, 1.0]))] * 3), min_size=1, max_size=5))
def test_weights_of_elements(rows):
    """Shares are powers of two, so that the weighted mean of every element is exact but for one division."""
    mean = Mean({"w": torch.zeros(3)}, dense_weights=True)
    for row in rows:
        value, own = zip(*row)
        mean.add({"w": (torch.tensor(value), torch.tensor(own))}, 1 / 8)
    entry = mean.result().get("w")
    exact = []
    for place in range(3):
        weight = sum(Fraction(row[place][1]) for row in rows)
        exact.append(sum(Fraction(row[place][0]) * Fraction(row[place][1]) for row in rows) / weight if weight else None)
    if all(value is None for value in exact):
        assert entry is None
        return
    value, held = entry if isinstance(entry, tuple) else (entry, torch.ones(3, dtype=torch.bool))
    assert held.tolist() == [wanted is not None for wanted in exact]
    for found, wanted in zip(value.tolist(), exact):
        if wanted is not None:
            assert abs(Fraction(found) - wanted) <= abs(wanted) / 2**50 + Fraction(1, 2**70)


def test_plain_entries_beside_weighted_ones():
    mean = Mean({"w": torch.zeros(2), "b": torch.zeros(1)}, dense_weights=True)
    mean.add({"w": (torch.tensor([2.0, 5.0]), torch.tensor([1.0, 0.0])), "b": torch.tensor([1.0])}, 0.5)
    mean.add({"b": torch.tensor([3.0])}, 0.5)
    result = mean.result()
    value, held = result["w"]
    assert value[0] == 2
    assert held.tolist() == [True, False]
    assert result["b"].tolist() == [2.0]


def test_entries_that_nobody_sent_are_not_in_the_result():
    mean = Mean({"w": torch.zeros(2), "b": torch.zeros(1)})
    mean.add({"b": torch.ones(1)}, 1.0)
    assert mean.result().keys() == {"b"}


def test_integers_and_flags_are_added_as_numbers():
    like = {"count": torch.tensor(0), "byte": torch.zeros(1, dtype=torch.uint8), "flag": torch.tensor(False), "none": torch.zeros(0, 3)}
    mean = Mean(like)
    for count, weight in ((3, 0.25), (7, 0.75)):
        mean.add({"count": torch.tensor(count), "byte": torch.full((1,), count, dtype=torch.uint8), "flag": torch.tensor(True)}, weight)
    mean.add({"none": torch.zeros(0, 3)}, 1.0)
    result = mean.result()
    assert result["count"].item() == 0.25 * 3 + 0.75 * 7
    assert result["byte"].item() == 6
    assert result["flag"].item() == 1
    assert result["none"].shape == (0, 3)


BAD = {
    "NaN": ({"w": torch.tensor([1.0, float("nan")])}, "not finite"),
    "infinite": ({"w": torch.tensor([1.0, -float("inf")])}, "not finite"),
    "too large": ({"w": torch.tensor([1.0, BOUND])}, "beyond 4194304"),
    "the least integer": ({"n": torch.tensor(-(2**63))}, "beyond"),
    "unknown": ({"v": torch.ones(2)}, '"v" is not among the 2'),
    "shape": ({"w": torch.ones(1)}, r"has shape \(1,\), expected \(2,\)"),
    "NaN weight": ({"w": (torch.ones(2), torch.tensor([1.0, float("nan")]))}, "a weight of 0 or more for each element"),
    "negative weight": ({"w": (torch.ones(2), torch.tensor([1.0, -1.0]))}, "a weight of 0 or more for each element"),
    "shape of the weight": ({"w": (torch.ones(2), torch.ones(1))}, "a weight of 0 or more for each element"),
    "huge weight": ({"w": (torch.ones(2), torch.tensor([1.0, 1e9]))}, "the weight of entry"),
    "too large with its weight": ({"w": (torch.tensor([1.0, 1e6]), torch.tensor([1.0, 100.0]))}, "times its weight"),
}


@pytest.mark.parametrize(("update", "message"), BAD.values(), ids=BAD)
def test_what_is_refused_adds_nothing(update, message):
    like = {"n": torch.tensor(0), "w": torch.zeros(2)}
    mean = Mean(like, dense_weights=True)
    mean.add({"n": torch.tensor(2), "w": torch.ones(2)}, 0.5)
    with pytest.raises(ValueError, match=message):
        mean.add({"n": torch.tensor(100), **update}, 0.5)
    result = mean.result()
    assert result["n"].item() == 2
    assert result["w"].tolist() == [1.0, 1.0]


VALUES = st.floats(-1e6, 1e6, width=32).filter(lambda value: value == 0 or abs(value) > 2.0**-40)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.lists(VALUES, min_size=3, max_size=3), st.integers(0, 2**26)), min_size=1, max_size=12))
def test_sums_are_the_exact_ones_rounded_once(rows):
    """Whichever form they went into: products of values above 2⁻⁴⁰ with weights in 2⁻³⁰ are multiples of 2⁻⁹³, and rounded to 2⁻⁷⁶."""
    sums = ExactSums(3, torch.device("cpu"))
    for values, units in rows:
        assert sums.add(0, torch.tensor(values), units)
    unit = Fraction(1, 2**76)
    for place, total in enumerate(sums.totals().tolist()):
        exact = sum(Fraction(values[place]) * units / 2**30 for values, units in rows)
        assert abs(Fraction(total) - exact) <= len(rows) * unit / 2 + abs(exact) / 2**52


@pytest.mark.parametrize("units", [2**26, 3 * 2**25, 107374183], ids=["a power of two", "few bits", "many bits"])
def test_short_and_long_sums_are_one(units):
    """Of a range of values that fit into one float64 each, the first half is made to go the long way, by a value that does not fit."""
    values = (torch.rand(200, generator=torch.Generator().manual_seed(0)) + 1).float()
    plain, mixed = (ExactSums(200, torch.device("cpu")) for _ in range(2))
    for sums in (plain, mixed):
        for turn in range(5):
            if sums is mixed:
                sums.add(0, torch.full((1,), 2.0**-50), 1)
            assert sums.add(0, values * (turn + 1), units)
            if sums is mixed:
                sums.add(0, torch.full((1,), 2.0**-50), -1)
    assert torch.equal(plain.totals(), mixed.totals())


def test_what_is_refused_half_way_is_taken_back():
    sums = ExactSums(2**17, torch.device("cpu"))
    values = torch.ones(2**17)
    assert sums.add(0, values, 2**29)
    values[-1] = torch.nan
    assert not sums.add(0, values, 2**29)
    assert torch.equal(sums.totals(), torch.full((2**17,), 0.5, dtype=torch.float64))


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50))
def test_weights_are_in_proportion_and_exact(sizes):
    weights = weigh(sizes, range(len(sizes)))
    assert sum(map(Fraction, weights.values())) <= 1
    for client, size in enumerate(sizes):
        assert Fraction(weights[client]) * sizes[0] == Fraction(weights[0]) * size
        assert (Fraction(weights[client]) * int(COARSE)).denominator == 1
