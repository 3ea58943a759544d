"""How factors of products leave an optimizer's own weight decay, and keep its schedule."""

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from featherlight.plugins import Clock, PrismSampling, Visit
from featherlight.plugins.optimizer_state import decay, hand_over_decay
from featherlight.plugins.sampled_layers import sampled_layers


def network(seed=0):
    """Convolution 4 → 6 with group norm, convolution 6 → 10 with a bias, linear layer 10 → 8."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(4, 6, 3, bias=False), nn.GroupNorm(2, 6), nn.ReLU()),
        *(nn.Conv2d(6, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 8)),
    )


LAYERS = ["0", "3", "6"]


def client_module(keep=0.5):
    plugin = PrismSampling(keep=keep, layers=LAYERS)
    plugin.attach(network())
    plugin.advance(Clock(0))
    small = plugin.narrow(Visit(0))
    client = PrismSampling(keep=keep, layers=LAYERS)
    client.attach(small)
    for parameter in small.parameters():
        nn.init.normal_(parameter)
    return small, client


SCHEDULES = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "lambdas": lambda optimizer: LambdaLR(optimizer, [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)]),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 8, 1e-3),
    "sequential": lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer, 0.1, 1, 3), CosineAnnealingLR(optimizer, 7)], [3]),
    "multiplicative": lambda optimizer: MultiplicativeLR(optimizer, lambda epoch: 0.9),
    "restarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, 4),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, [0.2, 0.6], total_steps=14),
    "cyclic": lambda optimizer: CyclicLR(optimizer, [0.1, 0.2], [0.5, 0.6], 3, cycle_momentum=False),
    "chained": lambda optimizer: ChainedScheduler([LinearLR(optimizer, 0.1, 1, 3), ExponentialLR(optimizer, 0.9)]),
}
FORMS = {
    "tuple": lambda optimizer, scheduler: ([optimizer], [scheduler]),
    "dict": lambda optimizer, scheduler: {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("form", FORMS)
def test_factors_leave_the_optimizer_s_decay_and_keep_its_schedule(form, schedule):
    """Two groups of different rates: each factor's learning rate is what it was without, at every step."""
    small, _ = client_module()

    def groups():
        layer = [*small[0].parameters(), *small[3].parameters()]
        return [{"params": layer, "lr": 0.1, "weight_decay": 0.3}, {"params": [*small[1].parameters(), *small[6].parameters()]}]

    def rates(optimizer):
        return {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}

    plain, optimizer = (SGD(groups(), 0.5, momentum=0.9, weight_decay=0.05) for _ in range(2))
    scheduler_of_plain, scheduler = SCHEDULES[schedule](plain), SCHEDULES[schedule](optimizer)
    hand_over_decay(FORMS[form](optimizer, scheduler))
    factors = {id(value) for layer in sampled_layers(small).values() for value in (layer.u, layer.v)}
    after = {id(value): group["weight_decay"] for group in optimizer.param_groups for value in group["params"]}
    before = {id(value): group["weight_decay"] for group in plain.param_groups for value in group["params"]}
    assert len(factors) == 6
    assert after == {key: 0.0 if key in factors else value for key, value in before.items()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    for path, rate in (("0", 0.3), ("3", 0.3), ("6", 0.05)):
        layer = small.get_submodule(path)
        assert layer.u._own_decay is layer.v._own_decay
        assert layer.u._own_decay.rate == rate
    for _ in range(12):
        assert rates(optimizer) == pytest.approx(rates(plain))
        for one, its in ((plain, scheduler_of_plain), (optimizer, scheduler)):
            one.step()
            its.step()
    assert [*scheduler.get_last_lr()] == [group["lr"] for group in optimizer.param_groups]


def test_a_scheduler_that_follows_a_metric_reaches_the_factors_too():
    """Under a Trainer; a federation refuses it."""
    small, _ = client_module()
    optimizer = SGD(small.parameters(), 0.4, weight_decay=0.1)
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=0.15)
    hand_over_decay({"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}})
    assert len(optimizer.param_groups) == 2
    for wanted in (0.4, 0.2, 0.15, 0.15):
        scheduler.step(1.0)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([wanted] * 2)


def test_nothing_is_handed_over_where_nothing_is_marked():
    model = network()
    optimizer = SGD(model.parameters(), 0.1, weight_decay=0.1)
    hand_over_decay(optimizer)
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == 7


def test_decay_is_of_the_product_for_factors_and_of_themselves_for_the_rest():
    small, plugin = client_module()
    optimizer = SGD(small.parameters(), 0.1, weight_decay=0.4)
    hand_over_decay({"optimizer": optimizer})
    x = torch.randn(3, 4, 7, 7)
    products = sum((layer.u @ layer.v.flatten(1)).square().sum() for layer in sampled_layers(small).values())
    rest = sum(value.square().sum() for name, value in small.named_parameters() if not name.endswith((".u", ".v")))
    loss = small(x).square().mean() + 0.4 / 2 * (products + rest)
    grads = torch.autograd.grad(loss, [*small.parameters()])
    wanted = {name: value.detach() - 0.1 * grad for (name, value), grad in zip(small.named_parameters(), grads)}
    plugin.before_forward(Clock(0))
    optimizer.zero_grad()
    small(x).square().mean().backward()
    decay(optimizer)
    optimizer.step()
    plugin.after_update(Clock(0))
    plugin.after_step(Clock(0))
    for name, value in small.named_parameters():
        torch.testing.assert_close(value.detach(), wanted[name], rtol=1e-4, atol=1e-4)


def test_factors_without_gradients_are_not_decayed():
    small, _ = client_module()
    optimizer = SGD(small.parameters(), 0.1, weight_decay=0.4)
    hand_over_decay(optimizer)
    decay(optimizer)
    assert all(value.grad is None for value in small.parameters())
