"""Images that the server has for itself: whose they are, and which batches are drawn of them."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from featherlight.plugins import SERVER, Visit
from featherlight.ssl_models import ImageData


def plain(**options):
    return ImageData(**{"augment": "none", "views": 1, "batch_size": 16, "drop_last": False, **options})


def rows(batches):
    return torch.cat([batch.views[0].flatten(1) for batch in batches])


def test_nobody_else_has_the_servers_share():
    """Training images of clients and server together are those without a share, and the share is its part of them."""
    whole, data = plain(), plain(server_fraction=0.1, num_clients=3)
    everything = rows(batch for _, batch in whole.client_batches([Visit(0)], 1)).double()
    own = rows(data.server_batches(Visit(0, SERVER), 1)).double()
    theirs = rows(batch for _, batch in data.client_batches([Visit(0, client) for client in range(3)], 1)).double()
    assert len(own) == round(0.1 * len(everything))
    weights = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))  # a picture as one number
    assert torch.equal((torch.cat([own, theirs]) @ weights).sort().values, (everything @ weights).sort().values)


def test_batches_are_drawn_from_seed_and_round():
    data, other = plain(server_fraction=0.05), plain(server_fraction=0.05)
    first, again, next_round = (rows(one.server_batches(Visit(round, SERVER, 3), 2)) for one, round in ((data, 0), (other, 0), (data, 1)))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_round)
    assert data.server_batch_sizes(2) == [len(batch.labels) for batch in data.server_batches(Visit(0, SERVER, 3), 2)]
    assert plain().server_batch_sizes(2) == []


def test_a_folder_of_its_own(tmp_path: Path):
    """Resized to the others' size; labels only where its folders are called as our classes are."""
    for part, names in (("ours", ("cat", "dog")), ("servers", ("dog", "wild"))):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(5):
                size = 8 if part == "ours" else 12
                Image.new("RGB", (size, size), (50 * number, 0, 0)).save(tmp_path / part / name / f"{number}.png")
    data = plain(dataset="folder", root=str(tmp_path / "ours"), server_root=str(tmp_path / "servers"))
    (batch,) = data.server_batches(Visit(0, SERVER), 1)
    assert batch.views[0].shape == (10, 3, 8, 8)
    assert sorted(batch.labels.tolist()) == [-1] * 5 + [1] * 5
    assert sum(data.client_sizes()) == 8  # two of ten are for testing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server_fraction": 1.0}, "server_fraction=1.0; it must be"),
        ({"server_fraction": 0.5, "val_fraction": 0.5}, "leave no images to clients"),
        ({"server_fraction": 0.5, "server_root": "pictures"}, "the server has one or the other"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageData(**options)
