"""Layer freezing: what each stage holds and trains is counted by hand, and what is frozen does not move."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from featherlight.plugins import Chain, Clock, LayerFreezing, ProgressiveGrowth, held, trained
from featherlight.plugins.adapters import WidthAdapter, width_of
from featherlight.plugins.bypass import Bypass
from featherlight.plugins.optimizer_state import check_covered, clear, release
from featherlight.plugins.present import count
from featherlight.plugins.step_cost import StepMeter

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


# -- copy of the block before -----------------------------------------------------------------------------------------
def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_copy_previous_happens_at_the_first_step_of_a_stage_only(make_tiny):
    model = make_tiny(3)
    plugin = attached(model, blocks="layers.*", periods_per_stage=2, init="copy_previous")
    own = copy.deepcopy(model.layers[1])
    for clock in ((0, 0), (1, 0), (2, 1), (3, 0)):
        at(model, plugin, *clock)
        assert same(model.layers[1], own)
    with torch.no_grad():
        model.layers[0].up.weight.add_(1)
    at(model, plugin, 2, 0)
    assert same(model.layers[1], model.layers[0])
    at(model, plugin, 2, 0)
    assert same(model.layers[1], model.layers[0])
    with torch.no_grad():
        model.layers[1].up.weight.add_(1)
    learnt = copy.deepcopy(model.layers[1])
    at(model, plugin, 3, 0)
    at(model, plugin, 2, 5)
    assert same(model.layers[1], learnt)
    at(model, plugin, 4, 0)
    assert same(model.layers[2], learnt)


def test_copy_previous_gives_every_block_of_a_group_the_last_one_before(make_tiny):
    model = make_tiny(4)
    plugin = attached(model, blocks="layers.*", blocks_per_stage=2, init="copy_previous")
    at(model, plugin, 1)
    assert same(model.layers[2], model.layers[1])
    assert same(model.layers[3], model.layers[1])
    assert not same(model.layers[0], model.layers[1])


def test_random_keeps_each_blocks_own_values(make_tiny, snapshot, moved):
    model = make_tiny(3)
    before = snapshot(model)
    plugin = attached(model, blocks="layers.*")
    for period in range(3):
        at(model, plugin, period)
    assert not moved(before, model)


def test_copy_previous_needs_blocks_of_one_shape(make_small_resnet):
    model = make_small_resnet()
    plugin = attached(model, init="copy_previous")
    at(model, plugin, 0)
    with pytest.raises(ValueError, match=r"needs blocks of one shape, but stage 2 begins .*use init='random'"):
        at(model, plugin, 1)


# -- nothing frozen moves ---------------------------------------------------------------------------------------------
def lars(parameters):
    from lightly.utils.lars import LARS

    return LARS(parameters, 0.5, momentum=0.9, weight_decay=0.1)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "lars": lars,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["tiny", "resnet"])
def test_frozen_weights_statistics_and_optimizer_state_do_not_move(
    kind, optimizer, make_tiny, make_small_resnet, images, snapshot, moved, below, take_step
):
    model, pattern = (make_tiny(3, dropout=0.2), "layers.*") if kind == "tiny" else (make_small_resnet(), "layer*")
    plugin = attached(model, blocks=pattern)
    stem, blocks = plugin._tower.stem, plugin._tower.paths
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    for stage in range(3):
        release([optimizer], at(model, plugin, stage))
        check_covered(model, [optimizer])
        before = snapshot(model)
        for step in range(2):
            take_step(model, plugin, Clock(stage, step), optimizer, images[kind])
        frozen = (*(stem if stage else ()), *blocks[:stage], *blocks[stage + 1 :])
        changed = moved(before, model)
        assert not below(changed, *frozen)
        assert below(changed, blocks[stage]) == below(before, blocks[stage])
        with_state = {name for name, p in model.named_parameters() if optimizer.state.get(p)}
        assert not below(with_state, *frozen)
        assert below(with_state, blocks[stage])


def test_frozen_norms_and_dropout_are_in_eval_mode_in_every_step(make_small_resnet, make_tiny, images):
    resnet = make_small_resnet()
    plugin = attached(resnet)
    at(resnet, plugin, 2)
    resnet.train()  # what a host does before each epoch
    plugin.before_forward(Clock(2, 0))
    assert not any(module.training for part in (resnet.bn1, resnet.layer1, resnet.layer2) for module in part.modules())
    assert all(module.training for part in (resnet.layer3, resnet.fc) for module in part.modules())

    tiny = make_tiny(3, dropout=0.5)
    plugin = attached(tiny, blocks="layers.*")
    at(tiny, plugin, 1)
    tiny.train()
    plugin.before_forward(Clock(1, 0))
    x = tiny.stem(images["tiny"])
    assert torch.equal(tiny.layers[0](x), tiny.layers[0](x))
    assert not torch.equal(tiny.layers[1](x), tiny.layers[1](x))


def test_a_thawed_block_is_back_in_training_mode(make_tiny):
    model = make_tiny(3)
    plugin = attached(model, blocks="layers.*")
    at(model, plugin, 2)
    assert not model.layers[0].training
    at(model, plugin, 0)
    assert model.layers[0].training
    assert model.layers[0].norm.training


def test_a_model_in_eval_mode_is_not_woken(make_tiny):
    model = make_tiny(3).eval()
    plugin = attached(model, blocks="layers.*")
    for period in (2, 0, 1):
        plugin.advance(Clock(period))
        assert not any(module.training for module in model.modules())


def test_release_drops_gradients_and_state_of_what_froze_only(make_tiny, images, take_step):
    model = make_tiny(2)
    plugin = attached(model, blocks="layers.*")
    at(model, plugin, 0)
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, plugin, Clock(0, 0), optimizer, images["tiny"])
    head = optimizer.state[model.head.weight]["exp_avg"]
    release([optimizer], at(model, plugin, 1))
    assert model.layers[0].up.weight.grad is None
    assert model.layers[0].up.weight not in optimizer.state
    assert model.head.weight.grad is not None
    assert optimizer.state[model.head.weight]["exp_avg"] is head
    clear([optimizer])
    assert not optimizer.state


def test_what_should_train_but_is_in_no_optimizer_is_named(make_tiny):
    model = make_tiny(2)
    plugin = attached(model, blocks="layers.*")
    at(model, plugin, 0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    check_covered(model, [optimizer])
    at(model, plugin, 1)
    with pytest.raises(ValueError, match=r"^layers\.1\.norm\.weight, .* and 3 more should train now but is in no optimizer; give"):
        check_covered(model, [optimizer])
    check_covered(model, [optimizer, torch.optim.SGD(model.layers[1].parameters(), 0.1)])


def test_a_stem_that_was_not_named_is_told_and_not_silently_paid_for(make_tiny, images):
    model = make_tiny(2)
    plugin = attached(model, blocks="layers.*", stem=["embed"])  # forgets the class token and the positions
    at(model, plugin, 1)
    with pytest.raises(RuntimeError, match="input of a frozen block requires grad"):
        model(images["tiny"])


# -- mistakes ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"blocks_per_stage": 0}, r"blocks_per_stage=0: give a count of at least 1"),
        ({"blocks_per_stage": [1, 0]}, r"blocks_per_stage=\[1, 0\]"),
        ({"periods_per_stage": []}, r"periods_per_stage=\[\]"),
        ({"periods_per_stage": -1}, r"periods_per_stage=-1"),
        ({"init": "zeros"}, r"init='zeros' is not known; use 'random' or 'copy_previous'"),
        ({"blocks_per_stage": 5}, r"blocks_per_stage=5, but the model has 4 blocks: layers\.0, layers\.1, layers\.2, layers\.3"),
        ({"blocks_per_stage": [1, 2]}, r"blocks_per_stage=\[1, 2\] adds up to 3, but the model has 4 blocks"),
        ({"blocks_per_stage": [3, 2]}, r"adds up to 5, but the model has 4 blocks"),
        (
            {"periods_per_stage": [1] * 5},
            r"makes 5 stages, but 4 blocks at blocks_per_stage=1 make 4: shorten the list or name finer blocks",
        ),
        ({"periods_per_stage": [1, 2]}, r"has 2 entries for 4 stages: give one for each"),
        ({"blocks": "layer.*"}, r'block "layer\.\*" not found; this Tiny has: embed, layers, norm, head'),
        ({"blocks": "layers"}, r"ModuleList has none: name its items, as in 'layers\.\*'"),
    ],
)
def test_mistakes_are_answered(arguments, says, make_tiny):
    with pytest.raises(ValueError, match=says):
        attached(make_tiny(4), **{"blocks": "layers.*", **arguments})


# -- targets ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["tiny", "resnet"])
def test_targets_go_through_every_stage_with_their_twin(kind, make_tiny, make_small_resnet, make_byol, images):
    encoder, pattern = (make_tiny(3), "encoder.layers.*") if kind == "tiny" else (make_small_resnet(), "encoder.layer*")
    model = make_byol(encoder)
    plugin = attached(model, blocks=pattern)
    for stage in range(3):
        at(model, plugin, stage)
        names = set(held(model))
        assert {name.removeprefix("target.") for name in names if name.startswith("target.")} == {
            name.removeprefix("encoder.") for name in names if name.startswith("encoder.")
        }
        assert not any(p.requires_grad for p in model.target.parameters())
        model.eval()
        assert torch.equal(model.target(images[kind]), model.encoder(images[kind]))


def test_a_stage_begins_with_equal_twins_and_only_then(make_tiny, make_byol):
    model = make_byol(make_tiny(3))
    plugin = attached(model, blocks="encoder.layers.*", periods_per_stage=2)

    def drift():
        with torch.no_grad():
            for parameter in (*model.target.layers.parameters(), model.target.cls_token, model.target.head.weight):
                parameter.add_(1)

    drift()
    at(model, plugin, 1, 0)
    assert not same(model.target.layers, model.encoder.layers)
    at(model, plugin, 2, 0)
    assert same(model.target.layers, model.encoder.layers)
    assert torch.equal(model.target.cls_token, model.encoder.cls_token)
    assert not torch.equal(model.target.head.weight, model.encoder.head.weight)  # heads keep their momentum


def test_a_stem_partly_outside_the_online_branch_is_copied_by_name(make_tiny, make_byol):
    model = nn.ModuleDict({"pre": nn.Linear(3, 3), "byol": make_byol(make_tiny(2))})
    stem = [f"byol.encoder.{name}" for name in ("cls_token", "pos_embed", "embed")]
    plugin = attached(model, blocks="byol.encoder.layers.*", stem=[*stem, "pre"])
    with torch.no_grad():
        model["byol"].encoder.cls_token.add_(1)
    at(model, plugin, 1)
    assert torch.equal(model["byol"].target.cls_token, model["byol"].encoder.cls_token)
    assert not model["pre"].weight.requires_grad


def test_a_new_block_that_is_a_copy_is_one_in_the_target_too(make_tiny, make_byol):
    model = make_byol(make_tiny(2))
    plugin = attached(model, blocks="encoder.layers.*", init="copy_previous")
    at(model, plugin, 1)
    assert same(model.target.layers[1], model.encoder.layers[0])


# -- adapters ---------------------------------------------------------------------------------------------------------
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
        Chain([LayerFreezing(), LayerFreezing()]).attach(model)


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


# -- bytes saved for backward -----------------------------------------------------------------------------------------
def saved_bytes(model, plugin, period, x):
    at(model, plugin, period)
    plugin.before_forward(Clock(period, 0))
    with StepMeter(model) as meter:
        loss = model(x).sum()
        meter.forward_is_done()
        loss.backward()
    return meter.cost.saved_bytes


def test_resnet18_end_to_end_against_its_second_half(make_resnet):
    """286.9 and 62.2 MiB: measured apart from this package, on torch 2.15, batch 64 at 32 px."""
    with FakeTensorMode():
        model = make_resnet()
        plugin = attached(model, blocks_per_stage=[2, 2], grow=False)
        x = torch.empty(64, 3, 32, 32)
        whole, half = (saved_bytes(model, plugin, period, x) / 2**20 for period in (0, 1))
    assert whole == pytest.approx(286.9, rel=0.02)
    assert half == pytest.approx(62.2, rel=0.02)


def test_a_frozen_prefix_saves_nothing(make_tiny, images):
    """The prefix runs as if under no_grad: the bytes are those of the newest block and the tail alone."""
    for depth in (2, 5):
        model = make_tiny(depth)
        plugin = attached(model, blocks="layers.*")
        found = saved_bytes(model, plugin, depth - 1, images["tiny"])
        at(model, plugin, depth - 1)
        with torch.no_grad():
            x = model.stem(images["tiny"])
            for block in model.layers[:-1]:
                x = block(x)
        with StepMeter(model) as meter:
            loss = model.tail(model.layers[-1](x)).sum()
            meter.forward_is_done()
            loss.backward()
        assert found == meter.cost.saved_bytes > 0
