"""Which strategies and callbacks plugins run beside, and what DDP must be told when a plugin freezes, thaws or leaves out."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from featherlight.plugins.bypass import is_absent, is_bypassed
from featherlight.plugins.present import held

_IGNORE = "_ddp_params_and_buffers_to_ignore"  # torch's own name; DDP reads it from the module that it wraps
_AVERAGING = tuple(  # versions of Lightning differ in which they have
    getattr(lightning_callbacks, name) for name in ("StochasticWeightAveraging", "WeightAveraging") if hasattr(lightning_callbacks, name)
)


def refuse_untested(strategy: Strategy) -> None:
    """Raise where weights are sharded or the strategy is unknown.

    Raises:
        MisconfigurationException: names the strategy and those allowed.
    """
    known = isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if not known:
        raise MisconfigurationException(
            f"featherlight's plugins do not run under {type(strategy).__name__}, which shards or moves what they freeze and leave out; "
            "use one device or strategy='ddp'"
        )


def refuse_averaging(trainer: pl.Trainer, added: set[str]) -> None:
    """Raise where Lightning averages weights parameter by parameter and plugins have ``added`` parameters that it does not know.

    Raises:
        MisconfigurationException: names the callback and says how weights can be averaged.
    """
    for callback in trainer.callbacks if added else ():  # type: ignore[attr-defined]
        if isinstance(callback, _AVERAGING):
            raise MisconfigurationException(
                f"{type(callback).__name__} averages a module parameter by parameter, and plugins add {len(added)} parameters while it "
                f'trains ("{min(added)}", ...): leave it out, and average the state_dict of the epochs\' checkpoints, which are whole'
            )


def rewrap(strategy: Strategy, module: pl.LightningModule) -> None:
    """Wrap ``module`` anew where what trains is not what DDP was made for: else a thaw diverges silently and a freeze crashes."""
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return
    present = held(module)
    resting = {name for name, value in module.named_parameters() if name not in present or not value.requires_grad}
    resting |= {
        f"{path}.{name}".lstrip(".")
        for path, owner in module.named_modules()
        for name in owner._buffers
        if name not in owner._non_persistent_buffers_set and f"{path}.{name}".lstrip(".") not in present
    }
    if resting == getattr(module, _IGNORE, set()):
        return
    setattr(module, _IGNORE, resting)
    strategy.model = module
    strategy.configure_ddp()


def forget(module: nn.Module) -> None:
    """Take away what :func:`rewrap` left on ``module``."""
    module.__dict__.pop(_IGNORE, None)


def check_all_used(strategy: Strategy, module: nn.Module) -> None:
    """Raise where a step leaves out parameters from which DDP waits for gradients; it would hang or fail in a later step.

    Raises:
        MisconfigurationException: names the block and the two ways out.
    """
    wrapped = strategy.model
    if not isinstance(wrapped, DistributedDataParallel) or wrapped.find_unused_parameters:
        return
    for path, block in module.named_modules():
        if not is_bypassed(block) or is_absent(block):
            continue
        if any(parameter.requires_grad for parameter in block.parameters()):
            raise MisconfigurationException(
                f'this step leaves out block "{path}", which trains, and DDP waits for its gradients: let plugins choose what is left out '
                "once an epoch rather than in every batch, or use strategy='ddp_find_unused_parameters_true'"
            )
