"""Plugins under a Lightning Trainer: one host for all of them, which names none.

Every method's callback is a :class:`PluginCallback` around one plugin. The first of them in ``trainer.callbacks`` leads: it gathers the
plugins of all into one chain, in list order, and drives it through training. The others stay passive.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from featherlight.callbacks import parallel, saved
from featherlight.callbacks.draws import Draws
from featherlight.callbacks.epoch_counts import count_epoch
from featherlight.plugins import Chain, Clock, Plugin, Visit, optimizer_state
from featherlight.plugins.base import overrides
from featherlight.plugins.present import count, held

_IN_TRAINING = ("advance", "before_forward", "extra_loss", "after_backward", "after_update", "after_step")


class PluginCallback(pl.Callback):
    """Train with one plugin; several of these compose in list order.

    A period is an epoch, a step is a batch (a micro-batch under gradient accumulation), and the epoch is one visit of client 0.
    The plugin is attached after ``configure_model`` and before ``configure_optimizers``, so that optimizers see every parameter, and
    detached when training ends, by success or by exception: the module has its whole depth again then, blocks included that training
    did not reach (a fit that ends so warns). A plugin's ``after_backward`` comes before each optimizer step, when accumulated
    gradients are complete and unscaled, its ``after_update`` at the end of the optimizer's own ``step``.
    A checkpoint is evaluated (``trainer.test(ckpt_path=…)``) at the stage in which it was written; its ``state_dict`` has the module's own
    keys and no others.

    Args:
        plugin: the method.
        seed: of all the method's draws; by default the one of ``seed_everything``, or 0.

    Raises:
        TypeError: a plugin that changes nothing but what travels, or happens on the server, in a federation; one that needs its clients'
            memory.
        MisconfigurationException: (on fit) a strategy other than one device or DDP, a plugin that adds to the loss under manual
            optimization, two callbacks with different seeds, Lightning's weight averaging beside a plugin that adds parameters.
        ValueError: (on fit) a parameter that should train is in no optimizer; a checkpoint of a run with other arguments.
    """

    def __init__(self, plugin: Plugin, seed: int | None = None) -> None:
        if reason := refusal(type(plugin)):
            raise TypeError(reason)
        self.plugin = plugin
        self.seed = seed
        self._chain: Chain | None = None  # the leader's, while attached
        self._reached: int | None = None  # the last epoch that was begun, in this process or in the one that is resumed
        self._clock: Clock | None = None  # of the step under way
        self._undo: list[Callable[[], None]] = []
        self._brought = saved.Brought()
        self._draws = Draws()

    # -- from an ordinary module to an attached one, and back -----------------------------------------------------
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if leader(trainer) is not self:
            return
        if stage == "fit":
            self._reached = None
            parallel.refuse_untested(trainer.strategy)
        chain = Chain(callback.plugin for callback in _members(trainer))
        common_seed(trainer)

        def attach() -> None:
            own = set(pl_module.state_dict())
            chain.attach(pl_module)
            self._chain = chain
            self._undo.append(self._brought.follow(pl_module, own))
            if stage == "fit":
                parallel.refuse_averaging(trainer, set(dict(pl_module.named_parameters())) - own)
            if stage == "fit" and any(overrides(plugin, "extra_loss") for plugin in chain.plugins):
                self._undo.append(_add_to_loss(pl_module, chain))
            if stage == "fit":
                self._undo.append(_after_configure_optimizers(pl_module, optimizer_state.hand_over_decay))

        self._undo.append(_after_configure_model(pl_module, attach))

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._chain is not None and self._reached is not None:
            _warn_of_untrained(self._chain, pl_module, self._reached)
        self._detach(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._detach(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._detach(pl_module)

    def _detach(self, pl_module: pl.LightningModule) -> None:
        self._end_step()
        while self._undo:
            self._undo.pop()()
        if self._chain is not None:
            parallel.forget(pl_module)
            self._chain.detach()
        self._chain = None

    # -- periods --------------------------------------------------------------------------------------------------
    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._follow_steps(trainer)
        if trainer.max_epochs in (None, -1) or trainer.current_epoch < trainer.max_epochs:  # a run resumed at its end begins nothing
            if self._chain is not None:
                self._chain.check(_epochs(trainer, self._chain), trainer.current_epoch)
            self._begin(trainer, pl_module)  # here, too: a run resumed within an epoch gets no on_train_epoch_start
        self._draws.run_starts(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._reached != trainer.current_epoch:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._chain is None:
            return
        period, done = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current
        # an epoch that was begun before must not begin again: a stage's first step makes its weights
        step = max(1, done.processed) if self._reached == period else 0  # type: ignore[attr-defined]
        change = self._chain.advance(Clock(period, step))
        if change:
            torch.compiler.reset()  # a stage compiles anew; the compiler keeps 8 versions of a function and then goes on in eager mode
        optimizer_state.release(trainer.optimizers, change)
        optimizer_state.check_covered(pl_module, trainer.optimizers)
        visit = Visit(period, 0, common_seed(trainer))
        self._chain.visit(visit)
        if not step:
            self._chain.receive(visit)
        parallel.rewrap(trainer.strategy, pl_module)
        self._reached = period

    # -- steps ----------------------------------------------------------------------------------------------------
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._chain is None:
            return
        count_epoch(trainer)
        self._draws.batch_starts(batch_idx)
        self._clock = Clock(trainer.current_epoch, batch_idx)
        self._chain.before_forward(self._clock)
        parallel.check_all_used(trainer.strategy, pl_module)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        if self._chain is not None and self._clock is not None:  # after accumulation and unscaling, before clipping
            self._chain.after_backward(self._clock)
            optimizer_state.decay(optimizer)

    def _follow_steps(self, trainer: pl.Trainer) -> None:
        """Let plugins have their say within each optimizer's step: whatever moves after it sees where parameters have come to rest."""

        def updated(*_: Any) -> None:
            if self._chain is not None and self._clock is not None:
                self._chain.after_update(self._clock)

        if self._chain is not None:
            self._undo += [optimizer.register_step_post_hook(updated).remove for optimizer in trainer.optimizers]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._end_step()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end_step()  # a module that skips the rest of an epoch gets no on_train_batch_end

    def _end_step(self) -> None:
        if self._chain is not None and self._clock is not None:
            self._chain.after_step(self._clock)
        self._clock = None

    # -- checkpoints ----------------------------------------------------------------------------------------------
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if leader(trainer) is self:
            checkpoint[saved.KEY] = {
                "plugins": saved.describe(_members(trainer)),
                "seed": common_seed(trainer),
                "epoch": self._reached,
                "brought": self._brought.take(pl_module),
                "state": Chain(callback.plugin for callback in _members(trainer)).state_dict(),
                "draws": self._draws.state_dict(),
            }

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._chain is None:
            return
        entry = saved.check_same(checkpoint.get(saved.KEY), _members(trainer), common_seed(trainer))
        self._brought.put_back(pl_module, entry["brought"])
        self._chain.load_state_dict(entry.get("state", {}))  # checkpoints of earlier versions have none
        self._draws.load_state_dict(entry.get("draws", {}) if trainer.state.fn == "fit" else {})
        self._reached = entry["epoch"]
        if trainer.state.fn != "fit" and self._reached is not None:  # a checkpoint is evaluated as far as it has grown
            self._chain.advance(Clock(self._reached, 1))


def refusal(plugin: type[Plugin]) -> str | None:
    """Why a Trainer has no use for plugins of this class; None where it has."""
    if overrides(plugin, "calibration"):
        return (
            f"{plugin.__name__} trains on the server of a federation, and under a Trainer there is none: give it to "
            "fed_loop.Federation, or leave it out"
        )
    if overrides(plugin, "encode") and not any(overrides(plugin, verb) for verb in _IN_TRAINING):
        return (
            f"{plugin.__name__} changes what clients and server of a federation send each other, and under a Trainer nothing "
            "travels: give it to fed_loop.Federation, or leave it out"
        )
    if overrides(plugin, "remember"):
        return (
            f"{plugin.__name__} needs what a federation's clients remember from one of their turns to the next, which a Trainer "
            "has not: give it to fed_loop.Federation, or leave it out"
        )
    return None


def leader(trainer: pl.Trainer) -> PluginCallback | None:
    """The callback that drives the plugins of all, or None where there is no plugin."""
    return next(iter(_members(trainer)), None)


def stage_of(trainer: pl.Trainer, epoch: int) -> int:
    """The stage, counted from 0, that ``epoch`` belongs to."""
    leading = leader(trainer)
    return 0 if leading is None or leading._chain is None else leading._chain.stage(epoch)


def copies_of(trainer: pl.Trainer) -> list[Tensor]:
    """Weights that plugins keep beside the model."""
    leading = leader(trainer)
    return [] if leading is None or leading._chain is None else list(leading._chain.copies())


def common_seed(trainer: pl.Trainer) -> int:
    """The seed of all plugins' draws: what a callback says, else what ``seed_everything`` set, else 0."""
    given = {callback.seed for callback in _members(trainer) if callback.seed is not None}
    if len(given) > 1:
        named = ", ".join(map(str, sorted(given)))
        raise MisconfigurationException(f"the callbacks have the seeds {named}, but a run has one: give it to one of them")
    return given.pop() if given else int(os.environ.get("PL_GLOBAL_SEED", 0))


def _epochs(trainer: pl.Trainer, chain: Chain) -> int:
    """How many epochs training may take, as far as they differ."""
    epochs = chain.last_stage()[1] + 1
    if trainer.max_epochs not in (None, -1):
        epochs = min(epochs, trainer.max_epochs)
    if trainer.max_steps != -1 and math.isfinite(trainer.num_training_batches):
        steps = max(1, math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches))
        epochs = min(epochs, math.ceil(trainer.max_steps / steps))
    return max(epochs, trainer.current_epoch + 1)


def _warn_of_untrained(chain: Chain, pl_module: pl.LightningModule, reached: int) -> None:
    """Say so where a later stage would have brought what training did not reach: the module is about to have it all the same."""
    now, (last, begins) = chain.stage(reached), chain.last_stage()
    if now == last:
        return
    chain.advance(Clock(reached, 1))
    trained = held(pl_module).keys()
    chain.advance(Clock(begins, 1))
    untrained = count({name: value for name, value in held(pl_module).items() if name not in trained})
    if untrained:
        rank_zero_warn(
            f"training ended in stage {now + 1} of {last + 1}, so that {untrained} parameters were never trained, and the module has "
            f"them from now on: set max_epochs above {begins}, where the last stage begins, or evaluate a checkpoint of this run at "
            "its own stage, as trainer.test(ckpt_path=...) with the same callbacks does",
            category=UserWarning,
        )


def _members(trainer: pl.Trainer) -> list[PluginCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, PluginCallback)]  # type: ignore[attr-defined]


def _after_configure_model(pl_module: pl.LightningModule, act: Callable[[], None]) -> Callable[[], None]:
    """Call ``act`` when ``configure_model`` has run: all layers are there then, and neither weights nor optimizers have been loaded.

    Returns the way back, for a run that does not get there.
    """
    configure = pl_module.configure_model

    def configure_model() -> None:
        undo()
        configure()
        act()

    def undo() -> None:
        vars(pl_module).pop("configure_model", None)

    pl_module.configure_model = configure_model  # type: ignore[method-assign]
    return undo


def _after_configure_optimizers(pl_module: pl.LightningModule, act: Callable[[Any], None]) -> Callable[[], None]:
    """Show ``act`` what ``configure_optimizers`` makes before anything else sees it; returns the way back."""
    own = pl_module.configure_optimizers

    @functools.wraps(own)
    def configure_optimizers() -> Any:
        configured = own()
        act(configured)
        return configured

    def undo() -> None:
        vars(pl_module).pop("configure_optimizers", None)

    pl_module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
    return undo


def _add_to_loss(pl_module: pl.LightningModule, chain: Chain) -> Callable[[], None]:
    """Make ``training_step`` return the module's loss plus the plugins', inside what DDP and autocast wrap; returns the way back."""
    if not pl_module.automatic_optimization:
        names = ", ".join(type(plugin).__name__ for plugin in chain.plugins if overrides(plugin, "extra_loss"))
        raise MisconfigurationException(f"{names} adds to the loss, which needs automatic optimization; this module optimizes manually")
    own, replaced = pl_module.training_step, pl_module.__dict__.get("training_step")

    @functools.wraps(own)
    def training_step(batch: Any, *args: Any, **kwargs: Any) -> Any:
        out: Any = own(batch, *args, **kwargs)
        extra = None if out is None else chain.extra_loss(pl_module, batch)
        if extra is None:
            return out
        return {**out, "loss": out["loss"] + extra} if isinstance(out, Mapping) else out + extra

    def undo() -> None:
        del pl_module.training_step
        if replaced is not None:  # a compiled module's
            pl_module.training_step = replaced  # type: ignore[method-assign]

    pl_module.training_step = training_step  # type: ignore[method-assign]
    return undo


__all__ = ["PluginCallback", "common_seed", "copies_of", "leader", "stage_of"]
