"""Layer freezing: what each stage holds and trains is counted by hand and follows the clock alone, and mistakes are answered."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherlight.plugins import Clock, LayerFreezing, ProgressiveGrowth, held, trained
from featherlight.plugins.bypass import Bypass
from featherlight.plugins.present import count

# Tiny (conftest): stem 80, each block 296, tail 43. timm's vit: 368, 3,280 and 32.
# ResNet-18: convolutions, then batch norms (2 a channel), then the shortcut of groups 2 to 4.
STEM = 3 * 64 * 9 + 128
GROUPS = [4 * 64 * 64 * 9 + 4 * 128] + [w // 2 * w * 9 + 3 * w * w * 9 + w // 2 * w + 5 * 2 * w for w in (128, 256, 512)]
FC = 512 * 3 + 3


def attached(model, **arguments):
    plugin = LayerFreezing(**arguments)
    plugin.attach(model)
    return plugin


def at(model, plugin, period, step=0):
    """Bring a model to a period as a host does."""
    model.train()
    return plugin.advance(Clock(period, step))


def counts(model):
    return count(held(model)), count(trained(model))


# -- stages -----------------------------------------------------------------------------------------------------------
def test_what_each_stage_holds_and_trains(make_tiny):
    model = make_tiny(4)
    plugin = attached(model, blocks="layers.*")
    for stage in range(4):
        at(model, plugin, stage)
        assert counts(model) == (80 + 296 * (stage + 1) + 43, 296 + 43 + (80 if stage == 0 else 0))


def test_a_timm_vit_by_family(make_vit):
    model = make_vit(3)
    plugin = attached(model, periods_per_stage=2)
    for period, expected in enumerate([(3680, 3680), (3680, 3680), (6960, 3312), (6960, 3312), (10240, 3312), (10240, 3312)]):
        at(model, plugin, period)
        assert counts(model) == expected


def test_resnet18_by_groups_with_adapters(make_resnet):
    model = make_resnet()
    plugin = attached(model)
    for stage in range(4):
        at(model, plugin, stage)
        width = 64 * 2**stage
        adapter = width * 512 + 512 if stage < 3 else 0
        assert counts(model) == (
            STEM + sum(GROUPS[: stage + 1]) + FC + adapter,
            GROUPS[stage] + FC + adapter + (STEM if stage == 0 else 0),
        )


def test_resnet18_counts_agree_with_the_published_total():
    assert STEM - 3 * 64 * 9 + 3 * 64 * 49 + sum(GROUPS) + 512 * 1000 + 1000 == 11_689_512  # torchvision: resnet18, ImageNet


def test_without_growth_the_whole_depth_stays_and_a_prefix_freezes(make_tiny):
    model = make_tiny(4)
    plugin = attached(model, blocks="layers.*", grow=False)
    for stage in range(4):
        at(model, plugin, stage)
        assert counts(model) == (80 + 4 * 296 + 43, (4 - stage) * 296 + 43 + (80 if stage == 0 else 0))


def test_blocks_per_stage_may_leave_a_smaller_last_group(make_tiny):
    model = make_tiny(5)
    plugin = attached(model, blocks="layers.*", blocks_per_stage=2)
    seen = []
    for stage in range(3):
        at(model, plugin, stage)
        seen.append(counts(model)[1])
    assert seen == [80 + 2 * 296 + 43, 2 * 296 + 43, 296 + 43]


def test_blocks_per_stage_as_a_list(make_tiny):
    model = make_tiny(4)
    plugin = attached(model, blocks="layers.*", blocks_per_stage=[1, 3])
    at(model, plugin, 1)
    assert counts(model) == (80 + 4 * 296 + 43, 3 * 296 + 43)


@pytest.mark.parametrize(
    ("periods", "stages"),
    [(1, [0, 1, 2, 3, 3, 3]), (2, [0, 0, 1, 1, 2, 2, 3, 3, 3]), ([2, 1, 3, 1], [0, 0, 1, 2, 2, 2, 3, 3, 3])],
)
def test_schedules(make_tiny, periods, stages):
    plugin = attached(make_tiny(4), blocks="layers.*", periods_per_stage=periods)
    assert [plugin.stage(period) for period in range(len(stages))] == stages


@pytest.mark.parametrize(("blocks", "each", "starts"), [(4, 1, [0, 3, 5, 8]), (4, 2, [0, 5]), (4, 3, [0, 5]), (3, 1, [0, 4, 7])])
def test_stages_share_the_periods_evenly(make_tiny, blocks, each, starts):
    plugin = attached(make_tiny(blocks), blocks="layers.*", blocks_per_stage=each, periods=10)
    assert [plugin.stage(period) for period in range(15)] == [sum(period >= start for start in starts) - 1 for period in range(15)]


def test_features_of_a_stage_are_its_newest_blocks_through_the_tail(make_tiny, images):
    model = make_tiny(3)
    plugin = attached(model, blocks="layers.*")
    for stage in range(3):
        at(model, plugin, stage)
        x = model.stem(images["tiny"])
        for block in model.layers[: stage + 1]:
            x = block.forward(x)
        assert torch.equal(model(images["tiny"]), model.tail(x))


def test_what_the_user_froze_stays_frozen(make_tiny, training):
    model = make_tiny(3)
    model.layers[1].up.requires_grad_(False)
    model.cls_token.requires_grad_(False)
    plugin = attached(model, blocks="layers.*", targets={})
    at(model, plugin, 0)
    assert "cls_token" not in training(model)
    at(model, plugin, 1)
    assert {name for name in training(model) if name.startswith("layers.1")} == {
        f"layers.1.{layer}.{kind}" for layer in ("norm", "down") for kind in ("weight", "bias")
    }
    plugin.detach()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == {"cls_token", "layers.1.up.weight", "layers.1.up.bias"}


def test_a_change_tells_what_froze_and_what_thawed(make_tiny):
    model = make_tiny(3)
    plugin = attached(model, blocks="layers.*")
    names = {id(p): name for name, p in model.named_parameters()}

    def told(parameters):
        return {names[id(p)].rsplit(".", 2)[0] if "layers" in names[id(p)] else names[id(p)].split(".")[0] for p in parameters}

    first = at(model, plugin, 0)
    assert told(first.froze) == {"layers.1", "layers.2"}
    assert not first.thawed
    second = at(model, plugin, 1)
    assert told(second.froze) == {"cls_token", "pos_embed", "embed", "layers.0"}
    assert told(second.thawed) == {"layers.1"}
    assert not at(model, plugin, 1)


# -- pure functions of the clock --------------------------------------------------------------------------------------
def state_of(model):
    return (
        {name for name, p in model.named_parameters() if p.requires_grad},
        set(held(model)),
        set(trained(model)),
        {name for name, module in model.named_modules() if module.training},
        {name for name, module in model.named_modules() if isinstance(module, Bypass) and module._bypassed_by},
    )


KINDS = {
    "freezing": lambda: LayerFreezing(blocks="layers.*", blocks_per_stage=[1, 2, 1], periods_per_stage=[2, 1, 3]),
    "prefix": lambda: LayerFreezing(blocks="layers.*", periods_per_stage=2, grow=False),
    "growth": lambda: ProgressiveGrowth(blocks="layers.*", periods_per_stage=3, warmup_periods=1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("byol", [False, True], ids=["alone", "with target"])
def test_any_way_to_a_period_ends_in_the_same_state(kind, byol, make_tiny, make_byol):
    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 14), st.integers(0, 1)), min_size=1, max_size=5))
    def check(clocks):
        models = []
        for way in (clocks, clocks[-1:]):
            model = make_byol(make_tiny(4, dropout=0.1)) if byol else make_tiny(4, dropout=0.1)
            plugin = KINDS[kind]()
            if byol:
                plugin.blocks = "encoder.layers.*"
            plugin.attach(model)
            for clock in way:
                at(model, plugin, *clock)
            models.append(model)
        assert state_of(models[0]) == state_of(models[1])

    check()


def test_adapters_too_follow_the_clock_alone(make_small_resnet):
    model = make_small_resnet()
    plugin = attached(model)
    states = {}
    for period in (2, 0, 3, 1, 2, 3, 0, 1):
        at(model, plugin, period)
        assert states.setdefault(period, state_of(model)) == state_of(model)


# -- the way back -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("period", [0, 1, 3])
def test_detach_leaves_an_ordinary_model(period, make_resnet, images):
    model, ordinary = make_resnet(), make_resnet()
    plugin = attached(model)
    at(model, plugin, period)
    plugin.detach()
    assert list(model.state_dict()) == list(ordinary.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in ordinary.modules()]
    assert held(model).keys() == ordinary.state_dict().keys()
    assert torch.equal(model.eval()(images["resnet"]), ordinary.eval()(images["resnet"]))
    attached(model)  # and can be attached again


# -- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"blocks_per_stage": 0}, r"blocks_per_stage=0: give a count of at least 1"),
        ({"blocks_per_stage": [1, 0]}, r"blocks_per_stage=\[1, 0\]"),
        ({"periods_per_stage": []}, r"periods_per_stage=\[\]"),
        ({"periods_per_stage": -1}, r"periods_per_stage=-1"),
        ({"init": "zeros"}, r"init='zeros' is not known; use 'random' or 'copy_previous'"),
        ({"adapters": "linear"}, r"adapters='linear' is not known; use 'auto' or 'none'"),
        ({"periods_per_stage": 1.5}, r"periods_per_stage=1\.5: give a count of at least 1"),
        ({"blocks_per_stage": [1, 2.5]}, r"blocks_per_stage=\[1, 2\.5\]: give a count"),
        ({"blocks_per_stage": 5}, r"blocks_per_stage=5, but the model has 4 blocks: layers\.0, layers\.1, layers\.2, layers\.3"),
        ({"blocks_per_stage": [1, 2]}, r"blocks_per_stage=\[1, 2\] adds up to 3, but the model has 4 blocks"),
        ({"blocks_per_stage": [3, 2]}, r"adds up to 5, but the model has 4 blocks"),
        (
            {"periods_per_stage": [1] * 5},
            r"makes 5 stages, but 4 blocks at blocks_per_stage=1 make 4: shorten the list or name finer blocks",
        ),
        ({"periods": 0}, r"periods=0: give a count of at least 1, or leave it out"),
        ({"periods": 3}, r"periods=3 are too few for 4 stages: give one for each, or more blocks_per_stage"),
        ({"periods": 8, "periods_per_stage": 2}, r"periods=8 and periods_per_stage=2 both say how long stages are: leave one out"),
        ({"periods_per_stage": [1, 2]}, r"has 2 entries for 4 stages: give one for each"),
        ({"blocks": "layer.*"}, r'block "layer\.\*" not found; this Tiny has: embed, layers, norm, head'),
        ({"blocks": "layers"}, r"ModuleList has none: name its items, as in 'layers\.\*'"),
    ],
)
def test_mistakes_are_answered(arguments, says, make_tiny):
    with pytest.raises(ValueError, match=says):
        attached(make_tiny(4), **{"blocks": "layers.*", **arguments})
