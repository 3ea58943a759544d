"""Blocks are found by path, pattern or family, in forward order, with their stem; mistakes are answered by what there is."""

import pytest
from torch import nn

from featherlight.plugins import Clock, LayerFreezing, find_blocks

STEM = ("cls_token", "pos_embed", "embed")


class Trainee(nn.Module):
    """As a LightningModule: something of its own registered before the backbone, heads behind."""

    def __init__(self, backbone):
        super().__init__()
        self.criterion = nn.Linear(2, 2)
        self.backbone = backbone
        self.head = nn.Linear(8, 3)


# -- patterns ---------------------------------------------------------------------------------------------------------
def test_a_star_stands_within_one_component(make_resnet):
    model = Trainee(make_resnet())
    groups = find_blocks(model, "backbone.layer*")
    residual = find_blocks(model, "backbone.layer*.*")
    assert groups.paths == tuple(f"backbone.layer{group}" for group in (1, 2, 3, 4))
    assert residual.paths == tuple(f"backbone.layer{group}.{block}" for group in (1, 2, 3, 4) for block in (0, 1))
    assert all(model.get_submodule(path) is block for path, block in zip(residual.paths, residual.blocks))


def test_lists_keep_the_order_given_and_may_mix_paths_and_patterns(make_tiny):
    assert find_blocks(make_tiny(3), ["layers.2", "layers.*"]).paths == ("layers.2", "layers.0", "layers.1")


def test_more_than_ten_blocks_stay_in_forward_order(make_tiny):
    assert find_blocks(make_tiny(12), "layers.*").paths == tuple(f"layers.{index}" for index in range(12))


def test_ranges_of_characters_work_as_in_a_shell(make_resnet):
    assert find_blocks(make_resnet(), "layer[34]").paths == ("layer3", "layer4")


# -- families ---------------------------------------------------------------------------------------------------------
def test_auto_knows_torchvision_resnet(make_resnet):
    tower = find_blocks(Trainee(make_resnet()))
    assert tower.paths == tuple(f"backbone.layer{group}" for group in (1, 2, 3, 4))
    assert tower.stem == ("backbone.conv1", "backbone.bn1", "backbone.relu", "backbone.maxpool")


def test_auto_knows_torchvision_vit():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(image_size=8, patch_size=4, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32)
    tower = find_blocks(Trainee(model))
    assert tower.paths == tuple(f"backbone.encoder.layers.encoder_layer_{index}" for index in range(3))
    # class token 16, positions 5·16, projection 16·3·4·4 + 16: they lie in two modules
    assert sum(p.numel() for p in tower.stem_parameters()) == 16 + 80 + 784
    assert {"backbone.class_token", "backbone.encoder.pos_embedding", "backbone.conv_proj"} == set(tower.stem)


def test_auto_knows_timm_resnet():
    from timm.models.resnet import BasicBlock, ResNet

    tower = find_blocks(ResNet(BasicBlock, (1, 1, 1, 1), channels=(4, 4, 8, 8), num_classes=2))
    assert tower.paths == ("layer1", "layer2", "layer3", "layer4")
    assert {"conv1", "bn1"} <= set(tower.stem)
    assert not {"fc", "global_pool"} & set(tower.stem)


def test_auto_knows_timm_vit(make_vit):
    tower = find_blocks(make_vit(depth=3))
    assert tower.paths == ("blocks.0", "blocks.1", "blocks.2")
    assert sum(p.numel() for p in tower.stem_parameters()) == 368
    assert {"cls_token", "pos_embed", "patch_embed"} <= set(tower.stem)
    assert "norm" not in tower.stem


def test_auto_takes_the_branch_that_trains_and_not_its_momentum_copy(make_vit):
    model = nn.ModuleDict({"momentum": make_vit(2).requires_grad_(False), "online": make_vit(2)})
    assert find_blocks(model).paths == ("online.blocks.0", "online.blocks.1")


def test_auto_does_not_guess(make_tiny):
    with pytest.raises(ValueError, match="does not know this Tiny") as error:
        find_blocks(make_tiny())
    for there in ("embed, layers, norm, head", "ResNet (torchvision, timm)", "VisionTransformer (timm)", "name its blocks"):
        assert there in str(error.value)


# -- stems ------------------------------------------------------------------------------------------------------------
def test_stem_is_the_parameters_and_modules_before_the_first_block(make_tiny):
    tower = find_blocks(make_tiny(), "layers.*")
    assert tower.stem == STEM
    assert sum(p.numel() for p in tower.stem_parameters()) == 80
    assert [type(module) for module in tower.stem_modules()] == [nn.Linear]


def test_what_a_lightning_module_registers_before_its_backbone_is_no_stem(make_tiny):
    assert find_blocks(Trainee(make_tiny()), "backbone.layers.*").stem == tuple(f"backbone.{name}" for name in STEM)


def test_a_sequential_backbone_of_resnet_children(make_resnet):
    backbone = nn.Sequential(*list(make_resnet().children())[:-1])  # conv1 bn1 relu maxpool | layer1..4 | avgpool
    tower = find_blocks(Trainee(backbone), [f"backbone.{index}" for index in (4, 5, 6, 7)])
    assert tower.stem == tuple(f"backbone.{index}" for index in range(4))
    assert sum(p.numel() for p in tower.stem_parameters()) == 3 * 64 * 9 + 2 * 64


def test_blocks_from_the_middle_have_what_is_before_them_as_stem(make_resnet):
    assert find_blocks(make_resnet(), "layer[34]").stem == ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2")


def test_residual_blocks_have_the_stem_of_their_groups(make_resnet):
    model = make_resnet()
    assert find_blocks(model, "layer*.*").stem == find_blocks(model, "layer*").stem == ("conv1", "bn1", "relu", "maxpool")


def test_a_stem_can_be_named(make_tiny):
    tower = find_blocks(make_tiny(), "layers.*", stem=["embed", "pos_embed"])
    assert tower.stem == ("embed", "pos_embed")
    assert sum(p.numel() for p in tower.stem_parameters()) == 32 + 40
    assert find_blocks(make_tiny(), "layers.*", stem=[]).stem == ()


def test_a_named_stem_replaces_the_known_one(make_vit):
    assert find_blocks(make_vit(), stem=["patch_embed"]).stem == ("patch_embed",)


# -- mistakes ---------------------------------------------------------------------------------------------------------
def message(model, *arguments, **named):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the caller compares the whole message)
        find_blocks(model, *arguments, **named)
    return str(error.value)


def test_an_unknown_block_is_answered_by_what_there_is(make_resnet):
    there = "conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4, avgpool, fc"
    model = Trainee(make_resnet())
    assert message(model.backbone, ["layer1", "layer5"]) == f'block "layer5" not found; this ResNet has: {there}'
    assert message(model, "backbone.layr*") == f'block "backbone.layr*" not found; this Trainee has inside "backbone": {there}'
    assert message(model.backbone, "layer1.2") == 'block "layer1.2" not found; this ResNet has inside "layer1": 0, 1'
    assert message(model, "head.deeper") == 'block "head.deeper" not found; this Trainee has inside "head": no modules'


def test_an_unknown_stem_is_answered_by_what_there_is(make_tiny):
    assert message(make_tiny(), "layers.*", stem=["embedding"]).startswith('stem "embedding" not found; this Tiny has: embed, layers')


def test_a_stem_that_is_no_module_and_no_parameter_is_refused(make_tiny):
    model = make_tiny()
    model.width = 8
    model.register_buffer("mean", nn.Parameter(model.pos_embed.detach().clone()).data)
    for name in ("width", "mean"):
        assert f'stem "{name}"' in message(model, "layers.*", stem=[name])


def test_nested_blocks_are_refused(make_resnet):
    said = message(make_resnet(), ["layer1", "layer2", "layer2.0"])
    assert said.startswith('block "layer2.0" lies inside another block; blocks must stand one after the other: ')
    assert said.endswith("layer1, layer2, layer2.0")


def test_a_prefix_of_a_name_is_no_parent(make_tiny):
    assert len(find_blocks(make_tiny(12), ["layers.1", "layers.10", "layers.11"]).paths) == 3


def test_the_same_block_twice_is_called_that(make_tiny):
    assert "twice" in message(make_tiny(), ["layers.0", "layers.0"])


def test_no_blocks_at_all(make_tiny):
    assert message(make_tiny(), []).startswith("blocks is empty; name module paths or a pattern")


# -- twins ------------------------------------------------------------------------------------------------------------
def test_a_tower_moves_into_a_twin(make_tiny, make_byol):
    model = make_byol(make_tiny(2))
    moved = find_blocks(model, "encoder.layers.*").moved("encoder", "target")
    assert moved.paths == ("target.layers.0", "target.layers.1")
    assert moved.stem == tuple(f"target.{name}" for name in STEM)
    assert moved.blocks == (model.target.layers[0], model.target.layers[1])


def test_a_tower_outside_the_online_branch_does_not_move(make_tiny, make_byol):
    assert find_blocks(make_byol(make_tiny(2)), "encoder.layers.*").moved("predictor", "target") is None
    assert find_blocks(make_byol(make_tiny(2)), "encoder.layers.*").moved("enc", "target") is None


def test_enclosing_modules_come_innermost_first(make_resnet):
    model = Trainee(make_resnet())
    inner = model.backbone.layer1
    assert find_blocks(model, "backbone.layer*.*").enclosing(1) == [inner[1], inner, model.backbone]


def test_a_tail_registered_before_the_blocks_is_named_out_of_the_stem() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    assert find_blocks(Early(), "layers.*").stem == ("embed", "head")
    assert find_blocks(Early(), "layers.*", tail=["head"]).stem == ("embed",)
    with pytest.raises(ValueError, match='"head" is named as stem and as tail'):
        find_blocks(Early(), "layers.*", stem=["embed", "head"], tail=["head"])
    with pytest.raises(ValueError, match="heat"):
        find_blocks(Early(), "layers.*", tail=["heat"])


def test_a_named_tail_trains_in_every_stage() -> None:
    model = nn.ModuleDict({"embed": nn.Linear(4, 4), "head": nn.Linear(4, 2), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    plugin = LayerFreezing(["a", "b"], tail=["head"])
    plugin.attach(model)
    plugin.advance(Clock(1))
    assert [model[name].weight.requires_grad for name in ("embed", "head", "a", "b")] == [False, True, False, True]
