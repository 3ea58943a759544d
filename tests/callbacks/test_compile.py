"""torch.compile, of the whole module or of each block, changes no number beyond rounding, at any stage."""

import shutil

import pytest
import torch
from torch import nn

from featherlight.callbacks import CostMonitor, DepthDropout, LayerFreezing

BLOCKS = {"blocks": "encoder.blocks.*"}


def compile_blocks(model, backend):
    for block in model.encoder.blocks:
        block.compile(backend=backend)
    return model


def compile_all(model, backend):
    return torch.compile(model, backend=backend)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # else it would go on in eager mode, silently
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("compiled", [compile_all, compile_blocks])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_is_eager(compiled, backend, toy, loader, make_trainer, snapshots):
    def callbacks():
        return LayerFreezing(**BLOCKS, periods_per_stage=1), DepthDropout(**BLOCKS, every="batch")

    eager, model = toy(), toy()
    make_trainer(*callbacks()).fit(eager, loader)
    make_trainer(*callbacks(), snapshots).fit(compiled(model, backend), loader)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    first, _, third = snapshots.states
    for name, value in first.items():
        if name.startswith(("encoder.stem", "encoder.blocks.0")):
            assert torch.equal(value, third[name]), name


def test_compiled_costs_what_eager_does(toy, loader, make_trainer):
    names = ("params_trained", "saved_bytes", "flops_forward", "flops_backward")

    def cost(model):
        monitor = CostMonitor(show=False)
        make_trainer(LayerFreezing(**BLOCKS, periods_per_stage=1), monitor).fit(model, loader)
        return [[row[name] for name in names] for row in monitor.table.rows()]

    assert cost(compile_all(toy(), "aot_eager")) == cost(toy())


@pytest.mark.parametrize("compiled", [compile_all, compile_blocks])
def test_more_stages_than_the_compiler_keeps_versions(compiled, toy, loader, make_trainer):
    model = compiled(toy(blocks=10), "eager")
    make_trainer(LayerFreezing(**BLOCKS), max_epochs=10, limit_train_batches=1).fit(model, loader)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor(toy, loader, make_trainer):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.blocks = nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def forward(self, images):
            return self.blocks(self.stem(images.mean(dim=(1, 2))))

    eager, model = toy(encoder=Linear), toy(encoder=Linear)
    for each in (eager, compile_all(model, "inductor")):
        make_trainer(LayerFreezing(**BLOCKS), max_epochs=2).fit(each, loader)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
