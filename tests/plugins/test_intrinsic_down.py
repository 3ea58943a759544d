"""IntrinsicProjection round by round: who is served what, when a subspace begins, and what is remembered."""

import pytest
import torch
from intrinsic_model import NAMES, SIZE, Two, attached, change, dense, flat, server_of, vectors, visit_round

from featherlight.plugins import Clock, Visit
from featherlight.plugins.bypass import make_bypassable, set_absent

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
