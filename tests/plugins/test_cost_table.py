"""A run's cost: means per turn, peaks that stay peaks, and the JSON that users read."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherlight.plugins.cost_table import HEADINGS, PEAKS, SUMS, CostTable, TurnCost, readable, text_rows

KEYS = ["stage", "rounds", "params_held", "params_trained", "saved_bytes", "peak_bytes", "flops_forward", "flops_backward"]
KEYS += ["bytes_down", "bytes_up", "seconds"]

turns = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 5), st.lists(st.integers(0, 10**6), min_size=9, max_size=9)), min_size=1, max_size=12
)


@pytest.fixture
def table():
    """Stage 1: rounds 0 and 1 with two clients each; stage 2: round 2 with one."""
    table = CostTable()
    table.add(0, 0, TurnCost(10, 10, 100, 1000, 50, 100, 40, 40, 1.0))
    table.add(0, 0, TurnCost(10, 10, 120, 1100, 70, 140, 40, 40, 2.0))
    table.add(0, 1, TurnCost(10, 10, 100, 1000, 50, 100, 0, 40, 1.0))
    table.add(0, 1, TurnCost(10, 10, 100, 1000, 50, 100, 0, 40, 0.0))
    table.add(1, 2, TurnCost(20, 8, 60, 900, 90, 20, 80, 32, 3.0))
    return table


def test_rows_are_means_of_sums_and_largest_peaks(table):
    first, second = table.rows()
    assert first == dict(zip(KEYS, [1, 2, 10, 10, 120, 1100, 55, 110, 20, 40, 1.0]))
    assert second == dict(zip(KEYS, [2, 1, 20, 8, 60, 900, 90, 20, 80, 32, 3.0]))


def test_total_is_a_client_that_takes_part_in_every_round(table):
    assert table.total() == dict(zip(KEYS[1:], [3, 20, 10, 120, 1100, 2 * 55 + 90, 2 * 110 + 20, 2 * 20 + 80, 2 * 40 + 32, 5.0]))


def test_the_json_is_what_the_documentation_says(table):
    told = json.loads(json.dumps(table.to_json()))
    assert list(told) == ["rows", "total"]
    assert all(list(row) == KEYS for row in told["rows"])
    assert list(told["total"]) == KEYS[1:]
    assert all(isinstance(row[name], int) for row in told["rows"] for name in KEYS[:6])


def test_a_mean_that_is_no_whole_number_is_not_rounded():
    table = CostTable()
    for length in (1, 2):
        table.add(0, 0, TurnCost(bytes_up=length))
    assert table.rows()[0]["bytes_up"] == 1.5
    assert table.total()["bytes_up"] == 1.5


@settings(deadline=None)
@given(turns)
def test_rows_and_total_agree_with_a_loop(turns):
    table = CostTable()
    for stage, round, costs in turns:
        table.add(stage, round, TurnCost(*costs))
    rows = table.rows()
    assert [row["stage"] for row in rows] == sorted({stage + 1 for stage, _, _ in turns})
    for row in rows:
        mine = [costs for stage, _, costs in turns if stage + 1 == row["stage"]]
        assert row["rounds"] == len({round for stage, round, _ in turns if stage + 1 == row["stage"]})
        for place, name in enumerate(PEAKS):
            assert row[name] == max(costs[place] for costs in mine)
        for place, name in enumerate(SUMS, len(PEAKS)):
            assert row[name] == pytest.approx(sum(costs[place] for costs in mine) / len(mine))
    for name in SUMS:
        assert table.total()[name] == pytest.approx(sum(row["rounds"] * row[name] for row in rows))


@settings(deadline=None)
@given(turns, st.integers(0, 12))
def test_a_table_goes_on_after_a_checkpoint_as_if_nothing_had_been(turns, cut):
    whole, first, second = CostTable(), CostTable(), CostTable()
    for number, (stage, round, costs) in enumerate(turns):
        whole.add(stage, round, TurnCost(*costs))
        if number < cut:
            first.add(stage, round, TurnCost(*costs))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.to_json() == first.to_json()
    for stage, round, costs in turns[cut:]:
        second.add(stage, round, TurnCost(*costs))
    assert second.to_json() == whole.to_json()


def test_a_saved_state_is_a_copy(table):
    state = table.state_dict()
    table.add(0, 0, TurnCost(bytes_up=1000))
    other = CostTable()
    other.load_state_dict(state)
    other.add(0, 9, TurnCost())
    assert state["0"]["turns"] == 4
    assert state["0"]["sums"]["bytes_up"] == 160
    assert state["0"]["rounds"] == [0, 1]


def test_an_empty_table():
    assert CostTable().rows() == []
    assert CostTable().total() == {"rounds": 0, **dict.fromkeys([*PEAKS, *SUMS], 0)}


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("bytes_up", 0, "0B"),
        ("bytes_up", 1023, "1023B"),
        ("bytes_up", 1024, "1KiB"),
        ("saved_bytes", 62.2 * 2**20, "62.2MiB"),
        ("peak_bytes", 3 * 2**40, "3TiB"),
        ("params_held", 444_864, "445k"),
        ("params_held", 999, "999"),
        ("flops_forward", 2.5e12, "2.5T"),
        ("seconds", 1.005, "1.00"),
        ("rounds", 12.0, "12"),
    ],
)
def test_figures_as_a_person_reads_them(name, value, text):
    assert readable(name, value) == text


def test_a_table_as_text(table):
    lines = text_rows(table)
    assert lines[0] == list(HEADINGS.values())
    assert [line[0] for line in lines[1:]] == ["1", "2", "total"]
    assert {len(line) for line in lines} == {len(KEYS)}
    assert text_rows(table, ["stage", "bytes_up"])[1:] == [["1", "40B"], ["2", "32B"], ["total", "112B"]]
