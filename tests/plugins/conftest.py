"""Small models whose parameters can be counted by hand, and what the tests of plugins ask of a model."""

import copy

import pytest
import torch
from torch import nn

WIDTH, CLASSES = 8, 3


class MlpBlock(nn.Module):
    """x + down(relu(up(norm(x)))) with dropout: 16 + 144 + 136 = 296 parameters at width 8."""

    def __init__(self, width=WIDTH, hidden=16, dropout=0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(self.dropout(torch.relu(self.up(self.norm(x)))))


class Tiny(nn.Module):
    """A hand-written transformer without attention: (N, 4, 3) to (N, 3).

    embed 3·8 + 8 = 32, cls_token 8, pos_embed 5·8 = 40: a stem of 80; blocks of 296; norm 16 and head 8·3 + 3 = 27: a tail of 43.
    """

    def __init__(self, depth=4, dropout=0.0):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.embed = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(MlpBlock(dropout=dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def stem(self, x):
        return torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x)], 1) + self.pos_embed

    def tail(self, x):
        return self.head(self.norm(x)[:, 0])

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.tail(x)


class Byol(nn.Module):
    """Online encoder with a predictor, and a momentum copy of the encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.predictor = nn.Linear(CLASSES, CLASSES)
        self.target = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, x):
        online = self.predictor(self.encoder(x))
        with torch.no_grad():
            target = self.target(x)
        return online - target

    def follow(self, momentum=0.9):
        with torch.no_grad():
            for target, online in zip(self.target.parameters(), self.encoder.parameters()):
                target.lerp_(online, 1 - momentum)


@pytest.fixture
def make_tiny():
    def make(depth=4, dropout=0.0, seed=0):
        torch.manual_seed(seed)
        return Tiny(depth, dropout)

    return make


@pytest.fixture
def make_byol():
    def make(encoder, seed=1):
        torch.manual_seed(seed)
        return Byol(encoder)

    return make


@pytest.fixture
def make_vit():
    """A vision transformer of timm: width d = 16, so 12·d² + 13·d = 3,280 parameters a block.

    patch_embed 16·1·4·4 + 16 = 272, class token 16, positions 5·16 = 80: a stem of 368; final norm 32.
    """
    from timm.models.vision_transformer import VisionTransformer

    def make(depth=4, seed=0, classes=0):
        torch.manual_seed(seed)
        return VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=classes, embed_dim=16, depth=depth, num_heads=2)

    return make


@pytest.fixture
def make_resnet():
    """torchvision's ResNet-18 with a CIFAR stem: 3×3, stride 1, no pooling."""
    from torchvision.models import resnet18

    def make(seed=0, classes=3):
        torch.manual_seed(seed)
        model = resnet18(num_classes=classes)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model

    return make


@pytest.fixture
def make_small_resnet():
    """The same, an eighth as wide: 8, 16, 32 and 64 channels."""
    from torchvision.models.resnet import BasicBlock, ResNet

    class Narrow(ResNet):
        def _make_layer(self, block, planes, *arguments, **named):
            self.inplanes = self.inplanes if planes > 64 else 8
            return super()._make_layer(block, planes // 8, *arguments, **named)

    def make(seed=0, classes=3):
        torch.manual_seed(seed)
        model = Narrow(BasicBlock, [2, 2, 2, 2])
        model.conv1, model.bn1, model.maxpool = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Identity()
        model.fc = nn.Linear(64, classes)
        return model

    return make


@pytest.fixture
def images():
    """Inputs of the models above, by a seed of their own."""
    random = torch.Generator().manual_seed(7)
    return {
        "tiny": torch.randn(4, 4, 3, generator=random),
        "vit": torch.randn(4, 1, 8, 8, generator=random),
        "resnet": torch.randn(4, 3, 16, 16, generator=random),
    }


@pytest.fixture
def training():
    """Names of the parameters that require grad."""
    return lambda model: {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def snapshot():
    """A copy of a model's state_dict."""
    return lambda model: {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def moved():
    """Names of the entries that differ, bit for bit."""

    def names(before, model):
        return {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}

    return names


@pytest.fixture
def below():
    """Those of ``names`` that lie at or below one of ``paths``."""

    def select(names, *paths):
        return {name for name in names if any(name == path or name.startswith(f"{path}.") for path in paths)}

    return select


@pytest.fixture
def take_step():
    """One training step as a host takes it, the model put in training mode first as a Trainer does."""

    def step(model, plugin, clock, optimizer, x):
        model.train()
        plugin.before_forward(clock)
        out = model(x)
        optimizer.zero_grad()
        (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape)).sum().backward()
        plugin.after_backward(clock)
        optimizer.step()
        plugin.after_update(clock)
        plugin.after_step(clock)
        if hasattr(model, "follow"):
            model.follow()

    return step
