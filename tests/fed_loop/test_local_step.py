"""The one step that training and prediction take: its order, its arguments, and that nothing of it is left out of a prediction."""

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision, Precision

from featherlight.fed_loop.local_step import LocalStep
from featherlight.fed_loop.predict import predict
from featherlight.fed_loop.trainees import local_steps
from featherlight.plugins import Chain, Clock, Plugin

LARGE = 10**6


class Watch(Plugin):
    """Notes every verb of a step, with the stem's weight at that time."""

    def __init__(self, noted):
        self._noted = noted

    def before_forward(self, clock):
        self._noted.append("before_forward")

    def extra_loss(self, model, batch):
        self._noted.append("extra_loss")
        return model.stem.bias.sum()

    def after_backward(self, clock):
        self._noted.append("after_backward")

    def after_update(self, clock):
        self._noted.append("after_update")

    def after_step(self, clock):
        self._noted.append("after_step")


@pytest.fixture
def hooked(net):
    class Hooked(net):
        noted = None

        def after_optimizer_step(self):
            self.noted.append("after_optimizer_step")

    return Hooked


def test_order_of_a_step_and_its_result_by_hand(net, hooked, points):
    """The plain loop: a loss with its extra term, gradients cut to a norm of 0.01, one update."""
    noted, module, plain, batch = [], hooked(), net(), points([4]).batches(0)[0]
    module.noted = noted
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    step = LocalStep(Chain([Watch(noted)]), Precision(), clip=0.01)
    loss = step(module, optimizer, batch, Clock(0, 0))
    assert noted == ["before_forward", "extra_loss", "after_backward", "after_update", "after_optimizer_step", "after_step"]
    wanted = plain.training_step(batch, 0) + plain.stem.bias.sum()
    wanted.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert norm > 0.01
    assert loss.item() == wanted.item()
    assert not loss.requires_grad
    for name, parameter in module.named_parameters():
        by_hand = plain.get_parameter(name) - 0.1 * gradients[name] * 0.01 / norm
        assert torch.allclose(parameter, by_hand, atol=1e-7), name


def test_one_step_serves_models_of_several_sizes(net, points):
    step, batch = LocalStep(Chain([]), Precision()), points([4]).batches(0)[0]
    for blocks in (1, 3):
        module, before = net(blocks=blocks), net(blocks=blocks)
        step(module, torch.optim.SGD(module.parameters(), 0.1), batch, Clock(0, 0))
        moved = {name for name, value in module.named_parameters() if not torch.equal(value, before.get_parameter(name))}
        assert {"stem.weight", "head.weight", *(f"blocks.{index}.linear.weight" for index in range(blocks))} <= moved


class Seen(Plugin):
    """Notes the gradients' norm, and halves them."""

    def attach(self, model):
        self._model = model

    def after_backward(self, clock):
        self.norm = torch.stack([value.grad.norm() for value in self._model.parameters()]).norm()
        for value in self._model.parameters():
            value.grad /= 2


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_loss_scaler_is_seen_by_nobody(clip, net, points):
    """What float16 under autocast leaves of the gradients, with a factor of 2¹⁶ on the loss."""
    found = []
    for plugins in ([], [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]):
        seen, module = Seen(), net()
        seen.attach(module)
        fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
        before = [value.detach().clone() for value in module.parameters()]
        optimizer = torch.optim.SGD(module.parameters(), 1.0)
        fabric.setup(module, optimizer)
        local_steps(fabric, clip)(Chain([seen]))(module, optimizer, points([4]).batches(0)[0], Clock(0))
        step = torch.stack([(old - new.detach()).norm() for old, new in zip(before, module.parameters())]).norm()
        found.append((float(seen.norm), float(step)))
        if clip is not None:
            assert float(step) == pytest.approx(clip, rel=1e-3)
    assert found[1] == pytest.approx(found[0], rel=0.02)


class Gradients(Plugin):
    """Needs memory once gradients are there."""

    def after_backward(self, clock):
        torch.zeros(LARGE)


@pytest.mark.parametrize("where", ["after_backward", "after_optimizer_step"])
def test_what_a_step_needs_at_its_end_is_predicted(where, net, points, federation, cost_of):
    class Needy(net):
        def after_optimizer_step(self):
            if where == "after_optimizer_step":
                torch.zeros(LARGE)

    plugins = [Gradients()] if where == "after_backward" else []
    settings = federation(1, clip=0.1)
    predicted = cost_of(predict(settings, Needy, points([8, 8]), plugins))
    measured = cost_of(settings.run(Needy(), points([8, 8]), plugins).cost)
    assert predicted == measured
    assert measured["total"]["peak_bytes"] > 4 * LARGE
