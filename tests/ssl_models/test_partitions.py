"""Partitions divide: nothing twice, nothing left out; and each has the shape it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from featherlight.plugins.seeds import derive
from featherlight.ssl_models.partitions import IID, Dirichlet, Natural, Partition, Shards

EVERY = [IID(), Dirichlet(1.0, min_size=0), Dirichlet(1.0, min_size=0, balance=False), Shards(1), Shards(3)]
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("partition", EVERY, ids=lambda p: f"{type(p).__name__}-{vars(p)}")
@quick
@given(labels=st.lists(st.integers(0, 4), min_size=24, max_size=120), clients=st.integers(1, 8), seed=st.integers(0, 2**62))
def test_every_image_goes_to_exactly_one_client_and_the_seed_decides(
    partition: Partition, labels: list[int], clients: int, seed: int
) -> None:
    parts = partition(torch.tensor(labels), clients, seed)
    assert len(parts) == clients
    places = [place for part in parts for place in part.tolist()]
    assert len(places) == len(labels)
    assert set(places) == set(range(len(labels)))
    assert all(torch.equal(a, b) for a, b in zip(parts, partition(torch.tensor(labels), clients, seed), strict=True))


@quick
@given(owners=st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=60))
def test_natural_gives_each_owner_his_own(owners: list[str]) -> None:
    names = sorted(set(owners))
    parts = Natural()(torch.zeros(len(owners), dtype=torch.long), len(names), 0, owners)
    assert [part.tolist() for part in parts] == [[i for i, o in enumerate(owners) if o == name] for name in names]


def test_iid_sizes_are_equal_to_within_one_and_labels_are_mixed() -> None:
    labels = torch.arange(10).repeat_interleave(103)
    parts = IID()(labels, 7, seed=3)
    assert {len(part) for part in parts} == {147, 148}  # 1030 = 7 · 147 + 1
    assert all(len(labels[part].unique()) == 10 for part in parts)
    assert not torch.equal(parts[0], IID()(labels, 7, seed=4)[0])


def test_shards_give_each_client_few_labels() -> None:
    labels = torch.arange(10).repeat(20)  # 20 shards of 10 images: none spans two labels
    parts = Shards(2)(labels, 10, seed=1)
    assert [len(part) for part in parts] == [20] * 10
    assert max(len(labels[part].unique()) for part in parts) == 2
    uneven = Shards(2)(torch.arange(10).repeat(20)[:197], 10, seed=1)
    assert {len(part) for part in uneven} <= {18, 19, 20}  # shards of 9 or 10


def test_dirichlet_is_even_for_a_large_alpha_and_uneven_for_a_small_one() -> None:
    labels = torch.arange(10).repeat(300)

    def largest_share(alpha: float) -> float:
        parts = Dirichlet(alpha, balance=False)(labels, 10, seed=0)
        counts = torch.stack([labels[part].bincount(minlength=10) for part in parts]).double()
        return float((counts.max(1).values / counts.sum(1)).mean())

    # Even shares are 1/10; the standard deviation of a share, sqrt(0.09 / (10·alpha + 1)), is 0.003 at alpha = 1000.
    assert largest_share(1000.0) < 0.1 + 4 * 0.003
    assert largest_share(0.05) > 0.5


@pytest.mark.parametrize("balance", [True, False])
def test_dirichlet_is_flwr_datasets_own_on_an_ordinary_table(balance: bool) -> None:
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    labels = torch.randint(0, 5, (300,), generator=torch.Generator().manual_seed(0))
    ours = Dirichlet(0.5, min_size=2, balance=balance)(labels, 6, seed=9)
    theirs = DirichletPartitioner(6, "label", 0.5, 2, balance, shuffle=False, seed=derive(9, "partition", "dirichlet"))
    theirs.dataset = Dataset.from_dict({"label": labels.tolist(), "place": list(range(300))})
    for client, part in enumerate(ours):
        assert sorted(theirs.load_partition(client)["place"]) == part.tolist()


@pytest.mark.parametrize(
    ("partition", "clients", "message"),
    [
        (IID(), 0, "num_clients=0; there must be at least 1"),
        (IID(), 13, "num_clients=13 but there are 12 training images"),
        (Shards(5), 3, "3 clients with 5 shards each need 15 images, there are 12"),
        (Dirichlet(0.1, min_size=6), 4, "no Dirichlet draw with alpha=0.1 gave each of 4 clients at least 6 of 12 images"),
        (Natural(), 2, "needs a folder per client"),
    ],
)
def test_what_cannot_be_divided_is_said_in_one_line(partition: Partition, clients: int, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        partition(torch.arange(12) % 3, clients)
    assert "\n" not in str(caught.value)


def test_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"alpha=0\.0; it must be above 0"):
        Dirichlet(0.0)
    with pytest.raises(ValueError, match="per_client=0; it must be at least 1"):
        Shards(0)
    with pytest.raises(ValueError, match="num_clients=3 but the data belong to 2 clients"):
        Natural()(torch.zeros(4, dtype=torch.long), 3, 0, ["a", "b", "a", "b"])


def test_a_partition_that_loses_images_is_caught() -> None:
    class Careless(Partition):
        def split(self, labels: torch.Tensor, num_clients: int, seed: int, owners: object) -> list[torch.Tensor]:
            return [torch.tensor([0, 1]), torch.tensor([1, 2])]

    with pytest.raises(ValueError, match="Careless gave 4 places, 3 of them different, to 5 images"):
        Careless()(torch.arange(5), 2)
