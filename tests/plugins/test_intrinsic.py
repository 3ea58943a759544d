"""The plugin verb by verb: what it takes, what it makes of a change, who is served what, and what it remembers."""

import pytest
import torch
from torch import nn

from featherlight.plugins import Clock, IntrinsicProjection, Quantization, Visit
from featherlight.plugins.bypass import make_bypassable, set_absent
from featherlight.plugins.projections import PROJECTIONS
from featherlight.plugins.seeds import derive
from featherlight.plugins.subspaces import Maps


class Two(nn.Module):
    """Parameters 6 + 2 + 4 + 2 = 14 in four tensors, and statistics of a norm without parameters."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Linear(3, 2), nn.BatchNorm1d(2, affine=False), nn.Linear(2, 2)

    def forward(self, x):
        return self.two(self.norm(self.one(x)))


SIZE = 14
NAMES = ["one.weight", "one.bias", "two.weight", "two.bias"]


def attached(model=None, **options):
    plugin = IntrinsicProjection(**options)
    plugin.attach(model or Two())
    return plugin


def dense(dim, span=0, which=0, kind="fastfood", seed=0, size=SIZE):
    projection = PROJECTIONS[kind](size, dim, derive(seed, "intrinsic", span, which))
    return torch.stack([projection.lift(unit) for unit in torch.eye(dim, dtype=torch.float64)], 1)


def server_of(plugin):
    return {name: value.detach() for name, value in plugin._model.state_dict().items()}


def change(seed=0):
    torch.manual_seed(seed)
    return {name: torch.randn(value.shape) for name, value in Two().named_parameters()}


def flat(entries):
    return torch.cat([entries[name].flatten() for name in NAMES])


def vectors(served):
    """Names of the vectors that come down, without those that only say that the client has them now."""
    return [name for name, value in served.items() if name.startswith("intrinsic.") and value.numel()]


def visit_round(plugin, round, clients, kept=(), seed=0, kept_by=None):
    """One round of an actual federation's calls; returns what each client was served."""
    kept_by = {} if kept_by is None else kept_by
    served, zs = {}, []
    for client in clients:
        visit = Visit(round, client, seed)
        served[client] = plugin.encode_down(server_of(plugin), visit, kept_by.get(client, kept))
        kept_by[client] = [name for name in served[client] if name.startswith("intrinsic.")]
        z = plugin.encode(change(10 * round + client), visit)
        zs.append(dict(plugin.decode(z, visit))["intrinsic.z"].double())
    lifted = plugin.lift({"intrinsic.z": sum(zs) / len(zs)}, Clock(round))
    with torch.no_grad():
        for name, value in lifted.items():
            plugin._model.get_parameter(name).add_(value)
    plugin.settle(plugin._model, Clock(round))
    return served


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


# -- down -------------------------------------------------------------------------------------------------------------
OTHERS = ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]


def test_static_serves_one_vector():
    plugin, kept = attached(dim=3), {}
    first = visit_round(plugin, 0, [0], kept_by=kept)[0]
    assert vectors(first) == []
    assert [name for name in first if not name.startswith("intrinsic.")] == OTHERS
    z = plugin._spans[-1].sums[0].clone()
    second = visit_round(plugin, 1, [0, 1], kept_by=kept)
    assert vectors(second[0]) == vectors(second[1]) == ["intrinsic.0.0@0"]
    assert torch.equal(second[0]["intrinsic.0.0@0"], z.float())
    assert second[0]["norm.running_mean"] is not None
    assert vectors(visit_round(plugin, 5, [0], kept_by=kept)[0]) == ["intrinsic.0.0@1"]  # a name is never used for another content


@pytest.mark.parametrize("draw", ["client", "round"])
def test_subspaces_serve_what_changed(draw):
    """What nobody drew did not change; ``serve="all"`` counts all the same."""
    for serve in ("changed", "all"):
        plugin, kept = attached(dim=2, subspaces=4, draw=draw, serve=serve), {}
        visit_round(plugin, 0, [0, 1], kept_by=kept)
        served = vectors(visit_round(plugin, 1, [0], kept_by=kept)[0])
        drawn = {plugin._which(Visit(0, client)) for client in (0, 1)}
        assert len(drawn) < 4
        assert served == [f"intrinsic.0.{k}@0" for k in range(4) if k in drawn or serve == "all"]


def test_a_prediction_knows_what_was_drawn():
    """Without updates, from which a server would see it."""
    plugin = attached(dim=2, subspaces=4)
    for client in (0, 1, 2):
        plugin.encode_down(server_of(plugin), Visit(0, client))
    plugin.arrive([Visit(0, client) for client in (0, 1)])  # the third dropped out
    served = vectors(plugin.encode_down(server_of(plugin), Visit(1, 0), ["intrinsic.start@0"]))
    assert served == [f"intrinsic.0.{k}@0" for k in sorted({plugin._which(Visit(0, client)) for client in (0, 1)})]


def test_half_precision_is_counted_in_bytes():
    """Σ in float32, 16 bytes a vector, against 28 of 14 parameters: a second vector is more than the model."""
    plugin, kept = attached(Two().bfloat16(), dim=4, periods_per_span=1, gain=0.01), {}
    visit_round(plugin, 0, [0, 1], kept_by=kept)
    one = plugin.encode_down(server_of(plugin), Visit(1, 1), kept[1])
    assert [one[name].dtype for name in vectors(one)] == [torch.float32]
    visit_round(plugin, 1, [0], kept_by=kept)
    two = plugin.encode_down(server_of(plugin), Visit(2, 1), kept[1])
    assert vectors(two) == []
    assert set(NAMES) <= set(two)


def test_with_the_model_comes_what_a_client_needs_to_go_on():
    """A model that holds A·Σ is no use with the next Σ unless that Σ is known."""
    plugin, kept = attached(dim=3, periods_per_span=5, known_start=False), {}
    for round in range(2):
        visit_round(plugin, round, [0], kept_by=kept)
    whole = plugin.encode_down(server_of(plugin), Visit(2, 1))
    assert set(NAMES) <= set(whole)
    assert torch.equal(whole["intrinsic.0.0@1"], plugin._spans[-1].sums[0].float())


def test_many_vectors_of_one_span_are_no_more_than_the_model():
    """K·d above D: the model alone, in every round; what the client had of vectors it still has."""
    plugin, kept = attached(dim=4, subspaces=4, serve="all"), {}
    first = visit_round(plugin, 0, [0], kept_by=kept)[0]
    assert not set(NAMES) & set(first)
    for round in (1, 2):
        served = visit_round(plugin, round, [0], kept_by=kept)[0]
        assert set(NAMES) <= set(served)
        assert vectors(served) == []
        assert kept[0] == ["intrinsic.start@0"]


def test_blocks_that_a_visit_leaves_out_come_with_the_model():
    plugin = attached(dim=2, known_start=False)
    make_bypassable(plugin._model.two)
    set_absent(plugin._model.two, "a test", True)
    message = plugin.encode_down(server_of(plugin), Visit(0))
    assert torch.equal(message["intrinsic.two.weight@0"], plugin._model.two.weight)
    assert "intrinsic.one.weight@0" not in message


def test_a_client_that_was_away_gets_a_vector_for_every_span():
    """Spans of a round: q spans away, q + 1 vectors, until the model is smaller: d = 3 of 14 parameters."""
    plugin, kept = attached(dim=3, periods_per_span=1), {}
    visit_round(plugin, 0, [0, 1], kept_by=kept)
    for round in range(1, 4):
        assert len([name for name in vectors(visit_round(plugin, round, [0], kept_by=kept)[0]) if name not in kept]) >= 1
    served = plugin.encode_down(server_of(plugin), Visit(4, 1), kept[1])
    missing = [name for name in vectors(served) if name not in kept[1]]
    assert missing == [f"intrinsic.{span}.0@{span}" for span in range(4)]
    assert not set(NAMES) & set(served)
    plugin.arrive([Visit(4, 1)])
    whole = plugin.encode_down(server_of(plugin), Visit(5, 1), kept[1])  # 5 · 3 > 14
    assert set(NAMES) <= set(whole)
    assert vectors(whole) == []
    assert {f"intrinsic.{span}.0@{span}" for span in range(5)} <= set(whole)  # it need not be sent them later
    plugin.arrive([Visit(5, 1)])
    after = [name for name in whole if name.startswith("intrinsic.")]
    assert [name for name in vectors(plugin.encode_down(server_of(plugin), Visit(6, 1), after)) if name not in after] == ["intrinsic.5.0@5"]


def test_an_unknown_start_is_sent_once():
    plugin, kept = attached(dim=2, known_start=False), {}
    first = visit_round(plugin, 0, [0], kept_by=kept)[0]
    assert set(NAMES) <= set(first)
    second = visit_round(plugin, 1, [0, 1], kept_by=kept)
    assert not set(NAMES) & set(second[0])
    assert set(NAMES) <= set(second[1])


# -- spans ------------------------------------------------------------------------------------------------------------
def test_spans_begin_where_they_are_due_and_where_others_train():
    plugin = attached(dim=3, periods_per_span=2)
    numbers = []
    for round in (0, 1, 2, 3, 7, 8):  # rounds may be missed: 4 to 6 are
        plugin.encode({}, Visit(round))
        numbers.append(plugin._spans[-1].number)
    assert numbers == [0, 0, 1, 1, 2, 3]
    plugin._model.one.requires_grad_(False)
    plugin.encode({}, Visit(9))
    assert plugin._spans[-1].number == 4
    assert plugin._spans[-1].names == NAMES[2:]
    assert all(span.position.numel() == 0 for span in plugin._spans[:-1])


def test_state_goes_round():
    plugin, kept = attached(dim=2, subspaces=2, periods_per_span=2), {}
    for round in range(3):
        visit_round(plugin, round, [0, 1], kept_by=kept)
    state = plugin.state_dict()
    model = Two()
    model.load_state_dict(plugin._model.state_dict())
    again = attached(model, dim=2, subspaces=2, periods_per_span=2)
    again.load_state_dict(state)
    sums = plugin._spans[-1].sums.clone()
    for round in range(3, 6):
        one, other = (visit_round(each, round, [0, 1], kept_by=dict(kept)) for each in (plugin, again))
        for client in (0, 1):
            assert one[client].keys() == other[client].keys()
            assert all(torch.equal(value, other[client][name]) for name, value in one[client].items())
    assert torch.equal(flat(dict(model.named_parameters())), flat(dict(plugin._model.named_parameters())))
    assert not torch.equal(sums, plugin._spans[-1].sums)
    third = attached(dim=2, subspaces=2, periods_per_span=2)
    third.load_state_dict(state)
    third._spans[-1].sums += 1
    third._spans[-1].changed[0] = 99
    fourth = attached(dim=2, subspaces=2, periods_per_span=2)
    fourth.load_state_dict(state)
    assert not torch.equal(third._spans[-1].sums, fourth._spans[-1].sums)  # what was loaded is nobody else's
    assert fourth._spans[-1].changed[0] != 99


def test_attached_again_it_knows_nothing():
    plugin = attached(dim=3)
    visit_round(plugin, 0, [0])
    plugin.attach(Two())
    assert plugin.state_dict()["spans"] == []


def test_the_server_s_momentum():
    """v ← β·v + mean, Σ ← Σ + v, anew in each span."""
    plugin, wanted, v = attached(dim=3, momentum=0.9, periods_per_span=2), torch.zeros(3).double(), torch.zeros(3).double()
    for round in range(4):
        if round == 2:
            wanted, v = torch.zeros(3).double(), torch.zeros(3).double()
        visit_round(plugin, round, [0])
        a = dense(3, round // 2)
        v = 0.9 * v + (3 / SIZE) ** 0.5 * a.T @ flat(change(10 * round)).double()
        wanted += v
        torch.testing.assert_close(plugin._spans[-1].sums[0], wanted, rtol=1e-5, atol=1e-6)


def test_what_an_optimizer_remembers_is_void_in_a_new_subspace():
    plugin = attached(dim=3, periods_per_span=2)
    renewed = [len(plugin.advance(Clock(period, step)).renewed) for period in range(5) for step in (0, 1)]
    assert renewed == [0, 0, 0, 0, 4, 0, 0, 0, 4, 0]
    assert not attached(dim=3).advance(Clock(4)).renewed


def test_weights_that_something_else_moved_are_not_overwritten():
    plugin = attached(dim=3)
    visit_round(plugin, 0, [0])
    z = plugin.encode(change(), Visit(1))
    with torch.no_grad():
        plugin._model.two.bias += 1
    with pytest.raises(ValueError, match=r"something moved two.bias out of the subspace since the round began"):
        plugin.lift(plugin.decode(z, Visit(1)), Clock(1))


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
