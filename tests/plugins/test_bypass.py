"""A bypassed block hands on its input; all else about it stays as it was."""

import copy

import pytest
import torch
from torch import nn

from featherlight.plugins import bypass
from featherlight.plugins.bypass import is_absent, is_bypassed, make_bypassable, restore, set_absent, set_bypassed


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    make_bypassable(model[1])
    return model


@pytest.fixture
def x():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_keys_parameters_and_kind_stay(model):
    torch.manual_seed(0)
    ordinary = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    assert list(model.state_dict()) == list(ordinary.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in ordinary.named_modules()]
    assert isinstance(model[1], nn.Sequential)
    assert len(model[1]) == 2
    ordinary.load_state_dict(model.state_dict(), strict=True)


def test_nothing_changes_until_somebody_bypasses(model, x):
    expected = nn.functional.linear(x, model[0].weight, model[0].bias)
    expected = torch.relu(nn.functional.linear(expected, model[1][0].weight, model[1][0].bias))
    assert torch.equal(model(x), nn.functional.linear(expected, model[2].weight, model[2].bias))


def test_a_bypassed_block_is_the_identity(model, x):
    set_bypassed(model[1], "me", True)
    assert torch.equal(model(x), model[2](model[0](x)))
    assert model[1](x) is x


def test_a_block_stays_bypassed_until_the_last_owner_lets_go(model, x):
    for owner in ("one", "other"):
        set_bypassed(model[1], owner, True)
    set_bypassed(model[1], "one", False)
    set_bypassed(model[1], "stranger", False)
    assert [is_bypassed(block) for block in model] == [False, True, *[False] * (len(model) - 2)]
    assert model[1](x) is x
    set_bypassed(model[1], "other", False)
    assert torch.equal(model[1](x), torch.relu(model[1][0](x)))


def test_absence_has_owners_too(model):
    set_absent(model[1], "one", True)
    set_absent(model[1], "other", True)
    assert is_absent(model[1])
    assert is_absent(model[1], but="one")
    set_absent(model[1], "other", False)
    assert is_absent(model[1])
    assert not is_absent(model[1], but="one")


def test_marks_are_each_blocks_own(model):
    make_bypassable(model[0])
    make_bypassable(model[2])
    set_bypassed(model[0], "me", True)
    assert type(model[0]) is type(model[2])
    assert not model[2]._bypassed_by


def test_twice_bypassable_is_once(model):
    once = type(model[1])
    make_bypassable(model[1])
    assert type(model[1]) is once
    restore(model[1])
    assert type(model[1]) is nn.Sequential


def test_restore_leaves_no_trace(model, x):
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    set_bypassed(model[1], "me", True)
    set_absent(model[1], "me", True)
    model[1]._frozen, model[1]._active, model[1]._residual_scale, model[1]._instead = True, True, 2.0, (nn.Linear(4, 4),)
    restore(model[1])
    assert type(model[1]) is nn.Sequential
    assert vars(model[1]).keys() == vars(plain).keys()
    assert torch.equal(model[1](x), torch.relu(model[1][0](x)))
    restore(model[1])
    assert type(model[1]) is nn.Sequential


def test_a_deepcopy_runs_its_own_weights(model, x):
    twin = copy.deepcopy(model)
    before = model[1](x)
    with torch.no_grad():
        twin[1][0].weight.zero_()
        twin[1][0].bias.fill_(5.0)
    assert torch.equal(twin[1](x), torch.full((3, 4), 5.0))
    assert torch.equal(model[1](x), before)


def test_a_deepcopy_has_its_own_marks(model, x):
    twin = copy.deepcopy(model)
    set_bypassed(twin[1], "me", True)
    assert twin[1](x) is x
    assert model[1](x) is not x


def test_compiled_models_follow_the_marks(model, x):
    compiled = torch.compile(model, backend="eager")
    full, short = model(x), model[2](model[0](x))
    for on in (False, True, False, True):
        set_bypassed(model[1], "me", on)
        assert torch.equal(compiled(x), short if on else full)


def test_something_else_can_stand_in(model, x):
    instead = nn.Linear(4, 4)
    model[1]._instead = (instead,)
    assert torch.equal(model[1](x), torch.relu(model[1][0](x)))
    set_bypassed(model[1], "me", True)
    assert torch.equal(model[1](x), instead(x))
    assert not any(name.startswith("1._instead") for name in model.state_dict())


def test_a_residual_can_be_scaled(x):
    class Residual(nn.Linear):
        def forward(self, x):
            return x + super().forward(x)

    block = Residual(4, 4)
    make_bypassable(block)
    block._residual_scale = 2.5
    expected = x + 2.5 * (x @ block.weight.T + block.bias)
    torch.testing.assert_close(block(x), expected)


def test_a_frozen_block_refuses_an_input_that_keeps_the_graph(model, x):
    model[1].requires_grad_(False)
    model[1]._frozen = True
    with pytest.raises(RuntimeError, match=r"input of a frozen block requires grad.*name it with stem=\[\.\.\.\]\), or the images"):
        model(x)
    with torch.no_grad():
        model(x)
    model[0].requires_grad_(False)
    assert model(x).requires_grad


@pytest.mark.parametrize("container", [nn.ModuleList([nn.Linear(1, 1)]), nn.ModuleDict({"a": nn.Linear(1, 1)})])
def test_containers_without_a_forward_are_no_blocks(container):
    with pytest.raises(ValueError, match=rf"{type(container).__name__} has none: name its items, as in 'layers\.\*'"):
        make_bypassable(container)


def test_one_class_is_made_for_each_kind_of_block():
    first, second = nn.Linear(1, 1), nn.Linear(2, 2)
    make_bypassable(first)
    make_bypassable(second)
    assert type(first) is type(second) is bypass._CLASSES[nn.Linear]
    assert type(first).__module__ == nn.Linear.__module__
