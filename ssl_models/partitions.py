"""How training images are divided over clients: identically, by a Dirichlet draw, in shards of few labels, or as they came.

Each partition is one of flwr-datasets' partitioners, run over a table of labels. Indices of a partition are disjoint and
cover every image, and they depend on nothing but labels, number of clients and seed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from functools import cache
from io import StringIO
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from featherlight.plugins.seeds import derive, generator

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


class Parts(Sequence[Tensor]):
    """Each client's indices, all in one tensor: of very many clients, one tensor each would take more than the indices themselves.

    Args:
        flat: all indices, (N,), client by client.
        sizes: how many are each client's.

    Example:
        >>> Parts(torch.tensor([4, 7, 1]), [2, 1])[0]
        tensor([4, 7])
    """

    def __init__(self, flat: Tensor, sizes: Sequence[int]) -> None:
        self.flat, self.sizes = flat, list(sizes)
        self._starts = [0, *accumulate(self.sizes)]

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Parts:
        """Of a tensor for each client."""
        if isinstance(parts, Parts):
            return parts
        return cls(torch.cat([torch.arange(0), *parts]), [len(part) for part in parts])

    def in_order(self) -> Parts:
        """The same, each client's indices in rising order."""
        owner = torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes, dtype=torch.int64))
        order = self.flat.argsort(stable=True)
        return Parts(self.flat[order[owner[order].argsort(stable=True)]], self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.flat.split(self.sizes))

    def __getitem__(self, client: Any) -> Any:
        """(n,); of a slice of clients a list."""
        if isinstance(client, slice):
            return [self[place] for place in range(len(self))[client]]
        place = range(len(self))[client]
        return self.flat[self._starts[place] : self._starts[place + 1]]


class Partition:
    """A way to divide images over clients. Override :meth:`split`; callers use :meth:`__call__`, which checks the result."""

    def split(self, labels: Tensor, num_clients: int, seed: int, owners: Sequence[str] | None) -> Sequence[Tensor]:
        """The indices of each client's images; arguments as in :meth:`__call__`."""
        raise NotImplementedError

    def __call__(self, labels: Tensor, num_clients: int, seed: int = 0, owners: Sequence[str] | None = None) -> Parts:
        """Divide images over clients.

        Args:
            labels: the images' labels, (N,).
            num_clients: how many clients there are.
            seed: what the division depends on besides labels.
            owners: to whom each image belongs, N names, where the data say so.

        Returns:
            For each client the indices of its images, int64, in rising order.

        Raises:
            ValueError: if there are fewer images than the division needs, or no owners where it needs them.
        """
        if num_clients < 1:
            raise ValueError(f"num_clients={num_clients}; there must be at least 1")
        if num_clients > len(labels):
            raise ValueError(f"num_clients={num_clients} but there are {len(labels)} training images; use fewer clients or more images")
        parts = Parts.of(self.split(labels, num_clients, seed, owners)).in_order()
        held = parts.flat.sort().values
        if not torch.equal(held, torch.arange(len(labels))):
            raise ValueError(
                f"{type(self).__name__} gave {len(held)} places, {len(held.unique())} of them different, to {len(labels)} "
                "images; its parameters are too extreme for this data (a Dirichlet alpha near 0?): choose milder ones"
            )
        return parts


class IID(Partition):
    """Equally many images for every client (to within one), drawn from all of them."""

    def split(self, labels: Tensor, num_clients: int, seed: int, owners: Sequence[str] | None) -> Sequence[Tensor]:
        from flwr_datasets.partitioner import IidPartitioner

        order = torch.randperm(len(labels), generator=generator(seed, "partition", "iid"))
        places = _places(IidPartitioner(num_clients), labels, num_clients)
        return Parts(order[places.flat], places.sizes)


class Dirichlet(Partition):
    """The images of each label are shared out in proportions drawn from a Dirichlet distribution (arXiv 1909.06335).

    Args:
        alpha: concentration: 0.1 gives clients few labels each, 100 is nearly IID.
        min_size: images every client must have at least; draws that give a client fewer are repeated, up to 10 times.
        balance: give a client that holds more than its equal share nothing of the labels that follow (flwr-datasets' default), which
            keeps sizes alike; False draws sizes freely, as the paper does.
    """

    def __init__(self, alpha: float = 0.5, min_size: int = 2, balance: bool = True) -> None:
        if not alpha > 0:
            raise ValueError(f"Dirichlet alpha={alpha}; it must be above 0")
        self.alpha, self.min_size, self.balance = alpha, min_size, balance

    def split(self, labels: Tensor, num_clients: int, seed: int, owners: Sequence[str] | None) -> Sequence[Tensor]:
        from flwr_datasets.partitioner import DirichletPartitioner

        partitioner = DirichletPartitioner(
            num_clients,
            "label",
            float(self.alpha),
            min_partition_size=self.min_size,
            self_balancing=self.balance,
            shuffle=False,
            seed=derive(seed, "partition", "dirichlet"),
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # flwr-datasets warns at every repeated draw
                return _places(partitioner, labels, num_clients)
        except ValueError as error:
            if "max number of attempts" not in str(error):
                raise
            raise ValueError(
                f"no Dirichlet draw with alpha={self.alpha} gave each of {num_clients} clients at least {self.min_size} of "
                f"{len(labels)} images; use a larger alpha, fewer clients or a smaller min_size"
            ) from None


class Shards(Partition):
    """Images sorted by label, cut into equal shards, so many of which are dealt to each client (arXiv 1602.05629, section 3).

    Args:
        per_client: shards of each client: with 2, most clients see two labels.
    """

    def __init__(self, per_client: int = 2) -> None:
        if per_client < 1:
            raise ValueError(f"Shards per_client={per_client}; it must be at least 1")
        self.per_client = per_client

    def split(self, labels: Tensor, num_clients: int, seed: int, owners: Sequence[str] | None) -> Sequence[Tensor]:
        from flwr_datasets.partitioner import ShardPartitioner

        count = num_clients * self.per_client
        if count > len(labels):
            raise ValueError(
                f"{num_clients} clients with {self.per_client} shards each need {count} images, there are {len(labels)}; "
                "use fewer clients or shards"
            )
        order = torch.randperm(len(labels), generator=generator(seed, "partition", "shards"))
        shards = order[labels[order].argsort(stable=True)].tensor_split(count)
        # One row of the table is one whole shard: flwr-datasets cuts shards of one size and drops the images left over.
        dealer = ShardPartitioner(
            num_clients,
            "label",
            num_shards_per_partition=self.per_client,
            shard_size=1,
            seed=derive(seed, "partition", "deal"),
        )
        dealt = _places(dealer, torch.arange(count), num_clients)
        return [torch.cat([shards[shard] for shard in hand.tolist()]) for hand in dealt]


class Natural(Partition):
    """Images as they came: a client for every owner (every folder, in image folders), by name."""

    def split(self, labels: Tensor, num_clients: int, seed: int, owners: Sequence[str] | None) -> Sequence[Tensor]:
        from flwr_datasets.partitioner import NaturalIdPartitioner

        if owners is None:
            raise ValueError(
                "the natural partition needs a folder per client (root/train/CLIENT/...), with dataset=folder; use another partition"
            )
        names = sorted(set(owners))
        if num_clients != len(names):
            raise ValueError(
                f"num_clients={num_clients} but the data belong to {len(names)} clients; leave num_clients out, or set num_clients: 1 "
                "(the default), and folders are counted"
            )
        numbers = {name: number for number, name in enumerate(names)}
        return _places(NaturalIdPartitioner("label"), torch.tensor([numbers[name] for name in owners]), num_clients)


def _places(partitioner: Partitioner, labels: Tensor, num_clients: int) -> Parts:
    """The rows of a table with a ``label`` column that ``partitioner`` gives to each client."""
    partitioner.dataset = _table().from_dict({"label": labels.numpy()})
    with redirect_stderr(StringIO()):  # the natural partitioner draws a progress bar that cannot be turned off
        partitioner.load_partition(0)
    rows: list[list[int]] = [partitioner.load_partition(client) for client in range(num_clients)]  # as our table has them
    return Parts(torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64), [len(own) for own in rows])


@cache
def _table() -> Any:
    """A Dataset whose rows are only ever named: making 100,000 views of it, one a client, would take minutes."""
    from datasets import Dataset

    class Table(Dataset):
        def select(self, indices: Iterable[int], *args: Any, **kwargs: Any) -> Any:
            return indices if isinstance(indices, list) else list(indices)

        def sort(self, *args: Any, **kwargs: Any) -> Any:
            return self  # the one table that is asked to sort itself is a row of shards, in order

        def __getitem__(self, column: Any) -> Any:
            return self.data.column(column).to_numpy() if isinstance(column, str) else super().__getitem__(column)

    return Table
