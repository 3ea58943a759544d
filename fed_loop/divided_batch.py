"""A training batch where the model is cut: the device has the images, the server gets activations in their place and, perhaps, labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from featherlight.plugins import Message
from featherlight.plugins.activation_codec import ActivationCodec


class DividedBatch(NamedTuple):
    """``(images, labels)`` or ``((view, view), labels)``, taken apart; labels may be missing.

    What stands behind the images may leave the device, so nothing but labels may stand there.

    Args:
        views: ``(N, …)`` each; single: whether they stood there alone, not in a tuple; others: the labels, ``(N, …)``, or nothing.
    """

    views: tuple[Tensor, ...]
    single: bool
    others: tuple[Tensor, ...]

    @classmethod
    def of(cls, batch: Any) -> DividedBatch:
        """Take ``batch`` apart.

        Raises:
            ValueError: its images are not found, or something else than one tensor of labels is behind them.
        """
        if isinstance(batch, Sequence) and batch:
            single = isinstance(batch[0], Tensor)
            views = (batch[0],) if single else tuple(batch[0]) if isinstance(batch[0], Sequence) else ()
            others = tuple(batch[1:])
            fits = all(isinstance(value, Tensor) and value.ndim and len(value) == len(views[0]) for value in others) if views else False
            if fits and len(others) < 2 and all(isinstance(view, Tensor) for view in views):
                return cls(views, single, others)
        raise ValueError(
            "to divide a model between device and server, batches must be (images, labels) or ((view, view), labels), with a label for "
            f"each image and nothing behind; this one is {_looks(batch)}: leave the rest out of the batch"
        )

    def labels(self, sent: bool | None) -> tuple[Tensor, ...]:
        """What of :attr:`others` travels. None: all where there is one view, nothing where there are several."""
        return self.others if sent or (sent is None and self.single) else ()


def _looks(value: Any) -> str:
    """What a batch is made of."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_looks, value))})"
    return f"a {type(value).__name__}"


def stand_in(shapes: Sequence[tuple[int, ...]], single: bool, labels: Sequence[Tensor]) -> Any:
    """A batch for the server's part of the model: images without data, and labels; those that were not sent have no data either."""
    with torch.device("meta"):
        views = tuple(torch.empty(shape) for shape in shapes)
        labels = tuple(labels) or (torch.empty(shapes[0][0], dtype=torch.int64),)
    return (views[0] if single else views), *labels


class StoredBatches:
    """Batches of activations out of one client's message, decoded when asked for.

    An entry's name is ``draw.step.view.codes`` (and ``.scale``) or ``draw.step.labels.place``; ``images`` and ``activations`` are shapes of
    one image and one activation of each view, ``single`` says how the batch held its views.

    Raises:
        ValueError: the message cannot have come from :func:`encoded` and :func:`heading`.
    """

    def __init__(self, message: Message, codec: ActivationCodec) -> None:
        self._message, self._codec = message, codec
        try:
            self._images = [tuple(map(int, shape)) for shape in message["images"].tolist()]
            self._activations = [tuple(map(int, shape)) for shape in message["activations"].tolist()]
            self.single = bool(message["single"])
            numbers = [tuple(map(int, name.split(".")[:2])) for name in message if name.endswith(".0.codes")]
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"a message of activations lacks what says how to read it ({error})") from error
        self.draws = 1 + max((draw for draw, _ in numbers), default=-1)
        if self.draws > len(numbers) or min((min(own) for own in numbers), default=0) < 0:  # or a name could ask for any amount of memory
            raise ValueError(f"a message of activations names draw {self.draws - 1}, and has {len(numbers)} batches")
        self._steps = [sum(draw == own for own, _ in numbers) for draw in range(self.draws)]
        self._places = sum(name.startswith("0.0.labels.") for name in message)
        if not numbers or len(self._images) != len(self._activations) or (self.single and len(self._images) > 1):
            raise ValueError("a message of activations holds none")
        for draw, steps in enumerate(self._steps):
            for step in range(steps):
                self._check(draw, step)

    def steps(self, draw: int) -> int:
        return self._steps[draw]

    def rows(self, draw: int, step: int) -> int:
        return self._message[f"{draw}.{step}.0.codes"].shape[0]

    def activations(self, draw: int, step: int) -> list[Tensor]:
        """``(N, …)`` for each view, float32."""
        rows = self.rows(draw, step)
        return [self._codec.decode(self._of(draw, step, view), (rows, *shape)) for view, shape in enumerate(self._activations)]

    def magnitude(self) -> float:
        """Of the largest activation."""
        steps = [(draw, step) for draw in range(self.draws) for step in range(self._steps[draw])]
        return max(self._codec.magnitude(self._of(*step, view)) for step in steps for view in range(len(self._activations)))

    def batch(self, draw: int, step: int) -> tuple[list[tuple[int, ...]], tuple[Tensor, ...]]:
        """Shapes of the images, and the labels."""
        labels = tuple(self._message[f"{draw}.{step}.labels.{place}"] for place in range(self._places))
        return [(self.rows(draw, step), *shape) for shape in self._images], labels

    def _of(self, draw: int, step: int, view: int) -> Message:
        prefix = f"{draw}.{step}.{view}."
        return {name: self._message[prefix + name] for name in ("codes", "scale") if prefix + name in self._message}

    def _check(self, draw: int, step: int) -> None:
        if f"{draw}.{step}.0.codes" not in self._message:
            raise ValueError(f"a message of activations lacks step {step}")
        rows = self.rows(draw, step)
        for view, shape in enumerate(self._activations):
            self._codec.check_received(self._of(draw, step, view), (rows, *shape))
        for place in range(self._places):
            if f"{draw}.{step}.labels.{place}" not in self._message:
                raise ValueError(f"a message of activations lacks the labels of step {step}")
        for place, value in enumerate(self.batch(draw, step)[1]):
            if value.ndim < 1 or len(value) != rows:
                raise ValueError(f"labels {place} of step {step} have shape {tuple(value.shape)} for {rows} samples")


def heading(batch: DividedBatch, activations: Sequence[Tensor]) -> Message:
    """What a message says of all its batches."""
    return {
        "images": torch.tensor([list(view.shape[1:]) for view in batch.views]),
        "activations": torch.tensor([list(value.shape[1:]) for value in activations]),
        "single": torch.tensor(int(batch.single)),
    }


def encoded(name: str, activations: Sequence[Tensor], labels: Sequence[Tensor], codec: ActivationCodec) -> Message:
    """The entries of one batch, ``name`` being ``draw.step``."""
    entries: Message = {}
    for view, value in enumerate(activations):
        entries |= {f"{name}.{view}.{part}": tensor for part, tensor in codec.encode(value).items()}
    return entries | {f"{name}.labels.{place}": value.clone() for place, value in enumerate(labels)}  # one tensor may be in several batches
