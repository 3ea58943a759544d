"""Momentum copies are found by what they are, or where the model says so, and follow their online twins."""

import copy

import pytest
import torch
from torch import nn

from featherlight.plugins import find_targets
from featherlight.plugins.targets import copy_member, follow


class LightlyByol(nn.Module):
    """As lightly's documentation writes BYOL."""

    def __init__(self):
        super().__init__()
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projection_head = BYOLProjectionHead(4, 8, 4)
        self.prediction_head = BYOLPredictionHead(4, 8, 4)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)


def test_lightlys_byol_though_predictor_and_projector_have_one_shape():
    assert find_targets(LightlyByol()) == {"backbone_momentum": "backbone", "projection_head_momentum": "projection_head"}


def test_the_largest_copy_is_the_target(make_tiny, make_byol):
    assert find_targets(make_byol(make_tiny())) == {"target": "encoder"}


def test_a_model_without_copies_has_no_targets(make_tiny, make_resnet):
    assert find_targets(make_tiny()) == find_targets(make_resnet()) == {}


def test_declared_targets_are_taken_as_they_are(make_tiny, make_byol):
    model = make_byol(make_tiny())
    model.targets = {"target": "predictor"}
    assert find_targets(model) == {"target": "predictor"}
    model.targets = {}
    assert find_targets(model) == {}


def test_twins_inside_branches_of_which_one_has_more():
    def branch(**more):
        return nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "projector": nn.Linear(4, 2), **more})

    model = nn.ModuleDict({"teacher": branch().requires_grad_(False), "student": branch(predictor=nn.Linear(2, 2))})
    assert find_targets(model) == {"teacher.backbone": "student.backbone", "teacher.projector": "student.projector"}


def test_a_branch_with_something_trainable_is_no_target(make_tiny, make_byol):
    model = make_byol(make_tiny())
    model.target.head.bias.requires_grad_(True)
    assert "target" not in find_targets(model)


def test_a_frozen_module_of_other_shapes_is_no_target():
    assert find_targets(nn.ModuleDict({"teacher": nn.Linear(3, 3).requires_grad_(False), "student": nn.Linear(3, 4)})) == {}


@pytest.mark.parametrize("frozen", ["layers.0", "layers.1", "layers.0.up"])
def test_a_layer_that_the_user_froze_is_no_copy_of_the_next_one(make_tiny, frozen):
    model = make_tiny()
    model.get_submodule(frozen).requires_grad_(False)
    assert find_targets(model) == {}


def test_a_frozen_norm_is_no_copy_of_the_other_norm(make_vit):
    model = make_vit()
    for block in model.blocks:
        block.norm1.requires_grad_(False)
    assert find_targets(model) == {}


def test_frozen_residual_blocks_are_no_copies_of_their_neighbours(make_resnet):
    model = make_resnet()
    for frozen in (model.conv1, model.bn1, model.layer1[0], model.layer3[1]):
        frozen.requires_grad_(False)
    assert find_targets(model) == {}


def test_following_copies_parameters_and_buffers():
    model = LightlyByol()
    with torch.no_grad():
        for value in [*model.backbone.parameters(), *model.projection_head.parameters()]:
            value.add_(1)
    model.backbone[1].running_mean.fill_(3.0)
    model.backbone[1].num_batches_tracked.fill_(9)
    follow(model, find_targets(model))
    for online, target in ((model.backbone, model.backbone_momentum), (model.projection_head, model.projection_head_momentum)):
        for name, value in online.state_dict().items():
            assert torch.equal(value, target.state_dict()[name]), name
    assert not any(p.requires_grad for p in model.backbone_momentum.parameters())


def test_copying_a_bare_parameter_keeps_the_object():
    source, destination = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2), requires_grad=False)
    copy_member(source, destination)
    assert destination.tolist() == [1.0, 1.0]
    assert not destination.requires_grad
