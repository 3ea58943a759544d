"""``configs/fit``: every callback under ``featherlight fit``, and what its cost table says that it saves, or costs."""

import json
from pathlib import Path
from typing import Any

import pytest

from featherlight import callbacks
from featherlight.cli import main

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "fit"
SMALL = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--data.limit_train=48", "--data.batch_size=16", "--probes=[]"]
LESS, AS_MUCH, MORE = -1, 0, 1
WANTED = {
    "layer_freezing": {"params_held": LESS, "params_trained": LESS, "saved_bytes": LESS, "flops_forward": LESS, "flops_backward": LESS},
    "progressive_growth": {"params_held": LESS, "saved_bytes": LESS, "flops_forward": LESS, "flops_backward": LESS},
    "depth_dropout": {"params_trained": LESS, "saved_bytes": LESS, "flops_forward": LESS, "flops_backward": LESS},
    "prism": {"params_trained": LESS, "flops_forward": LESS},
    "intrinsic_projection": {"flops_forward": AS_MUCH, "flops_backward": MORE},
    "representation_alignment": {"params_held": MORE, "flops_forward": MORE, "params_trained": AS_MUCH},
    "fresh_start": {"params_held": LESS, "params_trained": LESS, "flops_backward": LESS},
}
"""Each figure of the first epoch beside that of the model without callbacks."""


def total(name: str, *options: str) -> dict[str, Any]:
    main(["fit", "-c", str(CONFIGS / f"{name}.yaml"), *SMALL, *options])
    (path,) = Path("runs").glob("*/cost.json")
    return json.loads(path.read_text())["total"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        return total("layer_freezing", "--trainer.callbacks=[]")


@pytest.mark.parametrize("name", WANTED)
def test_a_callback_saves_what_it_is_for(
    name: str, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own = total(name)
    signs = {figure: (own[figure] > whole[figure]) - (own[figure] < whole[figure]) for figure in WANTED[name]}
    assert signs == WANTED[name]
    assert "cost: figures per epoch of a stage" in capsys.readouterr().out


def test_every_callback_has_a_configuration() -> None:
    text = "".join(path.read_text() for path in CONFIGS.glob("*.yaml"))
    methods = set(callbacks.__all__) - {"CostMonitor", "PluginCallback"}
    assert not {name for name in methods if f"class_path: {name}\n" not in text}
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == WANTED.keys()
