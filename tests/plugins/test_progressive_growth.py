"""Progressive growth: everything that is there trains, but during the warm-up of a new block."""

import pytest
import torch

from featherlight.plugins import Clock, ProgressiveGrowth, held, trained
from featherlight.plugins.optimizer_state import check_covered, release
from featherlight.plugins.present import count

# Tiny (conftest): stem 80, each block 296, tail 43.


def attached(model, **arguments):
    plugin = ProgressiveGrowth(**arguments)
    plugin.attach(model)
    return plugin


def at(model, plugin, period, step=0):
    model.train()
    return plugin.advance(Clock(period, step))


def counts(model):
    return count(held(model)), count(trained(model))


def test_all_that_is_there_trains(make_tiny):
    model = make_tiny(3)
    plugin = attached(model, blocks="layers.*", periods_per_stage=2)
    for period in range(8):
        at(model, plugin, period)
        there = 80 + 296 * (min(period // 2, 2) + 1) + 43
        assert counts(model) == (there, there)


def test_warm_up_trains_the_newest_group_and_the_tail(make_tiny):
    model = make_tiny(4)
    plugin = attached(model, blocks="layers.*", blocks_per_stage=2, periods_per_stage=4, warmup_periods=2)
    seen = []
    for period in range(8):
        at(model, plugin, period)
        seen.append(counts(model)[1])
    first, second = 80 + 2 * 296 + 43, 80 + 4 * 296 + 43
    assert seen == [first] * 4 + [2 * 296 + 43] * 2 + [second] * 2  # the first stage has nothing to protect


def test_a_warm_up_as_long_as_its_stage_is_layer_freezing(make_tiny, training):
    model = make_tiny(3)
    plugin = attached(model, blocks="layers.*", periods_per_stage=1, warmup_periods=1)
    at(model, plugin, 2)
    assert {name.rsplit(".", 1)[0] for name in training(model)} == {"layers.2.norm", "layers.2.up", "layers.2.down", "norm", "head"}


def test_the_end_of_a_warm_up_is_told_as_a_change(make_tiny):
    model = make_tiny(2)
    plugin = attached(model, blocks="layers.*", periods_per_stage=3, warmup_periods=1)
    at(model, plugin, 0)
    growth, thaw = at(model, plugin, 3), at(model, plugin, 4)
    assert sum(p.numel() for p in growth.froze) == 80 + 296
    assert sum(p.numel() for p in growth.thawed) == 296
    assert {id(p) for p in thaw.thawed} == {id(p) for p in growth.froze}
    assert not thaw.froze
    assert not at(model, plugin, 5)


@pytest.mark.parametrize("kind", ["tiny", "resnet"])
def test_only_what_should_move_moves(kind, make_tiny, make_small_resnet, images, snapshot, moved, below, take_step):
    model, pattern = (make_tiny(2), "layers.*") if kind == "tiny" else (make_small_resnet(), "layer*")
    plugin = attached(model, blocks=pattern, periods_per_stage=2, warmup_periods=1)
    stem, blocks = plugin._tower.stem, plugin._tower.paths
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    for period, still in ((0, blocks[1:]), (2, (*stem, blocks[0], *blocks[2:])), (3, blocks[2:])):
        release([optimizer], at(model, plugin, period))
        check_covered(model, [optimizer])
        before = snapshot(model)
        for step in range(2):
            take_step(model, plugin, Clock(period, step), optimizer, images[kind])
        changed = moved(before, model)
        assert not below(changed, *still)
        moving = {path for path in (*stem, *blocks) if path not in still and below(before, path)}
        for path in moving:
            assert below(changed, path) == below(before, path), path


def test_warm_up_below_zero_is_refused():
    with pytest.raises(ValueError, match="warmup_periods=-1: give 0 or more periods"):
        ProgressiveGrowth(warmup_periods=-1)
