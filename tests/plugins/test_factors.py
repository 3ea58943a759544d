"""Factors against torch.linalg.svd, draws against probabilities enumerated, decay against autograd."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherlight.plugins.factors import concentrate, decay, draw, factorise, factorise_all, importance, product

EPS = torch.finfo(torch.float32).eps


def random_matrix(rows, columns, rank, seed, scale=1.0):
    random = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=random, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=random, dtype=torch.float64)
    return (left @ right * (scale / rank**0.5)).float()


# -- factorise --------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e15]))
def test_singular_values_and_product_are_those_of_an_svd(rows, columns, rank, seed, scale):
    """Tall, wide, of any rank and scale: σ to √ε of float64 of the largest, u·v = W to rounding of the largest."""
    matrix = random_matrix(rows, columns, rank, seed, scale)
    values = torch.linalg.svdvals(matrix.double())
    factors = factorise(matrix)
    size = min(rows, columns)
    assert factors.u.shape == (rows, size)
    assert factors.v.shape == (size, columns)
    assert factors.u.dtype == factors.v.dtype == torch.float32
    assert factors.values.dtype == torch.float64
    assert factors.u.is_contiguous()
    assert factors.v.is_contiguous()
    assert (factors.values - values).abs().max() <= 1e-7 * values[0]
    assert (factors.values.diff() <= 0).all()
    assert (product(factors).double() - matrix.double()).abs().max() <= 8 * size * EPS * values[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31), st.floats(1, 100))
def test_factors_are_the_svd_s_up_to_signs_and_balanced(rows, columns, seed, ratio):
    """Well-separated σ: u = ±U√σ, v = ±√σVᵀ, one sign for both; uᵀu = diag(σ) = v·vᵀ."""
    size = min(rows, columns)
    plain = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    left, _, right = torch.linalg.svd(plain, full_matrices=False)
    values = ratio ** -torch.linspace(0, 1, size, dtype=torch.float64) + torch.arange(size, 0, -1)
    matrix = left * values @ right
    u, v, found = factorise(matrix)
    torch.testing.assert_close(found, values, rtol=1e-9, atol=0)
    expected_u, expected_v = left * values.sqrt(), values.sqrt()[:, None] * right
    signs = (u * expected_u).sum(0).sign()
    torch.testing.assert_close(u * signs, expected_u, rtol=0, atol=1e-8)
    torch.testing.assert_close(signs[:, None] * v, expected_v, rtol=0, atol=1e-8)
    torch.testing.assert_close(u.T @ u, values.diag(), rtol=0, atol=1e-9 * size)
    torch.testing.assert_close(v @ v.T, values.diag(), rtol=0, atol=1e-9 * size)


@pytest.mark.parametrize("shape", [(5, 2, 3, 3), (2, 5, 1, 3), (20, 2, 3, 3), (3, 4, 1, 1)])
def test_a_convolution_s_weight_is_a_matrix_of_output_channels(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, v, values = factorise(weight)
    rank = min(shape[0], shape[1] * shape[2] * shape[3])
    assert (u.shape, v.shape) == ((shape[0], rank), (rank, weight[0].numel()))
    torch.testing.assert_close((u @ v).view(shape), weight, rtol=0, atol=1e-5)
    torch.testing.assert_close(values, torch.linalg.svdvals(weight.reshape(shape[0], -1).double()), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 1), (3, 2, 3, 3)])
def test_a_weight_of_zeros(shape):
    u, v, values = factorise(torch.zeros(shape))
    assert torch.equal(u @ v, torch.zeros(shape).flatten(1))
    assert torch.equal(values, torch.zeros(min(u.shape[0], v.shape[1]), dtype=torch.float64))
    assert all(torch.isfinite(factor).all() for factor in (u, v))


def test_a_lost_rank_leaves_no_noise_in_the_kernels_below():
    """Rank 2 of 6: kernels 2… put out nothing to rounding, and are not blown up."""
    u, v, values = factorise(random_matrix(6, 9, 2, 3))
    assert (values[2:] < 1e-6 * values[0]).all()
    assert (u[:, 2:] @ v[2:]).abs().max() < 1e-6 * values[0]
    assert max(u[:, 2:].abs().max(), v[2:].abs().max()) < 1e-2 * values[0].sqrt()


def test_all_are_factorised_each_by_itself_and_gradients_do_not_follow():
    weights = {"a": torch.nn.Parameter(random_matrix(4, 3, 3, 0)), "b": random_matrix(2, 5, 2, 1)}
    found = factorise_all(weights)
    assert list(found) == ["a", "b"]
    for name, weight in weights.items():
        for ours, alone in zip(found[name], factorise(weight)):
            assert torch.equal(ours, alone)
            assert not ours.requires_grad


# -- importance -------------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9), st.sampled_from([0, 1, 2.5, 4]))
def test_importance_is_sigma_to_the_power_over_its_sum(values, power):
    powers = [value**power for value in values]
    expected = torch.tensor([one / sum(powers) for one in powers], dtype=torch.float64)
    torch.testing.assert_close(importance(torch.tensor(values, dtype=torch.float64), power), expected, rtol=1e-10, atol=1e-300)


def test_importance_by_hand():
    assert importance(torch.tensor([2.0, 1.0, 1.0]), 2).tolist() == pytest.approx([4 / 6, 1 / 6, 1 / 6])
    assert importance(torch.tensor([5.0, 1.0, 0.0]), 0).tolist() == pytest.approx([1 / 3] * 3)
    assert importance(torch.zeros(4), 2.5).tolist() == pytest.approx([0.25] * 4)
    assert importance(torch.tensor([3.0, 0.0]), 2.5).tolist() == pytest.approx([1.0, 0.0])
    assert importance(torch.tensor([1e200, 1e-200], dtype=torch.float64), 4).tolist() == [1.0, 0.0]


# -- draw -------------------------------------------------------------------------------------------------------------
def subsets_by_enumeration(odds, size):
    """Probability of every set that drawing one after the other, each in proportion among those left, gives."""
    found = {}
    for order in itertools.permutations(range(len(odds)), size):
        probability, left = 1.0, 1.0
        for index in order:
            probability *= odds[index] / left
            left -= odds[index]
        found[tuple(sorted(order))] = found.get(tuple(sorted(order)), 0.0) + probability
    return found


@pytest.mark.parametrize(
    ("odds", "size", "limit"),  # chi-square's 0.999 quantile at (number of sets − 1) degrees of freedom
    [
        ([0.5, 0.3, 0.15, 0.05], 1, 16.3),
        ([0.5, 0.3, 0.15, 0.05], 2, 20.5),
        ([0.4, 0.3, 0.2, 0.05, 0.05], 3, 27.9),
        ([0.25] * 4, 3, 16.3),
    ],
)
def test_sets_come_as_often_as_in_successive_draws_without_replacement(odds, size, limit):
    random, turns = torch.Generator().manual_seed(11), 3000
    expected = subsets_by_enumeration(odds, size)
    assert sum(expected.values()) == pytest.approx(1)
    seen = dict.fromkeys(expected, 0)
    for _ in range(turns):
        seen[tuple(draw(torch.tensor(odds), size, random).tolist())] += 1
    assert sum((seen[one] - turns * p) ** 2 / (turns * p) for one, p in expected.items()) < limit


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.data())
def test_different_indices_ascending_whatever_the_odds(weights, data):
    size = data.draw(st.integers(0, len(weights)))
    seed = data.draw(st.integers(0, 2**31))
    total = sum(weights)
    odds = torch.tensor([weight / total if total else 1 / len(weights) for weight in weights], dtype=torch.float64)
    drawn = draw(odds, size, torch.Generator().manual_seed(seed))
    assert drawn.dtype == torch.int64
    assert len(drawn) == size
    assert (drawn.diff() > 0).all()
    assert set(drawn.tolist()) <= set(range(len(weights)))
    assert torch.equal(drawn, draw(odds, size, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("seed", range(20))
def test_where_too_few_have_a_chance_others_make_up_the_number(seed):
    drawn = draw(torch.tensor([0.0, 0.75, 0.0, 0.25, 0.0]), 4, torch.Generator().manual_seed(seed)).tolist()
    assert len(set(drawn)) == 4
    assert {1, 3} <= set(drawn)
    assert draw(torch.tensor([0.0, 1.0, 0.0]), 1, torch.Generator().manual_seed(seed)).tolist() == [1]


# -- decay ------------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 5), st.integers(1, 7), st.floats(0, 1), st.integers(0, 2**31))
def test_decay_is_the_gradient_of_half_the_squared_product(n, r, columns, rate, seed):
    random = torch.Generator().manual_seed(seed)
    u = torch.randn(n, r, generator=random, dtype=torch.float64, requires_grad=True)
    v = torch.randn(r, columns, generator=random, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(rate / 2 * (u @ v).square().sum(), (u, v))
    for ours, theirs in zip(decay(u.detach(), v.detach(), rate), wanted):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# -- concentrate ------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31), st.floats(0.05, 1.0))
def test_singular_values_beyond_the_share_are_a_tenth_and_the_length_stays(rows, columns, seed, share):
    weight = torch.randn(rows, columns, 1, 1, generator=torch.Generator().manual_seed(seed))
    before = torch.linalg.svdvals(weight.flatten(1).double())
    after = torch.linalg.svdvals(concentrate(weight, share).flatten(1).double())
    kept = next(count for count in range(1, len(before) + 1) if count >= share * len(before) - 1e-9)
    wanted = torch.cat([before[:kept], before[kept:] / 10])
    wanted *= before.norm() / wanted.norm()
    torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-5 * float(before[0]))


def test_a_weight_of_zeros_stays():
    assert concentrate(torch.zeros(4, 3, 3, 3), 0.5).eq(0).all()
