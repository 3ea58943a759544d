"""A private federation: what one client can move, what is counted of it, and that nothing of that hangs on how it is run."""

import json
import math
import statistics
import sys

import pytest
import torch
from torch import nn

from featherlight.fed_loop import Federation, Median, noise_for
from featherlight.fed_loop.accounting import FIXED, KNOWN, POISSON, Account
from featherlight.fed_loop.cohort import asked
from featherlight.fed_loop.predict import predict
from featherlight.fed_loop.weighing import FixedMean
from featherlight.plugins import (
    MOON,
    ClientPrivacy,
    DepthDropout,
    FetchSGD,
    IntrinsicProjection,
    LayerFreezing,
    Mechanism,
    NormClipping,
    PartitionedTraining,
    PrismSampling,
    ProgressiveGrowth,
    Proximal,
    Quantization,
    TopK,
)

dp = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed: pip install 'featherlight[privacy]'")
SIZES = [10, 3, 14, 6, 8]


@pytest.fixture
def normed(net):
    """The small network with layer norm in place of batch norm."""

    def make(lr=0.1, **options):
        model = net(lambda parameters: torch.optim.SGD(parameters, lr), **options)
        for block in model.blocks:
            block.norm = nn.LayerNorm(8)
        return model

    return make


def private(clip=0.05, noise_multiplier=1.0, **options):
    return ClientPrivacy(clip, noise_multiplier, delta=1e-3, **options)


WAYS = {
    "alone": lambda: [private()],
    "layer-wise": lambda: [LayerFreezing("blocks.*"), private()],
    "progressive": lambda: [private(), ProgressiveGrowth("blocks.*")],
    "depth dropout": lambda: [DepthDropout("blocks.*"), private()],
    "PriSM": lambda: [PrismSampling({0.3: 0.5, 0.6: 0.5}, layers="blocks.*"), private()],
    "intrinsic": lambda: [IntrinsicProjection(20, periods_per_span=2), private()],
    "intrinsic, two subspaces": lambda: [IntrinsicProjection(20, subspaces=2), private()],
    "intrinsic, 6 bits": lambda: [IntrinsicProjection(20, subspaces=2, down_bits=6), private()],
    "top-k": lambda: [TopK(20), private()],
    "FetchSGD": lambda: [FetchSGD(20, 3, 10), private()],
    "8 bits": lambda: [private(), Quantization()],
    "clipped twice": lambda: [NormClipping(0.02), private()],
    "held near": lambda: [Proximal(0.1), private(), MOON(through=["stem", "blocks", "dropout", "head"])],
    "shares": lambda: [private(shares=5)],
}


# -- what one client can move -------------------------------------------------------------------------------------------
@pytest.fixture
def summed(federation, normed, points, monkeypatch):
    """The sum of one round's updates as lifting finds it, with some clients' data changed."""

    def run(way, change=lambda data: None, **options):
        seen = {}
        result = FixedMean.result
        monkeypatch.setattr(FixedMean, "result", lambda mean: seen.setdefault("sum", result(mean)))
        data = points(SIZES)
        change(data)
        done = federation(1, seed=5, **options).run(normed(), data, WAYS[way]())
        monkeypatch.undo()
        over = options.get("cohort", len(SIZES))
        return torch.cat([value.flatten() * over for _, value in sorted(seen["sum"].items())]), done

    return run


def absent(data):
    """A client whose loss is not finite, so that nothing of it counts."""
    data.clients[2][0][0, 0] = float("nan")


def another(data):
    data.clients[2][0].mul_(-3.0)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "shares"])
def test_one_client_moves_the_sum_by_no_more_than_the_bound(way, summed):
    """The bound where it comes or does not, twice that where its data are others."""
    with_it, _ = summed(way)
    without, done = summed(way, absent)
    assert done.rejected == 1
    moved = float((with_it - without).norm())
    bound = 0.02 if way == "clipped twice" else 0.05
    assert 0.9 * bound < moved <= bound * (1 + 1e-9)
    changed, _ = summed(way, another)
    assert 0 < float((with_it - changed).norm()) <= 2 * bound * (1 + 1e-9)


def test_samples_do_not_weigh(summed):
    """A client of one sample says as much as one of 14, and the sum is divided by what cohorts are to have."""
    alone, _ = summed("alone", dropout=0.0)
    few, done = summed("alone", absent)
    assert done.history[0]["clients"] == 4
    assert float((alone - few).norm()) == pytest.approx(0.05, rel=1e-3)


def test_an_entry_that_a_client_does_not_hold_counts_as_unchanged():
    mean = FixedMean({"a": torch.zeros(2), "b": torch.zeros(1), "c": torch.zeros(1)}, over=4)
    mean.add({"a": (torch.tensor([1.0, 7.0]), torch.tensor([1.0, 0.0])), "b": torch.tensor([2.0])})
    mean.add({"a": torch.tensor([3.0, 1.0])})
    assert {name: value.tolist() for name, value in mean.result().items()} == {"a": [1.0, 0.25], "b": [0.5], "c": [0.0]}
    for update in ({"a": (torch.ones(2), torch.tensor([2.0, 1.0]))}, {"b": torch.ones(1, dtype=torch.int64)}):
        with pytest.raises(ValueError, match="entry"):
            mean.add(update)


def test_noise_alone(federation, normed, points):
    """Of clients that learn nothing, the server's weights move by noise, each of them, by as much as is told."""
    module = normed(lr=0.0)
    before = {name: value.clone() for name, value in module.named_parameters()}
    done = federation(1, cohort=3, dropout=0.5).run(module, points(SIZES), [private(2.0, 1.5), DepthDropout("blocks.*", rate=0.9)])
    moved = torch.cat([(value - before[name]).detach().flatten() for name, value in module.named_parameters()])
    assert done.history[0]["clients"] < 3
    assert bool((moved != 0).all())
    assert float(moved.std()) == pytest.approx(2.0 * 1.5 / 3, rel=4 / math.sqrt(2 * len(moved)))


# -- what is counted ----------------------------------------------------------------------------------------------------
def library(relation, event, rounds, delta):
    accountant = dp.rdp.RdpAccountant(neighboring_relation=relation)
    return accountant.compose(event, rounds).get_epsilon(delta)


@pytest.mark.parametrize(
    ("options", "known", "adjacency"),
    [
        ({"cohort": 10, "sampling": "poisson"}, False, POISSON),
        ({"cohort": 10}, False, FIXED),
        ({}, False, KNOWN),
        ({"cohort": 10}, True, KNOWN),
        ({"cohort": 10, "sampling": "poisson"}, True, KNOWN),
    ],
)
def test_epsilon_is_the_library_s(options, known, adjacency):
    settings, relations = Federation(40, seed=4, **options), dp.NeighboringRelation
    account = Account(Mechanism(0.3, 2.0, 1e-4, known), settings, 100)
    turns = [asked(settings, 100, round) for round in range(40)]
    most = max(sum(client in cohort for cohort in turns) for client in range(100))
    relation, event, times = {
        POISSON: (relations.ADD_OR_REMOVE_ONE, dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(2.0)), 40),
        FIXED: (relations.REPLACE_ONE, dp.SampledWithoutReplacementDpEvent(100, 10, dp.GaussianDpEvent(1.0)), 40),
        KNOWN: (relations.REPLACE_SPECIAL, dp.GaussianDpEvent(2.0), most),
    }[adjacency]
    assert account.adjacency == adjacency
    assert account.epsilon(40) == pytest.approx(library(relation, event, times, 1e-4), rel=1e-9)
    assert account.epsilon(0) == 0 < account.epsilon(7) < account.epsilon(40)


def test_epsilon_in_the_textbook_s_setting():
    """q = 0.01, σ = 4, 10,000 steps, δ = 1e-5: at most 1.26 (arXiv 1607.00133, section 3.2), and less by what is known since."""
    account = Account(Mechanism(1.0, 4.0, 1e-5), Federation(10_000, cohort=1, sampling="poisson"), 100)
    assert 0.9 < account.epsilon(10_000) <= 1.26


def test_a_gaussian_by_hand():
    """Of orders α, T·α / 2σ² + log(1/δ) / (α − 1) is an upper bound (arXiv 1702.07476), and not far above."""
    account = Account(Mechanism(1.0, 5.0, 1e-5), Federation(30), 12)
    plain = min(30 * order / 50 + math.log(1e5) / (order - 1) for order in (1 + 0.1 * step for step in range(1, 300)))
    assert 0.8 * plain < account.epsilon(30) < plain


def test_clients_that_remember_tell_of_earlier_cohorts(federation, normed, points):
    """Who was drawn is then nothing to count on."""
    for plugins, adjacency in (([private()], POISSON), ([TopK(20), private()], KNOWN)):
        done = federation(3, cohort=2, sampling="poisson").run(normed(), points(SIZES), plugins)
        assert done.privacy["adjacency"] == adjacency


@pytest.mark.parametrize(("options", "known"), [({}, False), ({"cohort": 5}, True)])
def test_the_least_noise_for_an_epsilon(options, known):
    settings = Federation(20, **options)
    sigma = noise_for(3.0, settings, 50, delta=1e-3, known_cohorts=known)
    reached, with_less = (Account(Mechanism(1.0, value, 1e-3, known), settings, 50).epsilon(20) for value in (sigma, sigma - 0.003))
    assert reached <= 3.0 < with_less


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.inf, 1e-9])
def test_an_epsilon_that_no_noise_gives(epsilon):
    with pytest.raises(ValueError, match="epsilon="):
        noise_for(epsilon, Federation(20), 50)


def test_what_is_told(federation, normed, points, tmp_path):
    done = federation(3, folder=tmp_path).run(normed(), points(SIZES), [private()])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    account = Account(Mechanism(0.05, 1.0, 1e-3), federation(3), 5)
    assert [row["epsilon"] for row in rows] == pytest.approx([account.epsilon(rounds) for rounds in (1, 2, 3)])
    told = json.loads((tmp_path / "result.json").read_text())["privacy"]
    assert told == done.privacy == {**told, "epsilon": rows[-1]["epsilon"], "delta": 1e-3, "adjacency": KNOWN, "clip": 0.05}


def test_without_noise_nothing_is_private(federation, normed, points, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    done = federation(1, folder=tmp_path).run(normed(), points(SIZES), [private(noise_multiplier=0.0)])
    assert done.privacy["epsilon"] == math.inf
    assert json.loads((tmp_path / "result.json").read_text())["privacy"]["epsilon"] is None


def test_what_nobody_knows_is_not_told(federation, normed, points):
    """PriSM's share of kernels that somebody held: under noise all look held."""
    for plugins, told in ((WAYS["PriSM"]()[:1], True), (WAYS["PriSM"](), False)):
        done = federation(2, cohort=2).run(normed(), points(SIZES), plugins)
        assert all(("kernel_coverage" in row) == told for row in done.history)


@pytest.mark.parametrize("plugins", [[], [IntrinsicProjection(20, subspaces=2, draw="round")], [DepthDropout("blocks.*", every="batch")]])
def test_noise_of_shares_is_on_every_number(plugins, federation, normed, points):
    """Of clients that learn nothing, and add all of the noise: what they send is all there is."""
    module = normed(lr=0.0)
    before = [value.clone() for value in module.parameters()]
    federation(1).run(module, points(SIZES), [*plugins, private(2.0, 1.5, shares=5)])
    assert all(bool((value != old).all()) for value, old in zip(module.parameters(), before))


# -- how it is run ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
def test_every_update_counts_and_a_run_that_goes_on_ends_alike(way, federation, normed, points, same, figures, tmp_path):
    """Stopped after the first of three rounds, and in one go."""
    options = {"cohort": 3, "seed": 3, "dropout": 0.2}
    whole = normed()
    done = federation(3, **options).run(whole, points(SIZES), WAYS[way]())
    assert done.rejected == 0
    federation(1, folder=tmp_path, **options).run(normed(), points(SIZES), WAYS[way]())
    later = normed()
    on = federation(3, folder=tmp_path, **options).run(later, points(SIZES), WAYS[way](), resume=True)
    same(later.state_dict(), whole.state_dict())
    assert figures(on)[0] == figures(done)[0]


def test_secret_noise_goes_on_as_it_was(federation, normed, points, same, tmp_path):
    plugins = [private(secret=True)]
    federation(2, folder=tmp_path, seed=3, checkpoint_every=1).run(normed(), points(SIZES), plugins)
    ends = []
    for _ in range(2):  # twice from one checkpoint: with the same noise, or what it hides would be told twice
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        module = normed()
        federation(3, folder=tmp_path, seed=3, checkpoint_every=0).run(module, points(SIZES), [private(secret=True)], resume=True)
        ends.append(module.state_dict())
    same(*ends)


def test_poisson_cohorts():
    settings = Federation(1, cohort=20, sampling="poisson", seed=2)
    cohorts = [asked(settings, 100, round) for round in range(300)]
    assert statistics.mean(map(len, cohorts)) == pytest.approx(20, abs=4 * math.sqrt(16 / 300))
    assert statistics.variance(map(len, cohorts)) == pytest.approx(16, rel=0.4)
    assert all(cohort == sorted(set(cohort)) for cohort in cohorts)
    together = sum(3 in cohort and 4 in cohort for cohort in cohorts)
    assert together == pytest.approx(300 * 0.04, abs=4 * math.sqrt(300 * 0.04))


def test_rounds_that_nobody_comes_to(federation, net, normed, points, tmp_path):
    """Their noise falls all the same; without a private method, the weights stay."""
    settings = {"cohort": 1, "sampling": "poisson", "seed": 8}
    empty = [round for round in range(8) if not asked(Federation(8, **settings), 5, round)]
    assert empty
    for plugins in ([IntrinsicProjection(20), private()], [TopK(20)], []):
        done = federation(8, **settings).run(normed(), points(SIZES), plugins)
        assert [row["round"] for row in done.history if not row["clients"]] == empty


SENT = ["depth dropout", "intrinsic", "intrinsic, two subspaces", "intrinsic, 6 bits", "top-k", "progressive"]


@pytest.mark.parametrize(("cohort", "seed"), [(3, 3), (1, 8)], ids=["three of five", "some rounds with nobody"])
@pytest.mark.parametrize("way", SENT)
def test_what_it_costs_is_predicted(way, cohort, seed, federation, normed, points, cost_of, same_but_for_the_peak):
    """Noise changes what nobody sent, in rounds that nobody comes to as well, and what changed is sent."""
    settings = federation(6, cohort=cohort, sampling="poisson", seed=seed)
    assert all(asked(settings, 5, round) for round in range(6)) == (cohort == 3)
    predicted = predict(settings, normed, points(SIZES), WAYS[way]())
    measured = settings.run(normed(), points(SIZES), WAYS[way]()).cost
    one, other = predicted.to_json(), cost_of(type("Of", (), {"cost": measured})().cost)
    for row in (*one["rows"], one["total"]):
        row.pop("seconds")
    same_but_for_the_peak(one, other)


# -- refused ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "plugins", "why"),
    [
        ({"min_clients": 2}, [private()], "min_clients=2: whether a round counts would hang on one client"),
        ({"aggregate": Median()}, [private()], "noise is for a sum of bounded updates"),
        ({}, [ClientPrivacy(1.0, 1.0, delta=0.2)], "delta=0.2 of ClientPrivacy, with 5 clients"),
        ({}, [PartitionedTraining("blocks.1"), private()], "PartitionedTraining divides the model"),
        ({}, [DepthDropout("blocks.*"), private(shares=5)], "with DepthDropout clients of a round send different parts.*shares=5"),
        ({}, [TopK(20), private(shares=5)], "with TopK clients of a round send different parts"),
        ({}, [PrismSampling(0.5, layers="blocks.*"), private(shares=5)], "with PrismSampling clients of a round send different parts"),
        ({}, [IntrinsicProjection(20, subspaces=2), private(shares=5)], "with IntrinsicProjection clients of a round send different"),
        ({"sampling": "poisson", "cohort": 2}, [PartitionedTraining("blocks.1")], "cohorts of a fixed size"),
    ],
)
def test_what_does_not_go_together(options, plugins, why, federation, normed, points):
    with pytest.raises(ValueError, match=why):
        federation(2, **options).run(normed(), points(SIZES), plugins)


@pytest.mark.parametrize(
    "options", [{"sampling": "poisson"}, {"sampling": "poisson", "cohort": 3, "over_select": 1.5}, {"sampling": "some"}]
)
def test_sampling_that_is_not_known(options):
    with pytest.raises(ValueError, match="sampling="):
        Federation(2, **options)


def test_batch_norm_is_refused_before_anybody_trains(federation, net, points):
    with pytest.raises(ValueError, match="keeps running statistics"):
        federation(1).run(net(), points(SIZES), [private()])


def test_statistics_that_stay_do_not_travel(federation, net, points):
    module = net()
    before = {name: value.clone() for name, value in module.named_buffers()}
    federation(2).run(module, points(SIZES), [private(statistics="stay")])
    assert before
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())


def test_without_the_library(federation, normed, points, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ValueError, match=r'not installed: pip install "featherlight\[privacy\]"'):
        federation(1).run(normed(), points(SIZES), [private()])
