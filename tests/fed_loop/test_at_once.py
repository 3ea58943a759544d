"""Clients trained at once: the same turns as one after the other, to rounding, and a refusal of whatever could not be.

In float64, where what small batches of a norm make of a rounding is still far below what a wrong step would be.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from featherlight.plugins import MOON, DepthDropout, FetchSGD, LayerFreezing, Plugin, ProgressiveGrowth, Proximal, Quantization, TopK

SIZES = [6, 10, 14, 10, 3, 8, 10]


def adamw(parameters):
    return torch.optim.AdamW(parameters, 1e-2)


@pytest.fixture
def plain(net):
    """Without norms: a bias that a norm takes out again has a gradient of pure rounding, which Adam scales up."""

    class Plain(net):
        def __init__(self, *args, **options):
            super().__init__(*args, blocks=0, **options)

    return Plain


def both(federation, make, data, plugins=list, size=3, **options):
    """Runs with client_batch 1 and ``size``: modules and results."""
    runs = []
    for client_batch in (1, size):
        module = make()
        options = {"rounds": 2, "precision": "64-true", **options}
        result = federation(**{**options, "client_batch": client_batch}).run(module, data, plugins())
        runs.append((module, result))
    return runs


def apart(runs):
    """The largest difference between final weights."""
    (one, _), (other, _) = runs
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs)


STAGES = {"blocks": "blocks.*", "blocks_per_stage": 1, "periods_per_stage": 1}
METHODS = {
    "none": list,
    "freezing": lambda: [LayerFreezing(**STAGES)],
    "growth": lambda: [ProgressiveGrowth(**STAGES)],
    "top-k with memory": lambda: [TopK(share=0.1)],
    "sketches": lambda: [FetchSGD(k=20, rows=3, columns=64)],
    "frozen and quantised": lambda: [LayerFreezing(**STAGES), Quantization(8)],
}


@pytest.mark.parametrize("method", METHODS)
def test_the_same_weights_losses_and_costs(method, net, points, federation):
    """Norms with running statistics, momentum, two epochs of unequal data: lanes have batches of one size for some steps only."""
    runs = both(federation, net, points(SIZES), METHODS[method], rounds=3 if "freezing" in method else 2, local_epochs=2)
    assert apart(runs) < 1e-7
    (_, one), (_, other) = runs
    for row, same in zip(one.history, other.history, strict=True):
        assert same["loss"] == pytest.approx(row["loss"], rel=1e-7)
        assert {name: same[name] for name in ("clients", "bytes_up", "bytes_down")} == {
            name: row[name] for name in ("clients", "bytes_up", "bytes_down")
        }
    for row, same in zip(one.cost.rows(), other.cost.rows(), strict=True):
        assert {**row, "seconds": 0} == {**same, "seconds": 0}


@pytest.mark.parametrize("optimizer", [adamw, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5, weight_decay=0.1)])
def test_optimizers_whose_steps_count(optimizer, plain, points, federation):
    """Some clients' first batch is their last, so that lanes differ in whether they have a past."""
    assert apart(both(federation, lambda: plain(optimizer), points([2, 3, 3, 6, 10, 2, 4]), local_epochs=2, size=7)) < 1e-9


def test_clipping_is_each_clients_own(plain, points, federation):
    data = points([4, 4, 4])
    data.clients[1][0].mul_(100)  # in a norm of all three the others would shrink
    assert apart(both(federation, plain, data, clip=0.1)) < 1e-9


def test_dropout_draws_what_each_client_draws_alone(net, points, federation):
    """Masks of other draws would be far off: without any dropout the weights are elsewhere."""
    data = points(SIZES)
    runs = both(federation, lambda: net(dropout=0.5), data)
    assert apart(runs) < 1e-7
    without = both(federation, net, data)
    assert apart([runs[0], without[0]]) > 1e-3


def test_clients_that_drop_out_take_their_steps_and_are_left_out(net, points, federation):
    runs = both(federation, net, points(SIZES), dropout=0.4)
    assert apart(runs) < 1e-7
    assert [row["dropped_out"] for row in runs[0][1].history] == [row["dropped_out"] for row in runs[1][1].history] != [0, 0]


def test_one_clients_infinite_loss_is_its_own(plain, points, federation):
    data = points([8, 8, 8, 8])
    data.clients[2][0][0] = float("inf")
    runs = both(federation, plain, data, size=4)
    assert [row["rejected"] for row in runs[1][1].history] == [1, 1]
    assert apart(runs) < 1e-9


def test_losses_are_logged_nowhere_and_ssl_trains_at_once(ssl, digits, federation):
    runs = both(federation, lambda: ssl("simclr", depth=1), digits(num_clients=3, limit_train=60), rounds=1)
    assert runs[1][1].history[0]["loss"] == pytest.approx(runs[0][1].history[0]["loss"], rel=1e-7)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(2, 9))
def test_any_sizes_and_any_number_at_once(plain, points, federation, sizes, size):
    assert apart(both(federation, plain, points(sizes), size=size, rounds=1)) < 1e-9


# -- what is refused ----------------------------------------------------------------------------------------------------
class Looking(Plugin):
    """Looks at gradients."""

    def after_backward(self, clock):
        pass


class Unwilling(Plugin):
    """Says no, whatever it overrides."""

    at_once = False


REFUSED = {
    "a pull": (lambda: [Proximal(0.1)], r"Proximal has a hand in each client's turn \(receive, copies, extra_loss\): set client_batch=1"),
    "copies": (lambda: [MOON(through="stem")], "MOON has a hand"),
    "a structure of each client": (lambda: [DepthDropout(blocks="blocks.*")], "DepthDropout has a hand in each client's turn"),
    "gradients": (lambda: [Looking()], r"Looking has a hand in each client's turn \(after_backward\)"),
    "its own word": (lambda: [Unwilling()], "Unwilling has a hand in each client's turn: set"),
}


@pytest.mark.parametrize(("plugins", "message"), REFUSED.values(), ids=REFUSED)
def test_methods_that_look_at_one_client_are_refused(plugins, message, net, points, federation):
    with pytest.raises(ValueError, match=message):
        federation(1, client_batch=2).run(net(), points([4, 4]), plugins())


def test_momentum_copies_are_refused(ssl, digits, federation):
    with pytest.raises(ValueError, match="follows each client's own weights"):
        federation(1, client_batch=2).run(ssl("byol"), digits())


class Slower(torch.optim.SGD):
    """An optimizer that nobody here knows."""


def test_an_optimizer_that_is_not_known_to_be_elementwise_is_refused(net, points, federation):
    with pytest.raises(ValueError, match="but Slower may look at more than one element at a time"):
        federation(1, client_batch=2).run(net(lambda p: Slower(p, 0.1)), points([4, 4]))


def test_a_norm_that_counts_its_steps_is_refused(net, points, federation):
    module = net()
    module.blocks[1].norm.momentum = None
    with pytest.raises(ValueError, match=r'"blocks\.1\.norm" averages its running statistics by a count of steps'):
        federation(1, client_batch=2).run(module, points([4, 4]))


def test_random_numbers_of_the_step_itself_are_refused(net, points, federation):
    class Noisy(net):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0] + torch.randn_like(batch[0])), batch[1])

    with pytest.raises(ValueError, match=r"Noisy.training_step does what cannot be done .*random operation.*set client_batch=1"):
        federation(1, client_batch=2).run(Noisy(), points([4, 4, 4]))


def test_numbers_below_one_are_refused(federation):
    with pytest.raises(ValueError, match="client_batch=0: give 1 or more"):
        federation(1, client_batch=0)
