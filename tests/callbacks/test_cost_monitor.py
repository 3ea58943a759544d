"""What CostMonitor reports against counts made by hand."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from featherlight.callbacks import CostMonitor, DepthDropout, LayerFreezing

WIDTH, BATCH, CLASSES, FLOAT, INT = 16, 4, 3, 4, 8


class Mlp(pl.LightningModule):
    """Three square layers without activations between, and a head: every number below follows from the shapes."""

    def __init__(self, manual=False):
        super().__init__()
        self.automatic_optimization = not manual
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.head = nn.Linear(WIDTH, CLASSES)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.head(self.layers(batch[0])), batch[1])
        if not self.automatic_optimization:
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.layers(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


LINEAR = WIDTH * WIDTH + WIDTH
HEAD = WIDTH * CLASSES + CLASSES
INPUTS = BATCH * WIDTH * FLOAT  # what a linear layer keeps for its weight's gradient
LOSS = BATCH * CLASSES * FLOAT + BATCH * INT + FLOAT  # log-probabilities, labels, total weight


def product(width):
    """FLOPs of a matrix product (1, WIDTH) x (WIDTH, width): a multiply-add is 2."""
    return 2 * WIDTH * width


def data(samples=10):  # batches of 4, 4 and 2
    return DataLoader(TensorDataset(torch.randn(samples, WIDTH), torch.arange(samples) % CLASSES), BATCH)


def freezing():
    return LayerFreezing(blocks=["layers.1", "layers.2"], periods_per_stage=2)


def expected(stage):
    """Stage 1: layers 0 and 1 and the head train. Stage 2: layer 2 and the head train, 0 and 1 run without a graph."""
    held = (2, 3)[stage] * LINEAR + HEAD
    trained = (2, 1)[stage] * LINEAR + HEAD
    saved = (3, 2)[stage] * INPUTS + LOSS
    forward = (2, 3)[stage] * product(WIDTH) + product(CLASSES)
    # weight gradients of all that trains; input gradients of all that trains but the lowest
    backward = (2, 1)[stage] * product(WIDTH) + product(CLASSES) + (1, 0)[stage] * product(WIDTH) + product(CLASSES)
    return held, trained, saved, 10 * forward, 10 * backward


NAMES = ("params_held", "params_trained", "saved_bytes", "flops_forward", "flops_backward")


KINDS = {"automatic": (False, {}), "accumulation": (False, {"accumulate_grad_batches": 2}), "manual": (True, {})}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False], ids=["monitor first", "monitor last"])
def test_figures_by_hand(first, kind, make_trainer):
    manual, arguments = KINDS[kind]
    monitor = CostMonitor(show=False)
    callbacks = [monitor, freezing()] if first else [freezing(), monitor]
    make_trainer(*callbacks, max_epochs=4, **arguments).fit(Mlp(manual), data(), data())
    rows = monitor.table.rows()
    assert [row["rounds"] for row in rows] == [2, 2]
    for stage, row in enumerate(rows):
        assert tuple(row[name] for name in NAMES) == expected(stage)
        assert row["seconds"] > 0
        assert row["bytes_up"] == row["bytes_down"] == 0
        # at least: parameters, gradients of what trains, batch, what is saved
        assert row["peak_bytes"] >= FLOAT * (4 * LINEAR + HEAD + row["params_trained"]) - LINEAR * FLOAT + row["saved_bytes"]
    total = monitor.table.total()
    assert total["flops_forward"] == 2 * (expected(0)[3] + expected(1)[3])
    assert total["saved_bytes"] == expected(0)[2]


def test_without_a_plugin_and_with_one_batch(make_trainer):
    monitor = CostMonitor(show=False)
    make_trainer(monitor, max_epochs=1).fit(Mlp(), data(samples=4))
    (row,) = monitor.table.rows()
    assert row["flops_forward"] == 4 * (3 * product(WIDTH) + product(CLASSES))
    assert row["saved_bytes"] == 4 * INPUTS + LOSS
    assert row["params_held"] == row["params_trained"] == 3 * LINEAR + HEAD


def test_each_draw_of_blocks_is_measured(toy, loader, make_trainer):
    monitor = CostMonitor(show=False)
    make_trainer(DepthDropout(blocks="encoder.blocks.*"), monitor, max_epochs=8).fit(toy(), loader)
    (row,) = monitor.table.rows()
    conv = 12 * 2 * 6 * 6 * 4 * 4 * 9  # 12 images; two of three blocks stay
    stem_and_head = 12 * (2 * 6 * 6 * 4 * 9 + 2 * 4 * 3)
    assert row["flops_forward"] == 2 * conv + stem_and_head
    assert row["params_held"] == 2 * (4 * 4 * 9 + 8) + (4 * 9 + 4 + 8) + 15
    assert len(monitor._measured) == 2  # one for each draw


def test_mixed_precision_saves_half_inputs_and_cast_weights(make_trainer):
    """bfloat16 is 2 bytes: inputs of all four layers, weights of those whose input needs a gradient; the loss stays in float32."""
    monitor = CostMonitor(show=False)
    make_trainer(monitor, max_epochs=1, precision="bf16-mixed").fit(Mlp(), data())
    weights = 2 * WIDTH * WIDTH + WIDTH * CLASSES
    assert monitor.table.total()["saved_bytes"] == 4 * INPUTS // 2 + weights * 2 + LOSS


def test_validation_and_measuring_are_not_in_the_seconds(make_trainer):
    class Slow(pl.Callback):
        def on_validation_batch_start(self, *_):
            __import__("time").sleep(0.3)

    monitor = CostMonitor(show=False)
    make_trainer(Slow(), monitor, max_epochs=1, val_check_interval=1).fit(Mlp(), data(), data())
    assert monitor.table.total()["seconds"] < 0.3


def test_printed_written_and_logged(make_trainer, tmp_path, capsys):
    logger = CSVLogger(tmp_path)
    monitor = CostMonitor()
    trainer = make_trainer(freezing(), monitor, max_epochs=4, logger=logger)
    trainer.fit(Mlp(), data())
    assert json.loads((tmp_path / "lightning_logs/version_0/cost.json").read_text()) == monitor.table.to_json()
    assert trainer.callback_metrics["cost/saved_bytes"] == expected(1)[2]
    assert "cost/flops_forward" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    printed = capsys.readouterr().out
    assert "stage" in printed
    assert "total" in printed


def test_an_exception_leaves_no_counter_behind(make_trainer):
    class Breaks(Mlp):
        def training_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise ArithmeticError
            return super().training_step(batch, batch_idx)

    with pytest.raises(ArithmeticError):
        make_trainer(freezing(), CostMonitor(show=False)).fit(Breaks(), data())
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
