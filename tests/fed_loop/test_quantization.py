"""Rounds in which what travels is quantised, against the same rounds by hand; bytes, resuming, other methods beside it."""

import copy
import warnings

import pytest
import torch

from featherlight.fed_loop import Momentum
from featherlight.fed_loop.predict import predict
from featherlight.plugins import DepthDropout, IntrinsicProjection, LayerFreezing, PrismSampling, Quantization

SIZES = [6, 10, 14]


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def trained(server, data, client):
    model = copy.deepcopy(server).train()
    optimizer = model.configure_optimizers()
    for step, batch in enumerate(data.batches(client)):
        optimizer.zero_grad()
        model.training_step(batch, step).backward()
        optimizer.step()
    return model


def in_steps(value, bits):
    """Nearest multiples of the largest magnitude over 2^(bits−1) − 1, as a float32 has it."""
    step = float(torch.tensor(float(value.abs().max()) / (2 ** (bits - 1) - 1), dtype=torch.float32))
    return torch.tensor([round(float(one) / step) * step for one in value.flatten()]).view(value.shape) if step else value


def same_but_for_the_peak(predicted, measured):
    for table in (predicted, measured):
        for row in (*table["rows"], table["total"]):
            row.pop("peak_bytes")
    assert predicted == measured


# -- rounds by hand ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_two_rounds(bits, down, net, points, federation):
    data, module, server = points(SIZES), net(sgd).double(), net(sgd).double()
    data.clients = [(x.double(), y) for x, y in data.clients]
    federation(2).run(module, data, [Quantization(bits, rounding="nearest", down=down)])
    for _ in range(2):
        received = copy.deepcopy(server)
        for value in received.parameters():
            value.data.copy_(in_steps(value.data, bits) if down else value.data)
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in server.state_dict().items()}
        for client, size in enumerate(SIZES):
            after, before = trained(received, data, client).state_dict(), received.state_dict()
            for name, value in after.items():
                change = value.double() - before[name].double()
                is_parameter = name in dict(server.named_parameters())
                total[name] += (in_steps(change, bits) if is_parameter else change) * size / sum(SIZES)
        for name, value in server.state_dict().items():
            value.add_(total[name] if value.is_floating_point() else total[name].round().to(value.dtype))
    for name, value in server.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_client_that_sends_no_number_is_rejected(net, points, federation):
    class Breaking(net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if len(batch[0]) == 3:  # the last client's only batch: a finite loss, an infinite gradient
                loss = loss + (self.head.bias.abs().sum() * 0).sqrt()
            return loss

    for bits in (4, 8):
        module = Breaking()
        result = federation(2).run(module, points([8, 8, 3]), [Quantization(bits)])
        assert [(row["clients"], row["rejected"]) for row in result.history] == [(2, 1)] * 2
        assert all(torch.isfinite(value).all() for value in module.state_dict().values())


# -- bytes ------------------------------------------------------------------------------------------------------------
def test_bytes_by_hand(net, points, federation):
    """Eight parameters in ``bits`` bytes, a scale of four bytes for each tensor, statistics as they are; headers besides."""
    statistics = 3 * (2 * 8 * 4 + 8)
    sizes = [value.numel() for value in net(sgd).parameters()]
    for bits in (2, 4, 8):
        result = federation(1).run(net(sgd), points([8]), [Quantization(bits, down=True)])
        code = sum(sizes) if bits == 8 else sum(-(-size // 8) * bits for size in sizes)
        for way in ("bytes_up", "bytes_down"):
            header = result.history[0][way] - code - 4 * len(sizes) - statistics
            assert 0 < header < 110 * (len(sizes) + 10), (bits, way)


METHODS = {
    "8": lambda: [Quantization()],
    "8 both ways": lambda: [Quantization(down=True)],
    "3 both ways": lambda: [Quantization(3, down=True)],
    "of a subspace": lambda: [IntrinsicProjection(40), Quantization()],
    "of two subspaces": lambda: [IntrinsicProjection(20, subspaces=2), Quantization(4)],
    "of sampled kernels": lambda: [PrismSampling(0.5, layers="blocks.*"), Quantization(4)],
    "of a stage": lambda: [LayerFreezing("blocks.*"), Quantization(down=True)],
    "of what is kept": lambda: [DepthDropout("blocks.*"), Quantization(down=True)],
}


@pytest.mark.parametrize("method", METHODS)
def test_predicted_is_measured(method, net, points, federation, cost_of):
    settings = federation(4, cohort=2, seed=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*real steps are metered")
        warnings.filterwarnings("ignore", message=".*running statistics.*")
        predicted = predict(settings, lambda: net(sgd), points([6, 10, 14, 4]), METHODS[method]())
        measured = settings.run(net(sgd), points([6, 10, 14, 4]), METHODS[method]())
    same_but_for_the_peak(cost_of(predicted), cost_of(measured.cost))


def test_what_is_frozen_is_sent_once_and_whole(net, points, federation):
    """Stage 3 trains block 2 and the head: the rest a client has had since the round before."""
    plain, coded = (
        federation(5).run(net(sgd), points([8]), [LayerFreezing("blocks.*"), *codecs]) for codecs in ([], [Quantization(down=True)])
    )
    assert coded.history[4]["bytes_down"] < plain.history[4]["bytes_down"]
    server, module = net(sgd), net(sgd)
    federation(3).run(module, points([8]), [LayerFreezing("blocks.*"), Quantization(2, down=True)])
    federation(1).run(server, points([8]), [LayerFreezing("blocks.*"), Quantization(2, down=True)])
    assert torch.equal(module.stem.weight, server.stem.weight)  # trained in the first stage, never rounded on the server


# -- resuming, processes ----------------------------------------------------------------------------------------------
def test_resumed_is_uninterrupted(net, points, federation, same, figures, tmp_path):
    def run(rounds, folder=None, resume=False, seed=0):
        module = net(seed=seed)
        plugins = [LayerFreezing("blocks.*", periods_per_stage=2), Quantization(4, down=True)]
        result = federation(rounds, cohort=2, folder=folder, server=Momentum()).run(module, points(SIZES), plugins, resume=resume)
        return module.state_dict(), result

    whole, result = run(4)
    run(3, tmp_path)
    resumed, again = run(4, tmp_path, resume=True, seed=9)
    same(resumed, whole)
    assert figures(again) == figures(result)


# -- other methods ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("subspaces", [1, 2])
def test_of_a_subspace(subspaces, net, points, federation):
    """z is off by at most half a step of 1/127 of its largest number, and so is what is lifted by A times that."""
    modules = [net(sgd).double() for _ in range(3)]
    data = points(SIZES)
    data.clients = [(x.double(), y) for x, y in data.clients]
    federation(1).run(modules[0], data, [IntrinsicProjection(40, subspaces)])
    federation(1).run(modules[1], data, [IntrinsicProjection(40, subspaces), Quantization()])
    exact, coded, start = (torch.cat([value.detach().flatten() for value in module.parameters()]) for module in modules)
    assert 0 < float((exact - coded).norm() / (exact - start).norm()) < 0.03


def test_of_sampled_kernels(net, points, federation):
    modules = [net(sgd) for _ in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, coded = (
            federation(1).run(module, points(SIZES), [PrismSampling(0.5, layers="blocks.*"), *codecs])
            for module, codecs in zip(modules, ([], [Quantization()]))
        )
    exact, rounded, start = (torch.cat([value.detach().flatten() for value in module.parameters()]) for module in modules)
    assert 0 < float((exact - rounded).norm() / (exact - start).norm()) < 0.03
    assert coded.history[0]["bytes_up"] < plain.history[0]["bytes_up"]


@pytest.mark.parametrize(
    "plugin", [lambda: IntrinsicProjection(40), lambda: PrismSampling(0.5, layers="blocks.*")], ids=["subspace", "sampled kernels"]
)
def test_what_others_send_down_is_not_quantised(plugin, net, points, federation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            ValueError, match=r"down=True quantises parameters of the server's model, and another plugin sends .*leave down out"
        ):
            federation(2).run(net(sgd), points(SIZES), [plugin(), Quantization(down=True)])


def test_twice(net, points, federation):
    with pytest.raises(ValueError, match="Quantization stands twice among the plugins"):
        federation(1).run(net(sgd), points(SIZES), [Quantization(), Quantization(4)])
