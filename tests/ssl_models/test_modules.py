"""Models: heads counted by hand, momentum against its formula, Trainer and Fabric alike."""

import copy
import doctest
import importlib
import math
import pickle
import re

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from featherlight.plugins import Clock, LayerFreezing
from featherlight.plugins.step_cost import StepMeter
from featherlight.ssl_models import BYOL, Accuracy, Classifier, MoCoV3, SimCLR, accuracy
from featherlight.ssl_models.backbones import fixed_size
from featherlight.ssl_models.learner import Learner
from featherlight.ssl_models.ssl import SelfSupervised

SMALL = {
    "backbone": "vit",
    "image_size": 8,
    "in_channels": 1,
    "backbone_options": {"depth": 2, "width": 16, "heads": 2, "patch_size": 4},
}
HEADS = {"hidden_dim": 32, "output_dim": 16}
SELF_SUPERVISED = [SimCLR, BYOL, MoCoV3]
MODELS = [*SELF_SUPERVISED, Classifier]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def small(model: type[Learner], seed: int = 0, **options) -> Learner:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = HEADS if issubclass(model, SelfSupervised) else {}
        return model(**SMALL, **heads, **options)


class Images(Dataset):
    """Two noisy views of 32 images, or the image and its label where ``plain``; the same on every pass."""

    def __init__(self, plain: bool = False) -> None:
        draw = torch.Generator().manual_seed(3)
        images = torch.randn(32, 1, 8, 8, generator=draw)
        self.views = images + 0.1 * torch.randn(2, 32, 1, 8, 8, generator=draw)
        self.plain = plain

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple:
        x0, x1 = self.views[:, index]
        return (x0, index % 4) if self.plain else ((x0, x1), index % 4)


def batches(model: type[Learner]) -> DataLoader:
    return DataLoader(Images(plain=model is Classifier), batch_size=8)


def trainer(**options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, **{**quiet, **options})


# -- heads ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", SELF_SUPERVISED)
def test_heads_of_vit_tiny_have_the_weights_of_the_paper(model: type[SelfSupervised]) -> None:
    heads = model("vit_tiny", backbone_options={"depth": 1})

    def weights(head: nn.Module) -> int:
        return sum(linear.weight.numel() for linear in head.modules() if isinstance(linear, nn.Linear))

    assert weights(heads.projector) == 192 * 512 + 512 * 512 + 512 * 256 == 491_520
    if model is not SimCLR:
        assert weights(heads.predictor) == 256 * 512 + 512 * 256 == 262_144


# -- momentum -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", [BYOL, MoCoV3])
def test_target_moves_by_the_formula_where_the_online_branch_trains(model: type[SelfSupervised]) -> None:
    module = small(model, momentum=0.9)
    assert module.targets == {"backbone_target": "backbone", "projector_target": "projector"}
    assert not any(p.requires_grad for p in [*module.backbone_target.parameters(), *module.projector_target.parameters()])
    module.backbone.blocks[0].requires_grad_(False)
    with torch.no_grad():
        for parameter in (*module.backbone.parameters(), *module.projector.parameters()):
            parameter.add_(torch.randn_like(parameter))
    before = copy.deepcopy(module)
    module.after_optimizer_step()
    for name, value in module.state_dict().items():
        old = before.state_dict()[name]
        branch, _, rest = name.partition(".")
        trains = branch in module.targets and name in dict(module.named_parameters()) and not rest.startswith("blocks.0.")
        if trains:
            online = before.state_dict()[f"{module.targets[branch]}.{rest}"]
            torch.testing.assert_close(value, 0.9 * old + (1 - 0.9) * online)
            assert not torch.equal(value, old)
        else:
            assert torch.equal(value, old), name


def test_of_all_tokens_a_trained_block_and_the_norm_behind_it_keep_what_they_must() -> None:
    images, side, width = 8, 8, 32
    model = SimCLR(
        "vit", image_size=side, backbone_options={"depth": 2, "width": width, "heads": 2, "patch_size": 2}, hidden_dim=4, output_dim=4
    )
    plugin = LayerFreezing("backbone.blocks.*")
    plugin.attach(model)
    plugin.advance(Clock(1))
    with StepMeter(model) as meter:
        model.view_loss(*torch.randn(2, images, 3, side, side))
        meter.forward_is_done()
    tokens = 2 * images * ((side // 2) ** 2 + 1) * width * 4  # bytes of all tokens, once
    # inputs of: norm, qkv; attention (q, k, v); projection; norm, first layer; activation and second layer (four times as wide); last norm
    assert tokens * (1 + 1 + 3 + 1 + 1 + 1 + 4 + 4 + 1) < meter.cost.saved_bytes < 17.5 * tokens


def test_target_moves_once_an_optimizer_step() -> None:
    """With a learning rate of 0 the gap to the online branch shrinks by m a step; 4 batches, 2 accumulated, are 2 steps."""
    module = small(BYOL, momentum=0.5, lr=0.0, weight_decay=0.0)
    with torch.no_grad():
        module.backbone_target.norm.weight += 1.0
    trainer(max_epochs=1, accumulate_grad_batches=2).fit(module, batches(BYOL))
    torch.testing.assert_close(module.backbone_target.norm.weight - module.backbone.norm.weight, torch.full((16,), 0.25))


# -- optimizers and schedules ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_but_the_targets_is_in_one_of_two_groups(model: type[Learner], name: str) -> None:
    module = small(model, optimizer=name, weight_decay=0.3, lr=0.2)
    module.backbone.blocks[0].requires_grad_(False)  # frozen ones too
    optimizer = module.configure_optimizers()["optimizer"]
    decayed, free = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    expected = {id(p): p.ndim > 1 for n, p in module.named_parameters() if "_target." not in n}
    assert decayed == {key for key, matrix in expected.items() if matrix}
    assert free == {key for key, matrix in expected.items() if not matrix}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.2}


def test_cosine_schedule_by_its_formula() -> None:
    factor = small(SimCLR, schedule="cosine", periods=10, warmup_periods=2).lr_factor
    expected = [0.5, 1.0] + [0.001 + 0.999 * (1 + math.cos(math.pi * p / 8)) / 2 for p in range(9)]
    assert [factor(period) for period in range(11)] == pytest.approx(expected)
    assert factor(50) == pytest.approx(0.001)  # training on past the schedule stays at its end


def test_constant_schedule_and_warmup() -> None:
    assert [small(SimCLR, warmup_periods=4).lr_factor(period) for period in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert small(SimCLR).lr_factor(0) == 1.0


def test_scheduler_steps_by_the_epoch_and_can_be_pickled() -> None:
    module = small(SimCLR, schedule="cosine", periods=2, lr=0.1)
    configured = module.configure_optimizers()
    assert configured["lr_scheduler"]["interval"] == "epoch"
    pickle.loads(pickle.dumps(module))
    fit = trainer(max_epochs=1)
    fit.fit(module, batches(SimCLR))
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * (0.001 + 0.999 / 2))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"optimizer": "adam"}, '"adam" not found; there are adamw, sgd, lars'),
        ({"schedule": "linear"}, '"linear" not found; there are constant, cosine'),
        ({"schedule": "cosine"}, "periods=None"),
        ({"schedule": "cosine", "periods": 3, "warmup_periods": 3}, "greater than warmup_periods"),
        ({"momentum": 1.5}, r"momentum must lie in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"projector_layers": 1}, "projector_layers must be at least 2, got 1"),
    ],
)
def test_errors_of_construction(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        small(MoCoV3, **options).configure_optimizers()


# -- steps and hosts ------------------------------------------------------------------------------------------------
def after(module: Learner) -> None:
    """What a host without a Trainer does after an optimizer step."""
    if isinstance(module, BYOL | MoCoV3):
        module.after_optimizer_step()


@pytest.mark.parametrize("model", MODELS)
def test_trainer_and_fabric_train_to_the_same_weights(model: type[Learner]) -> None:
    by_trainer, by_fabric = small(model, lr=3e-3), small(model, lr=3e-3)
    fit = trainer(max_epochs=2)
    fit.fit(by_trainer, batches(model), DataLoader(Images(plain=model is Classifier), 16))
    assert {"train/loss", "val/loss"} <= set(fit.callback_metrics)

    fabric = L.Fabric(accelerator="cpu", devices=1)
    module = fabric.setup(by_fabric)
    optimizer = fabric.setup_optimizers(by_fabric.configure_optimizers()["optimizer"])
    for _ in range(2):
        for index, batch in enumerate(batches(model)):
            loss = module.training_step(batch, index)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            after(by_fabric)
    module.eval()
    scores = module.validation_step(next(iter(batches(model))), 0)
    assert all(score.ndim == 0 for score in scores.values())
    assert all(torch.equal(value, by_fabric.state_dict()[name]) for name, value in by_trainer.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
@pytest.mark.parametrize("model", MODELS)
def test_training_lowers_the_loss(model: type[Learner], optimizer: str) -> None:
    sharp = {"temperature": 0.1} if model is SimCLR else {}  # at 0.5 the best possible loss of 8 pairs is 0.9
    module = small(model, optimizer=optimizer, lr={"adamw": 3e-3, "sgd": 0.05, "lars": 0.5}[optimizer], **sharp)
    steps = module.configure_optimizers()["optimizer"]
    losses = []
    data = list(batches(model))
    for step in range(40):
        loss = module.training_step(data[step % 4], step)
        steps.zero_grad()
        loss.backward()
        steps.step()
        after(module)
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])


@pytest.mark.parametrize("model", SELF_SUPERVISED)
def test_batches_of_views(model: type[SelfSupervised]) -> None:
    module = small(model).eval()
    x0, x1 = torch.randn(2, 4, 1, 8, 8)
    labels = torch.zeros(4, dtype=torch.long)
    loss = module.training_step(((x0, x1), labels), 0)
    assert torch.equal(module.training_step(([x0, x1], labels, ["a", "b", "c", "d"]), 0), loss)
    assert torch.equal(module.validation_step(((x0, x1), labels), 0)["loss"], loss)
    assert module.validation_step((x0, labels), 0) == {}
    assert module.features(x0).shape == module(x0).shape == (4, module.feature_dim)
    with pytest.raises(ValueError, match="needs two views of each image"):
        module.training_step((x0, labels), 0)
    with pytest.raises(ValueError, match="got 3 views"):
        module.training_step(((x0, x1, x0), labels), 0)
    with pytest.raises(ValueError, match="at least 2 samples in a batch, got 1"):
        module.training_step(((x0[:1], x1[:1]), labels[:1]), 0)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((1, 16, 16), "image_size=16 of the model, or image_size=8 of the data"),
        ((3, 8, 8), "in_channels=3 of the model"),
        ((3, 16, 16), "in_channels=3 and image_size=16 of the model, or image_size=8 of the data"),
        ((1, 8, 12), "image_size=8 of the data"),  # a model's images are square
    ],
)
def test_images_that_do_not_fit_are_refused_by_every_step(model: type[Learner], shape: tuple[int, ...], advice: str) -> None:
    x, labels = torch.zeros(4, *shape), torch.zeros(4, dtype=torch.long)
    module = small(model)
    batch = (x, labels) if model is Classifier else ((x, x), labels)
    says = f"images have the shape {shape} (C, H, W), but {model.__name__} was made for in_channels=1 and image_size=8: set {advice}"
    for step in (module.training_step, module.validation_step, lambda batch: module(x)):
        with pytest.raises(ValueError, match=re.escape(says) + "$"):
            step(batch)


@pytest.mark.parametrize(
    ("backbone", "options", "fixed"),
    [
        ("vit", {}, (32, 32)),
        ("timm/vit_tiny_patch16_224", {}, (32, 32)),
        ("timm/vit_tiny_patch16_224", {"dynamic_img_size": True}, None),
        ("timm/mixer_s32_224", {}, (32, 32)),
        ("timm/resnet18", {}, None),
        ("torchvision/vit_b_32", {}, (32, 32)),
        ("torchvision/resnet18", {}, None),
        ("resnet18_cifar", {}, None),
        ("resnet9", {}, None),
        ("vgg11", {}, None),
    ],
    ids=str,
)
def test_only_backbones_of_one_size_refuse_others(backbone: str, options: dict, fixed: tuple[int, int] | None) -> None:
    with torch.device("meta"):
        module = Classifier(backbone, backbone_options=options)
        assert fixed_size(module.backbone) == fixed
        assert module.logits(torch.empty(2, 3, 32, 32)).shape == (2, 10)
        larger = torch.empty(2, 3, 64, 64)
        if fixed is None:
            assert module.logits(larger).shape == (2, 10)
        else:
            with pytest.raises(ValueError, match=r"made for in_channels=3 and image_size=32: set image_size=64 of the model"):
                module.logits(larger)
        with pytest.raises(ValueError, match=r"made for in_channels=3.*: set in_channels=1 of the model"):
            module.logits(torch.empty(2, 1, 32, 32))


def test_a_librarys_own_name_for_channels_is_understood() -> None:
    module = Classifier("timm/resnet18", backbone_options={"in_chans": 1})
    assert module.logits(torch.zeros(2, 1, 32, 32)).shape == (2, 10)


def test_looking_at_the_images_leaves_a_compiled_model_whole() -> None:
    module = small(Classifier).eval()
    x = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(torch.compile(module.logits, backend="eager", fullgraph=True)(x), module.logits(x))


def test_classifier_scores_by_hand() -> None:
    module = small(Classifier, num_classes=4).eval()
    x, labels = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        logits = module.head(module.features(x))
    scores = module.validation_step((x, labels), 0)
    right = sum(int(max(range(4), key=row.__getitem__) == label) for row, label in zip(logits.tolist(), labels.tolist()))
    loss = -sum(math.log(math.exp(row[k]) / sum(map(math.exp, row))) for row, k in zip(logits.tolist(), labels.tolist())) / 6
    assert scores["accuracy"].item() == pytest.approx(right / 6)
    assert scores["loss"].item() == pytest.approx(loss, rel=1e-5)


def test_a_trainer_averages_the_classifiers_accuracy_over_samples_not_batches() -> None:
    module = small(Classifier, num_classes=4)
    data = Images(plain=True)
    [scores] = trainer().test(module, DataLoader(data, 24), verbose=False)  # batches of 24 and 8
    with torch.no_grad():
        predicted = module.eval().logits(torch.stack([data[i][0] for i in range(32)])).argmax(1)
    assert scores["test/accuracy"] == pytest.approx((predicted == torch.arange(32) % 4).float().mean().item())


def test_a_checkpoint_rebuilds_the_model(tmp_path) -> None:
    module = small(MoCoV3, temperature=0.1, lr=0.2)
    fit = trainer(max_epochs=1, limit_train_batches=1)
    fit.fit(module, batches(MoCoV3))
    fit.save_checkpoint(tmp_path / "last.ckpt")
    again = MoCoV3.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert (again.temperature, again.hparams["lr"], again.hparams["hidden_dim"]) == (0.1, 0.2, 32)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("model", "own"),
    [
        (SimCLR, {"temperature", "gather_distributed", "hidden_dim", "projector_layers"}),
        (BYOL, {"momentum", "hidden_dim", "output_dim"}),
        (MoCoV3, {"momentum", "temperature", "scale_by_2tau", "hidden_dim"}),
        (Classifier, {"num_classes", "label_smoothing"}),
    ],
)
def test_the_command_line_knows_every_argument_and_what_it_is_for(model: type[Learner], own: set[str]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(model, "model")
    described = {action.dest.removeprefix("model."): action.help or "" for action in parser._actions}
    wanted = {"backbone", "backbone_options", "image_size", "lr", "optimizer", "schedule", "periods", "pretrained", *own}
    for name in wanted:
        assert len(described[name].split()) >= 2, name
    parsed = parser.parse_args(["--model.backbone=vit", "--model.backbone_options={depth: 2}", "--model.optimizer=lars"])
    assert parsed.model.backbone_options == {"depth": 2}


@pytest.mark.parametrize("name", ["backbones", "simclr", "byol", "moco_v3", "classifier"])
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"featherlight.ssl_models.{name}"))
    assert result.attempted >= 2
    assert result.failed == 0


def test_accuracy_is_the_share_of_test_images_that_are_named():
    """Of a batch of three, two are right, and the one of the next batch: 3 of 4, not the mean of batches."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.sharpness = nn.Parameter(torch.ones(()))

        def logits(self, x):
            return self.sharpness * nn.functional.one_hot(x, 3)

    class Tested:
        def probe_data(self):
            return [], [(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1])), (torch.tensor([2]), torch.tensor([2]))]

    assert accuracy(Named(), Tested()) == {"accuracy": 0.75} == Accuracy()(Named(), Tested())
    with pytest.raises(ValueError, match="Linear names no class that Accuracy could count: judge its features, by KNN or LinearProbe"):
        Accuracy()(nn.Linear(2, 3), Tested())
