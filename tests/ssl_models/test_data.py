"""ImageData: the same batches for everyone who asks, and one clear line for what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from featherlight.plugins.base import Visit
from featherlight.ssl_models.batches import BatchDataset, BatchLoader, Draw, Plan, VisitSampler, as_is
from featherlight.ssl_models.data import ImageData
from featherlight.ssl_models.partitions import Dirichlet, Natural, Shards


def made(data: ImageData, visits: list[Visit], epochs: int = 1) -> list[tuple[int, Any]]:
    """Finished batches of some visits."""
    return [(turn, data.on_after_batch_transfer(batch, 0)) for turn, batch in data.client_batches(visits, epochs)]


def tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    return [t for part in nested for t in tensors(part)] if isinstance(nested, list | tuple) else []


def same(a: Any, b: Any) -> bool:
    mine, yours = tensors(a), tensors(b)
    return len(mine) == len(yours) and all(torch.equal(x, y) for x, y in zip(mine, yours, strict=True))


# -- the same batches for everyone ------------------------------------------------------------------------------------
class Recorder(LightningModule):
    """Keeps the batches it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []
        self.validated = 0

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.seen.append(batch)
        return self.weight * tensors(batch)[0].mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.validated += len(batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=folder, **{"enable_checkpointing": False, "devices": 1, **quiet, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(("views", "augment"), [(2, "batched"), (1, "batched"), (2, "lightly"), (2, "none")])
def test_a_trainer_and_a_federation_of_one_client_see_the_same_batches(tmp_path: Path, views: Any, augment: Any) -> None:
    model = Recorder()
    ours = {"views": views, "augment": augment, "batch_size": 32, "limit_train": 100, "seed": 5}
    trainer(tmp_path, max_epochs=2).fit(model, datamodule=ImageData(**ours))  # type: ignore[arg-type]
    federation = ImageData(**ours)  # type: ignore[arg-type]
    batches = [batch for epoch in (0, 1) for _, batch in made(federation, [Visit(epoch, 0, 5)])]
    assert len(batches) == (6 if views == 2 else 8)  # 100 = 3 · 32 + 4: the rest is dropped with two views
    assert same(model.seen, batches)
    x, labels = model.seen[0]
    assert [part.shape for part in tensors(x)] == [(32, 1, 8, 8)] * views
    assert labels.dtype == torch.int64
    assert views == 1 or torch.equal(x[0], x[1]) == (augment == "none")
    assert not same(model.seen[0], model.seen[len(batches) // 2])  # another epoch, another order


def test_a_trainer_stopped_in_the_middle_of_an_epoch_goes_on_where_it_was(tmp_path: Path) -> None:
    def fit(steps: int, start: Path | None = None) -> Recorder:
        model = Recorder()
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        runner = trainer(tmp_path, max_steps=steps, max_epochs=-1, enable_checkpointing=True, callbacks=[keep])
        runner.fit(model, datamodule=ImageData(batch_size=32, limit_train=100), ckpt_path=start)
        return model

    whole, first = fit(8), fit(4)  # 3 steps an epoch: the checkpoint of step 4 lies in the second
    second = fit(8, tmp_path / "step=4.ckpt")
    assert len(whole.seen) == 8
    assert same(first.seen + second.seen, whole.seen)


@pytest.mark.parametrize("augment", ["batched", "lightly"])
def test_batches_do_not_depend_on_workers_on_the_order_of_clients_or_on_who_asks_else(augment: Any) -> None:
    def data(workers: int) -> ImageData:
        return ImageData(augment=augment, num_clients=4, partition=Dirichlet(0.5), batch_size=16, limit_train=200, num_workers=workers)

    visits = [Visit(2, client, 9) for client in (3, 0, 2)]
    alone, helped = data(0), data(2)
    expected = made(alone, visits, epochs=2)
    assert same([batch for _, batch in expected], [batch for _, batch in made(helped, visits, epochs=2)])
    backwards = made(helped, visits[::-1], epochs=2)  # a second stream from the same workers
    for turn in range(3):
        mine = [batch for at, batch in expected if at == turn]
        assert len(mine) == alone.steps_per_visit(visits[turn].client, 2)
        assert same(mine, [batch for at, batch in backwards if at == 2 - turn])
        assert same(mine, [batch for _, batch in made(data(0), [visits[turn]], epochs=2)])


def test_rounds_epochs_clients_and_seeds_all_change_what_is_drawn() -> None:
    data = ImageData(num_clients=2, batch_size=64, limit_train=200)
    first = made(data, [Visit(0, 0, 0)], epochs=2)
    others = [first[1], made(data, [Visit(1, 0, 0)])[0], made(data, [Visit(0, 1, 0)])[0], made(data, [Visit(0, 0, 1)])[0]]
    assert not any(same(first[0][1], other[1]) for other in others)


def test_a_new_stream_may_begin_before_the_last_has_ended() -> None:
    data = ImageData(num_clients=2, batch_size=32, limit_train=200, num_workers=1)
    next(data.client_batches([Visit(0, 0), Visit(0, 1)], 1))
    assert same(made(data, [Visit(0, 1)]), made(ImageData(num_clients=2, batch_size=32, limit_train=200), [Visit(0, 1)]))


def test_processes_share_a_batch_and_see_its_views() -> None:
    data = ImageData(batch_size=30, limit_train=70, drop_last=False, num_workers=0)
    data.setup()
    clients = [torch.arange(70)]
    whole = made(data, [Visit(0, 0, 0)])
    parts = []
    for rank in (0, 1, 2, 3):
        sampler = VisitSampler(clients, data.plan, 0, rank, processes=4)
        loader = BatchLoader(BatchDataset(data._train.images, data._train.labels), batch_size=None, sampler=sampler, collate_fn=as_is)
        parts.append([data.on_after_batch_transfer(batch) for batch in loader])
    for step, (_, ((x, _), labels)) in enumerate(whole):
        # 30 images over 4 processes: 8 each, the first two seen twice; the last batch has 10: 3 each.
        for rank, part in enumerate(parts):
            places = torch.arange(rank, -(-len(labels) // 4) * 4, 4) % len(labels)
            assert torch.equal(part[step][1], labels[places])
            assert torch.allclose(part[step][0][0], x[places], atol=1e-6)


# -- how epochs are cut -----------------------------------------------------------------------------------------------
@settings(max_examples=100, deadline=None)
@given(st.integers(0, 50), st.integers(2, 20), st.sampled_from([True, False, None]), st.sampled_from([1, 2]))
def test_an_epoch_gives_each_image_at_most_once_and_steps_says_how_many_batches(
    size: int, batch_size: int, drop_last: bool | None, at_least: int
) -> None:
    plan = Plan(batch_size, drop_last, at_least)
    indices = torch.arange(100, 100 + size)
    batches = [draw.indices.tolist() for draw in plan.draws(indices, Visit(0), 1)]
    assert len(batches) == plan.steps(size)
    seen = [index for batch in batches for index in batch]
    assert len(seen) == len(set(seen))
    assert set(seen) <= set(indices.tolist())
    assert all(at_least <= len(batch) <= batch_size for batch in batches)
    left_out = size - len(seen)
    if drop_last and size >= batch_size:
        assert left_out == size % batch_size
    elif drop_last is None and size > batch_size and size % batch_size == 1:
        assert left_out == 1
    else:
        assert left_out < at_least


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"views": 1}, [8, 8]),  # the 17th image would be a batch of its own
        ({"views": 1, "drop_last": False}, [8, 8, 1]),
        ({"views": 1, "limit_train": 18}, [8, 8, 2]),
        ({"views": 1, "limit_train": 18, "drop_last": True}, [8, 8]),
        ({"views": 1, "limit_train": 1}, [1]),  # the only one there is
        ({"views": 1, "limit_train": 3, "batch_size": 1}, [1, 1, 1]),  # as was asked for
        ({"views": 2, "limit_train": 18}, [8, 8]),
        ({"views": 2, "limit_train": 18, "drop_last": False}, [8, 8, 2]),
    ],
    ids=str,
)
def test_a_last_batch_is_left_out_alike_by_whoever_counts_or_draws(tmp_path: Path, settings: dict[str, Any], sizes: list[int]) -> None:
    given: dict[str, Any] = {"batch_size": 8, "limit_train": 17, **settings}
    data = ImageData(**given)
    assert data.batch_sizes(0, 2) == sizes * 2
    assert data.steps_per_visit(0, 2) == 2 * len(sizes)
    batches = [batch for epoch in (0, 1) for _, batch in made(data, [Visit(epoch)])]
    assert [len(labels) for _, labels in batches] == sizes * 2
    model = Recorder()
    trainer(tmp_path, max_epochs=2).fit(model, datamodule=ImageData(**given))
    assert same(model.seen, batches)


def test_client_sizes_and_labels_are_counted_as_a_loop_counts_them() -> None:
    data = ImageData(num_clients=5, partition=Shards(2), batch_size=8, client_val_fraction=0.2, views=1, drop_last=False)
    assert data.num_clients == 5
    counts = torch.zeros(5, 10, dtype=torch.long)
    for client in range(5):
        for _, (_, labels) in made(data, [Visit(0, client)]):
            for label in labels.tolist():
                counts[client, label] += 1
    assert torch.equal(data.client_label_counts(), counts)
    assert data.client_sizes() == counts.sum(1).tolist()
    kept = [torch.cat([y for _, y in data.client_val_batches(client)]) for client in range(5)]
    for size, held in zip(data.client_sizes(), kept, strict=True):
        assert len(held) == round(0.2 * (size + len(held)))
    everything = torch.cat([y for _, y in data.probe_data()[0]]).bincount(minlength=10)
    assert torch.equal(counts.sum(0) + torch.cat(kept).bincount(minlength=10), everything)


def test_limits_are_nested_and_validation_images_are_not_trained_on(tmp_path: Path) -> None:
    def images(**settings: Any) -> tuple[set[bytes], set[bytes]]:
        data = ImageData(val_fraction=0.1, **settings)
        parts = [data._train.images, data._val.images]
        return tuple({x.numpy().tobytes() for x in part.take(torch.arange(len(part)))} for part in parts)  # type: ignore[return-value]

    few, val = images(limit_train=50)
    more, same_val = images(limit_train=200)
    assert few < more
    assert val == same_val
    assert not val & more
    assert not few <= images(limit_train=200, seed=1)[0]
    model = Recorder()
    data = ImageData(val_fraction=0.1, limit_train=64, batch_size=32)
    trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(model, datamodule=data)
    assert model.validated == len(val)
    none = Recorder()
    trainer(tmp_path, max_epochs=1).fit(none, datamodule=ImageData(limit_train=64, batch_size=32))
    assert none.validated == 0


# -- one clear line ---------------------------------------------------------------------------------------------------
def test_a_client_with_fewer_images_than_a_batch_gives_them_in_one() -> None:
    data = ImageData(num_clients=3, limit_train=30, batch_size=64)
    assert [data.steps_per_visit(client, 2) for client in range(3)] == [2, 2, 2]
    assert [len(batch[1]) for _, batch in made(data, [Visit(0, 1)], epochs=2)] == [10, 10]


WRONG: list[tuple[Callable[[Path], Any], str]] = [
    (lambda _: ImageData("digit"), "dataset='digit' is unknown; choose from digits, cifar10, cifar100, folder"),  # type: ignore[arg-type]
    (lambda _: ImageData(views=3), "views=3 is unknown; choose from 1, 2"),  # type: ignore[arg-type]
    (lambda _: ImageData(augment="kornia"), "augment='kornia' is unknown; choose from batched, lightly, none"),  # type: ignore[arg-type]
    (lambda _: ImageData(batch_size=1), "batch_size=1; two views are compared within a batch, which needs at least 2"),
    (lambda _: ImageData(val_fraction=1.0), r"val_fraction=1\.0; it must be at least 0 and below 1"),
    (lambda _: ImageData(limit_train=0), "limit_train=0; it must be at least 1"),
    (
        lambda _: ImageData(num_clients=3, limit_train=4, batch_size=8).client_sizes(),
        "client 1 has 1 training images; with batch_size=8 it needs at least 2",
    ),
    (
        lambda _: ImageData(num_clients=2, limit_train=2, client_val_fraction=0.9, views=1).client_sizes(),
        "client 0 has 0 training images; with batch_size=256 it needs at least 1",
    ),
    (lambda _: ImageData(limit_train=1).train_dataloader(), "client 0 has 1 training images"),
    (lambda root: ImageData("folder", str(root / "nowhere")).setup(), r"root=.*nowhere is not a folder; give the folder that holds"),
    (lambda root: ImageData("folder", str(root)).setup(), r"no images \(\.jpg, .*\) in "),
    (lambda root: ImageData("cifar10", str(root)).setup(), "CIFAR10 is not in root=.*; set download=true"),
    (lambda _: ImageData(num_clients=2, partition=Natural()).client_sizes(), "needs a folder per client"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_what_cannot_be_is_said_in_one_line(tmp_path: Path, wrong: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        wrong(tmp_path)
    assert "\n" not in str(caught.value)


def test_overfit_batches_says_what_to_use_instead() -> None:
    dataset = BatchDataset(ImageData()._train.images, torch.zeros(4))
    with pytest.raises(TypeError, match="limit_train"):
        dataset[0]  # type: ignore[index]
    assert len(dataset[Draw(torch.tensor([1, 2]), torch.tensor([0, 1]), 2, 0)].labels) == 2  # type: ignore[union-attr]
