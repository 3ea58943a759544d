"""A model of 14 parameters, IntrinsicProjection attached to it, and its projections as matrices."""

import torch
from torch import nn

from featherlight.plugins import Clock, IntrinsicProjection, Visit
from featherlight.plugins.projections import PROJECTIONS
from featherlight.plugins.seeds import derive


class Two(nn.Module):
    """Parameters 6 + 2 + 4 + 2 = 14 in four tensors, and statistics of a norm without parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2)

    def forward(self, x):
        return self.two(self.norm(self.one(x)))


SIZE = 14
NAMES = ["one.weight", "one.bias", "two.weight", "two.bias"]


def attached(model=None, **options):
    plugin = IntrinsicProjection(**options)
    plugin.attach(model or Two())
    return plugin


def dense(dim, span=0, which=0, kind="fastfood", seed=0, size=SIZE):
    projection = PROJECTIONS[kind](size, dim, derive(seed, "intrinsic", span, which))
    return torch.stack([projection.lift(unit) for unit in torch.eye(dim, dtype=torch.float64)], 1)


def server_of(plugin):
    return {name: value.detach() for name, value in plugin._model.state_dict().items()}


def change(seed=0):
    torch.manual_seed(seed)
    return {name: torch.randn(value.shape) for name, value in Two().named_parameters()}


def flat(entries):
    return torch.cat([entries[name].flatten() for name in NAMES])


def vectors(served):
    """Names of the vectors that come down, without those that only say that the client has them now."""
    return [name for name, value in served.items() if name.startswith("intrinsic.") and value.numel()]


def visit_round(plugin, round, clients, kept=(), seed=0, kept_by=None):
    """One round of an actual federation's calls; returns what each client was served."""
    kept_by = {} if kept_by is None else kept_by
    served, zs = {}, []
    for client in clients:
        visit = Visit(round, client, seed)
        served[client] = plugin.encode_down(server_of(plugin), visit, kept_by.get(client, kept))
        kept_by[client] = [name for name in served[client] if name.startswith("intrinsic.")]
        z = plugin.encode(change(10 * round + client), visit)
        zs.append(dict(plugin.decode(z, visit))["intrinsic.z"].double())
    lifted = plugin.lift({"intrinsic.z": sum(zs) / len(zs)}, Clock(round))
    with torch.no_grad():
        for name, value in lifted.items():
            plugin._model.get_parameter(name).add_(value)
    plugin.settle(plugin._model, Clock(round))
    return served
