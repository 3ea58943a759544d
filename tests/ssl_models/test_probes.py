"""Probes: right on clusters, at chance on noise, as scikit-learn has it, and without a trace."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from featherlight.ssl_models import KNN, FineTune, LinearProbe, make_backbone
from featherlight.ssl_models.data import ImageData
from featherlight.ssl_models.partitions import Natural

CLASSES = 3


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Blobs:
    """Images 1×4×4 around one centre per class, ``spread`` apart from it; with ``spread=None`` labels mean nothing."""

    num_classes = CLASSES

    def __init__(self, spread: float | None, train: int = 240, test: int = 300) -> None:
        draw = torch.Generator().manual_seed(7)
        centres = torch.randn(CLASSES, 16, generator=draw)
        self.parts = []
        for count in (train, test):
            labels = torch.arange(count) % CLASSES
            images = torch.randn(count, 16, generator=draw)
            if spread is not None:
                images = centres[labels] + spread * images
            self.parts.append((images.view(-1, 1, 4, 4), labels))

    def probe_data(self) -> tuple[DataLoader, DataLoader]:
        train, test = (TensorDataset(*part) for part in self.parts)
        return DataLoader(train, 50, shuffle=True), DataLoader(test, 64)


class Model(nn.Module):
    """Features are the 16 pixels and a constant, behind layers that have modes, a bias and statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 17), nn.Dropout(0.2), nn.BatchNorm1d(17, affine=False))
        nn.init.eye_(self.backbone[1].weight)
        nn.init.ones_(self.backbone[1].bias)

    def features(self, x: Tensor) -> Tensor:
        return self.backbone(x)


PROBES = [KNN(), LinearProbe(), FineTune(epochs=4, warmup_epochs=1, lr=0.02, batch_size=32)]
NAMES = ["knn", "linear", "finetune"]


@pytest.mark.parametrize(("probe", "name"), list(zip(PROBES, NAMES)), ids=NAMES)
def test_separable_clusters_are_found_and_noise_is_not(probe: KNN, name: str) -> None:
    assert probe(Model(), Blobs(spread=0.2)) == {name: 1.0}
    chance = 1 / CLASSES
    deviation = math.sqrt(chance * (1 - chance) / 300)
    assert abs(probe(Model(), Blobs(spread=None))[name] - chance) < 4 * deviation


@pytest.mark.parametrize("probe", PROBES, ids=NAMES)
def test_a_probe_leaves_no_trace_and_repeats_itself(probe: KNN) -> None:
    model = Model().train()
    model.backbone[3].eval()  # a frozen norm inside a training model
    model.backbone[1].requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    stream = torch.get_rng_state()
    first = probe(model, Blobs(spread=1.5))
    torch.randn(3)  # what the global stream does in between changes nothing
    torch.set_rng_state(stream)
    assert probe(model, Blobs(spread=1.5)) == first
    assert torch.equal(torch.get_rng_state(), stream)
    assert [part.training for part in model.modules()] == modes
    assert not model.backbone[1].weight.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def numpy_parts(model: Model, data: Blobs) -> list[tuple[np.ndarray, np.ndarray]]:
    with torch.no_grad():
        return [(model.eval().features(images).double().numpy(), labels.numpy()) for images, labels in data.parts]


def test_knn_is_the_weighted_vote_of_scikit_learn() -> None:
    data, model = Blobs(spread=2.0), Model()
    (train, train_labels), (test, labels) = numpy_parts(model, data)
    votes = KNeighborsClassifier(15, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.2))
    votes.fit(normalize(train), train_labels)
    expected = votes.score(normalize(test), labels)
    assert 0.5 < expected < 0.95
    assert KNN(k=15, temperature=0.2, batch_size=70)(model, data)["knn"] == pytest.approx(expected, abs=1e-6)


def test_linear_probe_is_the_logistic_regression_of_scikit_learn() -> None:
    data, model = Blobs(spread=2.0), Model()
    (train, train_labels), (test, labels) = numpy_parts(model, data)
    scaler = StandardScaler().fit(train)
    decay = 0.05
    reference = LogisticRegression(C=1 / (decay * len(train)), max_iter=1000).fit(scaler.transform(train), train_labels)
    expected = reference.score(scaler.transform(test), labels)
    assert 0.5 < expected < 0.95
    assert LinearProbe(weight_decay=decay)(model, data)["linear"] == pytest.approx(expected, abs=1.5 / 300)


def test_linear_probe_takes_features_that_never_change() -> None:
    class Constant(Model):
        def features(self, x: Tensor) -> Tensor:
            return torch.cat([super().features(x), torch.full((len(x), 1), 1e3)], 1)

    assert LinearProbe()(Constant(), Blobs(spread=0.2)) == {"linear": 1.0}


def test_fine_tuning_trains_what_a_frozen_backbone_cannot_tell() -> None:
    model = Model()
    model.backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)).requires_grad_(False)
    nn.init.zeros_(model.backbone[1].weight)  # the same features for every image
    data = Blobs(spread=0.5)
    assert LinearProbe()(model, data)["linear"] == pytest.approx(1 / CLASSES)
    assert FineTune(epochs=20, warmup_epochs=2, lr=0.05, batch_size=32)(model, data)["finetune"] > 0.95
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_fine_tuning_trains_the_blocks_that_a_plugin_froze() -> None:
    from featherlight.plugins import Clock, LayerFreezing

    model = Model()
    model.backbone = make_backbone("vit", image_size=4, in_channels=1, depth=2, width=16, heads=2, patch_size=2)
    plugin = LayerFreezing(blocks="backbone.blocks.*", periods_per_stage=1)
    plugin.attach(model)
    plugin.advance(Clock(1))
    trains = [parameter.requires_grad for parameter in model.parameters()]
    assert False in trains
    tuned = FineTune(epochs=6, warmup_epochs=1, lr=5e-3, batch_size=32)(model, Blobs(spread=0.2))["finetune"]
    assert tuned > 0.9
    assert [parameter.requires_grad for parameter in model.parameters()] == trains


def test_a_last_batch_of_one_image_is_left_out_of_fine_tuning() -> None:
    FineTune(epochs=1, warmup_epochs=0, batch_size=32)(Model(), Blobs(spread=0.5, train=65))  # batch norm would refuse it


def test_fine_tuning_warms_up_and_ends_its_cosine_one_step_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder(torch.optim.AdamW):
        def step(self, *arguments: object) -> None:  # type: ignore[override]
            rates.append(self.param_groups[0]["lr"])

    rates: list[float] = []
    monkeypatch.setattr(torch.optim, "AdamW", Recorder)
    FineTune(epochs=3, warmup_epochs=1, lr=0.5, batch_size=60)(Model(), Blobs(spread=1.0))  # 4 steps an epoch
    rising = [0.125, 0.25, 0.375, 0.5]
    falling = [0.5 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates == pytest.approx(rising + falling, abs=1e-12)


def seen_in_training(monkeypatch: pytest.MonkeyPatch, **options: object) -> tuple[Tensor, Tensor]:
    """Images and labels of fine-tuning's only epoch, as the loss got them."""
    from featherlight.ssl_models import probes

    shown, named = [], []

    class Eyes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                shown.append(x.clone())
            return x.flatten(1) * self.weight

    original = probes.cross_entropy
    monkeypatch.setattr(probes, "cross_entropy", lambda logits, labels: (named.append(labels), original(logits, labels))[1])
    model = Model()
    model.backbone = Eyes()
    torch.manual_seed(0)  # the loader of the blobs shuffles
    FineTune(epochs=1, warmup_epochs=0, batch_size=32, **options)(model, Blobs(spread=1.0))  # type: ignore[arg-type]
    return torch.cat(shown), torch.cat(named)


def test_a_share_of_labels_is_of_every_class_and_within_a_larger_share(monkeypatch: pytest.MonkeyPatch) -> None:
    images = {}
    for share, each in ((0.001, 1), (0.1, 8), (0.25, 20), (1.0, 80)):
        shown, labels = seen_in_training(monkeypatch, labels=share)
        assert labels.bincount().tolist() == [each] * CLASSES
        images[share] = {tuple(image.flatten().tolist()) for image in shown}
    assert images[0.001] < images[0.1] < images[0.25] < images[1.0]


def test_other_seeds_know_other_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, again = (seen_in_training(monkeypatch, labels=0.1, seed=seed)[0] for seed in (0, 1, 0))
    assert torch.equal(first, again)
    assert not torch.equal(first.sum(0), second.sum(0))


def test_images_are_shifted_and_mirrored_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Blobs(spread=1.0).parts[0][0]
    padded = nn.functional.pad(plain, (1, 1, 1, 1))  # an eighth of 4 pixels, 1 at least
    cuts = [padded[..., row : row + 4, column : column + 4] for row in range(3) for column in range(3)]

    def share(shown: Tensor, allowed: list[Tensor]) -> float:
        """Of the images ``shown``, those that are among the ``allowed``."""
        known = {tuple(image.flatten().tolist()) for cut in allowed for image in cut}
        return sum(tuple(image.flatten().tolist()) in known for image in shown) / len(shown)

    assert share(seen_in_training(monkeypatch)[0], [plain]) == 1.0
    shifted, _ = seen_in_training(monkeypatch, augment="crop")
    assert share(shifted, cuts) == 1.0
    assert share(shifted, [plain]) == pytest.approx(1 / 9, abs=4 * math.sqrt(8 / 81 / 240))
    mirrored, _ = seen_in_training(monkeypatch, augment="crop_flip")
    assert share(mirrored, [*cuts, *(cut.flip(-1) for cut in cuts)]) == 1.0
    assert share(mirrored, cuts) == pytest.approx(1 / 2, abs=4 * math.sqrt(1 / 4 / 240))


def test_fine_tuning_by_sgd_is_the_step_by_hand() -> None:
    data, tuning = Blobs(spread=0.5), FineTune(epochs=1, warmup_epochs=0, lr=0.5, batch_size=240, optimizer="sgd", weight_decay=0.0)
    images, labels = data.parts[0]
    model = nn.Module()
    model.backbone = nn.Flatten()
    network = nn.Sequential(model.backbone, nn.Linear(16, CLASSES))
    weight, bias = (parameter.detach().clone() for parameter in network[1].parameters())
    error = (images.flatten(1) @ weight.T + bias).softmax(1) - nn.functional.one_hot(labels, CLASSES)  # of the cross entropy
    expected = weight - 0.5 * error.T @ images.flatten(1) / 240, bias - 0.5 * error.mean(0)
    tuning._train(network, images, labels, torch.device("cpu"))
    assert torch.allclose(network[1].weight, expected[0], atol=1e-6)
    assert torch.allclose(network[1].bias, expected[1], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": 0.0}, "labels=0.0 is no share of labels: give a number above 0, up to 1"),
        ({"labels": 1.5}, "labels=1.5 is no share of labels"),
        ({"optimizer": "adam"}, 'optimizer "adam" not found; there are adamw, sgd'),
        ({"augment": "flip"}, 'augment "flip" not found; there are none, crop, crop_flip'),
    ],
)
def test_fine_tuning_refuses_what_it_does_not_know(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FineTune(**options)


# -- what is found before training ------------------------------------------------------------------------------------
def no_features(_: Tensor) -> Tensor:
    raise AssertionError("features were computed")


@pytest.mark.parametrize("probe", PROBES, ids=NAMES)
def test_a_check_takes_no_features_no_batch_and_no_random_number(probe: KNN) -> None:
    class Untouched(Blobs):
        def probe_data(self) -> tuple[DataLoader, DataLoader]:
            return tuple(DataLoader(TensorDataset(*part), collate_fn=no_features) for part in self.parts)

    stream = torch.get_rng_state()
    assert probe.check(Untouched(spread=1.0)) is None
    assert torch.equal(torch.get_rng_state(), stream)


def test_too_few_training_images_for_the_neighbours_are_found_before_training() -> None:
    KNN(k=12).check(Blobs(spread=1.0, train=12))
    with pytest.raises(ValueError, match="k=13 neighbours, but 12 training images: choose k up to 12"):
        KNN(k=13).check(Blobs(spread=1.0, train=12))
    data = ImageData(limit_train=15)
    KNN(k=15).check(data)
    with pytest.raises(ValueError, match="k=16 neighbours, but 15 training images"):
        KNN(k=16).check(data)


def test_training_images_that_nobody_can_count_beforehand_are_counted_later() -> None:
    class Stream(Blobs):
        def probe_data(self) -> tuple[list, list]:  # type: ignore[override]
            return tuple([(images, labels)] for images, labels in self.parts)

    KNN(k=20).check(Stream(spread=1.0, train=12))
    with pytest.raises(ValueError, match="k=20 neighbours, but 12 training images"):
        KNN(k=20)(Model(), Stream(spread=1.0, train=12))


@pytest.mark.parametrize("probe", PROBES, ids=NAMES)
def test_missing_labels_are_found_before_training(probe: KNN, tmp_path: Path) -> None:
    for client in ("abe", "mia"):
        (tmp_path / "train" / client).mkdir(parents=True)
        for at in range(4):
            Image.new("RGB", (4, 4), (at, at, at)).save(tmp_path / "train" / client / f"{at}.png")
    data = ImageData("folder", str(tmp_path), partition=Natural())
    with pytest.raises(ValueError, match="probes need labels, and some training images have none"):
        probe.check(data)


def test_errors() -> None:
    with pytest.raises(ValueError, match="k=20 neighbours, but 12 training images"):
        KNN()(Model(), Blobs(spread=1.0, train=12))
    with pytest.raises(ValueError, match="warmup_epochs 5 must lie between 0 and epochs 4"):
        FineTune(epochs=4, warmup_epochs=5)(Model(), Blobs(spread=1.0))
    with pytest.raises(ValueError, match="warmup_epochs 5 must lie between 0 and epochs 4"):
        FineTune(epochs=4, warmup_epochs=5).check(Blobs(spread=1.0))
