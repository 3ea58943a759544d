"""Depth dropout: how many blocks go is a formula, which ones is a fair draw, and evaluation never notices."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featherlight.plugins import Chain, Clock, DepthDropout, LayerFreezing, ProgressiveGrowth, Visit, held, trained
from featherlight.plugins.adapters import keeps_shape
from featherlight.plugins.bypass import is_bypassed
from featherlight.plugins.present import count


def attached(model, **arguments):
    plugin = DepthDropout(**{"blocks": "layers.*", **arguments})
    plugin.attach(model)
    model.train()
    return plugin


def dropped(model, pattern="layer"):
    """Paths of the blocks that the forward pass skips."""
    return {name for name, module in model.named_modules() if name.startswith(pattern) and is_bypassed(module)}


def draw(model, plugin, visit, step=0):
    """What one step of a visit leaves out."""
    plugin.visit(visit)
    plugin.before_forward(Clock(visit.round, step))
    gone = dropped(model)
    plugin.after_step(Clock(visit.round, step))
    return gone


# -- how many ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("depth", "rate", "expected"),
    [(5, 0.5, 2), (4, 0.5, 2), (2, 0.5, 1), (12, 0.0, 0), (12, 0.25, 3), (12, 0.9, 10), (1, 0.5, 0), (6, 0.3, 2), (6, 0.29, 1)],
)
def test_a_rate_drops_round_rate_times_n_of_the_earlier_blocks(depth, rate, expected, make_tiny):
    model = make_tiny(depth)
    plugin = attached(model, rate=rate)  # n = depth − 1: the last block is the active one. 0.5·3 = 1.5 rounds up
    for client in range(3):
        assert len(draw(model, plugin, Visit(0, client, 0))) == expected


@pytest.mark.parametrize("every", ["round", "batch"])
def test_max_kept_is_min_s_6_of_12_blocks(every, make_tiny):
    """LW-FedSSL's tables (arXiv 2401.11647): stage s keeps min(s, 6) blocks."""
    model = make_tiny(12)
    dropout = DepthDropout(blocks="layers.*", rate=0.0, max_kept=6, every=every)
    chain = Chain([LayerFreezing(blocks="layers.*"), dropout])
    chain.attach(model)
    for stage in range(12):
        model.train()
        chain.advance(Clock(stage))
        gone = draw(model, chain, Visit(stage, 0, 0))
        left_out_by_stage = 12 - (stage + 1)
        assert 12 - len(gone) == min(stage + 1, 6)
        assert len(gone) - left_out_by_stage == max(0, stage + 1 - 6)
        assert f"layers.{stage}" not in gone


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.floats(0, 0.99), st.one_of(st.none(), st.integers(1, 10)), st.integers(0, 2**40), st.integers(0, 99))
def test_the_larger_of_rate_and_max_kept_counts(depth, rate, max_kept, seed, client):
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(depth)))
    plugin = DepthDropout(blocks="*", rate=rate, max_kept=max_kept)
    plugin.attach(model)
    plugin.visit(Visit(0, client, seed))
    plugin.before_forward(Clock(0))
    gone = dropped(model, "")
    by_rate = int(rate * (depth - 1) + 0.5)
    by_count = 0 if max_kept is None else depth - max_kept
    assert len(gone) == min(max(by_rate, by_count), depth - 1)
    assert str(depth - 1) not in gone


# -- which ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("block", "keeps"),
    [
        (nn.Conv2d(8, 8, 3, padding=1), True),
        (nn.Conv2d(8, 8, 5, padding=2), True),
        (nn.Conv2d(8, 8, 3, padding=2, dilation=2), True),
        (nn.Conv2d(8, 8, 3, padding="same"), True),
        (nn.Conv2d(8, 8, 3), False),  # loses the border
        (nn.Conv2d(8, 8, 1), True),
        (nn.Conv2d(8, 8, 3, stride=2, padding=1), False),
        (nn.Conv2d(8, 16, 3, padding=1), False),
        (nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.MaxPool2d(2)), False),
        (nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)), True),
        (nn.TransformerEncoderLayer(8, 2, 16), True),
        (nn.ReLU(), False),
    ],
    ids=lambda value: "" if isinstance(value, bool) else str(value)[:60],
)
def test_which_blocks_identity_could_replace(block, keeps):
    assert keeps_shape(block) is keeps


def test_only_blocks_of_stride_1_and_equal_width_of_a_resnet(make_resnet):
    model = make_resnet()
    plugin = attached(model, blocks="layer*.*", rate=0.9)
    # kept: layer2.0, layer3.0, layer4.0 change shape, layer4.1 is the last one; 0.9·4 = 3.6 → 4
    assert draw(model, plugin, Visit(0)) == {"layer1.0", "layer1.1", "layer2.1", "layer3.1"}


def test_bottlenecks_with_a_projection_stay():
    from torchvision.models.resnet import Bottleneck, ResNet

    model = ResNet(Bottleneck, [2, 1, 1, 1], num_classes=2)
    assert not keeps_shape(model.layer1[0])
    assert keeps_shape(model.layer1[1])


@pytest.mark.parametrize("kind", [LayerFreezing, ProgressiveGrowth])
@pytest.mark.parametrize("order", [1, -1])
def test_never_the_newest_group_whatever_the_order_in_the_chain(kind, order, make_tiny):
    model = make_tiny(6)
    plugins = [kind(blocks="layers.*", blocks_per_stage=2), DepthDropout(blocks="layers.*", rate=0.9)]
    chain = Chain(plugins[::order])
    chain.attach(model)
    for stage in range(3):
        chain.advance(Clock(stage))
        for client in range(4):
            gone = draw(model, chain, Visit(stage, client, 0))
            earlier, later = {f"layers.{i}" for i in range(2 * stage)}, {f"layers.{i}" for i in range(2 * stage + 2, 6)}
            assert later <= gone <= earlier | later
            assert len(gone & earlier) == (0, 2, 4)[stage]  # 0.9·2 = 1.8 → 2, 0.9·4 = 3.6 → 4


def test_without_growth_all_that_trains_is_active(make_tiny):
    model = make_tiny(4)
    chain = Chain([LayerFreezing(blocks="layers.*", grow=False), DepthDropout(blocks="layers.*", rate=0.9)])
    chain.attach(model)
    chain.advance(Clock(2))
    assert draw(model, chain, Visit(2)) == {"layers.0", "layers.1"}


@pytest.mark.parametrize("every", ["round", "batch"])
def test_draws_are_uniform_over_clients_and_steps(every, make_tiny):
    """2 of 4 earlier blocks: 6 subsets. Chi-square with 5 degrees of freedom exceeds 20.5 once in a thousand."""
    model = make_tiny(5)
    plugin = attached(model, rate=0.5, every=every)
    turns = 600
    subsets = dict.fromkeys(itertools.combinations([f"layers.{i}" for i in range(4)], 2), 0)
    for turn in range(turns):
        gone = draw(model, plugin, Visit(0, 0 if every == "batch" else turn, 3), turn)
        subsets[tuple(sorted(gone))] += 1
    expected = turns / 6
    assert sum((seen - expected) ** 2 / expected for seen in subsets.values()) < 20.5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 500), st.integers(0, 500), st.sampled_from(["round", "batch"]))
def test_a_draw_depends_on_seed_round_client_and_step_alone(seed, round, client, every):
    draws = []
    for noise in (0, 1):
        torch.manual_seed(noise)
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
        plugin = DepthDropout(blocks="*", every=every)
        plugin.attach(model)
        for other in range(noise * 2):  # clients before this one change nothing
            plugin.visit(Visit(round, client + 1 + other, seed))
            plugin.before_forward(Clock(round, other))
            plugin.after_step(Clock(round, other))
        state = torch.random.get_rng_state()
        plugin.visit(Visit(round, client, seed))
        plugin.before_forward(Clock(round, 4))
        draws.append(dropped(model, ""))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert draws[0] == draws[1]


def test_rounds_clients_seeds_and_steps_draw_apart(make_tiny):
    model = make_tiny(12)
    plugin = attached(model)
    for visits in ([Visit(0, c, 0) for c in range(8)], [Visit(r, 0, 0) for r in range(8)], [Visit(0, 0, s) for s in range(8)]):
        assert len({frozenset(draw(model, plugin, visit)) for visit in visits}) > 4
    plugin = attached(make_tiny(12), every="round")
    assert len({frozenset(draw(model, plugin, Visit(0), step)) for step in range(8)}) == 1
    model = make_tiny(12)
    plugin = attached(model, every="batch")
    assert len({frozenset(draw(model, plugin, Visit(0), step)) for step in range(8)}) > 4


# -- what a client holds ----------------------------------------------------------------------------------------------
def test_per_round_a_dropped_block_is_not_held_and_per_batch_it_is(make_tiny):
    for every, blocks in (("round", 3), ("batch", 5)):
        model = make_tiny(5)
        plugin = attached(model, every=every)
        plugin.visit(Visit(0))
        assert count(held(model)) == 80 + 296 * blocks + 43
        assert count(trained(model)) == 80 + 296 * blocks + 43
        plugin.before_forward(Clock(0))
        plugin.after_step(Clock(0))
        assert count(held(model)) == 80 + 296 * blocks + 43


def test_the_next_client_starts_from_the_whole_model(make_tiny):
    model = make_tiny(5)
    plugin = attached(model)
    for client in range(6):
        plugin.visit(Visit(0, client, 0))
        assert len([name for name in held(model) if name.endswith("up.weight")]) == 3


# -- the forward pass -------------------------------------------------------------------------------------------------
def by_hand(model, x, gone):
    x = model.stem(x)
    for index, layer in enumerate(model.layers):
        if f"layers.{index}" not in gone:
            x = layer.forward(x)
    return model.tail(x)


@pytest.mark.parametrize("every", ["round", "batch"])
def test_forward_is_the_kept_blocks_in_order_and_evaluation_is_all_of_them(every, make_tiny, images):
    model = make_tiny(6)
    plain = copy.deepcopy(model)
    plugin = attached(model, every=every)
    x = images["tiny"]
    plugin.visit(Visit(0, 1, 2))
    assert torch.equal(model(x), plain(x))
    for step in range(3):
        plugin.before_forward(Clock(0, step))
        gone = dropped(model)
        assert gone
        assert torch.equal(model(x), by_hand(plain, x, gone))
        plugin.after_step(Clock(0, step))
        assert torch.equal(model(x), plain(x))


def test_dropped_blocks_get_no_gradient(make_tiny, images):
    model = make_tiny(5)
    plugin = attached(model)
    plugin.visit(Visit(0))
    plugin.before_forward(Clock(0))
    model(images["tiny"]).sum().backward()
    gone = dropped(model)
    for index, layer in enumerate(model.layers):
        assert all((p.grad is None) == (f"layers.{index}" in gone) for p in layer.parameters())


def test_scale_divides_what_a_kept_earlier_block_adds_by_the_share_kept(make_tiny, images):
    model = make_tiny(5)
    plain = copy.deepcopy(model)
    plugin = attached(model, rate=0.5, scale=True)  # 2 of 4 earlier ones are kept: what they add counts twice
    plugin.visit(Visit(0))
    plugin.before_forward(Clock(0))
    x, gone = plain.stem(images["tiny"]), dropped(model)
    for index, layer in enumerate(plain.layers[:4]):
        if f"layers.{index}" not in gone:
            x = x + 2 * (layer(x) - x)
    torch.testing.assert_close(model(images["tiny"]), plain.tail(plain.layers[4](x)))
    plugin.after_step(Clock(0))
    assert torch.equal(model(images["tiny"]), plain(images["tiny"]))


def test_scale_with_every_earlier_block_gone(make_tiny, images):
    model = make_tiny(3)
    plugin = attached(model, rate=0.0, max_kept=1, scale=True)
    plugin.visit(Visit(0))
    plugin.before_forward(Clock(0))
    assert torch.equal(model(images["tiny"]), by_hand(model, images["tiny"], {"layers.0", "layers.1"}))


class Tuples(nn.Linear):
    """As blocks of some Hugging Face models: the caller takes item 0, which of a bare tensor would be the first image alone."""

    def forward(self, x):
        return (super().forward(x),)


@pytest.mark.parametrize("plugin", [DepthDropout(blocks="*"), LayerFreezing(blocks="*"), ProgressiveGrowth(blocks="*")])
def test_a_block_that_puts_out_more_than_a_tensor_is_refused(plugin):
    model = nn.ModuleDict({"a": Tuples(3, 3), "b": Tuples(3, 3)})
    plugin.attach(model)
    with pytest.raises(TypeError, match=r"puts out a tuple, so its input cannot stand in .* grow=False"):
        model["b"](torch.ones(2, 3))
    plugin.detach()
    assert isinstance(model["b"](torch.ones(2, 3)), tuple)


def test_a_block_that_puts_out_a_tuple_can_be_frozen():
    model = nn.ModuleDict({"a": Tuples(3, 3), "b": Tuples(3, 3)})
    plugin = LayerFreezing(blocks="*", grow=False)
    plugin.attach(model)
    plugin.advance(Clock(1))
    assert isinstance(model["b"](model["a"](torch.ones(2, 3))[0]), tuple)


# -- targets ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("every", ["round", "batch"])
def test_the_momentum_copy_leaves_out_the_same_blocks(every, make_tiny, make_byol, images):
    model = make_byol(make_tiny(6))
    plugin = DepthDropout(blocks="encoder.layers.*", every=every)
    plugin.attach(model)
    for client in range(3):
        plugin.visit(Visit(0, client, 0))
        plugin.before_forward(Clock(0, client))
        gone = {name.removeprefix("encoder.") for name in dropped(model, "encoder")}
        assert len(gone) == 3
        assert {name.removeprefix("target.") for name in dropped(model, "target")} == gone
        assert torch.equal(model.target(images["tiny"]), by_hand(model.encoder, images["tiny"], gone))
        held_there = {name.partition(".")[2] for name in held(model) if name.startswith("target.")}
        assert held_there == {name.partition(".")[2] for name in held(model) if name.startswith("encoder.")}
        plugin.after_step(Clock(0, client))
        assert not dropped(model, "")


# -- ends -------------------------------------------------------------------------------------------------------------
def test_detach_leaves_an_ordinary_model(make_tiny, images):
    model, ordinary = make_tiny(4), make_tiny(4)
    plugin = attached(model, scale=True)
    plugin.visit(Visit(0))
    plugin.before_forward(Clock(0))
    plugin.detach()
    assert [type(m) for m in model.modules()] == [type(m) for m in ordinary.modules()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model.modules(), ordinary.modules()))
    assert held(model).keys() == ordinary.state_dict().keys()
    assert torch.equal(model(images["tiny"]), ordinary(images["tiny"]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rate": 1.0}, r"rate=1\.0 is not a share of blocks to leave out; give 0 <= rate < 1"),
        ({"rate": -0.1}, r"rate=-0\.1"),
        ({"max_kept": 0}, r"max_kept=0: at least the active block is kept"),
        ({"max_kept": 1.5}, r"max_kept=1\.5: .* give a whole number"),
        ({"every": "epoch"}, r"every='epoch' is not known; use 'round' or 'batch'"),
    ],
)
def test_mistakes_are_answered(arguments, says):
    with pytest.raises(ValueError, match=says):
        DepthDropout(**arguments)


def test_what_max_kept_cannot_do_is_told_once(make_resnet, recwarn):
    plugin = attached(make_resnet(), blocks="layer*", rate=0.0, max_kept=2)  # only layer1 keeps its input's shape
    for client in range(3):
        plugin.visit(Visit(0, client))
        assert plugin._dropped == (0,)
    told = [str(one.message) for one in recwarn if "max_kept" in str(one.message)]
    assert len(told) == 1
    assert told[0].startswith("max_kept=2, but 3 blocks are active or change their input's shape, and stay: name finer blocks")


def test_blocks_that_identity_cannot_replace_are_answered_with_finer_ones(make_resnet):
    with pytest.raises(ValueError, match=r"none of the blocks layer2, layer3, layer4 keeps .*'backbone\.layer\*\.\*' for the residual"):
        attached(make_resnet(), blocks="layer[234]")


def test_blocks_of_hugging_faces_gpt2_can_be_left_out():
    """Their linear layers are transformers' own Conv1D."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=3, n_head=2, n_positions=8, vocab_size=16))
    plugin = DepthDropout("h.*", rate=0.5)
    plugin.attach(model)
    plugin.visit(Visit(0))
    (dropped,) = [index for index in range(3) if not any(name.startswith(f"h.{index}.") for name in held(model))]
    assert dropped < 2
    with_all = model(torch.arange(4)[None]).last_hidden_state
    plugin.before_forward(Clock(0))
    assert not torch.equal(model(torch.arange(4)[None]).last_hidden_state, with_all)
