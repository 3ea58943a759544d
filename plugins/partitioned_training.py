"""Partitioned training: devices run the front of a model, the server trains the rest (EcoFed); and the split ways beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from featherlight.plugins.activation_codec import WHOLE, ActivationCodec
from featherlight.plugins.adapters import width_of
from featherlight.plugins.base import Change, Clock, Plugin
from featherlight.plugins.cut import Cut
from featherlight.plugins.front_weights import load_front
from featherlight.plugins.partition import Partition
from featherlight.plugins.present import held
from featherlight.plugins.replay_buffer import ReplayBuffer
from featherlight.plugins.seeds import derive
from featherlight.plugins.targets import find_targets

HEAD = "auxiliary_head"


class PartitionedTraining(Plugin):
    """Cut a model at a block: devices hold what comes up to it, the server holds and trains what comes behind.

    What leaves a device: the activations at the cut of every sample, from which much of an image can be reconstructed where the cut is near
    to the input, and, where the loss needs them, its labels. Federated averaging sends neither. Choose this to save devices traffic
    and work, not for privacy. Measured (``python benchmarks/ecofed_reconstruction.py``): from 8 bits behind VGG-11's second convolution, a
    server with images of its own sees digits of 16 px at a PSNR of 28 dB and an SSIM of 0.96; at 4 bits it is the same, behind the fourth
    convolution 22 dB and 0.88, and 14 dB and 0.50 for the mean image.

    - ``way="replay"`` is EcoFed (arXiv 2304.05495): the front, trained beforehand, is frozen for ever. Every ``replay_period``-th round,
      devices send quantised activations of all their data, once; in the others they are idle, and the server trains on what it has kept.
      It trains a copy of the rear for each client, and averages the copies.
    - ``way="split"`` is SplitFed (arXiv 2004.12088): in every step activations go up and their gradient comes down; both parts train.
    - ``way="local_loss"``: a small head on the device trains the front (the mean over places and a linear layer), so that no gradient
      comes down.
    - ``way="classic"`` divides nothing: federated averaging from the same front, to compare.

    For federations only. Self-supervised models take part as they are; replay has no fresh views of an image, so have several ``draws``
    sent.

    Args:
        cut: path of the last block of the front.
        way: ``"replay"``, ``"split"``, ``"local_loss"`` or ``"classic"``.
        replay_period: rounds from one in which devices send to the next (2 in EcoFed).
        bits: of an activation on the wire: 2 to 8, or 32 for float32; by default 8 for replay, 32 for the others.
        signed: whether activations may be negative; without, ReLU's are sent with twice the resolution, and a negative one ends the run.
        buffer_bytes: what the server keeps at most; the oldest goes. While a round runs, as many again of what comes in it.
        buffer: ``"memory"``, or a folder on disk, in which every process has one of its own while it runs; nothing else there is touched.
        draws: passes over its data, freshly augmented, that a device sends; rounds of training take turns with them.
        joint: train one rear on all clients' batches together, in place of one for each. A model with a queue of keys (``MoCoV3``'s
            ``queue_size``) then has one for all clients, as in MocoSFL (Li et al., ICLR 2023), and can be trained in no other way.
        front_checkpoint: the front's weights: a Lightning checkpoint (of ``featherlight fit``, say), a federation's, a state_dict, or
            safetensors; or an address, such as torchvision publishes weights at, which is downloaded once; by default those that the model
            has, such as ``pretrained`` ones. Names may stand below another prefix, or, in order, be other ones for the same layers. It is
            read when a run starts; to resume one, it need not be there.
        labels: send labels; by default where a batch has one view.
        classes: outputs of the device's own head (``"local_loss"``); by default the model's ``num_classes``.
        stem, tail: what comes before and behind the cut block, where the order in which the model registers its modules does not say so.

    Raises:
        ValueError: arguments that do not fit together; on attach, no such block; on start, a file that has no such front.
    """

    ordinary_server = False  # devices have the front

    def __init__(
        self,
        cut: str,
        way: Literal["replay", "split", "local_loss", "classic"] = "replay",
        replay_period: int = 2,
        bits: int | None = None,
        signed: bool = True,
        buffer_bytes: int = 4 * 1024**3,
        buffer: str = "memory",
        draws: int = 1,
        joint: bool = False,
        front_checkpoint: str | None = None,
        labels: bool | None = None,
        classes: int | None = None,
        stem: Sequence[str] | None = None,
        tail: Sequence[str] | None = None,
    ) -> None:
        if way not in ("replay", "split", "local_loss", "classic"):
            raise ValueError(f"way={way!r} is not known; use 'replay', 'split', 'local_loss' or 'classic'")
        for name, value in (("replay_period", replay_period), ("draws", draws)):
            if value < 1:
                raise ValueError(f"{name}={value}: give 1 or more")
        if way != "replay" and (draws > 1 or joint):
            raise ValueError(f"way={way!r} keeps nothing on the server: draws and joint are for way='replay'")
        self.cut, self.way, self.replay_period = cut, way, replay_period
        self.bits, self.signed = bits, signed
        self.buffer_bytes, self.buffer, self.draws, self.joint = buffer_bytes, buffer, draws, joint
        self.front_checkpoint, self.labels, self.classes = front_checkpoint, labels, classes
        self.stem, self.tail = stem, tail
        self._codec = ActivationCodec((8 if way == "replay" else WHOLE) if bits is None else bits, signed)
        self._empty()

    def _empty(self) -> None:
        """As if nothing had been sent yet."""
        self._buffer = ReplayBuffer(self.buffer_bytes, None if self.buffer == "memory" else Path(self.buffer))

    # -- the verbs ------------------------------------------------------------------------------------------------
    def attach(self, model: nn.Module) -> None:
        self._empty()  # what another run left is of another model's front
        self._model = model
        self._cut = Cut(model, self.cut, self.stem, self.tail, find_targets(model))
        self._trainable = [parameter for parameter in self._cut.parameters if parameter.requires_grad]
        try:
            head = self._head(model) if self.way == "local_loss" else None
        except BaseException:
            self._cut.remove()  # a plugin that cannot be attached leaves the model as it was
            del self._model, self._cut, self._trainable
            raise
        if head is not None:
            model.add_module(HEAD, head)
        if self.way == "classic":
            self._cut.remove()

    def start(self) -> None:
        if self.front_checkpoint is not None:
            load_front(self.front_checkpoint, {name: value for name, value in held(self._model).items() if self._cut.has(name)})

    def advance(self, clock: Clock) -> Change:
        if self.way != "replay":
            return Change()
        froze = tuple(parameter for parameter in self._cut.parameters if parameter.requires_grad)
        for parameter in froze:
            parameter.requires_grad_(False)
        self.before_forward(clock)
        return Change(froze)

    def before_forward(self, clock: Clock) -> None:
        for module in self._cut.modules if self.way == "replay" else ():  # norms keep the statistics of the front's own training
            if module.training:
                module.eval()

    def detach(self) -> None:
        self._cut.remove()
        self._buffer.close()
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        if self.way == "local_loss":
            delattr(self._model, HEAD)
        del self._model, self._cut, self._trainable  # a copy of this plugin is not to have a copy of the model

    def partition(self, clock: Clock) -> Partition | None:
        if self.way == "classic":
            return None
        if self.way == "replay":
            work = clock.period % self.replay_period == 0
            return Partition(self._cut, self._codec, self._buffer, work, self.draws, self.joint, labels=self.labels)
        if self.way == "split":
            return Partition(self._cut, self._codec, gradients=True, labels=self.labels)
        head = self._model.get_submodule(HEAD)
        return Partition(self._cut, self._codec, on_device=(HEAD, head), local_loss=self._local_loss, labels=self.labels)

    def figures(self) -> dict[str, float]:
        if self.way != "replay":
            return {}
        return {"stored_clients": len(self._buffer.clients), "stored_bytes": self._buffer.nbytes}

    def state_dict(self) -> dict[str, Any]:
        return {"buffer": self._buffer.state_dict()} if self.way == "replay" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._buffer.load_state_dict(state["buffer"])

    # -- the device's own head ------------------------------------------------------------------------------------
    def _head(self, model: nn.Module) -> nn.Module:
        if hasattr(model, HEAD):
            raise ValueError(f"the model has {HEAD} already; only one plugin may give it one")
        classes = self.classes or getattr(model, "num_classes", None)
        if classes is None:
            raise ValueError(
                f"way='local_loss' trains the front by a head of its own: give classes=..., how many {type(model).__name__} learns"
            )
        block = model.get_submodule(self.cut)
        if (width := width_of(block)) is None:
            parent = self.cut.rpartition(".")[0]
            beside = [f"{parent}.{name}".lstrip(".") for name, one in model.get_submodule(parent).named_children() if width_of(one)]
            raise ValueError(
                f"way='local_loss' puts a head of its own behind the cut, and \"{self.cut}\" ({type(block).__name__}) has no layer that "
                f"says how wide its output is: cut at a block with a linear layer, a convolution or a norm in it ({', '.join(beside)})"
            )
        head, like = AuxiliaryHead(width, classes), next(model.parameters())
        same = like.device == head.linear.weight.device and like.dtype == head.linear.weight.dtype
        return head if same else head.to(like)  # tensors without data cannot be moved, even to where they are

    def _local_loss(self, activations: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self._model.get_submodule(HEAD)(activations), labels)


class AuxiliaryHead(nn.Module):
    """The mean over places and a linear layer: ``(N, C, H, W)``, ``(N, L, C)`` or ``(N, C)`` → ``(N, classes)``.

    Raises:
        ValueError: activations of another shape.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # attaching a plugin must not move the model's random numbers
            torch.manual_seed(derive(width, classes, "auxiliary head"))
            self.linear = nn.Linear(width, classes)

    def forward(self, activations: Tensor) -> Tensor:
        over = {4: (2, 3), 3: (1,), 2: ()}.get(activations.ndim)
        width = activations.shape[1 if activations.ndim == 4 else -1]
        if over is None or width != self.linear.in_features:
            raise ValueError(
                f"activations of shape {tuple(activations.shape)} came to the device's own head, which takes (N, C, H, W), (N, L, C) or "
                f"(N, C) with C = {self.linear.in_features}: cut at another block"
            )
        return self.linear(activations.mean(over) if over else activations)
