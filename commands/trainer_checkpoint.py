"""A Trainer's checkpoint before Lightning opens it: whole, tensors and plain data alone, and of the run that goes on from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.plugins.io import TorchCheckpointIO

from featherlight.fed_loop.checkpoint import read_plain
from featherlight.fed_loop.same_run import shortened
from featherlight.fed_loop.whole_files import write_whole

FREE = frozenset({"data.init_args.root", "data.init_args.download", "data.init_args.num_workers", "data.init_args.in_memory_bytes"})
"""Settings that say where data lie and how they are read, not what is trained."""

PRECISIONS = {"32-true": (None, 32, "32"), "64-true": (64, "64"), "16-mixed": (16, "16"), "bf16-mixed": ("bf16",)}

STEP: dict[str, dict[Any, Any]] = {
    "accumulate_grad_batches": {},
    "gradient_clip_algorithm": {None: "norm"},
    "gradient_clip_val": {None: 0},
    "precision": {name: word for word, names in PRECISIONS.items() for name in names},
    "sync_batchnorm": {},
}
"""Settings of a Trainer that say how a step is made, with other words for the same; all others may change."""


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside the one it replaces, flushes it to disk, then renames: a full disk or a kill leaves the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """As Lightning's own, in place of writing over ``path``.

        Raises:
            OSError: the disk is full or cannot be written; ``path`` is as it was.
        """
        final = Path(path)
        try:
            write_whole(final, lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            left = next((path for path in existing(final.parent) if _steps(path) < math.inf), None)
            good = f"the last good checkpoint is {left}" if left else "there is no earlier checkpoint"
            raise OSError(f"cannot write checkpoint {final} ({error}); {good}") from error


def existing(folder: Path) -> list[Path]:
    """Checkpoints in ``folder``, the one after most steps first; of several, the one written last. Damaged ones come before all."""
    return sorted(folder.glob("*.ckpt"), key=lambda path: (_steps(path), path.stat().st_mtime_ns), reverse=True)


def read_newest(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint that can be read, if there is any at all, and those before it that cannot, with why.

    Raises:
        ValueError: there are checkpoints, and none of them can be read.
    """
    damaged: dict[Path, str] = {}
    for path in existing(folder):
        try:
            check_readable(path)
        except ValueError as error:
            damaged[path] = str(error)
        else:
            return path, damaged
    if damaged:
        raise ValueError("; ".join(damaged.values()))
    return None, {}


def _steps(path: Path) -> float:
    """Optimizer steps that a checkpoint is after, read without its tensors; infinity where it cannot be read."""
    try:
        return float(torch.load(path, map_location="meta", mmap=True, weights_only=True)["global_step"])
    except Exception:  # whatever damaged bytes make of an unpickler
        return math.inf


def check_readable(path: Path) -> None:
    """Load ``path`` once, without running any code that it may hold.

    Raises:
        ValueError: the file is missing, damaged, or holds something else than a Trainer's checkpoint.
    """
    content = read_plain(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is not a Trainer's checkpoint: it has no state_dict")


def check_same_run(saved: Path, now: str) -> None:
    """Refuse to go on with another model, other data or other steps than the run's saved configuration names.

    Args:
        saved: the run's ``config.yaml``; a run without one is let pass.
        now: today's configuration, as YAML.

    Raises:
        ValueError: names the first setting that differs, with both values.
    """
    if not saved.exists():
        return
    before, after = _settings(saved.read_text()), _settings(now)
    for name in sorted((before.keys() | after.keys()) - FREE):
        if before.get(name) != after.get(name):
            raise ValueError(
                f"{saved.parent} is of another run: {name} was {shortened(before.get(name))}, now {shortened(after.get(name))}; "
                "use the same, or start anew without --resume"
            )


def _settings(text: str) -> dict[str, Any]:
    """Model, data and steps of a configuration, flat: ``{"model.init_args.lr": 0.1, …}``."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the run's config.yaml is not YAML: {error}") from error
    flat: dict[str, Any] = {}

    def visit(name: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key in value:
                visit(f"{name}.{key}", value[key])
        else:
            flat[name] = value

    content = content if isinstance(content, dict) else {}
    for section in ("model", "data"):
        visit(section, content.get(section))
    trainer = content.get("trainer") or {}
    return flat | {f"trainer.{name}": same.get(trainer.get(name), trainer.get(name)) for name, same in STEP.items()}
