"""Medians and trimmed means: against numpy's and lists, over what each client held, in any order and any split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherlight.fed_loop import Median, TrimmedMean

ROWS = st.integers(1, 4).flatmap(lambda size: st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=size, max_size=size), min_size=1))


def result(rule, rows, held=None):
    like = {"w": torch.zeros(len(rows[0]))}
    kept = rule.over(like, held is not None)
    for place, row in enumerate(rows):
        value = torch.tensor(row)
        kept.add({"w": value if held is None else (value, torch.tensor(held[place]))}, 1 / len(rows))
    return kept.result().get("w")


@settings(max_examples=150, deadline=None)
@given(ROWS)
def test_the_median_is_numpy_s(rows):
    assert np.allclose(result(Median(), rows).numpy(), np.median(np.array(rows, dtype=np.float64), axis=0), rtol=1e-12, atol=0)


@settings(max_examples=150, deadline=None)
@given(ROWS, st.floats(0, 0.49))
def test_the_trimmed_mean_by_sorting(rows, trim):
    cut = int(trim * len(rows))
    ordered = np.sort(np.array(rows, dtype=np.float64), axis=0)[cut : len(rows) - cut]
    assert np.allclose(result(TrimmedMean(trim), rows).numpy(), ordered.mean(0), rtol=1e-9, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.tuples(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, 1.0]))] * 3), min_size=1, max_size=7))
def test_over_those_who_held_an_element(rows):
    values, held = ([[entry[part] for entry in row] for row in rows] for part in (0, 1))
    entry = result(Median(), values, held)
    by_element = [[value for (value, own) in column if own] for column in zip(*rows)]
    if not any(by_element):
        assert entry is None
        return
    value, mask = entry if isinstance(entry, tuple) else (entry, torch.ones(3, dtype=torch.bool))
    assert mask.tolist() == [bool(column) for column in by_element]
    for found, column in zip(value.tolist(), by_element):
        if column:
            assert found == pytest.approx(np.median(column), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(ROWS, st.randoms(use_true_random=False), st.sampled_from([Median(), TrimmedMean(0.2)]))
def test_any_order_gives_the_same_bits(rows, random, rule):
    other = list(rows)
    random.shuffle(other)
    assert torch.equal(result(rule, rows), result(rule, other))


def test_a_minority_cannot_move_it_beyond_the_others():
    rows = [[1.0], [2.0], [3.0], [1e6], [1e6]]
    assert result(Median(), rows).item() == 3.0
    assert result(TrimmedMean(0.4), rows).item() == 3.0
    assert result(TrimmedMean(0.2), rows).item() == pytest.approx((2 + 3 + 1e6) / 3)


@pytest.mark.parametrize("trim", [-0.1, 0.5, float("nan")])
def test_a_share_out_of_range(trim):
    with pytest.raises(ValueError, match="trim="):
        TrimmedMean(trim)


def test_what_the_mean_refuses_is_refused_here():
    kept = Median().over({"w": torch.zeros(2)})
    for update in ({"w": torch.tensor([1.0, float("nan")])}, {"w": torch.zeros(3)}, {"v": torch.zeros(2)}):
        with pytest.raises(ValueError, match="entry"):
            kept.add(update, 1.0)
    assert kept.result() == {}
