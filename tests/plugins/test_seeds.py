"""Seeds by purpose: other parts, another seed; the same parts, the same draw, on any machine."""

import hashlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherlight.plugins.seeds import derive, generator

part = st.one_of(st.integers(-(2**63), 2**64), st.text(max_size=8).filter(lambda text: "\x1f" not in text))


def test_a_seed_is_the_upper_bits_of_a_published_hash():
    """BLAKE2b (RFC 7693) of the parts with their kinds, little-endian, without the lowest bit."""
    digest = hashlib.blake2b(b"int:0\x1fint:3\x1fstr:cohort", digest_size=8).digest()
    assert derive(0, 3, "cohort") == sum(byte << 8 * place for place, byte in enumerate(digest)) // 2


@settings(deadline=None)
@given(st.lists(part, max_size=4), st.lists(part, max_size=4))
def test_seeds_are_equal_exactly_where_the_parts_are(one, other):
    assert (derive(*one) == derive(*other)) == (one == other)


@settings(deadline=None)
@given(st.lists(part, max_size=5))
def test_every_seed_suits_torch_and_numpy(parts):
    assert 0 <= derive(*parts) < 2**63
    torch.Generator().manual_seed(derive(*parts))


def test_kinds_and_order_and_boundaries_matter():
    assert len({derive(1, 2), derive(2, 1), derive(12), derive("1", 2), derive("1", "2"), derive(1, 2, ""), derive("12")}) == 7


def test_a_generator_disturbs_no_other():
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    first = torch.rand(3, generator=generator(0, "a"))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(torch.rand(3, generator=generator(0, "a")), first)
    assert not torch.equal(torch.rand(3, generator=generator(0, "b")), first)
