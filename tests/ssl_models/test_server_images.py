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


def test_a_limit_is_of_clients_and_server_together():
    """The server's part is a fraction of what the limit leaves; smaller limits are subsets of larger ones."""
    found = {}
    for limit in (100, 200):
        data = plain(limit_train=limit, server_fraction=0.2, num_clients=2)
        own = rows(data.server_batches(Visit(0, SERVER), 1))
        theirs = rows(batch for _, batch in data.client_batches([Visit(0, 0), Visit(0, 1)], 1))
        assert (len(own), len(theirs)) == (limit // 5, limit - limit // 5)
        found[limit] = {tuple(picture) for picture in torch.cat([own, theirs]).tolist()}
    assert found[100] < found[200]


def pictures(folder: Path, count: int, mode: str = "RGB", size: int = 8):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new(mode, (size, size), 20 * number if mode == "L" else (20 * number, 100, 0)).save(folder / f"{number}.png")
    return str(folder)


@pytest.mark.parametrize("in_memory_bytes", [0, 2**20])
def test_pictures_get_the_clients_channels(in_memory_bytes, tmp_path: Path):
    """Clients' digits are grey: grey pictures keep their values, coloured ones become grey as PIL makes them, but for rounding."""
    for mode in ("L", "RGB"):
        root = pictures(tmp_path / mode, 6, mode, size=8)
        data = plain(server_root=root, in_memory_bytes=in_memory_bytes)
        (batch,) = data.server_batches(Visit(0, SERVER), 1)
        assert batch.views[0].shape == (6, 1, 8, 8)
        wanted = [Image.open(path).convert("L").getpixel((0, 0)) for path in sorted(Path(root).glob("*.png"))]
        found = sorted(batch.views[0][:, 0, 0, 0].tolist())
        assert found == sorted(wanted) if mode == "L" else all(abs(one - two) <= 1 for one, two in zip(found, sorted(wanted), strict=True))
        assert set(batch.labels.tolist()) == {-1}


def test_what_is_wrong_with_the_servers_images(tmp_path: Path):
    for name, count, message in (
        ("nothing", None, "server_root=.*nothing is not a folder"),
        ("empty", 0, "server_root=.*empty: no images"),
        ("one", 1, "server_root=.*one gives the server 1 images, and it needs at least 2"),
    ):
        root = str(tmp_path / name) if count is None else pictures(tmp_path / name, count)
        with pytest.raises(ValueError, match=message):
            ImageData(server_root=root).server_batch_sizes(1)
    with pytest.raises(ValueError, match=r"server_fraction=0.0005 gives the server 1 images, and it needs at least 2: give more"):
        ImageData(server_fraction=0.0005).server_batch_sizes(1)


def test_labels_for_models_that_learn_from_them(tmp_path: Path):
    pictures(tmp_path / "7", 2)
    plain(server_root=str(tmp_path)).check_server_labels()
    pictures(tmp_path / "seven", 3)
    with pytest.raises(ValueError, match=r"3 of the server's 5 images have no label .* \(0, 1, 2, 3, 4, 5, 6, 7, 8, 9\)"):
        plain(server_root=str(tmp_path)).check_server_labels()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"server_fraction": 1.0}, "server_fraction=1.0; it must be"),
        ({"server_fraction": 0.5, "val_fraction": 0.5}, "leave no images to clients"),
        ({"server_fraction": 0.5, "server_root": "pictures"}, "server_fraction to 0, or server_root to null"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageData(**options)
