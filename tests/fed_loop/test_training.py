"""The loop against training written by another route: a deep copy per client and a plain PyTorch loop."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from prism_by_hand import ConvNet
from torch import nn

from featherlight import callbacks, plugins
from featherlight.fed_loop import Adam, Average, Momentum


def plain_turn(server, data, client, epochs=1, clip=None):
    """One client's training as a notebook would write it."""
    model = copy.deepcopy(server).train()
    optimizer = model.configure_optimizers()
    for _ in range(epochs):
        for step, batch in enumerate(data.batches(client)):
            optimizer.zero_grad()
            model.training_step(batch, step).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model.state_dict()


def plain_mean(states, sizes):
    """In float64, with weights that are not rounded."""
    total = sum(sizes)
    return {name: sum(state[name].double() * size for state, size in zip(states, sizes)) / total for name in states[0]}


def into(model, values):
    """Load float64 values: rounded to float32, or to whole numbers where they are counts."""
    own = model.state_dict()
    model.load_state_dict(
        {name: (value if own[name].is_floating_point() else value.round()).to(own[name].dtype) for name, value in values.items()}
    )
    return model


def assert_close(module, model, tolerance):
    for name, value in module.state_dict().items():
        assert torch.allclose(value, model.state_dict()[name], rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("sizes", [[8, 8, 8], [6, 10, 14]])
def test_one_round_is_the_weighted_mean_of_clients_trained_alone(sizes, net, points, federation):
    data = points(sizes)
    wanted = plain_mean([plain_turn(net(), data, client, 2, 0.5) for client in range(3)], sizes)
    module = net()
    federation(1, local_epochs=2, clip=0.5).run(module, data)
    assert_close(module, into(net(), wanted), 1e-7)  # a rounding to float32


def test_full_batch_gradient_descent_on_equal_data_is_centralised(net, points, federation):
    """One full-batch step of plain SGD a round, no batch statistics: the mean of clients' steps is the step on all data."""

    class Linear(net):
        def forward(self, x):
            return self.head(self.stem(x))

    def sgd(parameters):
        return torch.optim.SGD(parameters, 0.5)

    data = points([10, 10, 10], batch_size=10)
    module, central = Linear(sgd), Linear(sgd)
    federation(5).run(module, data)
    optimizer = central.configure_optimizers()
    everything = tuple(torch.cat(parts) for parts in zip(*data.clients))
    for _ in range(5):
        optimizer.zero_grad()
        central.training_step(everything, 0).backward()
        optimizer.step()
    for name, value in module.named_parameters():
        assert torch.allclose(value, central.get_parameter(name), atol=1e-6), name


@pytest.mark.parametrize(
    "server", [Average(0.5), Momentum(0.7, 0.9), Adam(0.05, (0.8, 0.9), 1e-2)], ids=lambda server: type(server).__name__
)
def test_server_optimizers_over_rounds(server, net, points, federation):
    """Parameters go through the server optimizer; running statistics and counts take the mean, which momentum would carry too far."""
    sizes = [6, 10, 14]
    data, module = points(sizes), net()
    federation(4, server=copy.deepcopy(server)).run(module, data)
    model = net()
    for _ in range(4):
        old = copy.deepcopy(model.state_dict())
        mean = plain_mean([plain_turn(model, data, client) for client in range(3)], sizes)
        new = {}
        for name, value in mean.items():
            trained = name in dict(model.named_parameters())
            new[name] = server.step(name, old[name].double(), value) if trained else value
        into(model, new)
    assert_close(module, model, 1e-4)  # what one round rounds, the next three train on


def test_a_variance_stays_positive_under_server_momentum(net, points, federation):
    module = net()
    federation(12, server=Momentum(1.0, 0.9)).run(module, points([8, 8]))
    assert all((block.norm.running_var > 0).all() for block in module.blocks)
    assert all(block.norm.num_batches_tracked == 24 for block in module.blocks)


def test_one_client_is_plain_training_with_an_optimizer_made_anew_each_round(net, points, federation, same):
    data, module, model = points([11]), net(), net()
    federation(5, local_epochs=2).run(module, data)
    for _ in range(5):
        model.load_state_dict(plain_turn(model, data, 0, 2))
    same(module.state_dict(), model.state_dict())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision_reaches_the_training_step(precision, net, points, federation):
    seen = set()

    class Watching(net):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            seen.add((self.head.weight.dtype, batch[0].dtype, logits.dtype))
            return nn.functional.cross_entropy(logits, batch[1])

    result = federation(2, precision=precision, evaluate_clients=True).run(Watching(), points([8, 8], held_out=2))
    weights = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert seen == {(weights, weights, torch.bfloat16)}
    assert result.history[1]["rejected"] == 0
    assert result.metrics["client_loss"] > 0


def test_cohorts_are_the_ones_drawn(net, points, federation):
    from featherlight.fed_loop.cohort import sample

    sizes = [6, 10, 14, 7, 11]
    data, module, model = points(sizes), net(), net()
    federation(3, cohort=2, seed=5).run(module, data)
    for round in range(3):
        cohort = sample(5, 2, 5, round)
        mean = plain_mean([plain_turn(model, data, client) for client in cohort], [sizes[client] for client in cohort])
        into(model, mean)
    assert_close(module, model, 1e-4)


# -- a Trainer run is a one-client federation -------------------------------------------------------------------------
BLOCKS = {"blocks": "backbone.blocks.*"}
METHODS = {
    "end to end": [],
    "layer-wise, copied, with depth dropout": [
        ("LayerFreezing", {**BLOCKS, "periods_per_stage": [1, 2, 1], "init": "copy_previous"}),
        ("DepthDropout", {**BLOCKS, "rate": 0.5}),
    ],
    "progressive with warm-up": [("ProgressiveGrowth", {**BLOCKS, "warmup_periods": 1})],
    "progressive, dropout by batch": [("ProgressiveGrowth", BLOCKS), ("DepthDropout", {**BLOCKS, "every": "batch", "scale": True})],
    "layer-wise, aligned": [("RepresentationAlignment", {}), ("LayerFreezing", BLOCKS)],
}


@pytest.mark.parametrize(
    ("model", "method"),
    [("simclr", method) for method in list(METHODS)[:3]] + [("mocov3", method) for method in list(METHODS)[1:]],
)
def test_a_trainer_run_is_a_one_client_federation(model, method, ssl, digits, federation, same, tmp_path):
    options = {"num_clients": 1, "limit_train": 60, "seed": 3}
    fitted, module = (ssl(model, weight_decay=0.05, schedule="cosine", periods=4) for _ in range(2))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=4,
        callbacks=[
            callbacks.FreshStart(seed=3),
            *(getattr(callbacks, name)(seed=3, **settings) for name, settings in METHODS[method]),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(fitted, digits(**options))
    same_plugins = [getattr(plugins, name)(**settings) for name, settings in METHODS[method]]
    federation(4, seed=3).run(module, digits(**options), same_plugins)
    start = ssl(model).state_dict()
    moved = [name for name, value in fitted.named_parameters() if not torch.equal(value, start[name])]
    assert len(moved) > len(start) / 2
    for target in fitted.targets:  # a Trainer's follow at a distance, a server's are copies
        delattr(fitted, target)
        delattr(module, target)
    same(module.state_dict(), fitted.state_dict())


def test_a_module_that_has_been_federated_is_ordinary(net, points, federation, tmp_path):
    """A Trainer logs what it says, and it can be federated again with other plugins."""

    class Logging(net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

    module, data = Logging(), points([8])
    federation(2).run(module, data, [plugins.LayerFreezing(blocks="blocks.*")])
    federation(1).run(module, data, [plugins.ProgressiveGrowth(blocks="blocks.*")])
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert type(module.blocks[0]).__name__ == "Residual"
    silent = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, default_root_dir=tmp_path, **silent)
    trainer.fit(module, torch.utils.data.DataLoader(data.batches(0), batch_size=None))
    assert "loss" in trainer.callback_metrics


def test_a_run_that_ends_before_the_last_stage_says_so_as_it_begins(net, points, federation, capsys):
    for rounds, told in ((4, True), (5, False)):
        federation(rounds).run(net(), points([6]), [plugins.LayerFreezing("blocks.*", periods_per_stage=2)])
        lines = [line for line in capsys.readouterr().err.split("rounds=") if "never" in line]
        assert len(lines) == told
    federation(2).run(net(), points([6]), [plugins.ProgressiveGrowth("blocks.*", periods_per_stage=2)])
    assert "rounds=2 ends in stage 1 of 3" in capsys.readouterr().err


def test_a_model_laid_out_with_channels_last_stays_so_and_learns_the_same(pictures, federation):
    plain, last = ConvNet(), ConvNet().to(memory_format=torch.channels_last)
    before = plain.conv1.weight.detach().clone()
    for module in (plain, last):
        federation(3).run(module, pictures([8, 12]))
    assert last.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert not last.conv1.weight.is_contiguous()
    assert not torch.equal(plain.conv1.weight, before)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(last.state_dict()[name], value, msg=lambda text, name=name: f"{name}: {text}")
