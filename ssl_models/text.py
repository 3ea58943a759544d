"""Text for a Trainer and for a federation from one object, with the same batches bit for bit. A token is a byte: nothing is downloaded.

:class:`TextData` reads files, cuts them into sequences and divides these over clients. Batches are drawn as
:mod:`~featherlight.ssl_models.batches` says.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from featherlight.plugins.seeds import generator
from featherlight.ssl_models.batches import Batch, BatchDataset, BatchLoader, Plan, VisitSampler, as_is
from featherlight.ssl_models.client_streams import ClientStreams
from featherlight.ssl_models.partitions import IID, Natural, Partition, Parts

EVALUATION_BATCH = 64
NOT_READ = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}


class TextData(ClientStreams, LightningDataModule):
    """Sequences of bytes, whole (under a Trainer) and divided over clients (in a federation).

    A batch is ``(tokens, following)``, int64 (N, context) each, ``following`` one byte later.

    Args:
        dataset: ``stdlib``: the source text of the running Python's standard library, which every user has, some 30 packages;
            what exactly is in it depends on Python's version. ``folder``: any file, or folder of files, of text.
        root: the file or the folder; not needed for stdlib. A file's source is the first folder below root, or the file itself.
        pattern: which files of the folder are read.
        context: bytes that a model sees at once.
        batch_size: sequences of one step, over all processes.
        num_clients: clients of the federation; the natural partition counts sources instead.
        partition: how training sequences are divided over clients: IID, Dirichlet (over sources), Shards or Natural (a source is a client);
            None: IID.
        client_val_fraction: part of each client's sequences that is kept from training, for evaluation at the client.
        test_fraction: part of every source that is used for testing: its end.
        limit_train: train on this many sequences only; smaller limits are subsets of larger ones of the same seed.
        seed: what partition and limit are drawn from, and the Trainer's batches.

    Raises:
        ValueError: for numbers out of range; later, when data are read, where there is no text or too little.
    """

    def __init__(
        self,
        dataset: Literal["stdlib", "folder"] = "stdlib",
        root: str = "data",
        pattern: str = "*.txt",
        context: int = 128,
        batch_size: int = 32,
        num_clients: int = 1,
        partition: Partition | None = None,
        client_val_fraction: float = 0.0,
        test_fraction: float = 0.1,
        limit_train: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if dataset not in SOURCES:
            raise ValueError(f"dataset={dataset!r} is unknown; choose from {', '.join(SOURCES)}")
        for name, number in (("context", context), ("batch_size", batch_size), ("num_clients", num_clients), ("limit_train", limit_train)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number}; it must be at least 1")
        for name, fraction in (("client_val_fraction", client_val_fraction), ("test_fraction", test_fraction)):
            if not 0 <= fraction < 1:
                raise ValueError(f"{name}={fraction}; it must be at least 0 and below 1")
        self.dataset, self.root, self.pattern, self.context = dataset, root, pattern, context
        self.batch_size, self.partition = batch_size, partition or IID()
        self.client_val_fraction, self.test_fraction = client_val_fraction, test_fraction
        self.limit_train, self.seed = limit_train, seed
        self.plan = Plan(batch_size, False)
        self._num_clients = num_clients

    # -- what the data are ----------------------------------------------------------------------------------------
    @property
    def sources(self) -> list[str]:
        """Names of what the text was read from."""
        return [name for name, _ in self._texts]

    def describe(self) -> dict[str, str]:
        """What decides which batches are drawn: a run goes on only with the same."""
        names = ["dataset", "pattern", "context", "client_val_fraction", "test_fraction", "limit_train", "seed", "plan"]
        divided = {"partition": f"{type(self.partition).__name__}({vars(self.partition)})"}
        return {name: repr(getattr(self, name)) for name in names} | divided

    # -- for a federation -----------------------------------------------------------------------------------------
    def example_batch(self, size: int) -> tuple[Tensor, Tensor]:
        """A batch of zeros, shaped as ``training_step`` takes it: for counting costs."""
        return torch.zeros(size, self.context, dtype=torch.long), torch.zeros(size, self.context, dtype=torch.long)

    def client_val_batches(self, client: int) -> Iterator[Any]:
        """The client's sequences kept from training; none where client_val_fraction is 0."""
        return iter(self._evaluation(self._train.tokens[self._divided[1][client]]))

    # -- for a Trainer --------------------------------------------------------------------------------------------
    def setup(self, stage: str | None = None) -> None:
        self._train  # noqa: B018

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        rank, processes = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        return self._batches(VisitSampler([torch.arange(len(self._train))], self.plan, self.seed, rank, processes))

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation(self._parts[1].tokens)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> tuple[Tensor, Tensor]:
        """``(tokens, following)`` of a batch that has reached its device."""
        tokens = (batch.views if isinstance(batch, Batch) else batch)[0].long()
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    # -- how it is made -------------------------------------------------------------------------------------------
    @cached_property
    def _texts(self) -> list[tuple[str, bytes]]:
        return SOURCES[self.dataset](self.root, self.pattern)

    @cached_property
    def _parts(self) -> tuple[_Sequences, _Sequences]:
        """For training and for testing."""
        length = self.context + 1
        train, test = [], []
        for number, (_, text) in enumerate(self._texts):
            count = len(text) // length
            cut = torch.frombuffer(bytearray(text[: count * length]), dtype=torch.uint8).view(count, length) if count else None
            if cut is not None:
                held = round(self.test_fraction * count)
                train.append(_Sequences(cut[: count - held], torch.full((count - held,), number)))
                test.append(_Sequences(cut[count - held :], torch.full((held,), number)))
        if not train:
            raise ValueError(f"no text of {length} bytes or more was found, which a sequence takes; set a context below {self.context}")
        return _join(train), _join(test)

    @cached_property
    def _train(self) -> _Sequences:
        all_of_it = self._parts[0]
        chosen = torch.randperm(len(all_of_it), generator=generator(self.seed, "train"))[: self.limit_train]
        return all_of_it.at(chosen.sort().values)

    @cached_property
    def _divided(self) -> tuple[Parts, Parts]:
        """For each client the sequences it trains on, and those it keeps for evaluation."""
        names, labels, count = self.sources, self._train.labels, self._num_clients
        owners = [names[label] for label in labels.tolist()] if isinstance(self.partition, Natural) else None
        if owners is not None and count == 1:
            count = len(set(owners))
        parts = [torch.arange(len(labels))] if count == 1 else self.partition(labels, count, self.seed, owners)
        train, val = [], []
        for client, part in enumerate(parts):
            order = part[torch.randperm(len(part), generator=generator(self.seed, "client_val", client))]
            held = round(self.client_val_fraction * len(part))
            val.append(order[:held].sort().values)
            train.append(order[held:].sort().values)
            if not len(train[-1]):
                raise ValueError(f"client {client} has no training sequence: use fewer clients, a more even partition or a smaller context")
        return Parts.of(train), Parts.of(val)

    @property
    def _clients(self) -> Parts:
        return self._divided[0]

    @cached_property
    def _client_loader(self) -> BatchLoader:
        return self._batches(VisitSampler(self._clients, self.plan, self.seed))

    def _batches(self, sampler: VisitSampler) -> BatchLoader:
        return BatchLoader(BatchDataset(self._train, self._train.labels), batch_size=None, sampler=sampler, collate_fn=as_is)

    def _evaluation(self, tokens: Tensor) -> DataLoader[Any]:
        return DataLoader(TensorDataset(tokens), batch_size=EVALUATION_BATCH)


@dataclass(frozen=True)
class _Sequences:
    """Sequences, uint8 (N, length), and the number of each one's source, (N,)."""

    tokens: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> Tensor:
        return self.tokens[indices]

    def at(self, places: Tensor) -> _Sequences:
        return _Sequences(self.tokens[places], self.labels[places])

    def __len__(self) -> int:
        return len(self.tokens)


def _join(parts: Sequence[_Sequences]) -> _Sequences:
    return _Sequences(torch.cat([part.tokens for part in parts]), torch.cat([part.labels for part in parts]))


def stdlib(root: str, pattern: str) -> list[tuple[str, bytes]]:
    """The standard library's own packages, and its modules that are one file as one more source."""
    base = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in sorted(base.rglob("*.py")) if not NOT_READ & set(path.relative_to(base).parts)]
    return _by_source([(path.relative_to(base).parts[0] if path.parent != base else "modules", path) for path in files])


def folder(root: str, pattern: str) -> list[tuple[str, bytes]]:
    """A file, or the files of a folder by the first folder below it."""
    base = Path(root)
    if base.is_file():
        return _by_source([(base.name, base)])
    if not base.is_dir():
        raise ValueError(f"root={root} is neither a file nor a folder; give the one that holds the text")
    files = [path for path in sorted(base.rglob(pattern)) if path.is_file()]
    if not files:
        raise ValueError(f"no file in {root} has a name like {pattern}; set pattern")
    return _by_source([(path.relative_to(base).parts[0], path) for path in files])


def _by_source(files: Sequence[tuple[str, Path]]) -> list[tuple[str, bytes]]:
    texts: dict[str, list[bytes]] = {}
    for source, path in files:
        texts.setdefault(source, []).append(path.read_bytes())
    return [(source, b"\n".join(texts[source])) for source in sorted(texts)]


SOURCES: dict[str, Callable[[str, str], list[tuple[str, bytes]]]] = {"stdlib": stdlib, "folder": folder}
