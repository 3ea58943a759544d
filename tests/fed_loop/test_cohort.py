"""Who takes part, and who trains whom."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherlight.fed_loop.cohort import balance, sample


@given(st.integers(1, 30), st.data(), st.integers(0, 5), st.integers(0, 100))
def test_sampled_without_replacement(clients, data, seed, round):
    size = data.draw(st.integers(1, clients))
    cohort = sample(clients, size, seed, round)
    assert len(set(cohort)) == size
    assert cohort == sorted(cohort)
    assert set(cohort) <= set(range(clients))
    assert cohort == sample(clients, size, seed, round)


def test_all_take_part_where_no_size_is_given():
    assert sample(4, None, 0, 0) == sample(4, 4, 3, 9) == [0, 1, 2, 3]


def test_every_client_and_every_pair_is_drawn_equally_often():
    """3 of 10 in 4,000 rounds: 1,200 each, standard deviation √(4000 · 0.3 · 0.7) = 29; a pair 4000 · (3·2)/(10·9) = 267, deviation 16."""
    cohorts = [sample(10, 3, 0, round) for round in range(4000)]
    single = Counter(client for cohort in cohorts for client in cohort)
    assert all(abs(single[client] - 1200) < 5 * 29 for client in range(10))
    pairs = Counter((a, b) for cohort in cohorts for a in cohort for b in cohort if a < b)
    assert len(pairs) == 45
    assert all(abs(count - 4000 / 15) < 5 * 16 for count in pairs.values())


def test_depends_on_seed_and_round():
    rounds = {tuple(sample(50, 10, 0, round)) for round in range(50)}
    seeds = {tuple(sample(50, 10, seed, 0)) for seed in range(50)}
    assert len(rounds) == len(seeds) == 50


@pytest.mark.parametrize("size", [0, 5, -1])
def test_cohort_larger_than_the_federation(size):
    with pytest.raises(ValueError, match=f"cohort={size}, but there are 4 clients"):
        sample(4, size, 0, 0)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.integers(1, 5), st.randoms(use_true_random=False))
def test_balance(sizes, processes, random):
    clients = random.sample(range(len(sizes)), random.randint(1, len(sizes)))
    parts = balance(clients, sizes, processes)
    assert sorted(client for part in parts for client in part) == sorted(clients)
    assert all(part == sorted(part) for part in parts)
    assert parts == balance(list(reversed(clients)), sizes, processes)
    loads = [sum(sizes[client] for client in part) for part in parts]
    # the process with most was the least loaded when it got its last, smallest client: nobody is behind it by more than that one
    most = max(loads)
    smallest = min(sizes[client] for client in parts[loads.index(most)])
    assert min(loads) >= most - smallest
    # Graham's bound for largest first, against a lower bound of the best there can be
    best = max(sum(sizes[client] for client in clients) / processes, max(sizes[client] for client in clients))
    assert most <= best * (4 / 3 - 1 / (3 * processes)) or most <= sum(loads) / processes + max(sizes[client] for client in clients)
