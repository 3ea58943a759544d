"""Clients held near what they received, or near themselves: whole federations on the digits, what they cost, and how they go on."""

import pytest
import torch

from featherlight.fed_loop.predict import predict
from featherlight.plugins import (
    MOON,
    DepthDropout,
    FedEMA,
    IntrinsicProjection,
    LayerFreezing,
    PartitionedTraining,
    PrismSampling,
    ProgressiveGrowth,
    Proximal,
    Quantization,
    RepresentationAlignment,
)

BLOCKS = "backbone.blocks.*"
THROUGH = ["stem", "blocks", "dropout", "head"]
ON_DIGITS = {
    "cosine, layer-wise, blocks left out": (
        "mocov3",
        lambda: [RepresentationAlignment(form="cosine"), LayerFreezing(BLOCKS), DepthDropout(BLOCKS)],
    ),
    "alignment, progressive, blocks left out of batches": (
        "byol",
        lambda: [ProgressiveGrowth(BLOCKS), DepthDropout(BLOCKS, every="batch"), RepresentationAlignment()],
    ),
    "fed ema": ("byol", lambda: [FedEMA(of="backbone", keep_targets=True)]),
    "all": ("simclr", lambda: [LayerFreezing(BLOCKS), FedEMA(), Proximal(), MOON(), RepresentationAlignment(), Quantization(8)]),
}
ON_POINTS = {
    "alignment": lambda: [RepresentationAlignment(through=THROUGH)],
    "proximal": lambda: [Proximal(0.5)],
    "moon": lambda: [MOON(through=THROUGH)],
    "moon, layer-wise, blocks left out": lambda: [
        LayerFreezing("blocks.*", periods_per_stage=2),
        DepthDropout("blocks.*"),
        MOON(through=THROUGH),
    ],
    "fed ema": lambda: [FedEMA()],
}
SIZES = [10, 14, 6, 8]


@pytest.mark.parametrize("method", ON_DIGITS)
def test_what_is_predicted_is_measured_on_digits(method, ssl, digits, federation, cost_of):
    """Two of three clients a round, so that clients come for the first and for the second time."""
    model, make = ON_DIGITS[method]
    settings = federation(3, cohort=2, seed=1)
    data = digits(num_clients=3, limit_train=60, batch_size=8)
    predicted = predict(settings, lambda: ssl(model), data, make())
    result = settings.run(ssl(model), data, make())
    assert cost_of(predicted) == cost_of(result.cost)
    assert all(row["rejected"] == 0 for row in result.history)


@pytest.mark.parametrize("method", ON_POINTS)
def test_what_is_predicted_is_measured(method, net, points, federation, cost_of):
    settings = federation(3, cohort=3, seed=1)
    predicted = predict(settings, net, points(SIZES), ON_POINTS[method]())
    assert cost_of(predicted) == cost_of(settings.run(net(), points(SIZES), ON_POINTS[method]()).cost)


@pytest.mark.parametrize("method", ON_POINTS)
def test_a_method_does_something(method, net, points, federation):
    plain, module = net(), net()
    for one, held in ((plain, False), (module, True)):
        plugins = [p for p in ON_POINTS[method]() if held or isinstance(p, LayerFreezing | DepthDropout)]
        federation(2).run(one, points(SIZES), plugins)
    assert not torch.equal(plain.head.weight, module.head.weight)


def test_a_copy_is_held_and_nothing_more_travels(ssl, digits, federation):
    """SimCLR alone: all of it trains, all makes the representation."""
    parameters = sum(value.numel() for value in ssl("simclr").parameters())
    plain, aligned, moon, mixed = (
        federation(2).run(ssl("simclr"), digits(num_clients=1, limit_train=40), plugins)
        for plugins in ([], [RepresentationAlignment()], [MOON()], [FedEMA()])
    )
    (before,), (after,) = (result.cost.to_json()["rows"] for result in (plain, aligned))
    assert (before["params_held"], after["params_held"]) == (parameters, 2 * parameters)
    assert moon.cost.to_json()["rows"][0]["params_held"] == 3 * parameters  # in the second round
    assert after["flops_forward"] > 1.9 * before["flops_forward"]
    assert after["flops_backward"] < 1.02 * before["flops_backward"]  # no more than the similarities'
    assert before["peak_bytes"] + 4 * parameters <= after["peak_bytes"]
    for other in (aligned, moon, mixed):
        for row, theirs in zip(plain.history, other.history):
            assert (row["bytes_up"], row["bytes_down"]) == (theirs["bytes_up"], theirs["bytes_down"])


@pytest.mark.parametrize(
    "nothing", [RepresentationAlignment(0.0), Proximal(0.0), MOON(0.0), FedEMA(0.0)], ids=lambda plugin: type(plugin).__name__
)
def test_without_weight_nothing_changes(nothing, ssl, digits, federation, same, figures):
    plain, weightless = ssl("byol", 2), ssl("byol", 2)
    freezing, data = [LayerFreezing(BLOCKS)], digits(num_clients=1, limit_train=40)
    ours = federation(2).run(plain, data, freezing)
    theirs = federation(2).run(weightless, data, [*freezing, nothing])
    same(plain.state_dict(), weightless.state_dict())
    assert figures(ours) == figures(theirs)


@pytest.mark.parametrize("method", ON_POINTS)
def test_resumed_is_uninterrupted(method, net, points, federation, same, figures, tmp_path):
    make, settings = ON_POINTS[method], {"cohort": 3, "seed": 1}
    whole, parts = net(), net()
    wanted = federation(3, **settings).run(whole, points(SIZES), make())
    federation(2, **settings, folder=tmp_path).run(net(), points(SIZES), make())
    found = federation(3, **settings, folder=tmp_path).run(parts, points(SIZES), make(), resume=True)
    same(parts.state_dict(), whole.state_dict())
    assert figures(found) == figures(wanted)
    checkpoint = torch.load(tmp_path / "round-000002.ckpt", weights_only=True)
    assert not any("received" in state for state in checkpoint["plugins"].values())  # nobody has received anything between rounds
    assert any(checkpoint["memories"].values()) == ("moon" in method or "ema" in method)


def test_one_client_held_near_is_gradient_descent_with_a_pull(net, points, federation):
    """FedProx by a plain loop."""
    data, module, model = points([12]), net(lambda p: torch.optim.SGD(p, 0.1)), net(lambda p: torch.optim.SGD(p, 0.1))
    federation(1, local_epochs=2).run(module, data, [Proximal(2.0)])
    start = [value.detach().clone() for value in model.parameters()]
    optimizer = model.configure_optimizers()
    model.train()
    for step, batch in enumerate(data.batches(0) * 2):
        optimizer.zero_grad()
        distance = sum((value - before).square().sum() for value, before in zip(model.parameters(), start))
        (model.training_step(batch, step) + distance).backward()
        optimizer.step()
    for name, value in module.named_parameters():
        assert torch.allclose(value, model.get_parameter(name), atol=1e-6), name


# -- beside others ------------------------------------------------------------------------------------------------------
def test_in_smaller_modules(net, points, federation, cost_of):
    """A client of PriSM is held near what it received: its own share of the model."""

    def near():
        return [PrismSampling(0.5, layers="blocks.*"), RepresentationAlignment(through=THROUGH), Proximal(0.5)]

    settings = federation(2)
    plain, module = net(), net()
    settings.run(plain, points([10, 14]), [PrismSampling(0.5, layers="blocks.*")])
    result = settings.run(module, points([10, 14]), near())
    assert cost_of(predict(settings, net, points([10, 14]), near())) == cost_of(result.cost)
    assert not torch.equal(plain.head.weight, module.head.weight)


@pytest.mark.parametrize("method", [lambda: MOON(through="blocks"), FedEMA])
def test_a_last_model_of_other_kernels_is_refused(method, net, points, federation):
    with pytest.raises(ValueError, match=r"(MOON|FedEMA) needs clients that train the same parameters, and PrismSampling"):
        federation(1).run(net(), points([8, 8]), [PrismSampling(0.5, layers="blocks.*"), method()])


@pytest.mark.parametrize("method", [lambda: RepresentationAlignment(through="blocks"), Proximal, lambda: MOON(through="blocks"), FedEMA])
def test_a_model_divided_between_device_and_server_is_refused(method, net, points, federation):
    with pytest.raises(ValueError, match=r"PartitionedTraining divides the model .* changes the model or what travels \(.*receive"):
        federation(1).run(net(), points([8, 8]), [PartitionedTraining("blocks.1"), method()])


@pytest.mark.parametrize("space", ["gradient", "subspace"])
def test_in_a_subspace(space, net, points, federation):
    """What is projected is the change since what was received, wherever the client started from."""
    near = [RepresentationAlignment(through=THROUGH), Proximal(0.1), FedEMA()]
    result = federation(3).run(net(), points([10, 14]), [*near, IntrinsicProjection(20, space=space)])
    assert all(row["rejected"] == 0 for row in result.history)
