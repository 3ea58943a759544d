"""Bad input: one clear line, or one client's update rejected and counted; and evaluation by hand."""

import copy
import math

import pytest
import torch
from torch import nn

from featherlight.fed_loop import Federation
from featherlight.fed_loop.predict import predict
from featherlight.plugins import LayerFreezing, Plugin
from featherlight.ssl_models import Classifier


# -- updates that are not numbers -------------------------------------------------------------------------------------
def test_a_client_whose_loss_is_not_finite_is_rejected(net, points, federation, same, capsys, tmp_path):
    data, others = points([8, 8, 12]), points([8, 8, 12])
    data.clients[1][0][0, 0] = float("nan")
    module, without = net(), net()
    result = federation(2, folder=tmp_path).run(module, data)
    assert [(row["clients"], row["rejected"]) for row in result.history] == [(2, 1)] * 2
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    said = " ".join(capsys.readouterr().err.split())
    assert "round 0: update of client 1 rejected: loss is not finite" in said
    del others.clients[1], others.sizes[1]
    federation(2).run(without, others)
    for name, value in module.state_dict().items():  # shares of 8/28 and 12/28 for 8/20 and 12/20: as rounded to 2⁻³⁰
        assert torch.allclose(value, without.state_dict()[name], rtol=1e-4, atol=1e-5), name
    # the rejected client received and sent all the same
    assert result.history[0]["bytes_up"] == result.history[0]["bytes_down"]


def test_a_client_whose_weights_are_not_finite_is_rejected(net, points, federation):
    class Breaking(net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if len(batch[0]) == 3:  # the last client's only batch: a finite loss, an infinite gradient
                loss = loss + (self.head.bias.abs().sum() * 0).sqrt()
            return loss

    module = Breaking()
    result = federation(1).run(module, points([8, 8, 3]))
    assert (result.history[0]["clients"], result.history[0]["rejected"]) == (2, 1)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@pytest.mark.parametrize("encodes", [False, True])
def test_where_all_are_rejected_the_server_stays(encodes, net, points, federation, same):
    class Codec(Plugin):
        def encode(self, message, visit):
            return message

    data, module, before = points([8, 8]), net(), net().state_dict()
    for x, _ in data.clients:
        x.fill_(float("nan"))
    result = federation(2, server=None).run(module, data, [Codec()] if encodes else [])
    same(module.state_dict(), before)
    assert [(row["clients"], row["rejected"]) for row in result.history] == [(0, 2)] * 2
    assert all(math.isnan(row["loss"]) for row in result.history)


class Sends(Plugin):
    """A client that sends something else than it should."""

    def __init__(self, what):
        self._what = what

    def encode(self, message, visit):
        return self._what(message) if visit.client == 1 and any(value.any() for value in message.values()) else message


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda message: {**message, "stem.bias": message["stem.bias"] * float("inf")}, "is not finite or beyond"),
        (lambda message: {**message, "stem.bias": message["stem.bias"] + 1e9}, "is not finite or beyond"),
        (lambda message: {**message, "intruder": torch.ones(1)}, '"intruder" is not among the'),
        (lambda message: {**message, "stem.bias": torch.ones(3)}, "has shape"),
    ],
)
def test_odd_messages_are_rejected(what, message, net, points, federation, capsys):
    result = federation(1).run(net(), points([8, 8, 8]), [Sends(what)])
    assert (result.history[0]["clients"], result.history[0]["rejected"]) == (2, 1)
    said = " ".join(capsys.readouterr().err.split())
    assert "update of client 1 rejected: entry" in said
    assert message in said


# -- optimizers and schedules ------------------------------------------------------------------------------------------
def with_optimizers(net, configured):
    class Module(net):
        def configure_optimizers(self):
            return configured(self)

    return Module()


def sgd(module):
    return torch.optim.SGD(module.parameters(), 1.0)


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def listed(module):
    optimizer = sgd(module)
    return [optimizer], [halving(optimizer)]


def named(module, **more):
    optimizer = sgd(module)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": halving(optimizer), **more}}


FORMS = {
    "an optimizer": (sgd, [1, 1, 1, 1]),
    "a list": (lambda module: [sgd(module)], [1, 1, 1, 1]),
    "two lists": (listed, [1, 0.5, 0.25, 0.125]),
    "a dict": (named, [1, 0.5, 0.25, 0.125]),
    "a list of a dict": (lambda module: [named(module)], [1, 0.5, 0.25, 0.125]),
    "every other round": (lambda module: named(module, frequency=2), [1, 1, 0.5, 0.5]),
}


@pytest.mark.parametrize("form", FORMS)
def test_schedules_step_once_a_round(form, net, points, federation):
    configured, rates = FORMS[form]
    result = federation(4, local_epochs=2).run(with_optimizers(net, configured), points([8, 8]))
    assert [row["lr"] for row in result.history] == rates


def plateau(module):
    optimizer = sgd(module)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "x"}}


REFUSED = {
    "several": (lambda module: [sgd(module), sgd(module)], "gives 2 optimizers; a federation's clients train with exactly one"),
    "none": (lambda module: None, "gives 0 optimizers"),
    "by step": (lambda module: named(module, interval="step"), "StepLR steps every step.*use interval='epoch'"),
    "plateau": (plateau, "ReduceLROnPlateau follows a metric"),
    "some parameters": (lambda module: torch.optim.SGD(module.stem.parameters(), 1.0), "should train now but is in no optimizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_optimizers_that_are_refused(name, net, points, federation):
    configured, message = REFUSED[name]
    module = with_optimizers(net, configured)
    with pytest.raises(ValueError, match=message):
        federation(1).run(module, points([8]), [LayerFreezing(blocks="blocks.*")])
    assert type(module.blocks[0]).__name__ == "Residual"  # left as it came


# -- arguments ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds=0: give 1 or more"),
        ({"cohort": 0}, "cohort=0: give 1 or more"),
        ({"cohort": 2**16 + 1}, "exact sums hold up to 65536 clients a round"),
        ({"local_epochs": 0}, "local_epochs=0: give 1 or more"),
        ({"evaluate_every": -1}, "evaluate_every=-1: give 0 or more"),
        ({"checkpoint_every": -1}, "checkpoint_every=-1: give 0 or more"),
        ({"clip": 0.0}, "clip=0.0: give a largest norm above 0"),
        ({"clip": float("nan")}, "clip=nan"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Federation(**{"rounds": 1, **options})


def test_what_does_not_fit_together(net, points, federation, digits, ssl):
    with pytest.raises(ValueError, match="cohort=5, but there are 2 clients; give 1 to 2, or leave it out for all"):
        federation(1, cohort=5).run(net(), points([8, 8]))
    with pytest.raises(ValueError, match="client 1 has 0 training samples, which make no batch"):
        federation(1).run(net(), points([8, 0]))
    with pytest.raises(ValueError, match=r'block "layers.\*" not found; this Net has'):
        federation(1).run(net(), points([8]), [LayerFreezing(blocks="layers.*")])
    with pytest.raises(TypeError, match="is not a featherlight Plugin"):
        federation(1).run(net(), points([8]), [object()])


# -- evaluation --------------------------------------------------------------------------------------------------------
def test_clients_are_evaluated_on_their_own_held_out_samples(net, points, federation):
    data, module = points([8, 12, 8], held_out=3), net(dropout=0.5)
    result = federation(2, evaluate_clients=True).run(module, data)
    model = copy.deepcopy(module).eval()
    x, y = (torch.cat(parts) for parts in zip(*data.held_out))  # 3 + 4 + 5 samples, all alike in weight
    with torch.no_grad():
        logits = model(x)
    assert len(x) == 12
    assert result.metrics["client_accuracy"] == pytest.approx((logits.argmax(1) == y).double().mean().item(), abs=1e-7)
    assert result.metrics["client_loss"] == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)


def test_a_validation_step_may_return_its_loss_but_not_nothing(net, points, federation):
    class Loss(net):
        def validation_step(self, batch, batch_idx):
            return torch.tensor(2.5)

    class Nothing(net):
        def validation_step(self, batch, batch_idx):
            return None

    assert federation(1, evaluate_clients=True).run(Loss(), points([8], held_out=3)).metrics == {"client_loss": 2.5}
    with pytest.raises(ValueError, match=r"Nothing.validation_step gives no figure for clients' held-out samples"):
        federation(1, evaluate_clients=True).run(Nothing(), points([8], held_out=3))


def test_a_model_of_two_views_cannot_be_evaluated_on_clients_single_images(ssl, digits, federation):
    with pytest.raises(ValueError, match=r"SimCLR.validation_step gives no figure.*judge its features by probes"):
        federation(1, evaluate_clients=True).run(ssl("simclr"), digits(client_val_fraction=0.2))


def test_clients_that_hold_nothing_out_cannot_be_evaluated(digits, federation):
    def make():
        return Classifier("resnet9", image_size=8, in_channels=1, optimizer="sgd")

    options = {"views": 1, "num_clients": 2, "limit_train": 20}
    with pytest.raises(ValueError, match="no client holds samples out for evaluation: set client_val_fraction"):
        federation(1, evaluate_clients=True).run(make(), digits(**options))
    result = federation(1, evaluate_clients=True).run(make(), digits(**options, client_val_fraction=0.2))
    assert result.metrics["client_loss"] > 0


# -- batches of one sample -------------------------------------------------------------------------------------------
def test_a_batch_of_one_sample_is_told_where_the_model_cannot_train_on_it(net, points, federation):
    """Batch norm of (1, 8) has no variance; client 1 has 4 + 1 samples."""
    with pytest.raises(ValueError, match=r"client 1 has a batch of a single sample, which Net cannot train on .*drop_last=True") as error:
        federation(1).run(net(), points([8, 5]))
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match="client 1 has a batch of a single sample") as predicted:
        predict(federation(1), net, points([8, 5]))
    assert str(predicted.value) == str(error.value)


def test_a_batch_of_one_sample_is_trained_on_where_the_model_can(net, points, federation):
    class Linear(net):
        def forward(self, x):
            return self.head(self.stem(x))

    assert federation(1).run(Linear(), points([8, 5])).history[0]["clients"] == 2


def test_data_can_leave_out_a_batch_of_one_sample(digits, federation, cost_of):
    """17 images in batches of 8: two are trained on, the third, of one image, is left out by default, and predicted so."""

    def make():
        torch.manual_seed(0)
        return Classifier("resnet9", image_size=8, in_channels=1, optimizer="sgd")

    options = {"num_clients": 1, "views": 1, "limit_train": 17, "batch_size": 8}
    with pytest.raises(ValueError, match="client 0 has a batch of a single sample, which Classifier cannot train on"):
        federation(1).run(make(), digits(**options, drop_last=False))
    settings = federation(1)
    measured = cost_of(settings.run(make(), digits(**options)).cost)
    predicted = cost_of(predict(settings, make, digits(**options)))
    assert predicted["total"]["flops_forward"] == measured["total"]["flops_forward"]


def test_the_server_is_evaluated_when_asked_and_at_the_end(net, points, federation, same):
    data, module, seen = points([8, 8]), net(), []

    def evaluator(model, given):
        assert given is data
        assert not any(part.training for part in model.modules())
        seen.append(copy.deepcopy(model.state_dict()))
        return {"figure": torch.tensor(len(seen))}

    result = federation(5, evaluate_every=2).run(module, data, evaluators=[evaluator])
    assert [row.get("figure") for row in result.history] == [None, 1, None, 2, 3]
    assert result.metrics == {"figure": 3}
    same(seen[-1], module.state_dict())


def test_an_evaluator_that_trains_the_model_does_not_train_the_server(net, points, federation, same):
    def meddle(model, data):
        for value in model.parameters():
            value.data.zero_()
        return {}

    module, whole = net(), net()
    federation(3, evaluate_every=1).run(module, points([8, 8]), evaluators=[meddle])
    federation(3).run(whole, points([8, 8]))
    same(module.state_dict(), whole.state_dict())
