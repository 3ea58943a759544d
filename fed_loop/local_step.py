"""One optimizer step of a client. Training and prediction take this same step, so that what is predicted is what is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.fabric.plugins import MixedPrecision, Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from featherlight.plugins import SERVER, Chain, Clock
from featherlight.plugins.optimizer_state import decay, has_own_decay
from featherlight.plugins.step_cost import StepCost, StepMeter


def as_weights(batch: Any, precision: Precision) -> Any:
    """``batch`` in the precision of the weights; mixed precision leaves it as it is and casts where it computes, as under a Trainer."""
    return batch if isinstance(precision, MixedPrecision) else precision.convert_input(batch)


@contextmanager
def refusal_told(module: nn.Module, client: int, samples: int) -> Iterator[None]:
    """Around a step: where a model refuses a batch of one sample (batch norm finds no variance in it), say whose it is and what to do.

    Raises:
        ValueError: the model's own, in one line.
    """
    try:
        yield
    except ValueError as error:
        if samples != 1:
            raise
        whose = "the server" if client == SERVER else f"client {client}"
        raise ValueError(
            f"{whose} has a batch of a single sample, which {type(module).__name__} cannot train on ({error}): "
            "leave such batches out (drop_last=True), or choose another batch_size"
        ) from error


def take_step(optimizer: Optimizer) -> None:
    """An optimizer's step, without a loss scaler."""
    optimizer.step()


class LocalStep:
    """Forward, backward, update. The model and its optimizer are arguments of the step, not of this object: they may differ by client.

    Args:
        chain: the plugins.
        precision: what the forward pass is computed in.
        backward: fills gradients from a loss; the place for a loss scaler.
        clip: largest norm of all gradients together; no limit if left out.
        update: takes the optimizer's step; the loss scaler's other place.
    """

    def __init__(
        self,
        chain: Chain,
        precision: Precision,
        backward: Callable[[Tensor], None] = Tensor.backward,
        clip: float | None = None,
        update: Callable[[Optimizer], object] = take_step,
    ) -> None:
        self._chain, self._precision, self._backward, self._clip, self._update = chain, precision, backward, clip, update

    def __call__(self, module: nn.Module, optimizer: Optimizer, batch: Any, clock: Clock, meter: StepMeter | None = None) -> Tensor:
        """Take one step on ``module``.

        Args:
            module: a LightningModule; only its ``training_step`` and, if it has one, ``after_optimizer_step`` are called.
            optimizer: of its parameters, itself and not a wrapper.
            batch: as ``training_step`` takes it, on the model's device.
            meter: already entered; told where the forward pass ends.

        Returns:
            The loss, a detached scalar.
        """
        self._chain.before_forward(clock)
        with self._precision.forward_context():
            batch = as_weights(batch, self._precision)
            out = module.training_step(batch, clock.step)  # type: ignore[operator]
            loss = out["loss"] if isinstance(out, Mapping) else out
            extra = self._chain.extra_loss(module, batch)
            if extra is not None:
                loss = loss + extra
        if meter is not None:
            meter.forward_is_done()
        optimizer.zero_grad()
        self._backward(loss)
        if self._clip is not None or self._chain.sees_gradients or has_own_decay(optimizer):
            self._precision.unscale_gradients(optimizer)  # whoever looks at gradients wants them without a loss scaler's factor
        self._chain.after_backward(clock)
        decay(optimizer)
        if self._clip is not None:
            nn.utils.clip_grad_norm_([value for group in optimizer.param_groups for value in group["params"]], self._clip)
        self._update(optimizer)
        self._chain.after_update(clock)
        hook = getattr(module, "after_optimizer_step", None)  # where our SSL modules move their targets
        if hook is not None:
            hook()
        self._chain.after_step(clock)
        return loss.detach()

    def metered(self, module: nn.Module, optimizer: Optimizer, batch: Any, clock: Clock) -> tuple[Tensor, StepCost]:
        """As calling it; returns what the step cost, too."""
        with StepMeter(module, [optimizer], batch, self._chain.copies()) as meter:
            loss = self(module, optimizer, batch, clock, meter)
        return loss, meter.cost
