"""Terms that hold a model against what was received: formulas by hand, and who gets gradients."""

import copy
import threading

import pytest
import torch
from torch import nn

from featherlight.plugins import MOON, Clock, LayerFreezing, Proximal, RepresentationAlignment, Visit
from featherlight.plugins.chain import Chain
from featherlight.plugins.representations import Representations
from featherlight.plugins.step_cost import StepMeter

THROUGH = ("encoder", "head")


class Block(nn.Module):
    def __init__(self, width=8, dropout=0.0):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(dropout)

    def forward(self, x):
        return x + torch.relu(self.norm(self.dropout(self.linear(x))))


class Encoder(nn.Module):
    """(N, 6) to (N, 8, 1)."""

    def __init__(self, dropout):
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.blocks = nn.Sequential(*[Block(dropout=dropout) for _ in range(3)])

    def forward(self, x):
        return self.blocks(self.stem(x)).unsqueeze(-1)


class Model(nn.Module):
    """Two views, one pass each, or both at once; the target's pass is without gradients; a reshaping lies between the submodules."""

    def __init__(self, together=False, dropout=0.0, between=lambda features: features.flatten(1)):
        super().__init__()
        torch.manual_seed(0)
        self.together, self.between = together, between
        self.encoder, self.head = Encoder(dropout), nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5))
        self.unused = nn.Linear(2, 2)

    def represent(self, x):
        return self.head(self.between(self.encoder(x)))

    def training_step(self, batch, batch_idx=0):
        x0, x1 = batch[0]
        with torch.no_grad():
            self.represent(x0)
        if self.together:
            z0, z1 = self.represent(torch.cat([x0, x1])).chunk(2)
        else:
            z0, z1 = self.represent(x0), self.represent(x1)
        return (z0 - z1).square().sum()


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(3)
    return (torch.randn(4, 6, generator=random), torch.randn(4, 6, generator=random)), torch.zeros(4)


def received_of(model, plugin, *others, move=True):
    """What the client received, as a model of its own; the client's has trained a little since."""
    for one in (*others, plugin):
        one.attach(model)
    for one in (*others, plugin):
        one.advance(Clock(0))
    plugin.receive(Visit(0))
    start = copy.deepcopy(model).train()
    if move:
        with torch.no_grad():
            for value in model.parameters():
                value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel()))
    model.train()
    return start


def term(model, plugin, batch):
    plugin.before_forward(Clock(0))
    model.training_step(batch)
    return plugin.extra_loss(model, batch)


def by_hand(z, g, temperature):
    """The contrastive term, pair by pair."""
    total = 0.0
    for i in range(len(z)):
        similarities = [torch.dot(z[i], g[j]) / z[i].norm() / g[j].norm() / temperature for j in range(len(g))]
        total = total - torch.log(similarities[i].exp() / sum(one.exp() for one in similarities))
    return total / len(z)


@pytest.mark.parametrize("together", [False, True], ids=["a pass a view", "one pass"])
@pytest.mark.parametrize("form", ["contrastive", "cosine"])
def test_alignment_is_the_formula(form, together, batch):
    model = Model(together)
    plugin = RepresentationAlignment(0.7, 0.3, form, THROUGH)
    start = received_of(model, plugin)
    twin = copy.deepcopy(model)
    found = term(model, plugin, batch)
    xs = [torch.cat(batch[0])] if together else batch[0]
    zs = [z for x in xs for z in twin.represent(x).split(4)]
    gs = [g.detach() for x in xs for g in start.represent(x).split(4)]
    if form == "cosine":
        wanted = [(1 - (z * g).sum(1) / z.norm(dim=1) / g.norm(dim=1)).mean() for z, g in zip(zs, gs)]
    else:
        wanted = [by_hand(z, g, 0.3) for z, g in zip(zs, gs)]
    wanted = 0.7 * sum(wanted) / 2
    assert torch.allclose(found, wanted, atol=1e-6)
    found.backward()
    wanted.backward()
    for (name, value), other in zip(model.named_parameters(), twin.parameters()):
        assert (value.grad is None) == (other.grad is None), name
        assert value.grad is None or torch.allclose(value.grad, other.grad, atol=1e-6), name
    assert all(copied.grad is None for copied in plugin.copies())


class Narrowing(nn.Module):
    """Blocks of different widths, behind which a stage's adapter stands: the model's own module, outside the encoder."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(4, 8)))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x))


@pytest.mark.parametrize("moved", ["width_adapters", "encoder", "head"])
def test_an_adapter_of_the_stage_is_the_received_one_too(moved):
    model = Narrowing()
    chain = Chain([LayerFreezing("encoder.*"), plugin := RepresentationAlignment(form="cosine", through=THROUGH)])
    chain.attach(model)
    chain.advance(Clock(0))
    chain.visit(Visit(0))
    chain.receive(Visit(0))
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    start, terms = model(x).detach(), []
    for _ in range(2):
        chain.before_forward(Clock(0))
        z = model(x)
        terms.append(chain.extra_loss(model, (x,)))
        chain.after_step(Clock(0))
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.startswith(moved):
                    value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    assert abs(float(terms[0])) < 1e-6
    wanted = (1 - torch.cosine_similarity(z, start)).mean()
    assert float(wanted) > 0.01
    assert torch.allclose(terms[1], wanted, atol=1e-6)
    assert any(name.startswith("width_adapters.0") for name in plugin._received)


def test_a_copy_of_the_encoder_copies_no_more_than_that(batch):
    """As fine-tuning does while the plugins are attached, whatever else the module holds."""
    model = Model()
    plugin = RepresentationAlignment(through=THROUGH)
    received_of(model, plugin)
    model.lock = threading.Lock()  # cannot be copied
    assert torch.is_tensor(copy.deepcopy(model.encoder)(batch[0][0]))


def test_without_movement_the_model_is_where_it_is_pulled_to(batch):
    model = Model()
    plugin = RepresentationAlignment(form="cosine", through=THROUGH)
    received_of(model, plugin, move=False)
    found = term(model, plugin, batch)
    assert abs(found.item()) < 1e-6
    found.backward()
    assert max(value.grad.abs().max() for value in model.parameters() if value.grad is not None) < 1e-6


def test_looking_leaves_no_trace(batch):
    """Batch statistics, random numbers and modes are as without the term, dropout in the model or not."""
    plain, model = Model(dropout=0.5).train(), Model(dropout=0.5)
    plugin = RepresentationAlignment(through=THROUGH)
    received_of(model, plugin, move=False)
    for one, act in ((plain, lambda: plain.training_step(batch)), (model, lambda: term(model, plugin, batch))):
        torch.manual_seed(5)
        act()
        one.drawn = torch.rand(1)
    plugin.after_step(Clock(0))
    assert torch.equal(plain.drawn, model.drawn)
    for (name, value), other in zip(plain.state_dict().items(), model.state_dict().values()):
        assert torch.equal(value, other), name
    assert all(one.training for one in model.modules())
    plugin.detach()
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in model.modules())


def test_the_copy_is_of_what_trains_in_the_submodules_and_counts_in_the_peak(batch):
    model = Model()
    plugin = RepresentationAlignment(through=THROUGH)
    received_of(model, plugin, move=False)
    size = sum(value.numel() for value in [*model.encoder.parameters(), *model.head.parameters()])
    assert sum(value.numel() for value in plugin.copies()) == size

    def peak(beside):
        with StepMeter(model, batch=batch, beside=beside) as meter:
            model.training_step(batch)
            meter.forward_is_done()
        return meter.cost.peak_bytes

    assert peak(plugin.copies()) - peak(()) == 4 * size


def test_frozen_blocks_are_not_computed_again(batch):
    """In stage 3 two of three blocks are frozen: of the second pass the stem, one block and the head are left."""
    model = Model()
    freezing, plugin = LayerFreezing("encoder.blocks.*"), RepresentationAlignment(form="cosine", through=THROUGH)
    for one in (plugin, freezing):  # in either order
        one.attach(model)
    for one in (plugin, freezing):
        one.advance(Clock(2))
    plugin.receive(Visit(2))
    start = copy.deepcopy(model).train()
    freezing.before_forward(Clock(2))
    with torch.no_grad():
        model.encoder.blocks[2].linear.weight += 0.3
    names = {name for name, value in model.named_parameters() if value.requires_grad and not name.startswith("unused")}
    assert plugin._received.keys() == names
    freezing_of_start = copy.deepcopy(start)
    for block in freezing_of_start.encoder.blocks[:2]:
        block.eval()
    found = {}
    for weight in (0.0, 1.0):
        plugin.weight = weight
        with StepMeter(model) as meter:
            plugin.before_forward(Clock(2))
            model.training_step(batch)
            found[weight] = plugin.extra_loss(model, batch)
            meter.forward_is_done()
        found[f"flops {weight}"] = meter.cost.flops_forward
    once = 2 * 4 * (6 * 8 + 8 * 8 + 8 * 5)
    assert found["flops 1.0"] - found["flops 0.0"] == 2 * once
    zs = [freezing_of_start.represent(x) for x in batch[0]]
    for block in model.encoder.blocks[:2]:
        assert not block.norm.training
    ours = [model.represent(x) for x in batch[0]]
    wanted = sum(1 - torch.cosine_similarity(z, g).mean() for z, g in zip(ours, zs)) / 2
    assert torch.allclose(found[1.0], wanted, atol=1e-6)
    assert not any(block._bypassed_by for block in model.encoder.blocks)


@pytest.mark.parametrize(
    ("between", "through", "message"),
    [
        (lambda features: features.flatten(1) * 2, THROUGH, '"head" does not take what "encoder" puts out'),
        (lambda features: features.flatten(1), ("unused",), '"unused" 0 times'),
        (lambda features: features.flatten(1), ("encoder", "unused"), '"encoder" 2, "unused" 0 times'),
    ],
)
def test_what_cannot_be_made_again_is_refused(between, through, message, batch):
    model = Model(between=between)
    plugin = RepresentationAlignment(through=through)
    received_of(model, plugin)
    with pytest.raises(ValueError, match=message):
        term(model, plugin, batch)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RepresentationAlignment(-1.0), "weight=-1.0: give 0"),
        (lambda: RepresentationAlignment(float("nan")), "weight=nan"),
        (lambda: RepresentationAlignment(temperature=0.0), "temperature=0.0: give a number above 0"),
        (lambda: RepresentationAlignment(form="euclid"), "form='euclid' is not known"),
        (lambda: RepresentationAlignment().attach(Model()), 'through="backbone" not found; this Model has encoder, head, unused'),
        (lambda: Representations(Model(), []), r"through=\[\]"),
        (lambda: MOON(-1.0), "weight=-1.0"),
        (lambda: MOON(temperature=-0.5), "temperature=-0.5"),
        (lambda: Proximal(-0.1), "mu=-0.1: give 0"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_host_that_does_not_say_when_a_turn_begins_is_told(batch):
    model = Model().train()
    plugin = RepresentationAlignment(through=THROUGH)
    plugin.attach(model)
    plugin.advance(Clock(0))
    with pytest.raises(ValueError, match="does not call receive"):
        term(model, plugin, batch)


def test_the_temperature_is_the_models_own():
    for own, wanted in ((None, 0.5), (0.05, 0.05), (1, 1), (0, 0.5), (True, 0.5)):
        model = Model()
        model.temperature = own
        plugin = RepresentationAlignment(through=THROUGH)
        plugin.attach(model)
        assert plugin._temperature == wanted


# -- MOON ---------------------------------------------------------------------------------------------------------------
def test_moon_is_the_formula(batch):
    model = Model()
    plugin = MOON(2.0, 0.4, THROUGH)
    received_of(model, plugin, move=False)
    assert term(model, plugin, batch) is None  # a client's first turn
    assert not plugin.copies()
    with torch.no_grad():
        model.encoder.stem.weight += 0.2  # it has trained
    memory = {name: value.clone() for name, value in plugin.remember(Visit(0)).items()}
    assert memory.keys() == {name for name, _ in model.named_parameters() if not name.startswith("unused")}
    previous = copy.deepcopy(model)
    with torch.no_grad():
        model.head[0].weight -= 0.3  # the server's next model
    received = copy.deepcopy(model)
    plugin.recall(memory, Visit(1))
    plugin.receive(Visit(1))
    with torch.no_grad():
        model.encoder.blocks[1].linear.weight += 0.1
    twin = copy.deepcopy(model)
    found = term(model, plugin, batch)
    wanted = []
    for x in batch[0]:
        z, g, p = twin.represent(x), received.represent(x).detach(), previous.represent(x).detach()
        to_g, to_p = (torch.exp(torch.cosine_similarity(z, other) / 0.4) for other in (g, p))
        wanted.append(-torch.log(to_g / (to_g + to_p)).mean())
    wanted = 2.0 * sum(wanted) / 2
    assert torch.allclose(found, wanted, atol=1e-6)
    found.backward()
    wanted.backward()
    assert torch.allclose(model.encoder.stem.weight.grad, twin.encoder.stem.weight.grad, atol=1e-6)
    assert sum(value.numel() for value in plugin.copies()) == 2 * sum(value.numel() for value in memory.values())


# -- FedProx ------------------------------------------------------------------------------------------------------------
def test_proximal_is_the_formula_and_keeps_nothing_for_backward(batch):
    model = Model()
    plugin = Proximal(0.6)
    start = received_of(model, plugin)
    twin = copy.deepcopy(model)
    with StepMeter(model) as meter:
        found = plugin.extra_loss(model, batch)
        meter.forward_is_done()
        (3 * found).backward()
    wanted = 0.3 * sum((value - before.detach()).square().sum() for value, before in zip(twin.parameters(), start.parameters()))
    (3 * wanted).backward()
    assert torch.allclose(found, wanted, rtol=1e-5)
    assert meter.cost.saved_bytes == 0
    for (name, value), other in zip(model.named_parameters(), twin.parameters()):
        assert torch.allclose(value.grad, other.grad, atol=1e-6), name
    assert all(copied.grad is None for copied in plugin.copies())
