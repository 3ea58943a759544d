"""Toy plugins through the loop: codecs, sparse entries, an extra loss, settling; each against the same round by hand."""

import copy

import pytest
import torch

from featherlight.fed_loop import Momentum
from featherlight.fed_loop.cohort import sample
from featherlight.plugins import Clock, LayerFreezing, Plugin
from featherlight.plugins.seeds import generator


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


SIZES = [6, 10, 14]


def deltas(server, data, extra=lambda model: 0.0):
    """What each client changes, by a plain loop on a deep copy."""
    changes = []
    for client in range(len(SIZES)):
        model = copy.deepcopy(server).train()
        optimizer = model.configure_optimizers()
        for step, batch in enumerate(data.batches(client)):
            optimizer.zero_grad()
            (model.training_step(batch, step) + extra(model)).backward()
            optimizer.step()
        changes.append({name: value - server.state_dict()[name] for name, value in model.state_dict().items()})
    return changes


def weighted(changes, name):
    return sum(change[name].double() * size for change, size in zip(changes, SIZES)) / sum(SIZES)


class Projection(Plugin):
    """z = Aᵀ·change of all parameters on the way up, A·Σz on the server; A from the round, known to both sides."""

    def __init__(self, size):
        self.size = size

    def attach(self, model):
        self._shapes = {name: value.shape for name, value in model.named_parameters()}

    def matrix(self, round):
        rows = sum(shape.numel() for shape in self._shapes.values())
        return torch.randn(rows, self.size, generator=generator(round, "A")) / rows**0.5

    def encode(self, message, visit):
        return {"z": self.matrix(visit.round).T @ torch.cat([message[name].flatten() for name in self._shapes])}

    def lift(self, total, clock):
        if "z" not in total:
            return {}
        flat = self.matrix(clock.period).double() @ total["z"].double()
        parts = flat.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts)}


class Checkerboard(Plugin):
    """A client sends the elements of its own parity, client 2 none, and of the head all."""

    def _own(self, size, client):
        return (torch.arange(size) % 2 == client % 2) & (client != 2)

    def attach(self, model):
        self._shapes = {name: value.shape for name, value in model.named_parameters()}

    def encode(self, message, visit):
        return {
            name: message[name] if name.startswith("head") else message[name].flatten()[self._own(message[name].numel(), visit.client)]
            for name in self._shapes
        }

    def decode(self, message, visit):
        decoded = {}
        for name, value in message.items():
            if name.startswith("head"):
                decoded[name] = value
                continue
            own = self._own(self._shapes[name].numel(), visit.client)
            full = torch.zeros(own.numel())
            full[own] = value
            decoded[name] = full.view(self._shapes[name]), own.float().view(self._shapes[name])
        return decoded


def test_a_quantiser(int8, net, points, federation):
    data, module, server = points(SIZES), net(sgd), net(sgd)
    result = federation(1).run(module, data, [int8()])
    changes = deltas(server, data)
    for name, value in module.named_parameters():
        error = (value.double() - server.get_parameter(name).double() - weighted(changes, name)).abs().max()
        largest = max(change[name].abs().max() for change in changes)
        assert error <= largest / 127 / 2 * 1.001 + 1e-7
    assert (module.blocks[0].norm.running_mean != 0).any()
    plain = federation(1).run(net(sgd), data)
    parameters = sum(value.numel() for value in server.parameters())
    saved = plain.history[0]["bytes_up"] - result.history[0]["bytes_up"]
    assert saved < 3 * 3 * parameters  # three bytes of four, less headers of scales, times three clients


def test_a_projection_is_lifted_once_of_the_sum(net, points, federation):
    data, module, model = points(SIZES), net(sgd), net(sgd)
    projection = Projection(20)
    federation(2).run(module, data, [projection])
    for round in range(2):
        changes = deltas(model, data)
        matrix = projection.matrix(round).double()
        mean = torch.cat([weighted(changes, name).flatten() for name, _ in model.named_parameters()])
        lifted = matrix @ (matrix.T @ mean)
        for (_, value), part in zip(model.named_parameters(), lifted.split([p.numel() for p in model.parameters()])):
            value.data += part.view_as(value).float()
    for name, value in module.named_parameters():
        assert torch.allclose(value, model.get_parameter(name), atol=1e-5), name
    # what is not sent stays as the server has it
    assert all(torch.equal(block.norm.running_mean, torch.zeros(8)) for block in module.blocks)


def test_a_message_of_one_vector_has_its_length(net, points, federation):
    result = federation(1).run(net(sgd), points(SIZES), [Projection(20)])
    header = '{"z":{"dtype":"F32","shape":[20],"data_offsets":[0,80]}}'
    assert result.history[0]["bytes_up"] == 3 * (8 + (len(header) + 7) // 8 * 8 + 80)


def test_codecs_in_a_chain(int8, net, points, federation):
    """First to encode, last to decode: the quantiser sees coordinates, and lifting sees the sum of what it gave back."""
    modules = [net(sgd), net(sgd)]
    plain, coded = (
        federation(1).run(module, points(SIZES), chain) for module, chain in zip(modules, ([Projection(300)], [Projection(300), int8()]))
    )
    start = net(sgd)
    for name, value in start.named_parameters():
        one, other = (module.get_parameter(name) - value for module in modules)
        assert torch.allclose(one, other, atol=0.03 * one.abs().max().item()), name
    assert coded.history[0]["bytes_up"] < plain.history[0]["bytes_up"]


@pytest.mark.parametrize("server", [None, Momentum(1.0, 0.0)])
def test_sparse_entries(server, net, points, federation):
    """Every element is the mean over those who sent it, by their samples; what nobody sent stays."""
    data, module, start = points(SIZES), net(sgd), net(sgd)
    federation(1, server=server).run(module, data, [Checkerboard()])
    changes = deltas(start, data)
    for name, value in module.named_parameters():
        old, new = start.get_parameter(name).flatten(), value.flatten()
        for place in range(old.numel()):
            if name.startswith("head"):
                wanted = weighted(changes, name).flatten()[place]
            else:
                wanted = changes[place % 2][name].flatten()[place].double()
            assert abs(new[place].double() - old[place].double() - wanted) < 1e-6, name


def test_elements_that_nobody_sent_stay_bit_for_bit(net, points, federation):
    seed = next(seed for seed in range(100) if sample(3, 1, seed, 0) == [0])
    module, start = net(sgd), net(sgd)
    federation(1, cohort=1, seed=seed, server=Momentum()).run(module, points(SIZES), [Checkerboard()])
    one, other = module.stem.weight.flatten(), start.stem.weight.flatten()
    assert torch.equal(one[1::2], other[1::2])
    assert not torch.equal(one[::2], other[::2])


class HeldNear(Plugin):
    """μ/2 · ‖w − w₀‖² (FedProx, arXiv 1812.06127), w₀ as the client received it."""

    def __init__(self, mu):
        self.mu = mu

    def before_forward(self, clock):
        if clock.step == 0:
            self._start = None

    def extra_loss(self, model, batch):
        if self._start is None:
            self._start = [value.detach().clone() for value in model.parameters()]
        return self.mu / 2 * sum((value - start).square().sum() for value, start in zip(model.parameters(), self._start))


def test_an_extra_loss_is_added(net, points, federation):
    data, module, server = points(SIZES), net(sgd), net(sgd)
    federation(1).run(module, data, [HeldNear(2.0)])

    def proximal(model):
        return sum((value - server.get_parameter(name)).square().sum() for name, value in model.named_parameters())

    changes = deltas(server, data, proximal)
    for name, value in module.named_parameters():
        assert torch.allclose((value - server.get_parameter(name)).double(), weighted(changes, name), atol=1e-6), name
    without = net(sgd)
    federation(1).run(without, data)
    assert not torch.allclose(without.stem.weight, module.stem.weight, atol=1e-4)


class Settling(Plugin):
    """Sets the head's bias to the round's number on the server, once a round, after the update."""

    def __init__(self):
        self._seen = []

    def settle(self, server, clock):
        self._seen.append((clock, server.stem.weight.detach().clone()))
        server.head.bias.data.fill_(clock.period + 1)


def test_what_settling_does_to_the_server_is_kept_and_sent(net, points, federation):
    data, module, settling = points(SIZES), net(sgd), Settling()
    received = []

    class Look(Plugin):
        def before_forward(self, clock):
            if clock.step == 0:
                received.append(module.head.bias.detach().clone())

    freezing = LayerFreezing(blocks="blocks.*", periods_per_stage=9)
    federation(2).run(module, data, [settling, Look(), freezing])
    assert [clock for clock, _ in settling._seen] == [Clock(0, 0), Clock(1, 0)]
    assert torch.equal(settling._seen[-1][1], module.stem.weight)  # it saw the new weights
    assert module.head.bias.tolist() == [2.0] * 3
    assert received[-1].tolist() == [1.0] * 3
