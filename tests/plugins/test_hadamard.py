"""The Walsh–Hadamard transform, against its definition."""

import pytest
import torch
from scipy.linalg import hadamard

from featherlight.plugins.hadamard import passes, walsh_hadamard


def matrix(bits):
    """H, float64."""
    return torch.from_numpy(hadamard(2**bits)).double()


def by_butterflies(x):
    """H·x by the definition: halves, their sum and their difference."""
    if len(x) == 1:
        return x
    upper, lower = x.chunk(2)
    return torch.cat([by_butterflies(upper + lower), by_butterflies(upper - lower)])


def numbers(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bits", range(14))
def test_every_size_is_the_transform_by_definition(bits):
    x = numbers(1 << bits, bits)
    torch.testing.assert_close(walsh_hadamard(x), by_butterflies(x))
    if bits <= 9:
        torch.testing.assert_close(walsh_hadamard(x), matrix(bits) @ x)
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), len(x) * x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_batches_and_dtypes(dtype):
    x = torch.randint(-3, 4, (3, 2, 16), generator=torch.Generator().manual_seed(1)).to(dtype)  # sums of up to 48: exact in all
    kept = x.clone()
    out = walsh_hadamard(x)
    assert out.dtype == dtype
    assert torch.equal(out.double(), x.double() @ matrix(4))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("length", [0, 3, 12, 1000])
def test_a_length_that_is_no_power_of_two_is_refused(length):
    with pytest.raises(ValueError, match=f"got {length}: pad with zeros"):
        walsh_hadamard(torch.zeros(length))


def test_the_transform_is_its_own_gradient():
    """Not a multiple of it: a factor 1/L is easily lost."""
    assert torch.autograd.gradcheck(walsh_hadamard, (numbers(16).view(2, 8).requires_grad_(),))


@pytest.mark.parametrize("bits", [1, 4, 7, 11])
@pytest.mark.parametrize("inner", [1, 3])
def test_along_a_middle_axis(bits, inner):
    """In several rows, and in one of which the end is zero or of no use."""
    length = 1 << bits
    x = numbers(2 * length * inner).view(2, length, inner)
    wanted = torch.einsum("ij,ojk->oik", matrix(bits), x)
    torch.testing.assert_close(passes(x.clone(), torch.empty_like(x))[0], wanted)
    for cut in {1, length // 2, length - 1, length}:
        one = x[:1].clone()
        found, _ = passes(one, torch.empty_like(one), wanted=cut)
        torch.testing.assert_close(found[0, :cut], wanted[0, :cut])
        one = x[:1].clone()
        one[:, cut:] = 0
        wanted_of_it = torch.einsum("ij,ojk->oik", matrix(bits), one)
        torch.testing.assert_close(passes(one, torch.full_like(one, float("nan")), given=cut)[0], wanted_of_it)
