"""What a new stage starts from: its own values, a copy of the block before, and in targets its twin's."""

import copy

import pytest
import torch
from torch import nn

from featherlight.plugins import Clock, LayerFreezing, held


def attached(model, **arguments):
    plugin = LayerFreezing(**arguments)
    plugin.attach(model)
    return plugin


def at(model, plugin, period, step=0):
    """Bring a model to a period as a host does."""
    model.train()
    return plugin.advance(Clock(period, step))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


# -- copy of the block before -----------------------------------------------------------------------------------------
def test_copy_previous_happens_at_the_first_step_of_a_stage_only(make_tiny):
    model = make_tiny(3)
    plugin = attached(model, blocks="layers.*", periods_per_stage=2, init="copy_previous")
    own = copy.deepcopy(model.layers[1])
    for clock in ((0, 0), (1, 0), (2, 1), (3, 0)):
        at(model, plugin, *clock)
        assert same(model.layers[1], own)
    with torch.no_grad():
        model.layers[0].up.weight.add_(1)
    at(model, plugin, 2, 0)
    assert same(model.layers[1], model.layers[0])
    at(model, plugin, 2, 0)
    assert same(model.layers[1], model.layers[0])
    with torch.no_grad():
        model.layers[1].up.weight.add_(1)
    learnt = copy.deepcopy(model.layers[1])
    at(model, plugin, 3, 0)
    at(model, plugin, 2, 5)
    assert same(model.layers[1], learnt)
    at(model, plugin, 4, 0)
    assert same(model.layers[2], learnt)


def test_copy_previous_gives_every_block_of_a_group_the_last_one_before(make_tiny):
    model = make_tiny(4)
    plugin = attached(model, blocks="layers.*", blocks_per_stage=2, init="copy_previous")
    at(model, plugin, 1)
    assert same(model.layers[2], model.layers[1])
    assert same(model.layers[3], model.layers[1])
    assert not same(model.layers[0], model.layers[1])


def test_random_keeps_each_blocks_own_values(make_tiny, snapshot, moved):
    model = make_tiny(3)
    before = snapshot(model)
    plugin = attached(model, blocks="layers.*")
    for period in range(3):
        at(model, plugin, period)
    assert not moved(before, model)


def test_copy_previous_needs_blocks_of_one_shape(make_small_resnet):
    model = make_small_resnet()
    plugin = attached(model, init="copy_previous")
    at(model, plugin, 0)
    with pytest.raises(ValueError, match=r"needs blocks of one shape, but stage 2 begins .*use init='random'"):
        at(model, plugin, 1)


# -- targets ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["tiny", "resnet"])
def test_targets_go_through_every_stage_with_their_twin(kind, make_tiny, make_small_resnet, make_byol, images):
    encoder, pattern = (make_tiny(3), "encoder.layers.*") if kind == "tiny" else (make_small_resnet(), "encoder.layer*")
    model = make_byol(encoder)
    plugin = attached(model, blocks=pattern)
    for stage in range(3):
        at(model, plugin, stage)
        names = set(held(model))
        assert {name.removeprefix("target.") for name in names if name.startswith("target.")} == {
            name.removeprefix("encoder.") for name in names if name.startswith("encoder.")
        }
        assert not any(p.requires_grad for p in model.target.parameters())
        model.eval()
        assert torch.equal(model.target(images[kind]), model.encoder(images[kind]))


def test_a_stage_begins_with_equal_twins_and_only_then(make_tiny, make_byol):
    model = make_byol(make_tiny(3))
    plugin = attached(model, blocks="encoder.layers.*", periods_per_stage=2)

    def drift():
        with torch.no_grad():
            for parameter in (*model.target.layers.parameters(), model.target.cls_token, model.target.head.weight):
                parameter.add_(1)

    drift()
    at(model, plugin, 1, 0)
    assert not same(model.target.layers, model.encoder.layers)
    at(model, plugin, 2, 0)
    assert same(model.target.layers, model.encoder.layers)
    assert torch.equal(model.target.cls_token, model.encoder.cls_token)
    assert not torch.equal(model.target.head.weight, model.encoder.head.weight)  # heads keep their momentum


def test_a_stem_partly_outside_the_online_branch_is_copied_by_name(make_tiny, make_byol):
    model = nn.ModuleDict({"pre": nn.Linear(3, 3), "byol": make_byol(make_tiny(2))})
    stem = [f"byol.encoder.{name}" for name in ("cls_token", "pos_embed", "embed")]
    plugin = attached(model, blocks="byol.encoder.layers.*", stem=[*stem, "pre"])
    with torch.no_grad():
        model["byol"].encoder.cls_token.add_(1)
    at(model, plugin, 1)
    assert torch.equal(model["byol"].target.cls_token, model["byol"].encoder.cls_token)
    assert not model["pre"].weight.requires_grad


def test_a_new_block_that_is_a_copy_is_one_in_the_target_too(make_tiny, make_byol):
    model = make_byol(make_tiny(2))
    plugin = attached(model, blocks="encoder.layers.*", init="copy_previous")
    at(model, plugin, 1)
    assert same(model.target.layers[1], model.encoder.layers[0])
