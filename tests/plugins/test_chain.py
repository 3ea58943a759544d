"""Several plugins are one: the order of every verb, what goes back is undone in reverse, losses add up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from featherlight.plugins import Chain, Change, Clock, Plugin, Visit

LOG = []


class Recorder(Plugin):
    """Notes each verb; multiplies by, and then adds, its number on the wire, so that the order shows."""

    def __init__(self, number):
        self.number = number
        self._model = None

    def attach(self, model):
        LOG.append(("attach", self.number))

    def advance(self, clock):
        LOG.append(("advance", self.number))
        return Change((nn.Parameter(torch.full((1,), float(self.number))),), ())

    def stage(self, period):
        return period // self.number

    def visit(self, visit):
        LOG.append(("visit", self.number))

    def before_forward(self, clock):
        LOG.append(("before_forward", self.number))

    def extra_loss(self, model, batch):
        return None if self.number == 2 else batch * self.number

    def after_backward(self, clock):
        LOG.append(("after_backward", self.number))

    def after_update(self, clock):
        LOG.append(("after_update", self.number))

    def after_step(self, clock):
        LOG.append(("after_step", self.number))

    def detach(self):
        LOG.append(("detach", self.number))

    def encode(self, message, visit):
        return {name: value * self.number + self.number for name, value in message.items()}

    def decode(self, message, visit):
        return {name: (value - self.number) / self.number for name, value in message.items()}

    def lift(self, total, clock):
        return {name: (value - self.number) / self.number for name, value in total.items()}

    def settle(self, server, clock):
        LOG.append(("settle", self.number))


@pytest.fixture
def chain():
    LOG.clear()
    return Chain([Recorder(1), Recorder(2), Recorder(3)])


@pytest.mark.parametrize(
    "verb", ["attach", "advance", "visit", "before_forward", "after_backward", "after_update", "after_step", "detach", "settle"]
)
def test_what_puts_on_goes_forward_and_what_takes_off_goes_back(verb, chain):
    arguments = {
        "attach": [nn.Linear(1, 1)],
        "visit": [Visit(0)],
        "detach": [],
        "settle": [nn.Linear(1, 1), Clock(0)],
    }.get(verb, [Clock(0)])
    getattr(chain, verb)(*arguments)
    order = [3, 2, 1] if verb in ("after_update", "after_step", "detach") else [1, 2, 3]
    assert [(verb, number) for number in order] == LOG


def test_the_first_to_encode_is_the_last_to_decode(chain):
    sent = chain.encode({"w": torch.tensor([5.0])}, Visit(0))
    assert sent["w"].item() == ((5 * 1 + 1) * 2 + 2) * 3 + 3
    assert chain.decode(sent, Visit(0))["w"].item() == 5.0
    assert chain.lift(sent, Clock(0))["w"].item() == 5.0


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), max_size=5), st.integers(-8, 8))
def test_decoding_undoes_encoding_for_any_chain(numbers, value):
    chain = Chain([Recorder(number) for number in numbers])
    message = {"w": torch.tensor([float(value)], dtype=torch.float64)}
    torch.testing.assert_close(chain.decode(chain.encode(message, Visit(0)), Visit(0)), message)


def test_extra_losses_add_up_and_absent_ones_do_not_count(chain):
    assert chain.extra_loss(nn.Linear(1, 1), torch.tensor(5.0)).item() == 5 * 1 + 5 * 3
    assert Chain([Recorder(2)]).extra_loss(nn.Linear(1, 1), torch.tensor(5.0)) is None
    assert Chain().extra_loss(nn.Linear(1, 1), torch.tensor(5.0)) is None


def test_changes_come_together(chain):
    change = chain.advance(Clock(0))
    assert [p.item() for p in change.froze] == [1.0, 2.0, 3.0]
    assert change
    assert not change.thawed
    assert not Change()


def test_a_stage_is_new_when_any_plugins_is(chain):
    stages = [chain.stage(period) for period in range(7)]
    assert stages == [p + p // 2 + p // 3 for p in range(7)]


def test_an_empty_chain_does_nothing():
    chain, message = Chain(), {"w": torch.ones(1)}
    assert chain.encode(message, Visit(0)) == chain.decode(message, Visit(0)) == message
    assert not chain.advance(Clock(3))
    assert chain.stage(7) == 0


def test_who_changes_what_travels_is_known():
    class Encoder(Plugin):
        def encode(self, message, visit):
            return message

    class Lifter(Plugin):
        def lift(self, total, clock):
            return total

    class Server(Plugin):
        def encode_down(self, message, visit, kept=()):
            return message

    assert (Chain([Encoder()]).by_differences, Chain([Encoder()]).decodes) == (True, False)
    assert Chain([Plugin(), Lifter()]).by_differences
    assert not Chain([Plugin(), Server()]).by_differences
    assert Chain([Plugin(), Server()]).encodes_down
    assert not Chain([Encoder()]).encodes_down
    assert not Chain([Plugin()]).by_differences
    assert Chain([Plugin(), Recorder(1)]).decodes


def test_every_verb_of_a_bare_plugin_does_nothing():
    plugin, model, message = Plugin(), nn.Linear(1, 1), {"w": torch.ones(1)}
    for result in (plugin.attach(model), plugin.visit(Visit(0)), plugin.before_forward(Clock(0)), plugin.after_step(Clock(0))):
        assert result is None
    assert plugin.extra_loss(model, None) is None
    assert plugin.encode(message, Visit(0)) is plugin.decode(message, Visit(0)) is plugin.lift(message, Clock(0)) is message
    assert plugin.encode_down(message, Visit(0)) is message
    assert plugin.narrow(Visit(0)) is None
    assert plugin.figures() == {}


def test_a_client_can_have_one_smaller_module():
    class Narrowing(Plugin):
        def __init__(self, module):
            self.module = module

        def narrow(self, visit):
            return self.module

    small = nn.Linear(1, 1)
    assert Chain([Plugin(), Narrowing(small), Plugin()]).narrow(Visit(0)) is small
    assert Chain([Narrowing(None)]).narrow(Visit(0)) is None
    with pytest.raises(ValueError, match=r"^Narrowing, Narrowing each make a smaller module for a client, which can have one"):
        Chain([Narrowing(small), Narrowing(small)]).narrow(Visit(0))


def test_what_is_no_plugin_is_refused():
    with pytest.raises(TypeError, match=r"^'freezing' is not a featherlight Plugin; a method is a subclass"):
        Chain([Plugin(), "freezing"])


def test_a_chain_describes_each_plugins_arguments_in_order(chain):
    assert chain.describe() == {"0.Recorder": {"number": 1}, "1.Recorder": {"number": 2}, "2.Recorder": {"number": 3}}


def test_a_codec_before_what_makes_smaller_modules_is_refused():
    class Narrowing(Plugin):
        def narrow(self, visit):
            return nn.Linear(1, 1)

    class Coding(Plugin):
        def encode(self, message, visit):
            return message

    with pytest.raises(ValueError, match=r"Coding changes what travels, and stands before Narrowing.*put Narrowing first"):
        Chain([Coding(), Narrowing()]).narrow(Visit(0))
    assert Chain([Narrowing(), Coding()]).narrow(Visit(0)) is not None
