"""Server optimizers against their formulas, number by number."""

import math

import pytest
import torch

from featherlight.fed_loop.server import Adam, Average, Momentum

MEANS = [1.0, 3.0, -2.0, 0.5]


def walk(server, start=2.0):
    value, path = torch.tensor([start], dtype=torch.float64), []
    for mean in MEANS:
        value = server.step("w", value, torch.tensor([mean], dtype=torch.float64))
        path.append(value.item())
    return path


def test_average():
    assert walk(Average()) == MEANS
    assert walk(Average(lr=0.5)) == [1.5, 2.25, 0.125, 0.3125]


def test_momentum():
    x, m, path = 2.0, 0.0, []
    for mean in MEANS:
        m = 0.9 * m + (mean - x)
        x = x + 0.5 * m
        path.append(x)
    assert walk(Momentum(lr=0.5, momentum=0.9)) == pytest.approx(path, rel=1e-14)


def test_adam():
    x, m, v, path = 2.0, 0.0, 0.0, []
    for mean in MEANS:
        change = mean - x
        m = 0.8 * m + 0.2 * change
        v = 0.95 * v + 0.05 * change**2
        x = x + 0.1 * m / (math.sqrt(v) + 1e-2)
        path.append(x)
    assert walk(Adam(lr=0.1, betas=(0.8, 0.95), eps=1e-2)) == pytest.approx(path, rel=1e-14)


@pytest.mark.parametrize("make", [Average, Momentum, Adam])
def test_goes_on_from_its_state(make):
    whole = make()
    path, value = [], torch.tensor([2.0], dtype=torch.float64)
    server = make()
    for mean in MEANS:
        value = server.step("w", value, torch.tensor([mean], dtype=torch.float64))
        path.append(value.item())
        state, server = server.state_dict(), make()
        server.load_state_dict(state)
    assert path == walk(whole)


def test_entries_do_not_mix():
    server = Momentum()
    one, two = torch.zeros(1).double(), torch.zeros(2).double()
    server.step("a", one, one + 1)
    assert server.step("b", two, two + 1).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Average(lr=0), "lr=0: give a positive number"),
        (lambda: Momentum(momentum=1.0), "momentum=1.0: give 0 <= momentum < 1"),
        (lambda: Adam(eps=float("nan")), "eps=nan"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
