"""Backbones as named blocks: images in, one pooled feature vector per image out.

:func:`make_backbone` builds any of them by name. What a block is called matters: methods select blocks by path, such as
``backbone.layer*`` of a ResNet or ``backbone.blocks.*`` of a vision transformer.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn


def make_backbone(name: str, image_size: int = 32, in_channels: int = 3, pretrained: bool = False, **options: Any) -> nn.Module:
    """A backbone by name, its classifier removed: ``(N, C, H, W)`` to ``(N, feature_dim)``.

    Args:
        name: one of :data:`BACKBONES`, ``timm/NAME`` or ``torchvision/NAME``.
        image_size: height and width in pixels. Only transformers depend on it.
        in_channels: channels of an image.
        pretrained: load the weights that timm or torchvision publish.
        options: passed on to the builder, for example ``depth=4, width=64, heads=4`` of ``vit``.

    Returns:
        A module with the attribute ``feature_dim``.

    Raises:
        ValueError: no such backbone, no such option, or sizes that do not fit together.

    Example:
        >>> import torch
        >>> make_backbone("vit", image_size=8, in_channels=1, depth=2, width=32, heads=2, patch_size=2)(
        ...     torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 32])
    """
    library, _, model = name.partition("/")
    if model and library in LIBRARIES:
        return LIBRARIES[library](model, image_size, in_channels, pretrained, **options)
    if name not in BACKBONES:
        near = difflib.get_close_matches(name, BACKBONES, 1)
        raise ValueError(
            f'backbone "{name}" not found; there are {", ".join(BACKBONES)}, and any timm/NAME or torchvision/NAME'
            + (f'. Did you mean "{near[0]}"?' if near else "")
        )
    if pretrained:
        raise ValueError(f'backbone "{name}" has no pretrained weights; timm/NAME and torchvision/NAME have')
    builder = BACKBONES[name]
    allowed = [option for option in inspect.signature(builder).parameters if option not in ("image_size", "in_channels")]
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise ValueError(f'backbone "{name}" has no option "{unknown[0]}"; it takes {", ".join(allowed) if allowed else "none"}')
    return builder(image_size=image_size, in_channels=in_channels, **options)


def fixed_size(backbone: nn.Module) -> tuple[int, int] | None:
    """(H, W) of the only images that ``backbone`` takes; None where it takes others, too, as convolutional networks do."""
    for module in backbone.modules():
        if getattr(module, "strict_img_size", False):  # timm's
            height, width = module.img_size  # type: ignore[misc]
            return int(height), int(width)
    side = getattr(backbone, "image_size", None)  # torchvision's VisionTransformer
    return (side, side) if isinstance(side, int) else None


# -- vision transformers --------------------------------------------------------------------------------------------
class Apart(nn.Module):
    """Copies what is a part of a larger tensor, so that whoever keeps it for backward does not keep all of that."""

    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous()


def _with_own_token(model: nn.Module) -> nn.Module:
    """A class token is a view of all tokens: a copy of it is all that heads need."""
    if isinstance(getattr(model, "head", None), nn.Identity):
        model.head = Apart()
    return model


def vit(
    image_size: int,
    in_channels: int,
    depth: int = 6,
    width: int = 96,
    heads: int = 3,
    patch_size: int = 4,
    mlp_ratio: float = 4.0,
    pool: Literal["token", "mean"] = "token",
) -> nn.Module:
    """A vision transformer (arXiv 2010.11929) with a class token: ``blocks.0`` … ``blocks.{depth-1}``, then ``norm``.

    Features are the class token behind ``norm``, or with ``pool="mean"`` the mean of the other tokens; the parameters are the same.
    """
    from timm.models.vision_transformer import VisionTransformer

    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}: change one of them")
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}: change one of them")
    if pool not in ("token", "mean"):
        raise ValueError(f'pool "{pool}" not found; there are token, mean')
    model = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_channels,
        num_classes=0,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        global_pool="avg" if pool == "mean" else "token",
        fc_norm=False,  # one norm, in front of the pooling, either way
    )
    return _with_feature_dim(_with_own_token(model), width)


def vit_tiny(
    image_size: int,
    in_channels: int,
    depth: int = 12,
    width: int = 192,
    heads: int = 3,
    patch_size: int = 4,
    mlp_ratio: float = 4.0,
    pool: Literal["token", "mean"] = "token",
) -> nn.Module:
    """ViT-Tiny/4 as LW-FedSSL trains it (arXiv 2401.11647): 12 blocks of 444,864 parameters, 65 tokens at 32 px."""
    return vit(image_size, in_channels, depth, width, heads, patch_size, mlp_ratio, pool)


# -- convolutional networks -----------------------------------------------------------------------------------------
def resnet18_cifar(image_size: int, in_channels: int, width: int = 64, norm: Literal["batch", "group"] = "batch") -> nn.Module:
    """ResNet-18 for small images: a 3×3 stem of stride 1 without pooling (arXiv 2002.05709, B.9); ``layer1`` … ``layer4``.

    Args:
        width: channels of the stem and of ``layer1``; each later layer has twice as many as the one before.
        norm: batch norm, or group norm over 16 channels at a time (arXiv 1803.08494).
    """
    from torchvision.models.resnet import BasicBlock, ResNet

    normalise = _norm(norm)

    class Wide(ResNet):
        """torchvision fixes 64 channels where it builds its layers."""

        def _make_layer(self, block: Any, planes: int, *arguments: Any, **named: Any) -> nn.Sequential:
            if planes == 64:  # what the first layer takes in, set by torchvision just before
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *arguments, **named)

    model: nn.Module = Wide(BasicBlock, [2, 2, 2, 2], norm_layer=normalise)
    model.__class__ = ResNet
    model.conv1 = nn.Conv2d(in_channels, width, 3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision initialises its stem
    model.bn1 = normalise(width)
    model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    return _with_feature_dim(model, 8 * width)


def _norm(name: str) -> Callable[[int], nn.Module]:
    if name not in NORMS:
        raise ValueError(f'norm "{name}" not found; there are {", ".join(NORMS)}')
    return NORMS[name]


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // 16), channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm2d, "group": _group_norm}


class ConvBlock(nn.Sequential):
    """Convolution 3×3, norm, ReLU, and a 2×2 maximum where ``pool``: ``(N, C, H, W)`` to ``(N, width, …)``."""

    def __init__(self, in_channels: int, width: int, pool: bool = False, bias: bool = False, norm: str = "batch") -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=bias)
        self.norm = _norm(norm)(width)
        self.act = nn.ReLU(inplace=True)
        # An image that has shrunk to one pixel stays as it is: any image size works.
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if pool else nn.Identity()


class Residual(nn.Module):
    """``x + g(x)`` with g two convolution blocks: shape-preserving, so it can be left out."""

    def __init__(self, width: int, norm: str = "batch") -> None:
        super().__init__()
        self.conv1 = ConvBlock(width, width, norm=norm)
        self.conv2 = ConvBlock(width, width, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x))


class ResNet9(nn.Module):
    """The small residual network of the federated papers (FetchSGD, arXiv 2007.07682): ``stem``, ``layer1`` … ``layer3``.

    Args:
        image_size: not used: every size works.
        in_channels: channels of an image.
        width: channels of the stem; each layer has twice as many as the one before. At 64 there are 6.6 M parameters.
        norm: batch norm, or group norm over 16 channels at a time (arXiv 1803.08494).
    """

    def __init__(self, image_size: int, in_channels: int, width: int = 64, norm: Literal["batch", "group"] = "batch") -> None:
        super().__init__()
        self.feature_dim = 8 * width
        self.stem = ConvBlock(in_channels, width, norm=norm)
        self.layer1 = nn.Sequential()
        self.layer1.conv = ConvBlock(width, 2 * width, pool=True, norm=norm)
        self.layer1.residual = Residual(2 * width, norm)
        self.layer2 = nn.Sequential()
        self.layer2.conv = ConvBlock(2 * width, 4 * width, pool=True, norm=norm)
        self.layer3 = nn.Sequential()
        self.layer3.conv = ConvBlock(4 * width, 8 * width, pool=True, norm=norm)
        self.layer3.residual = Residual(8 * width, norm)
        self.pool = nn.AdaptiveMaxPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.layer3(self.layer2(self.layer1(self.stem(x))))).flatten(1)


class ResNet9Basic(nn.Module):
    """Nine layers of convolutions and one linear head: two convolutions, then three basic residual blocks, ``blocks.0`` … ``blocks.4``.

    With a linear layer for 10 classes it has 9.39 M parameters, 76,032 of them in the two convolutions, which put out 128×8×8 for images of
    32 px: the sizes of EcoFed's ResNet9 (arXiv 2304.05495), of which the paper prints no more.
    """

    feature_dim = 512

    def __init__(self, image_size: int, in_channels: int) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        def block(inputs: int, width: int, stride: int) -> nn.Module:
            shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)) if inputs != width else None
            return BasicBlock(inputs, width, stride, shortcut)

        stem = ConvBlock(in_channels, 64, pool=True, bias=True), ConvBlock(64, 128, pool=True, bias=True)
        self.blocks = nn.Sequential(*stem, block(128, 256, 2), block(256, 512, 2), block(512, 512, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.blocks(x)).flatten(1)


class VGG11(nn.Module):
    """VGG-11 (arXiv 1409.1556) with batch norm: ``blocks.0`` … ``blocks.7``, one convolution each.

    Args:
        image_size: not used: every size works.
        in_channels: channels of an image.
        fully_connected: keep the two hidden layers of 4,096 of the classifier, on 512×2×2. With a linear layer for 10
            classes this is the network of 34.4 M parameters that EcoFed trains.
        width: channels of the first convolution; the others have up to eight times as many.
    """

    def __init__(self, image_size: int, in_channels: int, fully_connected: bool = False, width: int = 64) -> None:
        super().__init__()
        widths = tuple(times * width for times in (1, 2, 4, 4, 8, 8, 8, 8))
        pooled = (True, True, False, True, False, True, False, False)
        inputs = (in_channels, *widths[:-1])
        self.blocks = nn.Sequential(*(ConvBlock(*layer, bias=True) for layer in zip(inputs, widths, pooled)))
        self.pool = nn.AdaptiveAvgPool2d(2 if fully_connected else 1)
        self.fc = nn.Sequential()
        self.feature_dim = 8 * width
        if fully_connected:
            self.fc = nn.Sequential(nn.Linear(32 * width, 4096), nn.ReLU(True), nn.Linear(4096, 4096), nn.ReLU(True))
            self.feature_dim = 4096

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(x)).flatten(1))


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18_cifar": resnet18_cifar,
    "resnet9": ResNet9,
    "resnet9_basic": ResNet9Basic,
    "vgg11": VGG11,
    "vit": vit,
    "vit_tiny": vit_tiny,
}


# -- any model of two libraries -------------------------------------------------------------------------------------
def from_timm(name: str, image_size: int, in_channels: int, pretrained: bool, **options: Any) -> nn.Module:
    """A timm model without its classifier. ``image_size`` reaches the models that take one."""
    import timm

    if not timm.is_model(name.partition(".")[0]):
        raise _not_found("timm", name, timm.list_models())
    options = {"num_classes": 0, "in_chans": in_channels, **options}
    try:
        model = timm.create_model(name, pretrained, img_size=image_size, **options)
    except TypeError:  # convolutional networks take images of any size, and refuse the argument
        model = timm.create_model(name, pretrained, **options)
    return _with_feature_dim(_with_own_token(model), getattr(model, "head_hidden_size", None) or model.num_features)


def from_torchvision(name: str, image_size: int, in_channels: int, pretrained: bool, **options: Any) -> nn.Module:
    """A torchvision classification model without its last linear layer."""
    from torchvision import models

    if name not in models.list_models(module=models):
        raise _not_found("torchvision", name, models.list_models(module=models))
    if pretrained and in_channels != 3:
        raise ValueError(f"the weights of torchvision/{name} take 3 channels, not {in_channels}; timm/NAME adapts its own")
    if "image_size" in inspect.signature(models.VisionTransformer).parameters and name.startswith("vit"):
        options = {"image_size": image_size, **options}
    model = models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].partition(".")[0] not in ("fc", "classifier", "head", "heads"):
        raise ValueError(f"torchvision/{name} does not end in a linear classifier; choose another model")
    feature_dim = model.get_submodule(linear[-1]).in_features
    model.set_submodule(linear[-1], nn.Identity())
    if in_channels != 3:
        path, stem = next((path, module) for path, module in model.named_modules() if isinstance(module, nn.Conv2d))
        model.set_submodule(path, _with_channels(stem, in_channels))
    return _with_feature_dim(model, feature_dim)


LIBRARIES: dict[str, Callable[..., nn.Module]] = {"timm": from_timm, "torchvision": from_torchvision}


def _with_feature_dim(model: nn.Module, feature_dim: Any) -> nn.Module:
    model.feature_dim = feature_dim
    return model


def _with_channels(conv: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
    )


def _not_found(library: str, name: str, known: list[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, 3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"{library}.list_models() lists all {len(known)}"
    return ValueError(f'{library} has no model "{name}"; {hint}')
