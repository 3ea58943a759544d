"""A small network, and PrismSampling attached to it as on a server."""

import torch
from torch import nn

from featherlight.plugins import Clock, PrismSampling, Visit


def network(seed=0):
    """Convolution 4 → 6 with group norm, convolution 6 → 10 with a bias, linear layer 10 → 8."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(4, 6, 3, bias=False), nn.GroupNorm(2, 6), nn.ReLU()),
        *(nn.Conv2d(6, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 8)),
    )


LAYERS = ["0", "3", "6"]


def on_server(model, period=0, **arguments):
    plugin = PrismSampling(**{"layers": LAYERS, "keep": 0.5, **arguments})
    plugin.attach(model)
    plugin.advance(Clock(period))
    plugin.encode_down(entries(model), Visit(period, 10**6))  # as in a round, where somebody is served before anything is lifted
    return plugin


def entries(model):
    return {name: value.detach() for name, value in model.state_dict().items()}


def held_by(plugin, model, visit):
    """Layer → (kernels, rows) of one client, read off where what it was sent belongs."""
    decoded = plugin.decode(plugin.encode_down(entries(model), visit), visit)
    return {
        path.removesuffix(".u"): (mask.any(0).nonzero().flatten().tolist(), mask.any(1).nonzero().flatten().tolist())
        for path, (_, mask) in ((path, entry) for path, entry in decoded.items() if path.endswith(".u"))
    }
