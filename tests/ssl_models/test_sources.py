"""Where images come from: scikit-learn's digits, CIFAR's archives as they are published, any folder of images."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from featherlight.plugins.base import Visit
from featherlight.ssl_models.data import ImageData
from featherlight.ssl_models.partitions import Natural


def made(data: ImageData, client: int) -> list[Any]:
    """Finished batches of one client's first turn."""
    return [data.on_after_batch_transfer(batch, 0) for _, batch in data.client_batches([Visit(0, client)], 1)]


# -- digits ----------------------------------------------------------------------------------------------
def test_digits_are_divided_into_the_same_training_and_test_parts_whatever_the_seed() -> None:
    one, other = ImageData(seed=0), ImageData(seed=1)
    train, test = ([x for batch in loader for x in batch[0]] for loader in one.probe_data())
    assert (len(train) + len(test), one.num_classes, one.image_shape) == (1797, 10, (1, 8, 8))
    assert abs(len(test) - 1797 / 5) <= 5  # a fifth of each of ten labels, rounded
    assert all(torch.equal(mine, yours) for (_, mine), (_, yours) in zip(one.probe_data()[1], other.probe_data()[1], strict=True))
    from sklearn.datasets import load_digits

    labels = torch.cat([y for loader in one.probe_data() for _, y in loader]).bincount()
    assert labels.tolist() == np.bincount(load_digits().target).tolist()


def test_training_images_are_normalised_and_pixels_are_sklearns() -> None:
    from sklearn.datasets import load_digits

    data = ImageData()
    train, test = (torch.cat([x for x, _ in loader]) for loader in data.probe_data())
    assert train.shape[1:] == (1, 8, 8)
    assert float(train.double().mean()) == pytest.approx(0, abs=1e-5)
    assert float(train.double().std()) == pytest.approx(1, abs=1e-4)
    everything = torch.cat([train, test]).double().flatten(1).sum(1).sort().values
    raw = torch.from_numpy(load_digits().data).sum(1).sort().values  # of 0 to 16; an affine map keeps the order and the shape
    assert np.corrcoef(everything, raw)[0, 1] > 0.99999


# -- CIFAR ------------------------------------------------------------------------------------------------------------
ARCHIVES = {
    # name: folder in the archive; training files with images in each; test file; file and key of the names; key of the labels; classes
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{n}" for n in range(1, 6)], "test_batch", "batches.meta", "label_names", "labels", 10),
    "cifar100": ("cifar-100-python", ["train"], "test", "meta", "fine_label_names", "fine_labels", 100),
}


def pixel(number: int, channel: int, row: int, column: int) -> int:
    """What image ``number`` of our small archives has there."""
    return (37 * number + 80 * channel + 5 * row + column) % 256


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing: its lines are no part of what is tested."""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder, and the address on this machine that it is served at: torchvision cannot fetch from file://."""
    folder = tmp_path / "published"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(params=ARCHIVES)
def published(request: pytest.FixtureRequest, site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A data set's name and its archive, laid out as the published one, with 20 training and 10 test images, that torchvision takes for it.

    A row of a file's data has 1024 values of red, then green, then blue, each row by row.
    """
    folder, parts, test, meta, key, labels, classes = ARCHIVES[request.param]
    each = 20 // len(parts)
    files = {}
    for name, first, count in [*((part, each * at, each) for at, part in enumerate(parts)), (test, 20, 10)]:
        rows = [[pixel(n, c, h, w) for c in range(3) for h in range(32) for w in range(32)] for n in range(first, first + count)]
        content = {"data": np.array(rows, dtype=np.uint8), labels: [n * 7 % classes for n in range(first, first + count)]}
        files[name] = pickle.dumps(content, protocol=2)
    files[meta] = pickle.dumps({key: [f"class {n}" for n in range(classes)]}, protocol=2)
    archive = site[0] / f"{request.param}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    kind = getattr(datasets, request.param.upper())
    monkeypatch.setattr(kind, "url", f"{site[1]}/{archive.name}")
    monkeypatch.setattr(kind, "filename", archive.name)
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[part, md5[part]] for part in parts])
    monkeypatch.setattr(kind, "test_list", [[test, md5[test]]])
    monkeypatch.setattr(kind, "meta", {"filename": meta, "key": key, "md5": md5[meta]})
    return request.param, archive


def cifar(name: Any, root: Path, **settings: Any) -> ImageData:
    return ImageData(name, str(root), views=1, augment="none", batch_size=8, **settings)


def test_cifar_is_fetched_unpacked_and_read(published: tuple[str, Path], tmp_path: Path) -> None:
    name, archive = published
    data = cifar(name, tmp_path / "data", download=True)
    data.prepare_data()
    archive.unlink()  # from here on it is there
    data.setup()
    classes = ARCHIVES[name][-1]
    assert (data.num_classes, data.image_shape, data.client_sizes()) == (classes, (3, 32, 32), [20])
    assert data._loaded.classes == tuple(f"class {n}" for n in range(classes))
    mean, std = data._moments
    for loader, numbers in zip(data.probe_data(), (range(20), range(20, 30)), strict=True):
        x, y = (torch.cat(part) for part in zip(*loader))
        assert y.tolist() == [n * 7 % classes for n in numbers]
        levels = ((x * std + mean) * 255).round().int()
        for at, number in enumerate(numbers):
            for place in ((0, 0, 0), (0, 0, 31), (1, 30, 2), (2, 31, 31), (2, 3, 17)):
                assert levels[at, *place] == pixel(number, *place)
    again = cifar(name, tmp_path / "data")
    assert torch.equal(again._train.images.take(torch.arange(20)), data._train.images.take(torch.arange(20)))
    cifar(name, tmp_path / "data", download=True).setup()  # nothing is fetched twice


def test_a_damaged_cifar_is_told_and_mended_by_a_download(published: tuple[str, Path], tmp_path: Path) -> None:
    name, _ = published
    root = tmp_path / "data"
    cifar(name, root, download=True).setup()
    damaged = root / ARCHIVES[name][0] / ARCHIVES[name][2]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=f"{name.upper()} is not in root=.*data or is incomplete .*; set download=true") as caught:
        cifar(name, root).setup()
    assert "\n" not in str(caught.value)
    cifar(name, root, download=True).setup()
    cifar(name, root).setup()


def test_an_archive_that_is_not_the_published_one_is_refused(published: tuple[str, Path], tmp_path: Path) -> None:
    name, archive = published
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{name.upper()} is not in root=.* or is incomplete"):
        cifar(name, tmp_path / "data", download=True).prepare_data()


def test_cifar_that_cannot_be_fetched_is_one_line(published: tuple[str, Path], tmp_path: Path) -> None:
    name, archive = published
    archive.unlink()
    with pytest.raises(ValueError, match=f"{name.upper()} is not in root=.* or is incomplete") as caught:
        cifar(name, tmp_path / "data", download=True).prepare_data()
    assert "\n" not in str(caught.value)


# -- folders ----------------------------------------------------------------------------------------------------------
def picture(path: Path, level: int, size: tuple[int, int] = (10, 12)) -> None:
    """A picture of one grey level, 10 wide and 12 high."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of 6 training and 2 test images, each with a grey level of its own."""
    for at in range(6):
        picture(tmp_path / "train" / "ant" / f"{at}.png", 10 + at)
        picture(tmp_path / "train" / "bee" / f"{at}.png", 110 + at)
    for at in range(2):
        picture(tmp_path / "test" / "ant" / f"{at}.png", 50 + at)
        picture(tmp_path / "test" / "bee" / f"{at}.png", 150 + at)
    return tmp_path


def folder(root: Path, **settings: Any) -> ImageData:
    return ImageData("folder", str(root), **{"views": 1, "augment": "none", "batch_size": 4, **settings})  # type: ignore[arg-type]


def levels(data: ImageData, loader: Any) -> dict[int, list[int]]:
    """Grey levels of a loader's images by label."""
    mean, std = data._moments
    found: dict[int, list[int]] = {}
    for x, y in loader:
        grey = ((x * std + mean) * 255).mean((1, 2, 3)).round().int().tolist()
        for level, label in zip(grey, y.tolist(), strict=True):
            found.setdefault(label, []).append(level)
    return {label: sorted(values) for label, values in sorted(found.items())}


@pytest.mark.parametrize("in_memory_bytes", [0, 2**30])
def test_a_folder_gives_its_images_decoded_at_once_or_as_they_are_taken(pictures: Path, in_memory_bytes: int) -> None:
    data = folder(pictures, in_memory_bytes=in_memory_bytes)
    assert (data.image_shape, data.num_classes) == ((3, 12, 10), 2)
    train, test = data.probe_data()
    assert levels(data, train) == {0: list(range(10, 16)), 1: list(range(110, 116))}
    assert levels(data, test) == {0: [50, 51], 1: [150, 151]}
    for (x, y), (expected, labels) in zip(made(data, 0), made(folder(pictures), 0), strict=True):
        assert torch.equal(x, expected)
        assert torch.equal(y, labels)


def test_a_folder_without_a_test_part_keeps_a_fifth_of_each_class(tmp_path: Path) -> None:
    for at in range(10):
        picture(tmp_path / "ant" / f"{at}.png", at)
        picture(tmp_path / "bee" / "more" / f"{at}.png", 100 + at)  # the folder that holds an image names its class
    data = folder(tmp_path)
    train, test = data.probe_data()
    assert {label: len(found) for label, found in levels(data, test).items()} == {0: 2, 1: 2}
    assert {label: len(found) for label, found in levels(data, train).items()} == {0: 8, 1: 8}
    assert data._loaded.classes == ("ant", "more")


def test_image_size_cuts_and_resizes(pictures: Path) -> None:
    picture(pictures / "train" / "ant" / "large.png", 20, (40, 30))
    data = folder(pictures, image_size=6)
    assert data.image_shape == (3, 6, 6)
    assert levels(data, data.probe_data()[0])[0] == [10, 11, 12, 13, 14, 15, 20]
    assert ImageData(image_size=16).image_shape == (1, 16, 16)
    assert next(iter(ImageData(image_size=16).probe_data()[0]))[0].shape == (512, 1, 16, 16)


@pytest.fixture
def damaged(pictures: Path) -> Path:
    (pictures / "train" / "ant" / "2.png").write_bytes(b"not a picture")
    cut = pictures / "train" / "bee" / "3.png"
    cut.write_bytes(cut.read_bytes()[:40])
    return pictures


READING = pytest.mark.parametrize(("in_memory_bytes", "num_workers"), [(0, 0), (2**30, 0), (0, 1)])


@READING
def test_an_unreadable_image_is_named(damaged: Path, in_memory_bytes: int, num_workers: int) -> None:
    with pytest.raises(ValueError, match=r"cannot read image .*(ant/2|bee/3)\.png \(.*\); repair or remove it") as caught:
        made(folder(damaged, in_memory_bytes=in_memory_bytes, num_workers=num_workers), 0)
    assert "\n" not in str(caught.value)


@READING
def test_unreadable_images_are_left_out_on_request(
    damaged: Path, caplog: pytest.LogCaptureFixture, in_memory_bytes: int, num_workers: int
) -> None:
    data = folder(damaged, in_memory_bytes=in_memory_bytes, num_workers=num_workers, skip_unreadable=True)
    assert sum(len(y) for _, y in made(data, 0)) == 10
    assert data.client_sizes() == [10]
    assert levels(data, data.probe_data()[0]) == {0: [10, 11, 13, 14, 15], 1: [110, 111, 112, 114, 115]}
    assert "left out 2 of 12 images" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not a picture"], ids=["empty", "text"])
@pytest.mark.parametrize("image_size", [None, 6])
@pytest.mark.parametrize("in_memory_bytes", [0, 2**30])
@pytest.mark.parametrize("layout", ["train and test", "classes alone", "a folder per client"])
def test_the_first_image_of_all_may_be_unreadable(
    tmp_path: Path, layout: str, in_memory_bytes: int, image_size: int | None, content: bytes
) -> None:
    base = tmp_path if layout == "classes alone" else tmp_path / "train"
    below = "ant" if layout == "a folder per client" else ""
    for kind in ("ant", "bee"):
        for at in range(10):
            picture(base / kind / below / f"{at}.png", at)
        if layout != "classes alone":
            picture(tmp_path / "test" / kind / "0.png", 99)
    (base / "ant" / below / "0.png").write_bytes(content)
    natural = Natural() if layout == "a folder per client" else None
    given: dict[str, Any] = {"in_memory_bytes": in_memory_bytes, "image_size": image_size, "partition": natural}
    data = folder(tmp_path, skip_unreadable=True, **given)
    assert data.image_shape == (3, image_size or 12, image_size or 10)
    sizes = data.client_sizes()
    if natural:
        assert sizes == [9, 10]
    else:  # where there is no test part, two images of each class are kept for it, of whichever the bad one may be one
        assert sizes in ([[19]] if layout == "train and test" else [[15], [16]])
    for client, size in enumerate(sizes):
        batches = made(data, client)
        assert sum(len(y) for _, y in batches) == size - (size % 4 == 1)
        assert {x.shape[1:] for x, _ in batches} == {data.image_shape}
    assert sum(len(y) for loader in data.probe_data() for _, y in loader) == {"classes alone": 19}.get(layout, 21)
    with pytest.raises(ValueError, match=r"cannot read image .*ant.*/0\.png"):
        list(folder(tmp_path, **given).probe_data()[0]), list(folder(tmp_path, **given).probe_data()[1])


def test_what_is_no_fault_of_a_file_is_not_blamed_on_it(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(*_: Any) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(Image, "open", endless)
    with pytest.raises(RecursionError, match="too deep"):
        folder(pictures, skip_unreadable=True).setup()


def test_a_client_folder_without_images_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for client in ("abe", "zoe"):
        for at in range(4):
            picture(tmp_path / "train" / client / "ant" / f"{at}.png", at)
    for empty in ("mia/ant", "bob", ".cache"):
        (tmp_path / "train" / empty).mkdir(parents=True)
    picture(tmp_path / "test" / "ant" / "0.png", 99)
    assert folder(tmp_path, partition=Natural()).client_sizes() == [4, 4]
    told = "2 of 4 client folders have no training image and are left out: bob, mia"
    assert told in caplog.text
    caplog.clear()
    with pytest.raises(ValueError, match="num_clients=4 but the data belong to 2 clients; leave num_clients out, or set num_clients: 1"):
        folder(tmp_path, partition=Natural(), num_clients=4).client_sizes()
    assert told in caplog.text
    for at in range(4):
        (tmp_path / "train" / "zoe" / "ant" / f"{at}.png").write_bytes(b"")
    caplog.clear()
    assert folder(tmp_path, partition=Natural(), skip_unreadable=True).client_sizes() == [4]
    assert "3 of 4 client folders have no training image and are left out: bob, mia, zoe" in caplog.text
    caplog.clear()
    folder(tmp_path).client_sizes()  # not divided by folders: nothing to tell
    assert "client folders" not in caplog.text


def test_a_folder_per_client(tmp_path: Path) -> None:
    for client, count in (("zoe", 3), ("abe", 5), ("mia", 2)):
        for at in range(count):
            picture(tmp_path / "train" / client / ("ant", "bee")[at % 2] / f"{at}.png", at)
    for kind in ("ant", "bee"):
        picture(tmp_path / "test" / kind / "0.png", 99)
    data = folder(tmp_path, partition=Natural())
    assert data.client_sizes() == [5, 2, 3]  # abe, mia, zoe
    assert data.client_label_counts().tolist() == [[3, 2], [1, 1], [2, 1]]
    assert data.num_classes == 2
    assert sum(len(y) for _, y in made(data, 2)) == 3


def test_a_folder_per_client_without_labels(tmp_path: Path) -> None:
    for client in ("abe", "mia"):
        for at in range(4):
            picture(tmp_path / "train" / client / f"{at}.png", at)
    picture(tmp_path / "test" / "ant" / "0.png", 99)
    data = folder(tmp_path, partition=Natural(), views=2, augment="batched")
    assert data.client_sizes() == [4, 4]
    assert data.client_label_counts().tolist() == [[0], [0]]
    _, labels = made(data, 1)[0]
    assert labels.tolist() == [-1] * 4
    with pytest.raises(ValueError, match="probes need labels"):
        data.probe_data()


def test_images_of_different_sizes_are_named(pictures: Path) -> None:
    picture(pictures / "train" / "bee" / "large.png", 20, (40, 30))
    with pytest.raises(ValueError, match=r"large\.png is 40x30 pixels, the first is 10x12; set image_size"):
        folder(pictures).setup()
    (pictures / "train" / "bee" / "large.png").unlink()
    for path in (pictures / "test").rglob("*.png"):
        picture(path, 1, (5, 5))
    with pytest.raises(ValueError, match=r"shape \(3, 12, 10\) and of shape \(3, 5, 5\).*set image_size"):
        folder(pictures).test_dataloader()
