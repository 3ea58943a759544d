"""What is held and what trains, by name: present entries, tied ones once, buffers of what is awake."""

import pytest
import torch
from torch import nn

from featherlight.plugins import held, trained
from featherlight.plugins.bypass import set_absent
from featherlight.plugins.present import count


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.head = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(5), persistent=False)


STATISTICS = {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}
WEIGHTS = {"scale", "body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias"}


def test_held_is_the_state_dict_with_live_tensors():
    model = Model()
    entries = held(model)
    assert entries.keys() == model.state_dict().keys()
    assert entries.keys() == WEIGHTS | STATISTICS | {"seen"}
    assert entries["head.weight"] is model.head.weight
    assert entries["body.1.running_mean"] is model.body[1].running_mean


def test_non_persistent_buffers_are_not_held():
    assert "cache" not in held(Model())
    assert "cache" not in trained(Model())


def test_count_leaves_buffers_out():
    assert count(held(Model())) == 2 + (2 * 3 + 3) + (3 + 3) + (3 * 2 + 2)


def test_trained_is_parameters_with_gradients_and_statistics_of_what_is_awake():
    model = Model()
    assert trained(model).keys() == WEIGHTS | STATISTICS | {"seen"}
    model.body[0].requires_grad_(False)
    assert trained(model).keys() == WEIGHTS - {"body.0.weight", "body.0.bias"} | STATISTICS | {"seen"}
    model.body.eval()
    assert not trained(model).keys() & STATISTICS
    model.eval()
    assert "seen" not in trained(model)


def test_absent_modules_and_all_below_them_are_not_there():
    model = Model()
    set_absent(model.body, "me", True)
    assert held(model).keys() == {"scale", "head.weight", "head.bias", "seen"}
    assert not any(name.startswith("body") for name in trained(model))
    set_absent(model.body, "me", False)
    assert len(held(model)) == 11


def test_tied_weights_count_once():
    model = nn.ModuleDict({"embed": nn.Linear(3, 4, bias=False), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    assert held(model).keys() == {"embed.weight", "head.bias"}
    assert count(held(model)) == 12 + 4


def test_a_tied_weight_is_held_as_long_as_one_of_its_owners_is_there():
    model = nn.ModuleDict({"embed": nn.Linear(3, 4, bias=False), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    set_absent(model["embed"], "me", True)
    assert held(model).keys() == {"head.weight", "head.bias"}


def test_a_module_used_twice_is_held_once():
    layer = nn.Linear(2, 2)
    assert count(held(nn.Sequential(layer, nn.ReLU(), layer))) == 6


@pytest.mark.parametrize("ignored", ["body", "body.1"])
def test_ignored_paths_do_not_train(ignored):
    found = trained(Model(), ignore=(ignored,))
    assert not any(name.startswith(f"{ignored}.") for name in found)
    assert {"scale", "head.weight", "seen"} <= found.keys()


def test_a_path_is_no_prefix_of_a_longer_name():
    model = nn.ModuleDict({"head": nn.Linear(1, 1), "head_target": nn.Linear(1, 1)})
    assert trained(model, ignore=("head",)).keys() == {"head_target.weight", "head_target.bias"}
