"""FetchSGD's rounds against the same rounds by hand with dense sketching matrices; bytes, resuming, other methods beside it."""

import copy
import warnings

import pytest
import torch

from featherlight.fed_loop.cohort import sample
from featherlight.fed_loop.predict import predict
from featherlight.plugins import DepthDropout, FetchSGD, IntrinsicProjection, LayerFreezing, PrismSampling, Quantization, TopK
from featherlight.plugins.seeds import derive
from featherlight.plugins.sketch import CountSketch

SIZES = [6, 10, 14]


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def flat(values):
    return torch.cat([value.detach().flatten() for value in values])


def trained(server, data, client):
    model = copy.deepcopy(server).train()
    optimizer = model.configure_optimizers()
    for step, batch in enumerate(data.batches(client)):
        optimizer.zero_grad()
        model.training_step(batch, step).backward()
        optimizer.step()
    return model


def by_hand(server, data, rounds, columns, rows, k, momentum, masking, cohort=3):
    """Sketches as products with matrices of one ±1 a row and element."""
    size = len(flat(server.parameters()))
    code = CountSketch(size, rows, columns, derive(0, "fetchsgd", 0))
    matrices = torch.stack([code.of(unit) for unit in torch.eye(size, dtype=torch.float64)], 2)  # (rows, columns, D)
    u = e = torch.zeros(rows, columns, dtype=torch.float64)
    for round in range(rounds):
        clients = sample(3, cohort, 0, round)
        total = sum(SIZES[client] for client in clients)
        before, models = flat(server.parameters()), [trained(server, data, client) for client in clients]
        mean = sum((flat(model.parameters()) - before) * SIZES[client] / total for client, model in zip(clients, models))
        u = momentum * u + matrices @ mean
        e = e + u
        estimate = torch.stack([matrix.T @ row for matrix, row in zip(matrices, e)]).sort(0).values[rows // 2]
        step = torch.zeros_like(before)
        for place in sorted(range(size), key=lambda place: -abs(float(estimate[place])))[:k]:
            step[place] = estimate[place]
        if masking:
            there = (matrices.abs() @ (step != 0).double()) > 0
            u, e = u.masked_fill(there, 0.0), e.masked_fill(there, 0.0)
        else:
            e = e - matrices @ step
        for value, part in zip(server.parameters(), step.split([value.numel() for value in server.parameters()])):
            value.data += part.view_as(value)
        for name, value in server.named_buffers():
            mean = sum(model.get_buffer(name).double() * SIZES[client] / total for client, model in zip(clients, models))
            value.copy_(mean if value.is_floating_point() else mean.round())
    return server


@pytest.mark.parametrize("cohort", [2, 3])
@pytest.mark.parametrize("masking", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rounds(momentum, masking, cohort, net, points, federation):
    data, module = points(SIZES), net(sgd).double()
    data.clients = [(x.double(), y) for x, y in data.clients]
    federation(4, cohort=cohort).run(module, data, [FetchSGD(50, 3, k=20, momentum=momentum, masking=masking)])
    wanted = by_hand(net(sgd).double(), data, 4, 50, 3, 20, momentum, masking, cohort)
    for name, value in wanted.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def test_a_rejected_update_is_left_out(net, points, federation):
    data = points(SIZES)
    data.clients[1][0][0] = float("nan")
    module = net(sgd)
    result = federation(2).run(module, data, [FetchSGD(50, 3, k=20)])
    assert [row["rejected"] for row in result.history] == [1, 1]
    assert torch.isfinite(flat(module.parameters())).all()


# -- bytes ------------------------------------------------------------------------------------------------------------
METHODS = {
    "plain": lambda: [FetchSGD(30, 3, k=20)],
    "unknown start": lambda: [FetchSGD(30, 3, k=20, known_start=False)],
    "large k": lambda: [FetchSGD(30, 3, k=300)],
    "quantised": lambda: [FetchSGD(30, 3, k=20), Quantization()],
    "of what is kept": lambda: [DepthDropout("blocks.*"), FetchSGD(30, 3, k=20)],
}


@pytest.mark.parametrize("method", METHODS)
def test_predicted_is_measured_where_all_train(method, net, points, federation, cost_of):
    """A round then changes k elements for all; for those who were away, the union is predicted as if rounds had none in common."""
    away = federation(5, cohort=2, seed=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*real steps are metered")
        everybody = cost_of(predict(federation(4), lambda: net(sgd), points(SIZES), METHODS[method]()))
        most = cost_of(predict(away, lambda: net(sgd), points(SIZES), METHODS[method]()))
    measured = cost_of(federation(4).run(net(sgd), points(SIZES), METHODS[method]()).cost)
    for table in (everybody, measured):
        for row in (*table["rows"], table["total"]):
            row.pop("peak_bytes")
    assert everybody == measured
    really = cost_of(away.run(net(sgd), points(SIZES), METHODS[method]()).cost)
    for predicted, row in zip(most["rows"], really["rows"], strict=True):
        assert predicted["bytes_up"] == row["bytes_up"]
        assert 0.7 * predicted["bytes_down"] <= row["bytes_down"] <= predicted["bytes_down"]


def test_bytes_by_hand(net, points, federation):
    """Up rows × columns floats; down k indices and values."""
    result = federation(3).run(net(sgd), points([8]), [FetchSGD(30, 3, k=20)])
    statistics = 3 * (2 * 8 * 4 + 8)
    up, down = ([row[way] for row in result.history] for way in ("bytes_up", "bytes_down"))
    assert all(0 < length - 4 * 3 * 30 - statistics < 1200 for length in up)
    assert 0 < down[0] - statistics < 1200
    assert all(0 < length - 8 * 20 - statistics < 1300 for length in down[1:])


# -- resuming ---------------------------------------------------------------------------------------------------------
def test_resumed_is_uninterrupted(net, points, federation, same, figures, tmp_path):
    """After the first round of a stage, and between stages."""

    def run(rounds, folder=None, resume=False, seed=0):
        module = net(seed=seed)
        plugins = [LayerFreezing("blocks.*", periods_per_stage=2), FetchSGD(30, 3, k=15)]
        result = federation(rounds, cohort=2, folder=folder).run(module, points(SIZES), plugins, resume=resume)
        return module.state_dict(), result

    whole, result = run(4)
    for done in (1, 2):
        run(done, tmp_path / str(done))
        resumed, again = run(4, tmp_path / str(done), resume=True, seed=9)
        same(resumed, whole)
        assert figures(again) == figures(result)


# -- refusals ---------------------------------------------------------------------------------------------------------
REFUSED = {
    "smaller modules": (
        lambda: [PrismSampling(0.5, layers="blocks.*"), FetchSGD(30, k=10)],
        "FetchSGD needs clients that train the same parameters, and PrismSampling gives them smaller modules",
    ),
    "behind a projection": (lambda: [IntrinsicProjection(20), FetchSGD(30, k=10)], "intrinsic.z is not a parameter of the server's model"),
    "behind top-k": (lambda: [TopK(20), FetchSGD(30, k=10)], "topk.indices is not a parameter of the server's model"),
    "too many": (lambda: [FetchSGD(30)], "k=1000: 347 parameters train in stage 1; give that many or fewer"),
}


@pytest.mark.parametrize("combination", REFUSED)
def test_refused(combination, net, points, federation):
    plugins, message = REFUSED[combination]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=message):
            federation(1).run(net(sgd), points(SIZES), plugins())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": 0}, "columns=0: give 1 or more"),
        ({"columns": 9, "rows": 4}, "rows=4: give an odd number"),
        ({"columns": 9, "k": 0}, "k=0: give 1 or more"),
        ({"columns": 9, "momentum": 1.0}, "momentum=1.0: give 0 <= momentum < 1"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        FetchSGD(**options)
