"""Width adapters: which stage has one, what it computes, and what they leave alone."""

import pytest
import torch
from torch import nn

from featherlight.plugins import Chain, Clock, LayerFreezing, held, trained
from featherlight.plugins.adapters import WidthAdapter, width_of


def attached(model, **arguments):
    plugin = LayerFreezing(**arguments)
    plugin.attach(model)
    return plugin


def at(model, plugin, period, step=0):
    """Bring a model to a period as a host does."""
    model.train()
    return plugin.advance(Clock(period, step))


def test_widths_are_read_off_the_last_layer(make_resnet, make_vit, make_tiny):
    resnet = make_resnet()
    assert [width_of(group) for group in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)] == [64, 128, 256, 512]
    assert width_of(make_vit().blocks[0]) == 16
    assert width_of(make_tiny().layers[0]) == 8
    assert width_of(nn.ReLU()) is None


def test_an_adapter_commutes_with_the_mean_over_the_map():
    adapter = WidthAdapter(3, 5)
    maps = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    everywhere = torch.einsum("nchw,dc->ndhw", maps, adapter.linear.weight) + adapter.linear.bias[:, None, None]
    assert adapter(maps).shape == (2, 5, 1, 1)
    torch.testing.assert_close(adapter(maps).flatten(1), everywhere.mean((2, 3)))
    tokens = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapter(tokens), tokens @ adapter.linear.weight.T + adapter.linear.bias)


def test_only_the_stages_adapter_is_held_and_trained(make_resnet, images):
    model = make_resnet()
    keys = list(model.state_dict())
    plugin = attached(model)
    assert [name for name in model.state_dict() if name not in keys] == [
        f"width_adapters.{stage}.linear.{kind}" for stage in range(3) for kind in ("weight", "bias")
    ]
    for stage in range(4):
        at(model, plugin, stage)
        expected = {f"width_adapters.{stage}.linear.{kind}" for kind in ("weight", "bias")} if stage < 3 else set()
        for names in (held(model), trained(model)):
            assert {name for name in names if name.startswith("width_adapters")} == expected
        assert model(images["resnet"]).shape == (4, 3)


def test_a_narrow_stage_is_block_mean_linear_head(make_small_resnet, images):
    model = make_small_resnet()
    plugin = attached(model)
    at(model, plugin, 1)
    model.eval()
    x = torch.relu(model.bn1(model.conv1(images["resnet"])))
    x = model.layer2.forward(model.layer1.forward(x)).mean((2, 3))
    linear = model.width_adapters["1"].linear
    torch.testing.assert_close(model(images["resnet"]), model.fc(x @ linear.weight.T + linear.bias))


def test_attaching_moves_no_random_number_of_the_model(make_small_resnet):
    model = make_small_resnet()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    attached(model)
    assert torch.equal(torch.rand(3), expected)
    other = make_small_resnet(seed=9)
    attached(other)
    assert torch.equal(model.width_adapters["0"].linear.weight, other.width_adapters["0"].linear.weight)


def test_adapters_have_the_models_precision(make_small_resnet, images):
    model = make_small_resnet().double()
    plugin = attached(model)
    at(model, plugin, 0)
    assert model(images["resnet"].double()).dtype == torch.float64


def test_no_adapters_where_nobody_wants_them(make_small_resnet, make_vit):
    for model, arguments in ((make_small_resnet(), {"adapters": "none"}), (make_small_resnet(), {"grow": False}), (make_vit(), {})):
        attached(model, **arguments)
        assert not hasattr(model, "width_adapters")


def test_two_plugins_cannot_both_bring_adapters(make_small_resnet):
    model = make_small_resnet()
    with pytest.raises(ValueError, match="only one plugin may grow it"):
        Chain([LayerFreezing(["layer1", "layer2"]), LayerFreezing(["layer3", "layer4"])]).attach(model)
