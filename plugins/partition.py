"""What a host must know of a round in which device and server each hold a part of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from featherlight.plugins.activation_codec import ActivationCodec
from featherlight.plugins.cut import Cut
from featherlight.plugins.replay_buffer import ReplayBuffer


class Partition(NamedTuple):
    """One round's division of the work.

    Without a buffer, device and server take every step together: activations go up batch by batch, and both parts train. With one, the
    front does not train: a device sends the activations of all its data at once, and the server trains on what it holds.

    Args:
        cut: the two parts.
        codec: how activations travel.
        buffer: where the server keeps them.
        devices_work: whether devices send anything in this round; if not, the server trains on what the buffer holds.
        draws: passes over its data, each with augmentation of its own, of which a device sends the activations.
        joint: train one rear on the batches of all clients together, in place of one for each, averaged.
        gradients: whether the loss's gradient with respect to the activations goes down.
        on_device: the device's own head, which trains the front there; local_loss: (activations, labels) → scalar, its loss.
        labels: whether labels are sent; None: where a batch has one view.
    """

    cut: Cut
    codec: ActivationCodec
    buffer: ReplayBuffer | None = None
    devices_work: bool = True
    draws: int = 1
    joint: bool = False
    gradients: bool = False
    on_device: tuple[str, nn.Module] | None = None
    local_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    labels: bool | None = None
