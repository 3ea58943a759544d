"""Rounds of PriSM by hand: factors in plain tensors, a plain loop, means over those who held an entry."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn import functional as F

from featherlight.plugins import Clock, PrismSampling, Visit
from featherlight.plugins.factors import factorise

RATE, DECAY = 0.05, 0.1
SIZES = [8, 11, 16]
MIXED = {0.3: 0.4, 0.6: 0.6}
LAYERS = {"conv1": "norm1", "conv2": "norm2", "fc1": None}
STATISTICS = ("running_mean", "running_var")


class ConvNet(pl.LightningModule):
    """(N, 2, 5, 5): stem 2 → 4, convolutions 4 → 6 and 6 → 8 with norms, a linear layer 8 → 10, head."""

    def __init__(self, norm="batch", seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.kind = norm
        make = {"batch": nn.BatchNorm2d, "group": lambda width: nn.GroupNorm(2, width)}[norm]
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(4, 6, 3, padding=1, bias=False), make(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, stride=2, padding=1), make(8)
        self.fc1, self.head = nn.Linear(8, 10), nn.Linear(10, 3)
        with torch.no_grad():
            for one in (self.norm1, self.norm2):
                one.bias.uniform_(0.5, 1)

    def forward(self, x):
        x = self.norm1(self.conv1(self.stem(x))).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(self.fc1(x.mean((2, 3))).relu())

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), RATE, momentum=0.9, weight_decay=DECAY)


def places(plugin, server, visit):
    """Layer → (kernels, rows) that the client of ``visit`` holds, read off where its entries belong."""
    entries = plugin.decode(plugin.encode_down({name: value.detach() for name, value in server.state_dict().items()}, visit), visit)
    found = {}
    for path in LAYERS:
        _, mask = entries[f"{path}.u"]
        found[path] = mask.any(0).nonzero().flatten(), mask.any(1).nonzero().flatten()
    return found


def among_zeros(part, rows, whole):
    return torch.stack([part[:, list(rows).index(row)] if row in rows else torch.zeros_like(part[:, 0]) for row in range(whole)], 1)


def norm_by_hand(kind, x, rows, whole, weight, bias, statistics):
    if kind == "batch":
        return F.batch_norm(x, *statistics, weight, bias, training=True)
    out = torch.empty_like(x)
    for group in range(2):
        there = [place for place, row in enumerate(rows) if row // (whole // 2) == group]
        if there:
            values = x[:, there]
            mean, variance = values.mean((1, 2, 3), keepdim=True), values.var((1, 2, 3), unbiased=False, keepdim=True)
            shape = (1, -1, 1, 1)
            out[:, there] = (values - mean) / (variance + 1e-5).sqrt() * weight[there].view(shape) + bias[there].view(shape)
    return out


def train_by_hand(server, held, batches):
    """One client: name → what it held after training, in its own smaller shapes."""
    state = {name: value.detach().clone() for name, value in server.state_dict().items() if value.is_floating_point()}
    mine = {}
    for path, norm in LAYERS.items():
        kernels, rows = held[path]
        u, v, _ = factorise(state.pop(f"{path}.weight"))
        mine[f"{path}.u"], mine[f"{path}.v"] = u[rows][:, kernels], v[kernels]
        for name in [f"{path}.bias", *(f"{norm}.{one}" for one in ("weight", "bias", *STATISTICS))]:
            if name in state:
                mine[name] = state.pop(name)[rows]
    mine |= state
    leaves = {name: value.requires_grad_() for name, value in mine.items() if not name.endswith(STATISTICS)}
    momentum = {name: torch.zeros_like(value) for name, value in leaves.items()}

    def layer(x, path, stride):
        rows, whole = held[path][1].tolist(), getattr(server, path).weight.shape[0]
        v = mine[f"{path}.v"].view(-1, *getattr(server, path).weight.shape[1:])
        out = F.conv2d(F.conv2d(x, v, None, stride, 1), mine[f"{path}.u"][:, :, None, None], mine.get(f"{path}.bias"))
        norm = LAYERS[path]
        statistics = [mine.get(f"{norm}.{one}") for one in STATISTICS]
        out = norm_by_hand(server.kind, out, rows, whole, mine[f"{norm}.weight"], mine[f"{norm}.bias"], statistics)
        return among_zeros(out, rows, whole).relu()

    for step, (x, y) in enumerate(batches):
        x = F.conv2d(x, mine["stem.weight"], mine["stem.bias"], padding=1)
        x = layer(layer(x, "conv1", 1), "conv2", 2).mean((2, 3))
        x = x @ mine["fc1.v"].T @ mine["fc1.u"].T + mine["fc1.bias"]
        x = among_zeros(x, held["fc1"][1].tolist(), 10).relu()
        loss = F.cross_entropy(F.linear(x, mine["head.weight"], mine["head.bias"]), y)
        products = sum((mine[f"{path}.u"] @ mine[f"{path}.v"]).square().sum() for path in LAYERS)
        others = sum(value.square().sum() for name, value in leaves.items() if not name.endswith((".u", ".v")))
        grads = torch.autograd.grad(loss + DECAY / 2 * (products + others), list(leaves.values()))
        with torch.no_grad():
            for (name, value), grad in zip(leaves.items(), grads):
                momentum[name] = momentum[name] * 0.9 + grad if step else grad
                value -= RATE * momentum[name]
    return {name: value.detach() for name, value in mine.items()}


def round_by_hand(server, plugin, data, round, clients=None):
    """The server's new state, float64, and the share of kernels that somebody held."""
    plugin.advance(Clock(round))
    state = {name: value.double() for name, value in server.state_dict().items()}
    clients = range(data.num_clients) if clients is None else clients
    factors = {path: factorise(getattr(server, path).weight) for path in LAYERS}
    before = {name: value for name, value in state.items() if not name.endswith("tracked")}
    for path, (u, v, _) in factors.items():
        before |= {f"{path}.u": u.double(), f"{path}.v": v.double()}
    total = {name: torch.zeros_like(value) for name, value in before.items()}
    weights = {name: torch.zeros_like(value) for name, value in before.items()}
    for client in clients:
        held = places(plugin, server, Visit(round, client, 0))
        trained = train_by_hand(server, held, data.batches(client))
        for name, value in trained.items():
            path = next((path for path, norm in LAYERS.items() if name.split(".")[0] in (path, norm)), None)
            where = [torch.arange(size) for size in before[name].shape]
            if path is not None:
                kernels, rows = held[path]
                where[0] = kernels if name.endswith(".v") else rows
                if name.endswith(".u"):
                    where[1] = kernels
            grid = torch.meshgrid(*where, indexing="ij")
            total[name][grid] += value.double() * data.sizes[client]
            weights[name][grid] += data.sizes[client]
    mean = {name: torch.where(weights[name] > 0, total[name] / weights[name].clamp(min=1), before[name]) for name in before}
    for path, (u, v, _) in factors.items():
        change = mean.pop(f"{path}.u") @ mean.pop(f"{path}.v") - u.double() @ v.double()
        mean[f"{path}.weight"] = state[f"{path}.weight"] + change.view_as(state[f"{path}.weight"])
    covered = [float((weights[f"{path}.v"][:, 0] > 0).double().mean()) for path in LAYERS]
    return mean, sum(covered) / len(covered), weights


def attached(server, **arguments):
    plugin = PrismSampling(**{"layers": list(LAYERS), **arguments})
    plugin.attach(server)
    return plugin


def close(module, wanted):
    state = module.state_dict()
    assert set(wanted) == {name for name in state if not name.endswith("tracked")}
    for name, value in wanted.items():
        torch.testing.assert_close(state[name].double(), value, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
