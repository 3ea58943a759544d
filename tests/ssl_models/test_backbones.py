"""Backbones: shapes, named blocks, parameters counted by hand, and errors that say what there is."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from featherlight.ssl_models import make_backbone
from featherlight.ssl_models.backbones import BACKBONES


def parameters(*modules: nn.Module | nn.Parameter) -> int:
    return sum(
        parameter.numel() for module in modules for parameter in (module.parameters() if isinstance(module, nn.Module) else [module])
    )


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("image_size", "in_channels"), [(32, 3), (8, 1)])
def test_images_of_any_size_become_one_feature_vector_each(name: str, image_size: int, in_channels: int) -> None:
    backbone = make_backbone(name, image_size, in_channels)
    features = backbone(torch.randn(2, in_channels, image_size, image_size))
    assert features.shape == (2, backbone.feature_dim)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_vit_tiny_has_the_parameters_of_the_paper() -> None:
    vit = make_backbone("vit_tiny")
    width, hidden, patch, tokens = 192, 768, 4 * 4 * 3, 64 + 1
    norm = 2 * width
    block = 2 * norm + (width * 3 * width + 3 * width) + (width * width + width)
    block += (width * hidden + hidden) + (hidden * width + width)
    assert [parameters(block) for block in vit.blocks] == [block] * 12 == [444_864] * 12
    embeddings = parameters(vit.patch_embed, vit.cls_token, vit.pos_embed)
    assert embeddings == patch * width + width + width + tokens * width == 22_080
    assert parameters(vit.norm) == norm == 384
    assert parameters(vit) == 12 * block + embeddings + norm
    assert {module.eps for module in vit.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_vit_features_are_the_normed_class_token_or_the_mean_of_the_others(pool: str) -> None:
    vit = make_backbone("vit_tiny", depth=2, pool=pool).eval()
    assert parameters(vit) == 2 * 444_864 + 22_080 + 384
    images = torch.randn(2, 3, 32, 32)
    tokens = vit.patch_embed(images)
    tokens = torch.cat([vit.cls_token.expand(2, -1, -1), tokens], 1) + vit.pos_embed
    tokens = vit.norm(vit.blocks(tokens))
    torch.testing.assert_close(vit(images), tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(1))


def test_resnet18_for_small_images_differs_from_the_large_one_in_its_stem_and_classifier() -> None:
    resnet = make_backbone("resnet18_cifar")
    published, classifier, stem7, stem3 = 11_689_512, 513_000, 64 * 3 * 49, 64 * 3 * 9
    assert parameters(resnet) == published - classifier - stem7 + stem3
    assert [name for name, _ in resnet.named_children() if name.startswith("layer")] == [f"layer{i}" for i in (1, 2, 3, 4)]
    maps: list[torch.Size] = []
    resnet.layer1.register_forward_hook(lambda module, args, out: maps.append(out.shape))
    resnet(torch.randn(2, 3, 32, 32))
    assert maps == [(2, 64, 32, 32)]  # the stem keeps the resolution


def test_vgg11_with_its_fully_connected_layers_is_the_network_of_ecofed() -> None:
    vgg = make_backbone("vgg11", fully_connected=True)
    widths = (3, 64, 128, 256, 256, 512, 512, 512, 512)
    by_block = [9 * a * b + b + 2 * b for a, b in pairwise(widths)]
    assert [parameters(block) for block in vgg.blocks] == by_block
    assert sum(by_block[:2]) == 76_032  # EcoFed's device part
    classifier = 512 * 2 * 2 * 4096 + 4096 + 4096 * 4096 + 4096
    with_head = sum(by_block) + classifier + 4096 * 10 + 10
    assert parameters(vgg) == sum(by_block) + classifier
    assert round(with_head / 1e6, 1) == 34.4
    assert vgg.blocks[:2](torch.randn(1, 3, 32, 32)).shape == (1, 128, 8, 8)  # its activation
    assert vgg(torch.randn(1, 3, 32, 32)).shape == (1, 4096)


def test_resnet9_counts() -> None:
    resnet = make_backbone("resnet9")
    convolutions = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    assert parameters(resnet) == sum(9 * a * b + 2 * b for a, b in convolutions)


def test_resnet9_narrower_and_with_group_norm() -> None:
    """A quarter of the width; 16 channels a group, and no running statistics."""
    resnet = make_backbone("resnet9", width=16, norm="group")
    convolutions = [(3, 16), (16, 32), (32, 32), (32, 32), (32, 64), (64, 128), (128, 128), (128, 128)]
    assert parameters(resnet) == sum(9 * a * b + 2 * b for a, b in convolutions)
    groups = [(module.num_groups, module.num_channels) for module in resnet.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert groups == [(width // 16, width) for _, width in convolutions]
    assert not list(resnet.buffers())
    assert resnet(torch.randn(2, 3, 16, 16)).shape == (2, resnet.feature_dim) == (2, 128)


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("timm/resnet10t", 512),
        ("timm/vit_tiny_patch16_224", 192),
        ("timm/mobilenetv3_small_050", 1024),
        ("torchvision/resnet18", 512),
        ("torchvision/mobilenet_v3_small", 1024),
        ("torchvision/shufflenet_v2_x0_5", 1024),
    ],
)
def test_any_model_of_timm_and_torchvision(name: str, dim: int) -> None:
    backbone = make_backbone(name, image_size=48, in_channels=2).eval()
    assert backbone.feature_dim == dim
    assert backbone(torch.randn(1, 2, 48, 48)).shape == (1, dim)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"name": "resnet18_cifer"},
            'resnet18_cifar, resnet9, resnet9_basic, vgg11, vit, vit_tiny, and any timm/NAME.*Did you mean "resnet18_cifar"',
        ),
        ({"name": "timm/resnet1"}, "timm has no model.*did you mean resnet"),
        ({"name": "torchvision/resnet"}, "torchvision has no model.*did you mean resnet"),
        ({"name": "torchvision/squeezenet1_0"}, "does not end in a linear classifier"),
        ({"name": "torchvision/resnet18", "pretrained": True, "in_channels": 1}, "take 3 channels, not 1"),
        ({"name": "vit", "detph": 3}, '"vit" has no option "detph"; it takes depth, width, heads, patch_size, mlp_ratio, pool'),
        ({"name": "resnet9", "depth": 3}, "it takes width, norm"),
        ({"name": "resnet9", "norm": "layer"}, 'norm "layer" not found; there are batch, group'),
        ({"name": "vit", "image_size": 30}, "30 is not a multiple of patch_size 4"),
        ({"name": "vit", "width": 100}, "100 is not a multiple of heads 3"),
        ({"name": "vit", "pretrained": True}, "no pretrained weights"),
    ],
)
def test_errors_say_what_there_is(arguments: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_backbone(**arguments)


def test_a_wrong_option_of_a_library_model_is_not_hidden() -> None:
    with pytest.raises(TypeError, match="detph"):
        make_backbone("timm/resnet10t", detph=3)
