"""Images of a shape that the model was not made for: one line before anything trains, whichever command finds out."""

from pathlib import Path

import pytest

from featherlight.cli import main

MODELS = {
    # as the examples have it, but with sizes and channels of CIFAR, on the digits: what does not fit, and what to set
    "SimCLR": ("vit", "in_channels=3 and image_size=32: set in_channels=1 and image_size=8 of the model, or image_size=32 of the data"),
    "MoCoV3": ("vit", "in_channels=3 and image_size=32: set in_channels=1 and image_size=8 of the model, or image_size=32 of the data"),
    "Classifier": ("resnet9", "in_channels=3: set in_channels=1 of the model"),
}
HOSTS = {
    "federate": "federation: {rounds: 1, accelerator: cpu, progress: false}",
    "fit": "trainer: {max_epochs: 1, accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}",
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("command", ["train", "cost"])
@pytest.mark.parametrize("model", MODELS)
def test_one_line_says_what_to_set(
    model: str, command: str, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone, says = MODELS[model]
    data = f"data: {{class_path: ImageData, init_args: {{views: {1 if model == 'Classifier' else 2}, limit_train: 64}}}}\n"
    given = f"model: {{class_path: {model}, init_args: {{backbone: {backbone}}}}}\n"
    Path("small.yaml").write_text(given + data + HOSTS[host])
    with pytest.raises(SystemExit) as stop:
        main([host if command == "train" else "cost", "-c", "small.yaml"])
    assert stop.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
    assert errors == [f"featherlight: error: images have the shape (1, 8, 8) (C, H, W), but {model} was made for {says}"]
    assert not list(tmp_path.rglob("*.ckpt"))
