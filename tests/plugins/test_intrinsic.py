"""The plugin verb by verb: what it takes, what it makes of a change, who is served what, and what it remembers."""

import pytest
import torch
from intrinsic_model import NAMES, SIZE, Two, attached, change, dense, flat, visit_round

from featherlight.plugins import Clock, IntrinsicProjection, Quantization, Visit
from featherlight.plugins.projections import PROJECTIONS
from featherlight.plugins.subspaces import Maps


# -- arguments --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim=0: give 1 or more"),
        ({"subspaces": 0}, "subspaces=0: give 1 or more"),
        ({"periods_per_span": 0}, "periods_per_span=0: give 1 or more"),
        ({"projection": "dense"}, "projection='dense' is not known; use 'fastfood' or 'sparse_signs'"),
        ({"space": "both"}, "space='both' is not known; use 'gradient' or 'subspace'"),
        ({"draw": "epoch"}, "draw='epoch' is not known; use 'client' or 'round'"),
        ({"gain": "one"}, "gain='one' is not known; use 'length', 'projection', 'unbiased' or a number"),
        ({"gain": float("inf")}, "gain=inf: give a number above 0"),
        ({"dim": 20.0}, "dim=20.0: give a whole number"),
        ({"dim": "20"}, "dim='20': give a whole number"),
        ({"subspaces": 1.5}, "subspaces=1.5: give a whole number"),
        ({"serve": "some"}, "serve='some' is not known; use 'changed' or 'all'"),
        ({"momentum": 1.0}, "momentum=1.0: give 0 <= momentum < 1"),
        ({"down_bits": 9}, "down_bits=9: give 2 to 8, or 32 for float32"),
        ({"down_bits": 4, "serve": "all"}, "down_bits=4 sends the steps that clients lack, and serve='all' everything"),
        ({"gain": 0.0}, r"gain=0.0: give a number above 0"),
        ({"gain": float("nan")}, "gain=nan: give a number above 0"),
        ({"gain": None}, "gain=None: give a number above 0"),
        ({"momentum": "0.9"}, "momentum='0.9': give 0 <= momentum < 1"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        IntrinsicProjection(**options)


def test_arguments_are_described():
    assert IntrinsicProjection(7, gain=0.5).describe() == {
        "dim": 7,
        "subspaces": 1,
        "periods_per_span": None,
        "projection": "fastfood",
        "space": "gradient",
        "gain": 0.5,
        "draw": "client",
        "known_start": True,
        "momentum": 0.0,
        "serve": "changed",
        "down_bits": 32,
    }
    assert attached(dim=7).describe() == IntrinsicProjection(7).describe()


def test_more_dimensions_than_train():
    model = Two()
    model.one.requires_grad_(False)
    with pytest.raises(ValueError, match="dim=7: 6 parameters train in this stage; give that many or fewer"):
        attached(model, dim=7).encode({}, Visit(0))


# -- up ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("gain", "factor"), [("length", (5 / SIZE) ** 0.5), ("projection", 5 / SIZE), ("unbiased", 1.0), (0.25, 0.25)])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_what_goes_up_by_hand(kind, gain, factor):
    """z = γ·Aᵀ·change, and statistics as they are."""
    plugin, moved = attached(dim=5, projection=kind, gain=gain), change()
    statistics = {"norm.running_mean": torch.tensor([1.0, 2.0]), "norm.num_batches_tracked": torch.tensor(3)}
    message = plugin.encode({**moved, **statistics}, Visit(0, 4, 9))
    assert set(message) == {"intrinsic.z", *statistics}
    assert all(message[name] is value for name, value in statistics.items())
    torch.testing.assert_close(message["intrinsic.z"], (factor * dense(5, kind=kind, seed=9).T @ flat(moved).double()).float())


def test_what_a_client_left_out_did_not_change():
    plugin, moved = attached(dim=5), change()
    part = {name: value for name, value in moved.items() if name.startswith("two")}
    whole = {name: value if name in part else torch.zeros_like(value) for name, value in moved.items()}
    assert torch.equal(plugin.encode(part, Visit(0))["intrinsic.z"], plugin.encode(whole, Visit(0))["intrinsic.z"])


@pytest.mark.parametrize("name", ["one.weight", "three.weight"])
def test_a_change_outside_the_subspace_is_refused(name):
    """A parameter that does not train here, or that the model has not."""
    model = Two()
    model.one.requires_grad_(False)
    with pytest.raises(ValueError, match=f"{name} is not a parameter of the server's model that trains in this round"):
        attached(model, dim=3).encode({name: torch.zeros(2)}, Visit(0))


def test_a_wrong_order_of_plugins_is_named():
    plugin, codec = attached(dim=3), Quantization()
    codec.attach(plugin._model)
    with pytest.raises(ValueError, match=r"one.bias:8 is not .*: IntrinsicProjection goes before plugins that change what clients send"):
        plugin.encode(codec.encode(change(), Visit(0)), Visit(0))
    with pytest.raises(ValueError, match="IntrinsicProjection stands twice among the plugins"):
        attached(dim=2).encode(plugin.encode(change(), Visit(0)), Visit(0))


def test_flat_and_back():
    plugin, moved = attached(dim=3), change()
    plugin.encode({}, Visit(0))
    assert plugin._spans[-1].names == NAMES
    back = plugin._split(plugin._flat(moved))
    assert all(torch.equal(back[name], moved[name]) for name in NAMES)
    assert plugin._flat(moved).tolist() == flat(moved).tolist()


def test_the_server_lifts_the_mean():
    plugin = attached(dim=5)
    start = flat(dict(plugin._model.named_parameters())).detach().double()
    visit_round(plugin, 0, [0, 1])
    a = dense(5)
    wanted = start + (5 / SIZE) ** 0.5 * a @ a.T @ (flat(change(0)) + flat(change(1))).double() / 2
    torch.testing.assert_close(flat(dict(plugin._model.named_parameters())).double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_round_without_updates_moves_nothing():
    assert attached(dim=5).lift({"norm.running_mean": torch.ones(2)}, Clock(0)).keys() == {"norm.running_mean"}


@pytest.mark.parametrize("draw", ["client", "round"])
def test_clients_draw_subspaces(draw):
    """K = 3: each z is placed in its own row; over many draws all are drawn about equally often."""
    plugin = attached(dim=4, subspaces=3, draw=draw)
    drawn = [[plugin._which(Visit(round, client, 1)) for client in range(6)] for round in range(200)]
    assert all(len(set(row)) == 1 for row in drawn) == (draw == "round")
    counts = torch.tensor(drawn)[:, 0].bincount(minlength=3)
    assert all(abs(int(count) - 200 / 3) < 4 * (200 * 2 / 9) ** 0.5 for count in counts)
    visit = next(visit for number in range(99) if plugin._which(visit := Visit(number, number)) == 2)
    which = plugin._which(visit)
    z = plugin.encode(change(), visit)
    placed = plugin.decode(z, visit)["intrinsic.z"]
    assert placed.shape == (3, 4)
    assert torch.equal(placed[which], z["intrinsic.z"])
    assert not placed[[row for row in range(3) if row != which]].any()
    torch.testing.assert_close(z["intrinsic.z"], ((4 / SIZE) ** 0.5 * dense(4, which=which).T @ flat(change()).double()).float())


# -- memory -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2**15 + 1, 2**16])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_few_maps_lie_in_memory(kind, size):
    """Of K = 8, as many as half a vector of float32 takes; those made again are the same."""
    maps, z = Maps(kind, 100), torch.randn(100)
    first = [maps.get(size, 7, 0, which).lift(z) for which in range(8)]
    assert 0 < maps.nbytes <= 2.2 * size
    again = maps.get(size, 7, 0, 0)
    assert torch.equal(again.lift(z), first[0])
    assert maps.get(size, 7, 0, 0) is again
    assert not torch.equal(first[0], first[1])


def test_a_host_that_asks_for_shapes_makes_no_map():
    plugin = attached(dim=3)
    z = plugin.encode({name: torch.zeros_like(value) for name, value in change().items()}, Visit(0))["intrinsic.z"]
    assert (z.shape, float(z.abs().max())) == ((3,), 0.0)
    assert plugin._maps.nbytes == 0
    plugin.encode(change(), Visit(0))
    assert plugin._maps.nbytes > 0


# -- every step -------------------------------------------------------------------------------------------------------
def step(plugin, moved, number=0):
    plugin.before_forward(Clock(0, number))
    plugin.after_backward(Clock(0, number))
    with torch.no_grad():
        for name, value in moved.items():
            plugin._model.get_parameter(name).add_(value)
    plugin.after_update(Clock(0, number))
    plugin.after_step(Clock(0, number))


@pytest.mark.parametrize("gain", ["length", "projection", "unbiased"])
def test_steps_become_their_part_in_the_subspace(gain):
    model = Two()
    plugin = attached(model, dim=5, space="subspace", gain=gain)
    plugin.visit(Visit(0, 0, 7))
    before = flat(dict(model.named_parameters())).detach().double()
    a, factor = dense(5, seed=7), {"length": (5 / SIZE) ** 0.5, "projection": 5 / SIZE, "unbiased": 1.0}[gain]
    z = torch.zeros(5).double()
    for number in range(3):
        step(plugin, change(number), number)
        z += factor * a.T @ flat(change(number)).double()
        torch.testing.assert_close(flat(dict(model.named_parameters())).double(), before + a @ z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plugin.encode(change(9), Visit(0, 0, 7))["intrinsic.z"].double(), z, rtol=1e-5, atol=1e-5)
    plugin.before_forward(Clock(0, 3))
    kept = flat(dict(model.named_parameters())).clone()
    plugin.after_step(Clock(0, 3))  # a micro-batch without an optimizer step
    assert torch.equal(flat(dict(model.named_parameters())), kept)
    plugin.visit(Visit(0, 1, 7))  # the next client begins at nothing
    assert not plugin.encode(change(9), Visit(0, 1, 7))["intrinsic.z"].any()


def test_on_one_machine_half_precision_is_rounded_once():
    """Steps far below a rounding of bfloat16 add up."""
    model = Two().bfloat16()
    plugin = IntrinsicProjection(5, gain=0.001).in_place()
    plugin.attach(model)
    plugin.visit(Visit(0))
    before, a = flat(dict(model.named_parameters())).detach().double(), dense(5)
    z = torch.zeros(5).double()
    for number in range(200):
        now = flat(dict(model.named_parameters())).detach().double()
        with torch.no_grad():
            moved = {name: value.bfloat16() for name, value in change(number % 3).items()}
            shifted = {name: model.get_parameter(name) + value for name, value in moved.items()}
        step(plugin, moved, number)
        z += 0.001 * a.T @ (flat(shifted).double() - now)
    after = flat(dict(model.named_parameters())).detach().double()
    wanted = before + a @ z
    assert bool(((after - wanted).abs() <= 2**-8 * wanted.abs() + 1e-4).all())
    assert float((after - before).norm()) > 0.1


def test_in_gradient_space_steps_are_left_alone():
    model = Two()
    plugin = attached(model, dim=5)
    plugin.visit(Visit(0))
    step(plugin, {"one.weight": torch.ones(2, 3)})
    assert torch.equal(model.one.weight, Two().one.weight + 1)
