"""Random projections against dense matrices: the formula, adjoints, moments, and what is kept of them."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from featherlight.plugins import projections
from featherlight.plugins.hadamard import full_precision, walsh_hadamard
from featherlight.plugins.projections import PROJECTIONS, Fastfood, SparseSigns

KINDS = pytest.mark.parametrize("kind", PROJECTIONS)


def dense(projection):
    """A, column by column, float64."""
    return torch.stack([projection.lift(unit) for unit in torch.eye(projection.dim, dtype=torch.float64)], 1)


def numbers(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


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
@pytest.mark.parametrize("size", [2**20 + 3, 3 * 2**18])
def test_adjoint_of_a_million_in_float32(kind, size):
    """Off by roundings of sums over D, far below the 1 in √D that a wrong map would have right by chance."""
    map_ = PROJECTIONS[kind](size, 5000, 3)
    z, g = numbers(5000, 1).float(), numbers(size, 2).float()
    lifted, projected = map_.lift(z), map_.project(g)
    one, other = float(lifted.double() @ g.double()), float(z.double() @ projected.double())
    assert abs(one - other) < 1e-5 * float(lifted.double().norm() * g.double().norm())
    assert abs(one) > 1e-4 * float(lifted.double().norm() * g.double().norm())
    assert float((map_.project(g.double()) - projected.double()).norm() / projected.norm()) < 1e-5


@pytest.mark.parametrize("seed", [450, 697, 1316])
def test_two_parameters_are_always_moved(seed):
    """Seeds of which all normal numbers are drawn as 0."""
    lifted = Fastfood(2, 1, seed).lift(torch.ones(1))
    assert bool(lifted.isfinite().all())
    assert float(lifted.norm()) > 0


def loose():
    """Whether float32 products may be less exact."""
    kind = torch.backends.cuda.matmul
    return kind.fp32_precision == "tf32" if hasattr(kind, "fp32_precision") else torch.get_float32_matmul_precision() != "highest"


def allow(way, loosely):
    if way == "older":
        torch.set_float32_matmul_precision("medium" if loosely else "highest")
    elif hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if loosely else "ieee"
    else:
        pytest.skip("torch before 2.9")


@pytest.mark.parametrize("way", ["older", "newer"])
@KINDS
def test_products_have_the_numbers_own_precision(kind, way, monkeypatch):
    """Whatever is allowed elsewhere: TF32 on one machine and not on another would be two maps."""
    map_, z, g, products = PROJECTIONS[kind](5000, 100, 0), numbers(100).float(), numbers(5000).float(), []
    for name in ("mm", "bmm"):
        own = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, own=own, **k: (products.append(loose()), own(*a, **k))[1])
    wanted = map_.lift(z), map_.project(g)
    allow(way, True)
    try:
        assert loose()
        assert torch.equal(map_.lift(z), wanted[0])
        assert torch.equal(map_.project(g), wanted[1])
        walsh_hadamard(z[:64])
        with full_precision():
            assert not loose()
        assert loose()
    finally:
        allow(way, False)
    assert not loose()
    assert products
    assert not any(products)


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


def square(map_):
    """Of a Fastfood, Π as the order in which numbers are taken, and G, both of length L."""
    places = torch.arange(map_.length).view(len(map_._row_order), len(map_._column_order))
    order = places[map_._row_order][:, map_._column_order].flatten()
    assert order.sort().values.tolist() == list(range(map_.length))
    return order, map_._normal.transpose(0, 1).reshape(map_.length).double()


@pytest.mark.parametrize("panel", [projections.PANEL, 16], ids=["one panel", "panels of 16 numbers"])
@pytest.mark.parametrize(("size", "dim"), [(16, 4), (13, 13), (100, 9), (2, 1), (1, 1), (70, 40), (65, 50), (60, 1), (64, 64)])
def test_fastfood_is_its_formula(size, dim, panel, monkeypatch):
    """√(D/d)·(H G Π H B)[:D, :d] / (√(L·ΣG²)·√(D/L)) by dense matrices."""
    monkeypatch.setattr(projections, "PANEL", panel)
    map_ = Fastfood(size, dim, 3)
    length = map_.length
    assert length == max(2, 1 << (size - 1).bit_length())
    order, normal = square(map_)
    permutation = torch.eye(length, dtype=torch.float64)[order]
    signs = torch.ones(length, dtype=torch.float64)
    signs[:dim] = map_._signs.double()
    assert set(map_._signs.tolist()) <= {-1, 1}
    transform = torch.from_numpy(hadamard(length)).double()
    product = transform @ normal.diag() @ permutation @ transform @ signs.diag()
    divisor = (length * normal.square().sum()).sqrt() * (size / length) ** 0.5
    torch.testing.assert_close(dense(map_), (size / dim) ** 0.5 * product[:size, :dim] / divisor)
    # all L rows of a column of P together, √(D/L) taken back, have exactly unit length
    whole = product[:, :dim] / (length * normal.square().sum()).sqrt()
    torch.testing.assert_close(whole.square().sum(0), torch.ones(dim, dtype=torch.float64))
    g = numbers(size)
    torch.testing.assert_close(map_.project(g), dense(map_).T @ g)


def test_fastfood_s_normals_are_normal():
    """2¹⁸ of them, in units of 1/29: moments within 5 standard errors, and the share beyond two deviations."""
    _, normal = square(Fastfood(2**18, 1, 11))
    normal, count = normal / 29, 2**18
    assert abs(float(normal.mean())) < 5 / count**0.5
    assert abs(float(normal.square().mean()) - 1) < 5 * (2 / count) ** 0.5 + 1 / 29**2  # rounding adds 1/(12·29²)
    assert abs(float(normal.pow(4).mean()) - 3) < 5 * (96 / count) ** 0.5 + 0.01
    assert float((normal.abs() > 2).double().mean()) == pytest.approx(0.0455, abs=0.004)
    assert float(normal.abs().max()) < 4.4
    close = (normal[1:] * normal[:-1]).mean()
    assert abs(float(close)) < 5 / count**0.5


def test_sparse_signs_have_one_entry_in_every_row():
    for size, dim in ((10, 3), (700, 64), (5, 5)):
        matrix = dense(SparseSigns(size, dim, 2))
        assert ((matrix != 0).sum(1) == 1).all()
        assert (matrix.abs().sum(1) == 1).all()
        count = (matrix != 0).sum(0)
        assert set(count.tolist()) <= {size // dim, -(-size // dim)}  # places are used evenly


@pytest.mark.parametrize("tile", [1, 3, 1000])
def test_sparse_signs_over_several_blocks(tile, monkeypatch):
    """Blocks of 8 numbers: an offset for each; the entry of parameter i = ρ·d + j is r[ρ]·s[ρ + p] at p = j + o mod d."""
    monkeypatch.setattr(projections, "BLOCK", 8)
    monkeypatch.setattr(projections, "TILE", tile)
    map_ = SparseSigns(103, 4, 1)
    matrix = dense(map_)
    place = matrix.abs().argmax(1)
    offsets = {(int(place[i]) - i) % 4 for i in range(100)}
    assert len(offsets) > 1
    for start, stop in ((0, 8), (8, 16), (88, 96), (96, 100), (100, 103)):  # the row that is not whole is a block of its own
        assert len({(int(place[i]) - i) % 4 for i in range(start, stop)}) == 1
    for i in range(103):
        row, p = i // 4, int(place[i])
        assert float(matrix[i, p]) == int(map_._of_row[row]) * int(map_._of_place[row + p])
    g = numbers(103)
    torch.testing.assert_close(map_.project(g), matrix.T @ g)


def test_sparse_signs_vary_as_independent_ones_do():
    """Over all signs that r and s can have: the mean of Aᵀ·A·Aᵀ·A's trace and of ‖Aᵀ·1‖⁴ are those of D independent signs.

    D = 6, d = 2: three parameters meet in each place, so ‖Aᵀ·1‖² is the sum of two squared sums of three signs: 6 in the mean, its
    square 2·E S⁴ + 2·(E S²)² = 2·21 + 2·9 = 60.
    """
    map_ = SparseSigns(6, 2, 0)
    rows, places = len(map_._of_row), len(map_._of_place)
    assert (rows, places) == (3, 4)
    squares = []
    for number in range(2 ** (rows + places)):
        signs = torch.tensor([1 - 2 * (number >> bit & 1) for bit in range(rows + places)], dtype=torch.int8)
        map_._of_row, map_._of_place = signs[:rows], signs[rows:]
        squares.append(float(map_.project(torch.ones(6)).square().sum()))
    assert sum(squares) / len(squares) == 6
    assert sum(value**2 for value in squares) / len(squares) == 60


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adjoint_in_half_precision(kind, dtype):
    """⟨A z, g⟩ = ⟨z, Aᵀ g⟩ but for the rounding of what comes out: at most half a unit in the last place of every number."""
    map_ = PROJECTIONS[kind](3000, 200, 4)
    z, g = numbers(200).to(dtype), numbers(3000, 1).to(dtype)
    lifted, projected = map_.lift(z).double(), map_.project(g).double()
    unit = torch.finfo(dtype).eps / 2
    bound = unit * float(lifted.abs() @ g.double().abs() + z.double().abs() @ projected.abs())
    assert 0 < abs(float(lifted @ g.double() - z.double() @ projected)) <= bound
    exact = map_.project(g.double())
    assert bool(((projected - exact).abs() <= 1.001 * unit * exact.abs() + 1e-5).all())  # summed in float32, rounded once


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_into_given_memory(kind, dtype):
    """The same numbers; what is projected in place is used up, what is projected otherwise is kept."""
    map_ = PROJECTIONS[kind](300, 20, 4)
    z, g = numbers(20).to(dtype), numbers(300).to(dtype)
    kept, wanted = g.clone(), map_.project(g)
    assert torch.equal(g, kept)
    assert torch.equal(map_.project_(g), wanted)
    assert torch.equal(map_.project(kept.repeat(2).view(2, -1).T[:, 0]), wanted)  # a vector with gaps
    out, gaps = torch.empty(300, dtype=dtype), torch.empty(300, 2, dtype=dtype)
    assert map_.lift(z, out=out) is out
    assert torch.equal(out, map_.lift(z))
    assert torch.equal(map_.lift(z, out=gaps[:, 1]), out)
    with pytest.raises(ValueError, match=r"expected a vector of 300 numbers, got shape \(20,\)"):
        map_.lift(z, out=z)


@KINDS
def test_threads_draw_the_same(kind):
    before = torch.get_num_threads()
    drawn = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            map_ = PROJECTIONS[kind](70000, 300, 5)
            drawn.append(({name: value for name, value in vars(map_).items() if isinstance(value, torch.Tensor)}, map_.lift(numbers(300))))
    finally:
        torch.set_num_threads(before)
    (one, first), (two, second) = drawn
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    torch.testing.assert_close(first, second)


@KINDS
def test_what_a_map_keeps(kind):
    """A is 5000 × 1000; L is 8192: a byte for each of its numbers, or two bytes for each of d and D/d, and orders of √L."""
    map_ = PROJECTIONS[kind](5000, 1000, 1)
    map_.project(map_.lift(torch.ones(1000)))
    kept = sum(value.numel() * value.element_size() for value in vars(map_).values() if isinstance(value, torch.Tensor))
    assert kept <= {"fastfood": 8192 + 1000 + 8 * (64 + 128) + 8, "sparse_signs": 1000 + 2 * 5}[kind]


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
