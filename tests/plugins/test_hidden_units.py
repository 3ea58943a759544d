"""Hidden units that are not drawn: nothing is computed with them, and what comes out is what zeros in their places give."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from featherlight.plugins import Chain, Clock, LayerFreezing, PrismSampling, Visit
from featherlight.plugins.hidden_units import Hidden, find_gated, find_hidden
from featherlight.plugins.sampled_layers import sampled_layers
from featherlight.plugins.step_cost import StepMeter


class Mlp(nn.Module):
    def __init__(self, hidden=12, **between):
        super().__init__()
        self.fc1 = nn.Linear(8, hidden)
        for name, module in between.items():
            self.add_module(name, module)
        self.fc2 = nn.Linear(hidden, 6)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Gated(nn.Module):
    """As LLaMA has it: registered w1, w2, w3."""

    def __init__(self, **between):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, 40), nn.Linear(40, 8), nn.Linear(8, 40)
        for name, module in between.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def linears(model):
    return [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize(
    ("model", "hidden", "gated"),
    [
        (Mlp(act=nn.GELU(), drop=nn.Dropout(0.1), norm=nn.Identity()), [(("fc1",), "fc2")], set()),
        (Mlp(norm=nn.LayerNorm(12)), [], set()),
        (Mlp(act=nn.Sigmoid()), [], set()),
        (Mlp(act=nn.PReLU(12)), [], set()),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 3)), [(("0",), "2"), (("2",), "3")], set()),
        (nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1), nn.Linear(6, 5)), [], set()),
        (nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.Linear(12, 5)), [], set()),
        (nn.TransformerEncoderLayer(8, 2, 16), [(("linear1",), "linear2")], set()),
        (nn.TransformerEncoderLayer(8, 2, 16, activation=F.softplus), [], set()),
        (Gated(), [(("w1", "w3"), "w2")], {"w1", "w3"}),
        (Gated(norm=nn.LayerNorm(40)), [], {"w1", "w3"}),
        (nn.ModuleDict({"fc1": nn.Linear(8, 24), "fc2": nn.Linear(12, 8)}), [], {"fc1"}),
        (nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")}), [], set()),
    ],
    ids=[
        "mlp",
        "norm",
        "sigmoid",
        "prelu",
        "sequence",
        "softmax",
        "flat",
        "torch",
        "softplus",
        "gate",
        "gate, norm",
        "two in one",
        "attention",
    ],
)
def test_which_units_are_hidden(model, hidden, gated):
    paths = [path for path in linears(model) if "self_attn" not in path]
    assert find_hidden(model, paths) == [Hidden(*one) for one in hidden]
    assert find_gated(model, paths) == gated
    assert not find_hidden(model, paths[:1])


def client_of(model, keep, visit, **arguments):
    """A client's module with what it is sent."""
    server = PrismSampling(keep, **arguments)
    server.attach(model)
    server.advance(Clock(visit.round))
    small = copy.deepcopy(server.narrow(visit))
    client = PrismSampling(keep, **arguments)
    client.attach(small)
    entries = {name: value.detach() for name, value in model.state_dict().items()}
    small.load_state_dict(client.decode_down(server.encode_down(entries, visit), visit))
    return small


def among_zeros(layer, x):
    """A sampled layer's rows at their places."""
    u, v = layer.u, layer.v
    out = torch.zeros(*x.shape[:-1], layer.whole, dtype=x.dtype)
    out[..., layer.rows] = F.linear(F.linear(x, v), u, layer.bias)
    return out


@pytest.mark.parametrize("keep", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("made", [lambda: Mlp(), lambda: Gated()], ids=["mlp", "gate"])
def test_an_mlp_of_drawn_units_is_the_one_with_zeros_for_the_others(made, keep):
    torch.manual_seed(0)
    model = nn.Sequential(made(), nn.LayerNorm(6)).double()
    small = client_of(model, keep, Visit(1, 2, 3), layers="*")[0]
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    if isinstance(small, Mlp):
        wanted = among_zeros(small.fc2, F.gelu(among_zeros(small.fc1, x)))
    else:
        assert torch.equal(small.w1.rows, small.w3.rows)
        hidden = F.silu(among_zeros(small.w1, x)) * among_zeros(small.w3, x)
        assert int((hidden.abs().sum((0, 1)) > 0).sum()) == round(40 * keep)
        wanted = among_zeros(small.w2, hidden)
    out = small(x)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    inputs = [x, *small.parameters()]
    for one, other in zip(*(torch.autograd.grad(value.sin().sum(), inputs) for value in (out, wanted))):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("made", [lambda: Mlp(), lambda: Gated()], ids=["mlp", "gate"])
def test_in_place_it_is_the_client_s(made):
    torch.manual_seed(0)
    model = nn.Sequential(made(), nn.LayerNorm(6)).double()
    plugin, visit, x = PrismSampling(0.3, layers="*").in_place(), Visit(1), torch.randn(3, 8, dtype=torch.float64)
    wanted = client_of(model, 0.3, visit, layers="*")[0](x)
    whole = model[0](x)
    plugin.attach(model)
    plugin.advance(Clock(1))
    plugin.visit(visit)
    plugin.before_forward(Clock(1))
    torch.testing.assert_close(model[0](x), wanted)
    plugin.after_step(Clock(1))
    torch.testing.assert_close(model[0](x), whole)
    plugin.detach()
    assert not any(hasattr(module, "before") for module in model.modules())
    torch.testing.assert_close(model[0](x), whole)


def test_a_wide_gate_in_one_layer_keeps_all_rows():
    model = nn.Sequential(nn.ModuleDict({"fc1": nn.Linear(8, 24), "fc2": nn.Linear(12, 8)}), nn.LayerNorm(8))
    assert {path: layer.rows is not None for path, layer in sampled_layers(client_of(model, 0.5, Visit(0), layers="*")).items()} == {
        "0.fc1": False,
        "0.fc2": True,
    }


def kept(model, x):
    with StepMeter(model) as meter:
        loss = model(x).sum()
        meter.forward_is_done()
        loss.backward()
    return meter.cost.saved_bytes


def test_of_a_vision_transformer_s_mlps_about_the_share_is_kept_for_backward(make_vit, images):
    """A block's MLP keeps, in widths d of a token, 1, 4 and 4: its input, before and after GELU; sampled the 1 and 0.2·(1 + 4 + 4 + 1)."""
    model = make_vit(depth=2, classes=3)
    small = client_of(model, 0.2, Visit(0))
    x = images["vit"]
    whole, sampled = kept(model, x), kept(small, x)
    unit = 4 * 5 * 16 * 4  # 4 images of 5 tokens of width 16, float32
    fewer = 2 * unit * (9 - 1 - (4 + 13 + 13 + 4) / 16)  # ⌈0.2·16⌉ kernels, ⌈0.2·64⌉ units
    assert whole - sampled == pytest.approx(fewer, rel=0.1)
    assert kept(client_of(model, 0.2, Visit(0), rows=False), x) > whole


def test_torch_s_encoder_frozen_in_part_trains_as_sub_models():
    """Its fast path for what does not train reads a weight that a client has not."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
            self.head = nn.Linear(8, 3)

        def forward(self, x, padded=None):
            return self.head(self.layers(x, src_key_padding_mask=padded).mean(1))

    torch.manual_seed(0)
    small = client_of(Model(), 0.5, Visit(0))
    chain = Chain([LayerFreezing("layers.layers.*", stem=[])])
    chain.attach(small)
    chain.advance(Clock(1))
    chain.before_forward(Clock(1))
    x = torch.randn(2, 5, 8)
    assert small(x).isfinite().all()
    small.eval()
    with torch.no_grad():
        assert small(x).isfinite().all()
        assert small(x, torch.arange(5).expand(2, 5) > 3).isfinite().all()
