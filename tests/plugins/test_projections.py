"""Random projections against dense matrices: the transform, the formula, adjoints, moments, and what is kept of them."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherlight.plugins.projections import PROJECTIONS, Fastfood, SparseSigns, walsh_hadamard

KINDS = pytest.mark.parametrize("kind", PROJECTIONS)


def hadamard(bits):
    """H by its Kronecker powers, float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(bits):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def by_butterflies(x):
    """H·x by the definition: halves, their sum and their difference."""
    if len(x) == 1:
        return x
    upper, lower = x.chunk(2)
    return torch.cat([by_butterflies(upper + lower), by_butterflies(upper - lower)])


def dense(projection):
    """A, column by column, float64."""
    return torch.stack([projection.lift(unit) for unit in torch.eye(projection.dim, dtype=torch.float64)], 1)


def numbers(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the transform ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", range(14))
def test_every_size_is_the_transform_by_definition(bits):
    x = numbers(1 << bits, bits)
    torch.testing.assert_close(walsh_hadamard(x), by_butterflies(x))
    if bits <= 9:
        torch.testing.assert_close(walsh_hadamard(x), hadamard(bits) @ x)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), len(x) * x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_batches_and_dtypes(dtype):
    x = torch.randint(-3, 4, (3, 2, 16), generator=torch.Generator().manual_seed(1)).to(dtype)  # sums of up to 48: exact in all
    kept = x.clone()
    out = walsh_hadamard(x)
    assert out.dtype == dtype
    assert torch.equal(out.double(), x.double() @ hadamard(4))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("length", [0, 3, 12, 1000])
def test_a_length_that_is_no_power_of_two_is_refused(length):
    with pytest.raises(ValueError, match=f"got {length}: pad with zeros"):
        walsh_hadamard(torch.zeros(length))


# -- the maps ---------------------------------------------------------------------------------------------------------
SHAPES = st.integers(1, 300).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size)))


@KINDS
@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**40))
def test_adjoint_and_linear(kind, shape, seed):
    size, dim = shape
    map_ = PROJECTIONS[kind](size, dim, seed)
    z, other, g = numbers(dim, seed), numbers(dim, seed + 1), numbers(size, seed + 2)
    lifted, projected = map_.lift(z), map_.project(g)
    assert (lifted.shape, projected.shape) == ((size,), (dim,))
    assert float(lifted @ g) == pytest.approx(float(z @ projected), rel=1e-9, abs=1e-9 * float(lifted.norm() * g.norm()))
    torch.testing.assert_close(map_.lift(2 * z - 3 * other), 2 * lifted - 3 * map_.lift(other), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(map_.project(2 * g), 2 * projected)


@KINDS
@pytest.mark.parametrize(("size", "dim"), [(1, 1), (7, 3), (64, 64), (100, 17)])
def test_equal_to_the_dense_matrix(kind, size, dim):
    map_ = PROJECTIONS[kind](size, dim, 5)
    matrix, z, g = dense(map_), numbers(dim), numbers(size)
    assert matrix.shape == (size, dim)
    torch.testing.assert_close(map_.lift(z), matrix @ z)
    torch.testing.assert_close(map_.project(g), matrix.T @ g)


@KINDS
def test_a_times_its_transpose_is_the_identity_in_the_mean(kind):
    """An entry's standard error over n seeds is at most √(its variance/n); 200 entries within 5 of them."""
    size, dim, seeds = 20, 8, 600
    products = torch.stack([(matrix := dense(PROJECTIONS[kind](size, dim, seed))) @ matrix.T for seed in range(seeds)])
    error = (products.mean(0) - torch.eye(size, dtype=torch.float64)).abs()
    bound = 5 * products.std(0) / seeds**0.5 + 1e-9
    assert bool((error <= bound).all())
    assert float(bound.max()) < 0.35
    assert float(products.std(0).max()) > 0.01  # it is random


@KINDS
def test_norms_are_kept_in_the_mean(kind):
    """E‖Aᵀg‖² = ‖g‖² and E‖A z‖² = (D/d)·‖z‖²: columns of A have the length √(D/d)."""
    size, dim, seeds = 48, 12, 300
    g, z = numbers(size), numbers(dim)
    maps = [PROJECTIONS[kind](size, dim, seed) for seed in range(seeds)]
    for lengths, wanted in (
        (torch.stack([map_.project(g).square().sum() for map_ in maps]), g.square().sum()),
        (torch.stack([map_.lift(z).square().sum() for map_ in maps]), z.square().sum() * size / dim),
    ):
        assert abs(float(lengths.mean() - wanted)) <= 5 * float(lengths.std()) / seeds**0.5 + 1e-9 * float(wanted)


@pytest.mark.parametrize(("size", "dim"), [(16, 4), (13, 13), (100, 9), (2, 1), (1, 1)])
def test_fastfood_is_its_formula(size, dim):
    """√(D/d)·(H G Π H B)[:D, :d] / (√(L·ΣG²)·√(D/L)) by dense matrices."""
    map_ = Fastfood(size, dim, 3)
    length = map_.length
    assert length == max(2, 1 << (size - 1).bit_length())
    bits = length.bit_length() - 1
    places = torch.arange(length).view(len(map_._rows), len(map_._columns))
    order = torch.stack([places[row, column] for column in map_._columns for row in map_._rows])  # Π: which number goes where
    assert order.sort().values.tolist() == list(range(length))
    permutation = torch.eye(length, dtype=torch.float64)[order]
    signs = torch.ones(length, dtype=torch.float64)
    signs[:dim] = map_._signs.double()
    assert set(map_._signs.tolist()) <= {-1, 1}
    normal = map_._normal.double()
    product = hadamard(bits) @ normal.diag() @ permutation @ hadamard(bits) @ signs.diag()
    divisor = (length * normal.square().sum()).sqrt() * (size / length) ** 0.5
    torch.testing.assert_close(dense(map_), (size / dim) ** 0.5 * product[:size, :dim] / divisor)
    # all L rows of a column of P together, √(D/L) taken back, have exactly unit length
    whole = product[:, :dim] / (length * normal.square().sum()).sqrt()
    torch.testing.assert_close(whole.square().sum(0), torch.ones(dim, dtype=torch.float64))


def test_sparse_signs_have_one_entry_in_every_row():
    for size, dim in ((10, 3), (700, 64), (5, 5)):
        matrix = dense(SparseSigns(size, dim, 2))
        assert ((matrix != 0).sum(1) == 1).all()
        assert (matrix.abs().sum(1) == 1).all()
        count = (matrix != 0).sum(0)
        assert set(count.tolist()) <= {size // dim, -(-size // dim)}  # places are used evenly


def test_sparse_signs_over_several_blocks(monkeypatch):
    """Blocks of 8 numbers: an offset for each, and the same adjoint."""
    monkeypatch.setattr("featherlight.plugins.projections.BLOCK", 8)
    map_ = SparseSigns(100, 4, 1)
    matrix = dense(map_)
    place = matrix.abs().argmax(1)
    offsets = {(int(place[i]) - i) % 4 for i in range(100)}
    assert len(offsets) > 1
    assert all(len({(int(place[i]) - i) % 4 for i in range(start, min(start + 8, 100))}) == 1 for start in range(0, 100, 8))
    g = numbers(100)
    torch.testing.assert_close(map_.project(g), matrix.T @ g)


@KINDS
def test_gradients(kind):
    map_ = PROJECTIONS[kind](37, 11, 4)
    z, g = numbers(11).requires_grad_(), numbers(37).requires_grad_()
    assert torch.autograd.gradcheck(map_.lift, (z,))
    assert torch.autograd.gradcheck(map_.project, (g,))
    weights = numbers(37, 8)
    (gradient,) = torch.autograd.grad(map_.lift(z) @ weights, z)
    torch.testing.assert_close(gradient, map_.project(weights))


# -- seeds and what is kept -------------------------------------------------------------------------------------------
@KINDS
def test_a_seed_is_a_matrix(kind):
    first = dense(PROJECTIONS[kind](50, 20, 7))
    torch.manual_seed(99)
    torch.rand(1000)
    assert torch.equal(dense(PROJECTIONS[kind](50, 20, 7)), first)
    state = torch.get_rng_state()
    again = PROJECTIONS[kind](50, 20, 7)
    z = numbers(20)
    assert torch.equal(again.lift(z), again.lift(z))
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws are disturbed
    assert not torch.equal(dense(PROJECTIONS[kind](50, 20, 8)), first)


def test_another_process_draws_the_same():
    code = (
        "import torch\nfrom featherlight.plugins.projections import PROJECTIONS\ntorch.rand(3)\n"
        "for kind in PROJECTIONS.values():\n"
        "    print([value.hex() for value in kind(50, 20, 7).lift(torch.arange(20, dtype=torch.float64)).tolist()])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    ours = [
        [value.hex() for value in kind(50, 20, 7).lift(torch.arange(20, dtype=torch.float64)).tolist()] for kind in PROJECTIONS.values()
    ]
    assert done.stdout.split("\n")[: len(ours)] == [str(row) for row in ours]


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(kind, dtype):
    map_ = PROJECTIONS[kind](64, 16, 1)
    matrix = dense(map_)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for vector, there, wanted in ((numbers(16), map_.lift, matrix), (numbers(64), map_.project, matrix.T)):
        out = there(vector.to(dtype))
        assert out.dtype == dtype
        exact = wanted @ vector
        assert float((out.double() - exact).norm() / exact.norm()) < tolerance


@KINDS
def test_nothing_as_large_as_the_matrix_is_kept(kind):
    """A is 5000 × 1000; L is 8192."""
    map_ = PROJECTIONS[kind](5000, 1000, 1)
    map_.project(map_.lift(torch.ones(1000)))
    kept = [value.numel() for value in vars(map_).values() if isinstance(value, torch.Tensor)]
    assert sum(kept) <= 8192 + 1000 + 1000
    assert max(kept, default=0) <= 8192


@KINDS
def test_sizes_are_checked(kind):
    with pytest.raises(ValueError, match="dim=11: a subspace of 10 parameters has from 1 to 10 dimensions"):
        PROJECTIONS[kind](10, 11, 0)
    with pytest.raises(ValueError, match="dim=0"):
        PROJECTIONS[kind](10, 0, 0)
    map_ = PROJECTIONS[kind](10, 4, 0)
    with pytest.raises(ValueError, match=r"expected a vector of 4 numbers, got shape \(10,\)"):
        map_.lift(torch.zeros(10))
    with pytest.raises(ValueError, match=r"expected a vector of 10 numbers, got shape \(4,\)"):
        map_.project(torch.zeros(4))
    with pytest.raises(ValueError, match=r"got shape \(4, 1\)"):
        map_.lift(torch.zeros(4, 1))
