"""Methods compose: while stages and draws go by, only what should move moves, on any architecture, with or without a momentum copy."""

import itertools

import pytest
import torch

from featherlight.plugins import Chain, Clock, DepthDropout, LayerFreezing, ProgressiveGrowth, Visit, held, trained
from featherlight.plugins.bypass import is_bypassed
from featherlight.plugins.optimizer_state import check_covered, release

BLOCKS = {"tiny": "layers.*", "vit": "blocks.*", "resnet": "layer*"}
INNER = {"tiny": "layers.*", "vit": "blocks.*", "resnet": "layer*.*"}


@pytest.fixture
def build(make_tiny, make_vit, make_small_resnet, make_byol):
    """A model, a chain of plugins on it, and the path before the names of its blocks."""

    def make(kind, method, byol=False, classes=3, **dropout):
        encoder = {"tiny": make_tiny, "resnet": make_small_resnet}[kind]() if kind != "vit" else make_vit(classes=classes)
        model, prefix = (make_byol(encoder), "encoder.") if byol else (encoder, "")
        chain = Chain([method(blocks=prefix + BLOCKS[kind]), DepthDropout(blocks=prefix + INNER[kind], **dropout)])
        chain.attach(model)
        return model, chain, prefix

    return make


def left_out(model, prefix):
    """Paths below ``prefix`` of the blocks that the forward pass skips."""
    return {name for name, module in model.named_modules() if name.startswith(prefix) and is_bypassed(module)}


@pytest.mark.parametrize("every", ["round", "batch"])
@pytest.mark.parametrize("byol", [False, True], ids=["alone", "with target"])
@pytest.mark.parametrize("method", [LayerFreezing, ProgressiveGrowth])
@pytest.mark.parametrize("kind", ["tiny", "vit", "resnet"])
def test_only_what_should_move_moves(kind, method, byol, every, build, images, snapshot, moved, below, take_step):
    model, chain, prefix = build(kind, method, byol, rate=0.5, every=every)
    tower = chain.plugins[0]._tower
    stem, groups = tower.stem, tower.paths
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=0.1)
    for stage, client in itertools.product(range(3), range(2)):
        model.train()
        release([optimizer], chain.advance(Clock(stage, 0)))
        check_covered(model, [optimizer])
        chain.visit(Visit(stage, client, 5))
        optimizer.state.clear()  # a client's optimizer is new
        before = snapshot(model)
        absent_all_along = set(before)
        for step in range(2):
            chain.before_forward(Clock(stage, step))
            absent_all_along &= below(before, *left_out(model, prefix))
            chain.after_step(Clock(stage, step))
            take_step(model, chain, Clock(stage, step), optimizer, images[kind])
        changed = {name for name in moved(before, model) if not name.startswith("target.")}
        earlier = groups[:stage] if method is LayerFreezing else ()
        still = below(before, *(stem if stage and method is LayerFreezing else ()), *earlier, *groups[stage + 1 :]) | absent_all_along
        assert not changed & still
        own = {name for name in before if not name.startswith(("target.", "width_adapters."))}
        expected = below(own, groups[stage])
        assert expected <= changed
        if method is ProgressiveGrowth and every == "round":
            expected = below(own, *stem, *groups[: stage + 1]) - absent_all_along
            assert expected <= changed
        assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("method", [LayerFreezing, ProgressiveGrowth])
def test_residual_blocks_go_inside_groups_that_are_stages(method, build):
    """ResNet-18: layerX.1 keeps its shape, layerX.0 only in layer1; those of absent groups and of the newest one are not drawn."""
    model, chain, _ = build("resnet", method, rate=0.9)
    droppable = {"layer1": {"layer1.0", "layer1.1"}, "layer2": {"layer2.1"}, "layer3": {"layer3.1"}, "layer4": {"layer4.1"}}
    for stage in range(4):
        chain.advance(Clock(stage))
        chain.visit(Visit(stage))
        chain.before_forward(Clock(stage))
        earlier = set().union(*(droppable[f"layer{group + 1}"] for group in range(stage)))
        inner = {name for name in left_out(model, "layer") if "." in name}
        assert inner <= earlier
        assert len(inner) == int(0.9 * len(earlier) + 0.5)
        groups = {name for name in left_out(model, "layer") if "." not in name}
        assert groups == {f"layer{group}" for group in range(stage + 2, 5)}
        names = set(held(model))
        assert not any(name.startswith(f"{path}.") for name in names for path in inner | groups)
        chain.after_step(Clock(stage))
        assert left_out(model, "layer") == groups


def test_max_kept_counts_blocks_of_the_groups_that_are_there(build):
    model, chain, _ = build("resnet", LayerFreezing, rate=0.0, max_kept=4)
    for stage, expected in enumerate((0, 0, 2, 4)):  # 2, 4, 6, 8 blocks there
        chain.advance(Clock(stage))
        chain.visit(Visit(stage))
        chain.before_forward(Clock(stage))
        assert len({name for name in left_out(model, "layer") if "." in name}) == expected
        chain.after_step(Clock(stage))


def test_blocks_named_for_dropout_may_lie_above_or_below_the_stage(make_tiny):
    """Nothing is there to drop before the stage is reached; once it has passed, none of them is the newest any more."""
    model = make_tiny(4)
    chain = Chain([LayerFreezing(blocks="layers.*"), DepthDropout(blocks=["layers.1", "layers.2"], rate=0.9)])
    chain.attach(model)
    for stage, expected in enumerate([set(), set(), {"layers.1"}, {"layers.1", "layers.2"}]):
        chain.advance(Clock(stage))
        chain.visit(Visit(stage))
        chain.before_forward(Clock(stage))
        assert left_out(model, "") - {f"layers.{later}" for later in range(stage + 1, 4)} == expected
        chain.after_step(Clock(stage))


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_the_forward_pass_is_the_kept_blocks_of_the_stage(kind, build, images):
    model, chain, _ = build(kind, LayerFreezing, rate=0.5)
    chain.advance(Clock(2))
    chain.visit(Visit(2, 1))
    chain.before_forward(Clock(2))
    model.eval()
    gone, x = left_out(model, ""), images[kind]
    if kind == "vit":
        x = model._pos_embed(model.patch_embed(x))
        for index in range(3):
            if f"blocks.{index}" not in gone:
                x = model.blocks[index].forward(x)
        expected = model.head(model.norm(x)[:, 0])
    else:
        x = torch.relu(model.bn1(model.conv1(x)))
        for path in [f"layer{group}.{block}" for group in (1, 2, 3) for block in (0, 1)]:
            if path not in gone:
                x = model.get_submodule(path).forward(x)
        linear = model.width_adapters["2"].linear
        expected = model.fc(x.mean((2, 3)) @ linear.weight.T + linear.bias)
    assert any("." in name for name in gone)
    torch.testing.assert_close(model(images[kind]), expected)


@pytest.mark.parametrize("kind", ["tiny", "resnet"])
def test_both_branches_run_the_same_blocks(kind, build, images):
    model, chain, _ = build(kind, LayerFreezing, byol=True)
    for stage in range(3):
        chain.advance(Clock(stage))
        chain.visit(Visit(stage))
        chain.before_forward(Clock(stage))
        assert {name.partition(".")[2] for name in left_out(model, "target")} == {
            name.partition(".")[2] for name in left_out(model, "encoder")
        }
        model.eval()
        assert torch.equal(model.encoder(images[kind]), model.target(images[kind]))
        chain.after_step(Clock(stage))


def test_evaluation_between_steps_sees_the_whole_stage(build, images):
    model, chain, _ = build("tiny", ProgressiveGrowth)
    chain.advance(Clock(3))
    model.eval()
    whole = model(images["tiny"])
    for step in range(3):
        chain.visit(Visit(3, step))
        chain.before_forward(Clock(3, step))
        assert not torch.equal(model(images["tiny"]), whole)
        chain.after_step(Clock(3, step))
        assert torch.equal(model(images["tiny"]), whole)


def test_what_is_dropped_from_a_frozen_prefix_is_not_what_trains(build):
    model, chain, _ = build("tiny", LayerFreezing, rate=0.9)
    chain.advance(Clock(3))
    chain.visit(Visit(3))
    assert {name.rsplit(".", 1)[0] for name in trained(model)} == {"layers.3.norm", "layers.3.up", "layers.3.down", "norm", "head"}
    assert not any(name.startswith(("layers.0.", "layers.1.", "layers.2.")) for name in held(model))


@pytest.mark.parametrize("kind", ["tiny", "resnet"])
def test_compiled_blocks_follow_stages_and_draws(kind, build, images):
    torch._dynamo.reset()
    model, chain, _ = build(kind, LayerFreezing)
    model.eval()
    compiled = torch.compile(model, backend="eager")
    for stage in (0, 1, 2):
        chain.advance(Clock(stage))
        chain.visit(Visit(stage))
        chain.before_forward(Clock(stage))
        torch.testing.assert_close(compiled(images[kind]), model(images[kind]))
        chain.after_step(Clock(stage))


@pytest.mark.parametrize("method", [LayerFreezing, ProgressiveGrowth])
@pytest.mark.parametrize("kind", ["tiny", "vit", "resnet"])
def test_detaching_the_chain_leaves_an_ordinary_model(kind, method, build, make_tiny, make_vit, make_small_resnet):
    model, chain, _ = build(kind, method, byol=True)
    chain.advance(Clock(1))
    chain.visit(Visit(1))
    chain.before_forward(Clock(1))
    chain.detach()
    ordinary = {"tiny": make_tiny, "vit": lambda: make_vit(classes=3), "resnet": make_small_resnet}[kind]()
    assert [type(m) for m in model.encoder.modules()] == [type(m) for m in ordinary.modules()]
    assert [type(m) for m in model.target.modules()] == [type(m) for m in ordinary.modules()]
    assert not left_out(model, "")
    assert held(model).keys() == model.state_dict().keys()
    assert all(p.requires_grad != name.startswith("target.") for name, p in model.named_parameters())


@pytest.mark.parametrize("second", [["layer1", "layer2"], ["layer2.0", "layer2.1"]], ids=["the same", "inside"])
def test_blocks_have_one_schedule(second, make_small_resnet):
    model = make_small_resnet()
    with pytest.raises(ValueError, match=r'LayerFreezing has a schedule for block "layer\d.*so ProgressiveGrowth cannot have one'):
        Chain([LayerFreezing(blocks="layer*"), ProgressiveGrowth(blocks=second)]).attach(model)
    other = Chain([LayerFreezing(blocks=["layer1", "layer2"], adapters="none"), ProgressiveGrowth(blocks=["layer3", "layer4"])])
    other.attach(model)  # the refused chain left nothing behind, and other blocks may have another schedule
    other.detach()
    assert not any("_staged" in vars(module) for module in model.modules())
