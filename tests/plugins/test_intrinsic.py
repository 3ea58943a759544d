"""The plugin verb by verb: what it takes, what it makes of a change, who is served what, and what it remembers."""

import pytest
import torch
from torch import nn

from featherlight.plugins import Clock, IntrinsicProjection, Visit
from featherlight.plugins.projections import PROJECTIONS
from featherlight.plugins.seeds import derive


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
        ({"gain": "one"}, "gain='one' is not known; use 'projection', 'unbiased' or a number"),
        ({"gain": 0.0}, r"gain=0.0: give a number above 0"),
        ({"gain": float("nan")}, "gain=nan: give a number above 0"),
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
    }
    assert attached(dim=7).describe() == IntrinsicProjection(7).describe()


def test_more_dimensions_than_train():
    model = Two()
    model.one.requires_grad_(False)
    with pytest.raises(ValueError, match="dim=7: 6 parameters train in this stage; give that many or fewer"):
        attached(model, dim=7).encode({}, Visit(0))


# -- up ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("gain", "factor"), [("projection", 5 / SIZE), ("unbiased", 1.0), (0.25, 0.25)])
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
    wanted = start + 5 / SIZE * a @ a.T @ (flat(change(0)) + flat(change(1))).double() / 2
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
    torch.testing.assert_close(z["intrinsic.z"], (4 / SIZE * dense(4, which=which).T @ flat(change()).double()).float())


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
def test_subspaces_serve_what_may_have_changed(draw):
    plugin, kept = attached(dim=2, subspaces=3, draw=draw), {}
    visit_round(plugin, 0, [0], kept_by=kept)
    served = vectors(visit_round(plugin, 1, [0], kept_by=kept)[0])
    drawn = plugin._which(Visit(0, 0))
    assert served == ([f"intrinsic.0.{k}@0" for k in range(3)] if draw == "client" else [f"intrinsic.0.{drawn}@0"])


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
    whole = plugin.encode_down(server_of(plugin), Visit(5, 1), kept[1])  # 5 · 3 > 14
    assert set(NAMES) <= set(whole)
    assert vectors(whole) == []
    assert {f"intrinsic.{span}.0@{span}" for span in range(5)} <= set(whole)  # it need not be sent them later
    after = [name for name in whole if name.startswith("intrinsic.")]
    assert [name for name in vectors(plugin.encode_down(server_of(plugin), Visit(6, 1), after)) if name not in after] == ["intrinsic.5.0@5"]


def test_an_unknown_start_is_sent_once():
    plugin, kept = attached(dim=2, known_start=False), {}
    first = visit_round(plugin, 0, [0], kept_by=kept)[0]
    assert set(NAMES) <= set(first)
    second = visit_round(plugin, 1, [0, 1], kept_by=kept)
    assert not set(NAMES) & set(second[0])
    assert set(NAMES) <= set(second[1])


@pytest.mark.parametrize("options", [{"dim": 4}, {"dim": 2, "subspaces": 2}, {"dim": 2, "periods_per_span": 1}], ids=str)
def test_what_a_client_makes_of_vectors_is_the_server_s_model(options):
    plugin, kept = attached(**options), {}
    for round in range(3):
        visit_round(plugin, round, [0, 1], kept_by=kept)
        served = plugin.encode_down(server_of(plugin), Visit(round + 1, 0), kept[0])
        received = plugin.decode_down(served, Visit(round + 1, 0))
        assert not any(name.startswith("intrinsic.") for name in received)
        for name, value in plugin._model.named_parameters():
            torch.testing.assert_close(received[name], value.detach(), rtol=1e-6, atol=1e-7)


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


# -- every step -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gain", ["projection", "unbiased"])
def test_a_step_becomes_its_part_in_the_subspace(gain):
    model = Two()
    plugin = attached(model, dim=5, space="subspace", gain=gain)
    plugin.visit(Visit(0, 0, 7))
    before = flat(dict(model.named_parameters())).detach().double()
    plugin.before_forward(Clock(0))
    plugin.after_backward(Clock(0))
    with torch.no_grad():
        for name, value in change().items():
            model.get_parameter(name).add_(value)
    plugin.after_step(Clock(0))
    a = dense(5, seed=7)
    wanted = before + (5 / SIZE if gain == "projection" else 1.0) * a @ (a.T @ flat(change()).double())
    torch.testing.assert_close(flat(dict(model.named_parameters())).double(), wanted, rtol=1e-5, atol=1e-6)
    plugin.before_forward(Clock(0, 1))
    kept = flat(dict(model.named_parameters())).clone()
    plugin.after_step(Clock(0, 1))  # a micro-batch without an optimizer step
    assert torch.equal(flat(dict(model.named_parameters())), kept)


def test_in_gradient_space_steps_are_left_alone():
    model = Two()
    plugin = attached(model, dim=5)
    plugin.visit(Visit(0))
    plugin.after_backward(Clock(0))
    with torch.no_grad():
        model.one.weight.add_(1)
    plugin.after_step(Clock(0))
    assert torch.equal(model.one.weight, Two().one.weight + 1)
