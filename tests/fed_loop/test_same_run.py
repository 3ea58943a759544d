"""Which settings differ between a checkpoint and a run: only those, by name, with both values, in few words."""

import pytest

from featherlight.fed_loop.same_run import check_same_run, differences

BEFORE = {
    "model": "SimCLR({'backbone': 'vit', 'backbone_options': {'depth': 4, 'width': 64}, 'lr': 0.002, 'schedule': None})",
    "entries": "301b67",
    "plugins": "{'0.LayerFreezing': {'blocks': 'backbone.blocks.*', 'periods_per_stage': 2}}",
    "clients": "10 with 77aa",
    "seed": "0",
    "data": str(
        {"dataset": repr("digits"), "augmentation": "Augmentation(min_scale=0.5, flip=0.0)", "partition": "Dirichlet({'alpha': 0.5})"}
    ),
}
CHANGES = {
    "seed": ({"seed": "1"}, "seed was 0, now 1"),
    "a number": ({"model": BEFORE["model"].replace("0.002", "0.1")}, "model.lr was 0.002, now 0.1"),
    "nested": ({"model": BEFORE["model"].replace("64", "32")}, "model.backbone_options.width was 64, now 32"),
    "its shapes follow": (
        {"model": BEFORE["model"].replace("64", "32"), "entries": "99"},
        "model.backbone_options.width was 64, now 32",
    ),
    "a class": ({"model": BEFORE["model"].replace("SimCLR", "BYOL")}, "model was SimCLR, now BYOL"),
    "a plugin's": ({"plugins": BEFORE["plugins"].replace("2", "3")}, "plugins.0.LayerFreezing.periods_per_stage was 2, now 3"),
    "no plugin": (
        {"plugins": "{}"},
        "plugins.0.LayerFreezing.blocks was backbone.blocks.*, now None, plugins.0.LayerFreezing.periods_per_stage was 2, now None",
    ),
    "a repr's": ({"data": BEFORE["data"].replace("flip=0.0", "flip=0.5")}, "data.augmentation.flip was 0.0, now 0.5"),
    "another repr's": ({"data": BEFORE["data"].replace("0.5}", "0.1}")}, "data.partition.alpha was 0.5, now 0.1"),
    "a word's type": ({"model": BEFORE["model"].replace("None", "'None'")}, "model was SimCLR({"),
    "entries alone": ({"entries": "99"}, "its model's entries have other names or shapes"),
    "sizes alone": ({"clients": "10 with 99"}, "its clients have other numbers of samples"),
    "clients": ({"clients": "8 with 99"}, "clients was 10, now 8"),
    "no expression": ({"seed": "a b"}, "seed was 0, now a b"),
    "one that is gone": ({"clip": "1.0"}, "clip was None, now 1.0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_differs_is_named(change, tmp_path):
    settings, told = CHANGES[change]
    assert differences(BEFORE, {**BEFORE, **settings}).startswith(told)
    if not told.endswith("({"):
        assert differences(BEFORE, {**BEFORE, **settings}) == told
    with pytest.raises(ValueError, match=r"checkpoint .* is of another run: .*; use the same configuration, or another folder"):
        check_same_run(tmp_path, BEFORE, {**BEFORE, **settings})


def test_the_same_is_the_same(tmp_path):
    assert differences(BEFORE, dict(BEFORE)) == ""
    check_same_run(tmp_path, BEFORE, dict(BEFORE))


def test_however_much_differs_it_is_told_in_few_words():
    others = dict.fromkeys(BEFORE, "Other({'a': '" + 300 * "x" + "', 'b': 1, 'c': 2})")
    told = differences(BEFORE, others)
    assert len(told) < 200
    assert told.endswith("more")
