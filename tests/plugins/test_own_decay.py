"""The decay of products u·v in each optimizer's own way, by hand."""

import warnings

import pytest
import torch
from lightly.utils.lars import LARS
from torch import nn

from featherlight.plugins import Clock, PrismSampling, Visit
from featherlight.plugins.optimizer_state import decay, hand_over_decay

RATE = 0.01


def client():
    """A linear layer of full rank as two factors; its parameters before, and what a step of it is taken with."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    server = PrismSampling(1.0, layers="*", rows=False)
    server.attach(model)
    server.advance(Clock(0))
    small = server.narrow(Visit(0))
    PrismSampling(1.0, layers="*", rows=False).attach(small)
    small.load_state_dict(server.encode_down({name: value.detach() for name, value in model.state_dict().items()}, Visit(0)))
    return small


def step(small, optimizer, scale):
    """One step on ``scale`` times a loss; returns u, v and their gradients of the loss from before."""
    optimizer.zero_grad()
    (scale * small(torch.randn(8, 16, generator=torch.Generator().manual_seed(1))).square().mean()).backward()
    before = [value.detach().clone() for value in (small[0].u, small[0].v, small[0].u.grad, small[0].v.grad)]
    decay(optimizer)
    optimizer.step()
    return before


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_decoupled_decay_stays_beside_adam_s_normaliser(scale):
    """AdamW's first step is lr·sign(g) and the decay lr·wd·gradient of it; with a loss of gradient 0 the decay alone."""
    small = client()
    optimizer = torch.optim.AdamW(small.parameters(), RATE, eps=1e-12, weight_decay=0.5)
    hand_over_decay(optimizer)
    u, v, of_u, of_v = step(small, optimizer, scale)
    torch.testing.assert_close(small[0].u.detach(), u - RATE * 0.5 * u @ v @ v.T - RATE * of_u.sign(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small[0].v.detach(), v - RATE * 0.5 * u.T @ u @ v - RATE * of_v.sign(), rtol=1e-4, atol=1e-5)


def test_adam_s_decay_is_in_the_gradient():
    small = client()
    optimizer = torch.optim.Adam(small.parameters(), RATE, eps=1e-12, weight_decay=0.5)
    hand_over_decay(optimizer)
    u, v, of_u, _ = step(small, optimizer, 1.0)
    torch.testing.assert_close(small[0].u.detach(), u - RATE * (of_u + 0.5 * u @ v @ v.T).sign(), rtol=1e-4, atol=1e-5)


def test_lars_scales_the_step_of_factors():
    """lr·trust·‖u‖/‖g‖·g with g the loss's gradient and the product's decay: 0.3 of a thousandth of u's length."""
    small = client()
    optimizer = LARS(small.parameters(), 0.3, momentum=0.9, weight_decay=1e-4)
    hand_over_decay(optimizer)
    u, v, of_u, _ = step(small, optimizer, 1.0)
    g = of_u + 1e-4 * u @ v @ v.T
    torch.testing.assert_close(u - small[0].u.detach(), 0.3 * 0.001 * u.norm() / g.norm() * g, rtol=1e-3, atol=1e-7)
    assert float((u - small[0].u.detach()).norm() / u.norm()) == pytest.approx(0.3 * 0.001, rel=1e-3)


def test_who_maximizes_decays_all_the_same():
    small = client()
    optimizer = torch.optim.SGD(small.parameters(), RATE, weight_decay=0.5, maximize=True)
    hand_over_decay(optimizer)
    u, v, of_u, _ = step(small, optimizer, 1.0)
    torch.testing.assert_close(small[0].u.detach(), u + RATE * of_u - RATE * 0.5 * u @ v @ v.T)


def groups(small, decays):
    chosen = [value for name, value in small.named_parameters() if decays(name, value)]
    rest = [value for name, value in small.named_parameters() if not decays(name, value)]
    return torch.optim.SGD([{"params": chosen, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], 0.1)


def test_decay_that_misses_the_factors_by_name_is_told():
    small = nn.Sequential(client(), nn.Linear(16, 4))
    with pytest.warns(UserWarning, match=r"none of the factors u and v .* by their dimensions \(ndim > 1\), not by the name"):
        hand_over_decay(groups(small, lambda name, value: name.endswith("weight")))
    small = nn.Sequential(client(), nn.Linear(16, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hand_over_decay(groups(small, lambda name, value: value.ndim > 1))
        hand_over_decay(torch.optim.SGD(client().parameters(), 0.1))
    assert small[0][0].u._own_decay.rate == 0.1
