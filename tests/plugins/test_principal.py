"""Which layers are taken apart and how large what is left is: by hand, by fractions, and by the method's table of costs."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from featherlight.plugins.principal import Layer, find_layers, shrink
from featherlight.plugins.sampled_layers import sampled_layers, sampled_norms
from featherlight.plugins.targets import find_targets, follow


def auto(model, attention=False, rows=True):
    return find_layers(model, "auto", attention, rows, {})


def tree(*paths, linear=None):
    """A module with linear layers at ``paths``; blocks are numbered members of a Sequential, and there are two."""
    root = nn.Module()
    paths = [path.replace("0", str(block), 1) for block in (0, 1) for path in paths if block == 0 or "0" in path]
    for path in paths:
        *parents, name = path.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Sequential() if parent in ("h", "layer", "layers") else nn.Module())
            module = module.get_submodule(parent)
        module.add_module(name, (linear or nn.Linear)(4, 4))
    return root


# -- which ------------------------------------------------------------------------------------------------------------
def test_of_a_resnet_every_3x3_convolution_but_the_stem(make_resnet):
    model = make_resnet()
    assert set(auto(model)) == {f"layer{s}.{b}.conv{c}" for s in (1, 2, 3, 4) for b in (0, 1) for c in (1, 2)}
    for path, layer in auto(model).items():
        outputs = 64 * 2 ** (int(path[5]) - 1)
        assert layer == Layer(path, path.replace("conv", "bn"), outputs, outputs, True)


def test_of_torchvision_s_own_resnet_the_same():
    from torchvision.models import resnet18

    with torch.device("meta"):
        model = resnet18()
    whole = {path for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)} - set(auto(model))
    assert whole == {"conv1", "fc", *(f"layer{stage}.0.downsample.0" for stage in (2, 3, 4))}  # stem, head, 1 × 1


def test_of_a_vision_transformer_the_mlps_and_if_asked_attention(make_vit):
    model = make_vit(depth=2, classes=3)
    mlps = {f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("fc1", "fc2")}
    assert set(auto(model)) == mlps
    assert set(auto(model, attention=True)) == mlps | {f"blocks.{i}.attn.{name}" for i in (0, 1) for name in ("qkv", "proj")}
    layers = auto(model, attention=True)
    assert layers["blocks.0.mlp.fc1"] == Layer("blocks.0.mlp.fc1", None, 64, 16, True, given=True)
    assert layers["blocks.1.mlp.fc2"] == Layer("blocks.1.mlp.fc2", None, 16, 16, True, takes="blocks.1.mlp.fc1")
    assert layers["blocks.1.attn.qkv"] == Layer("blocks.1.attn.qkv", None, 48, 16, True)


@pytest.mark.parametrize(
    ("mlps", "attention", "whole"),
    [
        (["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"], [], ["lm_head"]),
        (
            ["layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj"],
            [f"layers.0.self_attn.{name}_proj" for name in "qkvo"],
            ["lm_head"],
        ),
        (["layers.0.feed_forward.w1", "layers.0.feed_forward.w2", "layers.0.feed_forward.w3"], [], ["output"]),
        (["encoder.layers.0.linear1", "encoder.layers.0.linear2"], ["encoder.layers.0.self_attn.out_proj"], ["head", "fc"]),
        (["encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_0.mlp.3"], [], ["heads.head"]),
        (["layer.0.ffn.lin1", "layer.0.ffn.lin2"], [f"layer.0.attention.{name}" for name in ("query", "key", "value")], ["classifier"]),
    ],
    ids=["gpt", "llama", "llama-original", "torch", "torchvision", "distilbert"],
)
def test_how_transformers_name_their_layers(mlps, attention, whole):
    model = tree(*mlps, *attention, *whole)
    mlps, attention = ({path.replace("0", block, 1) for path in paths for block in "01"} for paths in (mlps, attention))
    assert set(auto(model)) == mlps
    assert set(auto(model, attention=True)) == mlps | attention


class Mnist(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 16, 3)
        self.fc1, self.fc2 = nn.Linear(64, 32), nn.Linear(32, 10)


def classifier(**modules):
    """A network whose last layers are named as those of a transformer's MLP."""
    root = nn.Module()
    for name, module in modules.items():
        root.add_module(name, module)
    return root


def mlp(*names):
    return classifier(**{name: nn.Linear(16, 16) for name in names})


@pytest.mark.parametrize(
    ("model", "apart"),
    [
        (Mnist(), {"conv2", "fc1"}),
        (classifier(mlp=nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))), {"mlp.0"}),
        (nn.Sequential(nn.Conv2d(4, 8, 3), mlp("fc1", "fc2")), {"0", "1.fc1"}),
        (classifier(conv=nn.Conv2d(4, 8, 3), aux1=mlp("fc1", "fc2"), aux2=mlp("fc1", "fc2")), {"conv", "aux1.fc1", "aux2.fc1"}),
        (classifier(attn=mlp("qkv"), mlp=mlp("fc1", "fc2"), head=nn.Linear(16, 4)), {"mlp.fc1", "mlp.fc2"}),
        (classifier(blocks=nn.ModuleList([mlp("fc1", "fc2"), mlp("fc1", "fc2")])), {f"blocks.{i}.fc{j}" for i in (0, 1) for j in (1, 2)}),
    ],
    ids=["mnist", "mlp", "sequence", "auxiliary", "one block", "blocks"],
)
def test_classifiers_named_as_mlps_give_whole_answers(model, apart):
    assert set(auto(model)) == apart


def test_of_a_model_s_last_layer_all_rows_are_there():
    """By itself; who names it is told."""
    assert not auto(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)))["1"].samples_rows
    assert auto(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.Linear(4, 4)))["1"].samples_rows
    assert auto(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)))["1"].samples_rows
    with pytest.warns(
        UserWarning, match=r'layer "1" is the last of the model, .* is 0: .* leave it out of layers=\[\.\.\.\], or use rows=False'
    ):
        assert find_layers(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), "*", False, True, {})["1"].samples_rows


def test_stems_grouped_and_pointwise_convolutions_stay_whole():
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 1),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Conv2d(8, 8, (1, 3)),
        nn.Conv1d(8, 8, 3),
    )
    assert set(auto(model)) == {"4"}


def test_patterns_name_layers_pointwise_ones_too():
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 5))
    assert set(find_layers(model, ["0", "3"], False, True, {})) == {"0", "3"}
    assert set(find_layers(model, "*", False, True, {})) == {"0", "1", "3"}


# -- errors -----------------------------------------------------------------------------------------------------------
class Own(nn.Linear):
    pass


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Embedding(4, 6), nn.Linear(6, 4, bias=False)
        self.two.weight = self.one.weight


@pytest.mark.parametrize(
    ("model", "layers", "says"),
    [
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4)), ["0", "block*"], r'layer "block\*" not found; .* of this model are 0, 1'),
        (nn.Sequential(*(nn.Linear(2, 2) for _ in range(11))), ["a"], r"are 0, 1, 2, 3, 4, 5, 6, 7 and 3 more"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), ["0"], r'layer "0" cannot be taken apart: it convolves in 2 groups'),
        (nn.Sequential(Own(4, 4)), ["0"], r'layer "0" cannot be taken apart: it is a Own'),
        (nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4))), "0", r'layer "0" cannot be taken apart: its weight is made by a'),
        (Tied(), "two", r'layer "two" cannot be taken apart: its weight is another layer\'s, too'),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
            ["0"],
            r'layer "0" cannot be taken apart: it is a ParametrizedLinear|its weight is made by a parametrization',
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4)), "auto", r"nothing to take apart: .* layers=\[\.\.\.\]: 0, 1"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "auto", r"nothing to take apart"),
    ],
    ids=["pattern", "many", "groups", "subclass", "spectral", "tied", "parametrized", "nothing", "only-groups"],
)
def test_mistakes_are_answered(model, layers, says):
    with pytest.raises(ValueError, match=says):
        find_layers(model, layers, False, True, {})


# -- how much ---------------------------------------------------------------------------------------------------------
@given(st.integers(1, 1000), st.integers(1, 2000))
def test_a_share_is_rounded_up_and_never_by_a_rounding_error(thousandths, size):
    layer = Layer("", None, size, size, True)
    exact = math.ceil(Fraction(thousandths, 1000) * size)
    assert layer.kernels_at(thousandths / 1000) == layer.rows_at(thousandths / 1000) == exact


def test_shares_by_hand():
    layer = Layer("", None, 20, 10, True)
    assert layer.kernels_at(0.2) == 2
    assert layer.kernels_at(0.7) == 7  # 0.7 · 10 is 7.000000000000001 or so
    assert layer.kernels_at(0.21) == 3
    assert layer.rows_at(0.2) == 4
    assert layer._replace(samples_rows=False).rows_at(0.2) == 20


CNN_SHARES = {
    False: {0.1: 0.129, 0.2: 0.240, 0.4: 0.461, 0.8: 0.904, 1.0: 1.125},
    True: {0.1: 0.118, 0.2: 0.220, 0.4: 0.431, 0.8: 0.884, 1.0: 1.125},
}


@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("keep", [0.1, 0.2, 0.4, 0.8, 1.0])
def test_parameters_of_a_resnet_18_for_cifar(keep, rows):
    """Derived by hand of 11.17 million parameters: for each convolution r·I·k² + n·r, r = ⌈κR⌉, n = ⌈κO⌉ or O."""
    from torchvision.models import resnet18

    with torch.device("meta"):
        model = resnet18(num_classes=10)
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        small = shrink(model, auto(model, rows=rows), keep)
    whole = sum(value.numel() for value in model.parameters())
    assert whole == 11_173_962
    assert sum(value.numel() for value in small.parameters()) / whole == pytest.approx(CNN_SHARES[rows][keep], rel=0.01)
    count = whole
    for block, inputs, outputs in [
        (f"layer{stage}.{block}.conv{conv}", 64 * 2 ** (stage - 1 - (stage > 1 and block == 0 and conv == 1)), 64 * 2 ** (stage - 1))
        for stage in (1, 2, 3, 4)
        for block in (0, 1)
        for conv in (1, 2)
    ]:
        assert tuple(model.get_submodule(block).weight.shape) == (outputs, inputs, 3, 3)
        kernels = math.ceil(Fraction(str(keep)) * outputs)
        n = kernels if rows else outputs
        count += kernels * inputs * 9 + n * kernels - outputs * inputs * 9
        count += 2 * n - 2 * outputs
    assert sum(value.numel() for value in small.parameters()) == count


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
def test_shapes_of_what_is_left(keep, make_small_resnet):
    model = make_small_resnet()
    before = copy.deepcopy(model.state_dict())
    small = shrink(model, auto(model), keep)
    conv, norm = small.layer2[0].conv1, small.layer2[0].bn1
    kernels = rows = math.ceil(Fraction(str(keep)) * 16)
    assert conv.u.shape == (rows, kernels)
    assert conv.v.shape == (kernels, 8, 3, 3)
    assert [value.shape for value in norm.state_dict().values()] == [(rows,)] * 4 + [()]
    assert (conv.stride, conv.padding) == ((2, 2), (1, 1))
    assert "layer2.0.conv1.weight" not in small.state_dict()
    assert not any(name.endswith(".rows") for name in small.state_dict())
    assert small.layer2[0].downsample[0].weight.shape == model.layer2[0].downsample[0].weight.shape
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not {value.data_ptr() for value in model.parameters()} & {value.data_ptr() for value in small.parameters()}
    assert small(torch.randn(2, 3, 8, 8)).shape == (2, 3)


# -- norms ------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def conv(outputs=6):
    return nn.Conv2d(4, outputs, 3)


@pytest.mark.parametrize(
    ("block", "norm", "samples_rows"),
    [
        (Block(conv=conv(), bn=nn.BatchNorm2d(6)), "block.bn", True),
        (Block(conv=conv(), act=nn.ReLU(), gn=nn.GroupNorm(2, 6)), "block.gn", True),
        (Block(conv=conv()), None, True),
        (Block(conv=conv(), other=nn.Conv2d(6, 6, 1), bn=nn.BatchNorm2d(6)), None, True),
        # a norm that is not known to take some channels alone: all rows
        (Block(conv=conv(), norm=nn.InstanceNorm2d(6, affine=True)), None, False),
        (Block(conv=conv(), bn=nn.BatchNorm2d(12)), None, False),
        # nor one that the forward pass may well call behind it
        (Block(bn=nn.BatchNorm2d(6), conv=conv()), None, False),
        (Block(conv=conv(), convs=nn.ModuleList([conv(5)]), norms=nn.ModuleList([nn.GroupNorm(2, 6), nn.GroupNorm(1, 5)])), None, False),
        (Block(bn=nn.BatchNorm2d(4), conv=conv()), None, True),
        # nor one behind what mixes channels, nor two
        (Block(conv=conv(), shuffle=nn.ChannelShuffle(2), bn=nn.BatchNorm2d(6)), None, False),
        (Block(conv=conv(), local=nn.LocalResponseNorm(3), bn=nn.BatchNorm2d(6)), None, False),
        (Block(conv=conv(), one=nn.BatchNorm2d(6), other=nn.BatchNorm2d(6)), None, False),
        (Block(conv=conv(), bn=nn.BatchNorm2d(6), shortcut=nn.Conv2d(4, 6, 1)), None, False),
        (Block(conv=conv(), bn=nn.BatchNorm2d(6), shortcut=nn.Conv2d(4, 6, 1), other=nn.BatchNorm2d(6)), "block.bn", True),
        (Block(conv=conv(), bn=nn.BatchNorm2d(6), another=nn.Conv2d(6, 6, 1)), "block.bn", True),
    ],
    ids=[
        *("batch", "group", "none", "another's", "instance", "another width", "in front", "in a list", "the inputs'"),
        *("shuffled", "local", "two", "of a sum", "of two branches", "of a chain"),
    ],
)
def test_a_norm_pairs_with_the_layer_that_it_is_registered_right_behind(block, norm, samples_rows):
    model = Block(stem=nn.Conv2d(3, 4, 3), block=block)
    layer = find_layers(model, ["block.conv"], False, True, {})["block.conv"]
    assert (layer.norm, layer.samples_rows) == (norm, samples_rows)
    layer = find_layers(model, ["block.conv"], False, False, {})["block.conv"]
    assert (layer.norm, layer.samples_rows) == (None, False)


@pytest.mark.parametrize("affine", [True, False])
def test_behind_a_linear_layer_a_layer_norm_sees_all_rows(affine):
    """Zeros would count in its mean and variance, whether it has parameters or not."""
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=affine))
    assert not find_layers(model, ["0"], False, True, {})["0"].samples_rows


def test_a_norm_that_another_module_registers_sees_all_rows():
    """As in DenseNet, where the next layer's norm takes what earlier layers put out: of a constant 0 it makes its bias, and trains that."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6), nn.ReLU())
    assert not auto(model)["1.0"].samples_rows


def test_a_layer_at_the_root():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
    assert auto(model)["0"].norm == "1"


# -- momentum copies --------------------------------------------------------------------------------------------------
class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.bn(self.conv(self.stem(x))).mean((2, 3)))


def test_momentum_copies_follow_their_online_twins(make_byol):
    model = make_byol(Encoder())
    layers = find_layers(model, "auto", False, True, find_targets(model))
    assert {path: layer.leader for path, layer in layers.items()} == {"encoder.conv": "encoder.conv", "target.conv": "encoder.conv"}
    assert layers["target.conv"].norm == "target.bn"
    small = shrink(model, layers, 0.5)
    assert set(sampled_layers(small)) == {"encoder.conv", "target.conv"}
    assert set(sampled_norms(small)) == {"encoder.bn", "target.bn"}
    assert not any(value.requires_grad for value in small.target.parameters())
    assert all(value.requires_grad for value in small.encoder.parameters())
    nn.init.normal_(small.encoder.conv.u)
    follow(small, find_targets(small))
    assert all(torch.equal(one, other) for one, other in zip(small.encoder.state_dict().values(), small.target.state_dict().values()))
    assert small(torch.randn(2, 3, 7, 7)).shape == (2, 3)


def test_the_copy_of_a_layer_named_is_taken_apart_with_it(make_byol):
    model = make_byol(Encoder())
    targets = find_targets(model)
    small = shrink(model, find_layers(model, ["encoder.conv"], False, True, targets), 0.5)
    follow(small, targets)  # else there is nothing to copy into the copy's whole weight
    assert set(sampled_layers(small)) == {"encoder.conv", "target.conv"}
