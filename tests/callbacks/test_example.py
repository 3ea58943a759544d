"""What README shows: a torchvision ResNet-18 in a LightningModule that nobody prepared; the same from a configuration file."""

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from featherlight.callbacks import CostMonitor, DepthDropout, FreshStart, LayerFreezing, ProgressiveGrowth


class Example(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = resnet18(num_classes=4)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.backbone(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


@pytest.fixture
def images():
    return DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4)), 2)


def test_resnet_18(images, make_trainer):
    """Whole groups of a ResNet: none but the first keeps its input's shape, so that it is the one that may be left out."""
    monitor = CostMonitor(show=False)
    freezing = LayerFreezing(blocks="backbone.layer*", blocks_per_stage=1, periods_per_stage=1)
    model = Example()
    make_trainer(freezing, DepthDropout(blocks="backbone.layer*", rate=0.5), monitor, max_epochs=4).fit(model, images)
    rows = monitor.table.rows()
    assert len(rows) == 4
    layers = [sum(p.numel() for p in getattr(model.backbone, f"layer{i}").parameters()) for i in (1, 2, 3, 4)]
    stem, head = 64 * 3 * 49 + 128, 512 * 4 + 4
    adapters = [width * 512 + 512 for width in (64, 128, 256)] + [0]
    for stage, row in enumerate(rows):
        assert row["params_trained"] == (stem if stage == 0 else 0) + layers[stage] + adapters[stage] + head
        dropped = {0: [], 1: [0, layers[0]], 2: [layers[0]], 3: [layers[0]]}
        held = stem + sum(layers[: stage + 1]) + adapters[stage] + head
        assert held - row["params_held"] in (dropped[stage] or [0])
    assert rows[3]["saved_bytes"] < rows[0]["saved_bytes"] / 2
    assert all(p.requires_grad for p in model.parameters())
    assert model.state_dict().keys() == Example().state_dict().keys()


class Small(Example):
    """ResNet-18 for 32 px images: stride 1 and no pooling in the stem; its features and nothing else."""

    def __init__(self):
        super().__init__()
        self.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.backbone.maxpool = nn.Identity()
        self.backbone.fc = nn.Identity()

    def training_step(self, batch, batch_idx):
        return self.backbone(batch[0]).sum()


def test_bytes_saved_for_backward(make_trainer):
    """Batch 64 at 32 px: 286.9 MiB end to end, 62.2 MiB where the second half trains."""
    loader = DataLoader(TensorDataset(torch.randn(64, 3, 32, 32), torch.arange(64)), 64)
    monitor = CostMonitor(show=False)
    half = LayerFreezing(blocks="backbone.layer*", blocks_per_stage=[2, 2], grow=False)
    make_trainer(half, monitor, max_epochs=2).fit(Small(), loader)
    end_to_end, second_half = (row["saved_bytes"] / 2**20 for row in monitor.table.rows())
    assert end_to_end == pytest.approx(286.9, rel=0.02)
    assert second_half == pytest.approx(62.2, rel=0.02)


class Own(Example):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4)), 2)


def test_from_a_configuration_file(tmp_path):
    callbacks = [
        {"class_path": "featherlight.callbacks.LayerFreezing", "init_args": {"blocks": "backbone.layer*.*", "blocks_per_stage": [2, 6]}},
        {"class_path": "featherlight.callbacks.DepthDropout", "init_args": {"blocks": ["backbone.layer*.*"], "max_kept": 3, "seed": 3}},
        {"class_path": "featherlight.callbacks.CostMonitor", "init_args": {"show": False}},
        {"class_path": "featherlight.callbacks.FreshStart"},
    ]
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    config = {"trainer": {"accelerator": "cpu", "max_epochs": 2, "callbacks": callbacks, **silent}}
    (tmp_path / "config.yaml").write_text(yaml.dump(config))
    cli = LightningCLI(Own, save_config_callback=None, args=["fit", "--config", str(tmp_path / "config.yaml")])
    monitor = next(callback for callback in cli.trainer.callbacks if isinstance(callback, CostMonitor))
    assert [row["rounds"] for row in monitor.table.rows()] == [1, 1]
    freezing, dropout = cli.trainer.callbacks[:2]
    assert freezing.plugin.blocks_per_stage == [2, 6]
    assert (dropout.plugin.max_kept, dropout.seed) == (3, 3)


ARGUMENTS = {
    LayerFreezing: {
        "blocks",
        "blocks_per_stage",
        "periods_per_stage",
        "init",
        "grow",
        "adapters",
        "stem",
        "tail",
        "targets",
        "share_prefix",
        "periods",
        "seed",
    },
    ProgressiveGrowth: {
        "blocks",
        "blocks_per_stage",
        "periods_per_stage",
        "warmup_periods",
        "init",
        "adapters",
        "stem",
        "tail",
        "targets",
        "share_prefix",
        "periods",
        "seed",
    },
    DepthDropout: {"blocks", "rate", "max_kept", "every", "scale", "targets", "seed"},
    CostMonitor: {"show"},
    FreshStart: {"seed"},
}


@pytest.mark.parametrize("callback", ARGUMENTS)
def test_typed_arguments_and_help(callback):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(callback, "c")
    names = set(parser.get_defaults().c.keys())
    assert names == ARGUMENTS[callback]
    text = " ".join(parser.format_help().split())
    if "rate" in names:
        assert "share of the earlier blocks to leave out" in text
        with pytest.raises(Exception, match="rate"):
            parser.parse_args(["--c.rate=much"])
    if "init" in names:
        assert "what a new block starts from" in text
        with pytest.raises(Exception, match="init"):
            parser.parse_args(["--c.init=zero"])


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="ratio"):
        DepthDropout(ratio=0.5)
