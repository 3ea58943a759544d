"""The front's weights from files: our own, torchvision's as torchvision writes them, downloaded ones; and files that are no front."""

import hashlib

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from featherlight.plugins import Clock, PartitionedTraining
from featherlight.ssl_models import Classifier


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 3))


def loaded(plugin, model):
    plugin.attach(model)
    plugin.start()


WRITE = {
    "lightning.ckpt": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
    "round-000001.ckpt": lambda state, path: torch.save({"server": state, "round": 1}, path),
    "plain.pt": torch.save,
    "weights.safetensors": save_file,
}


@pytest.mark.parametrize("name", WRITE)
def test_the_front_comes_from_a_file(name, tmp_path):
    pretrained, model = Net(), Net()
    rear = model.blocks[2].weight.clone()
    WRITE[name]({**pretrained.state_dict(), "blocks.2.weight": torch.zeros(9)}, tmp_path / name)  # another rear: it is not looked at
    loaded(PartitionedTraining("blocks.1", front_checkpoint=str(tmp_path / name)), model)
    assert torch.equal(model.blocks[0].weight, pretrained.blocks[0].weight)
    assert torch.equal(model.blocks[2].weight, rear)


class Malicious:
    def __reduce__(self):
        return print, ("code",)


def test_files_that_are_no_front(tmp_path, capsys):
    torch.save({"state_dict": {"blocks.0.weight": torch.ones(6, 4)}}, tmp_path / "half.ckpt")
    torch.save({"state_dict": {"blocks.0.weight": torch.ones(6, 9), "blocks.0.bias": torch.ones(6)}}, tmp_path / "other.ckpt")
    torch.save({"blocks.0.weight": torch.ones(6, 4), "blocks.0.bias": torch.full((6,), float("nan"))}, tmp_path / "nan.ckpt")
    torch.save({"state_dict": Malicious()}, tmp_path / "bad.ckpt")
    (tmp_path / "text.ckpt").write_text("model: VGG11")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    for name, message in (
        ("half.ckpt", 'half.ckpt has no "blocks.0.bias"'),
        ("nan.ckpt", 'nan.ckpt has "blocks.0.bias" with numbers that are not finite'),
        ("other.ckpt", r'other.ckpt has "blocks.0.weight" of shape \(6, 9\), needed is \(6, 4\)'),
        ("bad.ckpt", "bad.ckpt cannot be read: it is no file of weights alone$"),
        ("text.ckpt", "text.ckpt cannot be read: it is no file of weights alone$"),
        ("cut.safetensors", "cut.safetensors cannot be read"),
        ("none.ckpt", "none.ckpt does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(PartitionedTraining("blocks.1", front_checkpoint=str(tmp_path / name)), Net())
    assert "code" not in capsys.readouterr().out


# -- torchvision's ------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Where torch keeps what it downloads."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def published(model, folder, name, hashed=None):
    """A file as torchvision publishes it, its hash in its name, at an address."""
    torch.save(model.state_dict(), folder / "raw.pth")
    digest = hashed or hashlib.sha256((folder / "raw.pth").read_bytes()).hexdigest()[:8]
    return (folder / "raw.pth").rename(folder / f"{name}-{digest}.pth").as_uri()


def vgg11(norm):
    """torchvision's own, without the 120 M parameters of its linear layers."""
    torch.manual_seed(1)
    with torch.device("meta"):
        model = torchvision.models.vgg11_bn() if norm else torchvision.models.vgg11()
    model.classifier = nn.Identity()
    return weights_drawn(model.to_empty(device="cpu"))


def weights_drawn(model):
    """Every entry other than where training begins, running statistics too."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.0)
    return model.eval()


@pytest.mark.parametrize("backbone", ["vgg11", "resnet9_basic"])
def test_the_front_comes_from_what_torchvision_publishes(backbone, hub, tmp_path):
    """VGG-11 with batch norm: its first two convolutions, norms and poolings, by our names; downloaded once."""
    theirs = vgg11(norm=True)
    address = published(theirs, tmp_path, "vgg11_bn")
    model = Classifier(backbone).eval()
    plugin = PartitionedTraining("backbone.blocks.1", front_checkpoint=address)
    loaded(plugin, model)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plugin.partition(Clock(0)).cut.run(x), theirs.features[:8](x))
    assert [path.name for path in hub.iterdir()] == [address.rpartition("/")[2]]
    plugin.detach()
    next(tmp_path.glob("vgg11_bn-*")).unlink()
    again = Classifier(backbone)
    loaded(PartitionedTraining("backbone.blocks.1", front_checkpoint=address), again)
    assert torch.equal(again.backbone.blocks[1].conv.weight, theirs.features[4].weight)


def test_published_weights_without_norms_do_not_fit_a_front_with_norms(tmp_path):
    torch.save(vgg11(norm=False).state_dict(), tmp_path / "vgg11.pth")
    message = r'vgg11.pth has no "backbone.blocks.0.conv.weight" \(it has features.0.weight, .*where it has "features.3.weight" of shape '
    with pytest.raises(ValueError, match=message + r'\(128, 64, 3, 3\), the front has "backbone.blocks.0.norm.weight" of shape \(64,\)$'):
        loaded(PartitionedTraining("backbone.blocks.1", front_checkpoint=str(tmp_path / "vgg11.pth")), Classifier("vgg11"))


@pytest.mark.parametrize("way", ["front_checkpoint", "pretrained"])
def test_a_model_of_torchvision_takes_torchvision_weights_by_their_names(way, hub, tmp_path):
    """``pretrained=True`` asks torchvision, which looks where torch keeps downloads: there lies a file of the name that it publishes."""
    theirs = weights_drawn(torchvision.models.resnet18())
    path = hub / torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    hub.mkdir(parents=True)
    torch.save(theirs.state_dict(), path)
    model = Classifier("torchvision/resnet18", pretrained=way == "pretrained")
    loaded(PartitionedTraining("backbone.layer1", front_checkpoint=str(path) if way == "front_checkpoint" else None), model)
    for part in ("conv1", "bn1", "layer1"):
        for name, value in theirs.get_submodule(part).state_dict().items():
            assert torch.equal(model.backbone.get_submodule(part).state_dict()[name], value), name


def test_counts_that_old_files_lack_are_left(tmp_path):
    theirs = vgg11(norm=True)
    torch.save({name: value for name, value in theirs.state_dict().items() if "num_batches" not in name}, tmp_path / "old.pth")
    model = Classifier("vgg11")
    loaded(PartitionedTraining("backbone.blocks.1", front_checkpoint=str(tmp_path / "old.pth")), model)
    assert torch.equal(model.backbone.blocks[1].norm.running_var, theirs.features[5].running_var)


def test_downloads_that_are_not_what_their_name_says(hub, tmp_path):
    address = published(Net(), tmp_path, "net", hashed="00000000")
    with pytest.raises(ValueError, match=r'net-00000000.pth cannot be read: invalid hash value \(expected "00000000"'):
        loaded(PartitionedTraining("blocks.1", front_checkpoint=address), Net())
    with pytest.raises(ValueError, match=r"gone.pth cannot be read: .*No such file"):
        loaded(PartitionedTraining("blocks.1", front_checkpoint=(tmp_path / "gone.pth").as_uri()), Net())
    assert not list(hub.iterdir())


# -- names below other prefixes -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["module.", "online.encoder."])
def test_names_may_stand_below_another_prefix(prefix, tmp_path):
    pretrained, model = Net(), Net()
    torch.save({f"{prefix}{name}": value for name, value in pretrained.state_dict().items()}, tmp_path / "front.pt")
    loaded(PartitionedTraining("blocks.1", front_checkpoint=str(tmp_path / "front.pt")), model)
    assert torch.equal(model.blocks[0].weight, pretrained.blocks[0].weight)


def test_which_of_two_fronts_is_meant_is_asked(tmp_path):
    both = {f"{who}.{name}": value for who in ("student", "teacher") for name, value in Net().state_dict().items()}
    torch.save(both, tmp_path / "both.pt")
    message = r'has the front more than once \("student.blocks.0.weight" and "teacher.blocks.0.weight"\): save the one that is meant'
    with pytest.raises(ValueError, match=message):
        loaded(PartitionedTraining("blocks.1", front_checkpoint=str(tmp_path / "both.pt")), Net())
