"""PriSM's models on another device: what a host attaches first and moves later has all its tensors made anew, one by one."""

import copy

import pytest
import torch
from torch import nn

from featherlight.plugins import Clock, PrismSampling, Visit


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), norm(8))


NORMS = {"batch": lambda width: nn.BatchNorm2d(width, track_running_stats=False), "group": lambda width: nn.GroupNorm(2, width)}


def move(model):
    """What ``Module.to`` does to every parameter and buffer, whatever shares them."""
    return model._apply(lambda tensor: tensor.clone())


@pytest.mark.parametrize("norm", NORMS)
def test_a_client_s_norms_see_the_rows_of_their_layers_wherever_it_was_moved(norm):
    model, visit = network(NORMS[norm]), Visit(3, 1, 0)
    server = PrismSampling(0.5, layers="*")
    server.attach(model)
    server.advance(Clock(0))
    entries = {name: value.detach() for name, value in model.state_dict().items()}
    found = []
    for moved in (False, True):
        small = copy.deepcopy(server.narrow(visit))
        client = PrismSampling(0.5, layers="*")
        client.attach(small)
        small = move(small) if moved else small
        small.load_state_dict(client.decode_down(server.encode_down(entries, visit), visit))
        for layer in (0, 3):
            assert small[layer].rows.tolist() != [0, 1, 2, 3]
            assert torch.equal(small[layer].rows, small[layer + 1].rows)
        found.append(small(torch.ones(1, 4, 6, 6)))
    assert torch.equal(*found)


@pytest.mark.parametrize("norm", NORMS)
def test_in_place_too(norm):
    found = []
    for moved in (False, True):
        model = network(NORMS[norm])
        plugin = PrismSampling(0.5, layers="*").in_place()
        plugin.attach(model)
        model = move(model) if moved else model
        plugin.advance(Clock(3))
        plugin.visit(Visit(3))
        plugin.before_forward(Clock(3))
        for layer in (0, 3):
            assert model[layer].rows.tolist() != [0, 1, 2, 3]
            assert torch.equal(model[layer].rows, model[layer + 1].rows)
        found.append(model(torch.ones(1, 4, 6, 6)))
        plugin.after_step(Clock(3))
        plugin.detach()
        assert not any(hasattr(module, "behind") or hasattr(module, "rows") for module in model.modules())
    assert torch.equal(*found)
