"""A frozen prefix that two branches have alike runs once a view, changes no gradient, and runs twice wherever it is not alike."""

import copy

import pytest
import torch
from torch import nn

from featherlight.plugins import MOON, Chain, Clock, DepthDropout, LayerFreezing, RepresentationAlignment, Visit
from featherlight.plugins.step_cost import StepMeter
from featherlight.ssl_models import BYOL, MoCoV3

LAST = Clock(2, 1)
"""In a stage whose first two blocks are frozen; past the step that makes its weights."""


class Block(nn.Module):
    def __init__(self, inplace=False):
        super().__init__()
        self.linear, self.norm, self.inplace, self.runs = nn.Linear(4, 4), nn.BatchNorm1d(4), inplace, 0

    def forward(self, x):
        self.runs += 1
        if self.inplace:
            x += 1.0
        return x + torch.relu(self.norm(self.linear(x)))


class Branch(nn.Module):
    def __init__(self, noise=0.0, **options):
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.Sequential(*[Block() for _ in range(2)], Block(**options))
        self.noise = noise

    def forward(self, x):
        return self.blocks(self.stem(x) + self.noise * torch.randn_like(x))


class TwoBranches(nn.Module):
    """The loss of two views: the online branch learns what the momentum copy makes of the other one."""

    def __init__(self, first="target", **options):
        super().__init__()
        torch.manual_seed(0)
        self.online = Branch(**options)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.first = first

    def forward(self, x0, x1):
        if self.first == "online":
            ours = self.online(x0), self.online(x1)
        with torch.no_grad():
            theirs = self.target(x0), self.target(x1)
        if self.first == "target":
            ours = self.online(x0), self.online(x1)
        return (ours[0] - theirs[1]).square().mean() + (ours[1] * theirs[0]).mean()

    def runs(self):
        """How often each block ran: online, then target."""
        return [block.runs for branch in (self.online, self.target) for block in branch.blocks]


def gradients(share, views, before=lambda model: None, plugins=(), **options):
    """Gradients of one step in the last stage, and how often each block ran."""
    model = TwoBranches(**options)
    chain = [LayerFreezing("online.blocks.*", share_prefix=share), *plugins]
    for plugin in chain:
        plugin.attach(model)
    model.train()
    for plugin in chain:
        plugin.advance(LAST)
        plugin.visit(Visit(2, 0, 0))
    before(model)
    for plugin in chain:
        plugin.before_forward(LAST)
    torch.manual_seed(1)
    model(*views).backward()
    for plugin in reversed(chain):
        plugin.after_step(LAST)
    assert all(block._shared is None for branch in (model.online, model.target) for block in branch.blocks)
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}, model.runs()


@pytest.fixture
def views():
    random = torch.Generator().manual_seed(3)
    return torch.randn(6, 4, generator=random), torch.randn(6, 4, generator=random)


def compare(views, **options):
    """Whether sharing changes a gradient; returns how often each block ran with it."""
    (alone, each), (shared, runs) = gradients(False, views, **options), gradients(True, views, **options)
    assert alone.keys() == shared.keys()
    assert len(alone) == 4  # of the last block: linear and norm
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
    assert each == [2] * 6
    return runs


@pytest.mark.parametrize("first", ["target", "online"])
def test_the_branch_that_comes_second_runs_no_frozen_block(first, views):
    runs = compare(views, first=first)
    online, target = runs[:3], runs[3:]
    assert (online, target) == (([0, 0, 2], [2, 2, 2]) if first == "target" else ([2, 2, 2], [0, 0, 2]))


def test_equal_views_are_told_apart_by_their_values(views):
    assert compare((views[0], views[0].clone()))[:3] == [0, 0, 2]


def test_what_is_drawn_in_front_of_the_blocks_is_not_shared(views):
    assert compare(views, noise=0.1) == [2] * 6


@pytest.mark.parametrize("first", ["target", "online"])
def test_what_the_first_branch_wrote_to_is_not_given_to_the_second(first, views):
    assert compare(views, first=first, inplace=True) == [2] * 6


def test_what_the_online_branch_keeps_for_backward_the_second_cannot_write_to(views):
    def writes(model):
        model.target.blocks[2].inplace = True

    assert compare(views, first="online", before=writes) == [2, 2, 2, 0, 0, 2]


def test_a_copy_that_is_no_copy_runs(views):
    def other(model):
        with torch.no_grad():
            model.target.blocks[1].linear.weight[0, 0] += 0.1

    assert compare(views, before=other) == [2] * 6


def test_rounding_of_an_average_of_equals_is_no_difference(views):
    def averaged(model):
        with torch.no_grad():
            for own, copied in zip(model.online.parameters(), model.target.parameters()):
                for _ in range(20):
                    copied.copy_(0.99 * copied + 0.01 * own)

    (alone, _), (shared, runs) = (gradients(share, views, before=averaged) for share in (False, True))
    assert runs == [0, 0, 2, 2, 2, 2]
    assert all(torch.allclose(alone[name], shared[name], rtol=1e-4, atol=1e-6) for name in alone)


def test_somebody_watches_the_blocks(views):
    seen = []

    def watch(model):
        model.online.blocks[0].register_forward_hook(lambda block, args, out: seen.append(out))

    assert compare(views, before=watch) == [2] * 6
    assert len(seen) == 4


def test_somebody_watches_what_is_inside_a_block(views):
    seen = []

    def watch(model):
        model.online.blocks[1].linear.register_forward_pre_hook(lambda module, args: seen.append(args))

    assert compare(views, before=watch) == [2] * 6
    assert len(seen) == 4


def kept(blocks, x):
    outs = []
    for block in blocks:
        x = block(x)
        outs.append(x)
    return outs[0] * outs[1] + outs[2]


def added_up(blocks, x):
    total = torch.zeros_like(x)
    for block in blocks:
        x = block(x)
        total += x
    return total


def written_to(blocks, x):
    for block in blocks:
        x = block(x)
        x.mul_(1.5)
    return x


def measured(blocks, x):
    for block in blocks:
        x = block(x)
        assert x.shape == (6, 4)
        assert x.dtype is torch.float32
    return x * len(x)


@pytest.mark.parametrize(("use", "runs"), [(kept, 1), (added_up, 1), (written_to, 2), (measured, 0)])
@pytest.mark.parametrize("first", ["target", "online"])
def test_what_is_looked_at_between_blocks_is_computed(use, runs, first, views):
    """The first of two frozen blocks runs in the second branch where somebody looks at its values, and not for its shape."""

    class Model(TwoBranches):
        def __init__(self):
            super().__init__(first)
            for branch in (self.online, self.target):
                branch.forward = lambda x, branch=branch: use(branch.blocks, branch.stem(x))

    def one(share):
        model, plugin = Model(), LayerFreezing("online.blocks.*", share_prefix=share)
        plugin.attach(model)
        model.train()
        plugin.advance(LAST)
        plugin.before_forward(LAST)
        loss = model(*views)
        loss.backward()
        plugin.after_step(LAST)
        return loss, [value.grad for value in model.online.blocks[2].parameters()], model.runs()

    (alone, wanted, _), (shared, found, told) = one(False), one(True)
    assert torch.equal(alone, shared)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(wanted, found, strict=True))
    second = told[:2] if first == "target" else told[3:5]
    assert second == ([2, 2] if runs == 2 else [2 * runs, 0])


def dropped(**options):
    return [DepthDropout("online.blocks.*", rate=0.5, **options)]


def test_depth_dropout(views):
    """One of two frozen blocks is left out: of both branches alike, or, where the copy is not known as one, of the online branch alone."""
    (alone, each), (shared, runs) = (gradients(share, views, plugins=dropped()) for share in (False, True))
    assert sorted(each) == [0, 0, 2, 2, 2, 2]
    assert sorted(runs) == [0, 0, 0, 2, 2, 2]
    assert all(torch.equal(alone[name], shared[name]) for name in alone)
    (alone, each), (shared, runs) = (gradients(share, views, plugins=dropped(targets={})) for share in (False, True))
    assert sorted(runs) == sorted(each) == [0, 2, 2, 2, 2, 2]
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


BESIDE = {
    "alone": list,
    "alignment": lambda: [RepresentationAlignment()],
    "MOON": lambda: [MOON()],
    "both": lambda: [MOON(), RepresentationAlignment(form="cosine")],
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("method", [BYOL, MoCoV3])
def test_self_supervised_models(method, beside):
    """Bit for bit the same gradients; forward FLOPs less by two passes through the prefix, whoever notes what blocks make of a view."""
    found = []
    for share in (False, True):
        torch.manual_seed(0)
        model = method(
            "vit", image_size=8, backbone_options={"depth": 3, "width": 16, "heads": 2, "patch_size": 4}, hidden_dim=16, output_dim=8
        )
        plugin = Chain([LayerFreezing("backbone.blocks.*", share_prefix=share), *BESIDE[beside]()])
        plugin.attach(model)
        model.train()
        plugin.advance(LAST)
        last_turn = {f"1:{name}": value + 0.1 for name, value in model.named_parameters()}
        plugin.recall(last_turn, Visit(2))
        plugin.receive(Visit(2))
        plugin.before_forward(LAST)
        random = torch.Generator().manual_seed(1)
        views = [torch.randn(4, 3, 8, 8, generator=random) for _ in range(2)]
        with StepMeter(model) as meter:
            loss = model.view_loss(*views)
            extra = plugin.extra_loss(model, (views, torch.zeros(4)))
            assert (extra is None) == (beside == "alone")
            loss = loss if extra is None else loss + extra
            meter.forward_is_done()
            loss.backward()
        plugin.after_step(LAST)
        with StepMeter(model) as prefix, torch.no_grad():
            model.eval()
            tokens = torch.randn(4, 5, 16)
            model.backbone.blocks[1](model.backbone.blocks[0](tokens))
        found.append((loss.item(), [value.grad for value in model.parameters()], meter.cost, prefix.cost.flops_forward))
    (loss, alone, whole, prefix), (other, shared, less, _) = found
    assert loss == other
    assert all(one is two or torch.equal(one, two) for one, two in zip(alone, shared, strict=True))
    assert whole.flops_forward - less.flops_forward == 2 * prefix > 0
    assert whole.saved_bytes == less.saved_bytes
