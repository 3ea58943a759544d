"""Count sketches: against loops, linear, unbiased, and right about what is large."""

import torch

from featherlight.plugins.sketch import CountSketch


def test_by_loops():
    sketch = CountSketch(37, rows=3, columns=5, seed=1)
    x = torch.randn(37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = [[0.0] * 5 for _ in range(3)]
    for row in range(3):
        for place in range(37):
            table[row][int(sketch.places[row, place])] += int(sketch.signs[row, place]) * float(x[place])
    torch.testing.assert_close(sketch.of(x), torch.tensor(table, dtype=torch.float64))
    wanted = [sorted(table[row][int(sketch.places[row, i])] * int(sketch.signs[row, i]) for row in range(3))[1] for i in range(37)]
    torch.testing.assert_close(sketch.estimate(sketch.of(x)), torch.tensor(wanted, dtype=torch.float64))


def test_sketches_add():
    sketch = CountSketch(100, rows=5, columns=13, seed=2)
    x, y = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sketch.of(2 * x - y), 2 * sketch.of(x) - sketch.of(y))


def test_a_row_is_unbiased_with_the_variance_of_collisions():
    """One row: E = x, variance (|x|² − x_i²) / columns."""
    x = torch.randn(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    rows = [CountSketch(20, rows=1, columns=8, seed=seed) for seed in range(4000)]
    draws = torch.stack([sketch.estimate(sketch.of(x)) for sketch in rows])
    variance = (x.square().sum() - x.square()) / 8
    assert ((draws.mean(0) - x).abs() < 5 * (variance / 4000).sqrt()).all()
    torch.testing.assert_close(draws.var(0), variance, rtol=0.15, atol=0)


def test_what_is_touched():
    sketch = CountSketch(50, rows=3, columns=40, seed=4)
    indices = torch.tensor([3, 17])
    mask = sketch.touched(indices)
    one = torch.zeros(50)
    one[indices] = torch.tensor([1.0, 2.5])  # no two of them cancel
    assert torch.equal(mask, sketch.of(one) != 0)


def test_everyone_draws_the_same_from_a_seed():
    one, other, third = (CountSketch(50, 3, 7, seed) for seed in (5, 5, 6))
    assert torch.equal(one.places, other.places)
    assert torch.equal(one.signs, other.signs)
    assert not torch.equal(one.places, third.places)
