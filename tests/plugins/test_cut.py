"""A model in two parts: each computes what it should and nothing else."""

import pytest
import torch
from torch import nn

from featherlight.plugins import Chain, Clock, DepthDropout, IntrinsicProjection, LayerFreezing, PartitionedTraining, PrismSampling
from featherlight.plugins.cut import Cut, InOrder
from featherlight.plugins.partitioned_training import AuxiliaryHead
from featherlight.ssl_models import Classifier


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 3))

    def forward(self, x):
        return self.blocks(x)

    def training_step(self, batch, index=0):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def cut_of(model, block="blocks.1", targets=None, **options):
    return Cut(model, block, options.get("stem"), options.get("tail"), targets or {})


def test_the_two_parts_make_the_whole():
    model, x, labels = Net(), torch.randn(7, 4), torch.randint(3, (7,))
    whole = model.training_step((x, labels))
    cut = cut_of(model)
    activations = cut.run(x)
    assert torch.equal(activations, torch.relu(model.blocks[0](x)))
    assert [name for name in model.state_dict() if cut.has(name)] == ["blocks.0.weight", "blocks.0.bias"]
    images = torch.empty(7, 4, device="meta")  # there is nothing to see of them
    with cut.fed(lambda branch, rows: activations):
        assert all(parameter.is_meta for parameter in model.blocks[0].parameters())
        loss = model.training_step((images, labels))
    assert torch.equal(loss, whole)
    assert torch.equal(model.training_step((x, labels)), whole)
    cut.remove()
    assert not model.blocks[1]._forward_hooks


def test_a_vision_transformer_with_class_token_and_positions(make_vit, images):
    """What lies between modules (the token in front of the patches, positions added) belongs to the front where it is."""
    model = make_vit(classes=3).eval()
    cut = cut_of(model, "blocks.1")
    x = images["vit"]
    expected = model(x)
    activations = cut.run(x)
    assert torch.equal(activations, model.blocks[1](model.blocks[0](model._pos_embed(model.patch_embed(x)))))
    assert cut.has("cls_token")
    assert cut.has("pos_embed")
    assert not cut.has("norm.weight")
    with cut.fed(lambda branch, rows: activations):
        assert torch.equal(model(torch.empty_like(x, device="meta")), expected)


@pytest.mark.parametrize(("backbone", "total"), [("vgg11", 34.4), ("resnet9_basic", 9.4)])
def test_the_sizes_that_ecofed_prints(backbone, total):
    """76,032 parameters in front of the cut, an activation of 128 × 8 × 8 for an image of 32 px, millions of parameters in all."""
    with torch.device("meta"):
        model = Classifier(backbone, backbone_options={"fully_connected": True} if backbone == "vgg11" else None)
        cut = cut_of(model, "backbone.blocks.1")
        assert sum(parameter.numel() for parameter in cut.parameters) == 76_032
        assert cut.run(torch.empty(5, 3, 32, 32)).shape == (5, 128, 8, 8)
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(total, abs=0.05)
        assert model.logits(torch.empty(2, 3, 32, 32)).shape == (2, 10)


def test_passes_take_views_in_order():
    order = InOrder([3, 3])
    assert [order.views("", 3), order.views("", 3), order.views("", 6), order.views("", 3)] == [(0,), (1,), (0, 1), (0,)]
    with pytest.raises(ValueError, match=r"a pass of 4 samples is not made of whole views in order, which have \[3, 3\] samples"):
        order.views("", 4)


class LooksAtImages(Net):
    def training_step(self, batch, index=0):
        return super().training_step(batch) + (self(batch[0])[:, :1] - batch[0]).square().mean()


def test_a_step_that_needs_the_images_is_refused():
    model, activations = LooksAtImages(), torch.randn(2, 6)
    message = r'cut="blocks.1": LooksAtImages.training_step needs images, labels or weights that stay on the device .*stem=\[...\]'
    with (
        pytest.raises(ValueError, match=message),
        cut_of(model).fed(lambda branch, rows: activations),
    ):
        model.training_step((torch.empty(2, 4, device="meta"), torch.tensor([0, 1])))
    assert not any(parameter.is_meta for parameter in model.parameters())
    cut = cut_of(Net())
    with pytest.raises(ValueError, match=r"needs images, .*\(its loss has no value\)"):
        cut.check(torch.zeros(()) + torch.empty(3, device="meta").sum())


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    forward = training_step = lambda self, x: self.third(self.second(self.first(x)))


def test_a_front_that_is_not_all_of_it_is_refused():
    """With a stem named too short, a weight in front of the cut would be the server's."""
    x, activations = torch.empty(2, 4, device="meta"), torch.ones(2, 6)
    model = Flat()
    with pytest.raises(ValueError, match="needs images, labels or weights"), cut_of(model, "second", stem=[]).fed(lambda *_: activations):
        model(x)
    model = Flat()
    with cut_of(model, "second").fed(lambda *_: activations):
        assert torch.equal(model(x), model.third(activations))


def test_cuts_that_cannot_be():
    model = Net()
    with pytest.raises(ValueError, match=r'block "blocks.9" not found; this Net has inside "blocks": 0, 1, 2, 3'):
        cut_of(model, "blocks.9")
    with pytest.raises(ValueError, match=r'cut="blocks.\*" names 4 blocks; name one of them'):
        cut_of(model, "blocks.*")
    model.again = nn.Linear(4, 6)
    model.again.weight = model.blocks[0].weight
    with pytest.raises(ValueError, match=r'"again.weight" is used before and behind cut="blocks.1"'):
        cut_of(model)
    model = Net()
    model.forward = lambda x: x
    with pytest.raises(ValueError, match=r'Net.forward\(images\) never gets to "blocks.1"'):
        cut_of(model).run(torch.ones(2, 4))


# -- the plugin -------------------------------------------------------------------------------------------------------
def test_the_front_is_frozen_for_ever_and_a_detached_model_is_ordinary():
    model = Net()
    model.blocks[1] = nn.BatchNorm1d(6)
    names = list(model.state_dict())
    plugin = PartitionedTraining("blocks.1")
    plugin.attach(model)
    for period in (0, 1, 7):
        model.train()
        plugin.advance(Clock(period))
        assert [p.requires_grad for p in model.parameters()] == [False] * 4 + [True] * 4
        assert [block.training for block in model.blocks] == [False, False, True, True]
    assert [plugin.partition(Clock(period)).devices_work for period in range(4)] == [True, False, True, False]
    plugin.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert list(model.state_dict()) == names
    assert not model.blocks[1]._forward_hooks


def test_a_device_has_a_head_of_its_own_where_its_loss_is_local():
    model = Net()
    plugin = PartitionedTraining("blocks.1", way="local_loss", classes=3)
    with pytest.raises(ValueError, match=r"give classes=\.\.\., how many Net learns"):
        PartitionedTraining("blocks.1", way="local_loss").attach(Net())
    model.blocks[1] = nn.Linear(6, 6)
    plugin.attach(model)
    assert model.get_submodule("auxiliary_head").linear.weight.shape == (3, 6)
    plugin.detach()
    assert not hasattr(model, "auxiliary_head")


def test_a_head_of_its_own_needs_a_width():
    message = r'"blocks.1" \(ReLU\) has no layer that says how wide its output is: cut at .* \(blocks.0, blocks.2, blocks.3\)'
    with pytest.raises(ValueError, match=message):
        PartitionedTraining("blocks.1", way="local_loss", classes=3).attach(Net())
    for shape in ((2, 5), (2, 6, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"came to the device's own head, which takes \(N, C, H, W\), .* with C = 6: cut at another"):
            AuxiliaryHead(6, 3)(torch.ones(shape))
    assert torch.equal(AuxiliaryHead(6, 3)(torch.ones(2, 6, 4, 4)), AuxiliaryHead(6, 3)(torch.ones(2, 6)))


@pytest.mark.parametrize("options", [{"way": "local_loss"}, {"way": "local_loss", "classes": 3}])
def test_where_it_cannot_be_attached_the_model_is_as_before(options):
    """No number of classes, no width: in each case the cut was made already."""
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"classes=|how wide"):
        PartitionedTraining("blocks.1", **options).attach(model)
    assert not model.blocks[1]._forward_hooks
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model(torch.ones(2, 4)).shape == (2, 3)


@pytest.mark.parametrize(
    "other",
    [lambda: LayerFreezing("blocks.*"), lambda: DepthDropout("blocks.*"), lambda: IntrinsicProjection(4), lambda: PrismSampling(0.5)],
)
def test_what_changes_the_model_or_what_travels_is_refused_beside_it(other):
    chain = Chain([PartitionedTraining("blocks.1"), other()])
    name = type(chain.plugins[1]).__name__
    chain.plugins[0].attach(Net())
    with pytest.raises(ValueError, match=f"PartitionedTraining divides the model between device and server; {name} changes"):
        chain.partition(Clock(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"way": "other"}, "way='other' is not known; use 'replay', 'split', 'local_loss' or 'classic'"),
        ({"replay_period": 0}, "replay_period=0: give 1 or more"),
        ({"way": "split", "draws": 2}, "way='split' keeps nothing on the server"),
        ({"buffer_bytes": 0}, "buffer_bytes=0: give 1 or more"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        PartitionedTraining("blocks.1", **arguments)
