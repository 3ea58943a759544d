"""A Trainer's checkpoint before Lightning opens it: whole, tensors and plain data alone, and of the run that goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.plugins.io import TorchCheckpointIO

from featherlight.fed_loop.checkpoint import read_plain
from featherlight.fed_loop.whole_files import as_before, write_whole

FREE = frozenset({"data.init_args.root", "data.init_args.download", "data.init_args.num_workers", "data.init_args.in_memory_bytes"})
"""Settings that say where data lie and how they are read, not what is trained."""


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
            raise OSError(f"cannot write checkpoint {final} ({error}){as_before(final)}") from error


def check_readable(path: Path) -> None:
    """Load ``path`` once, without running any code that it may hold.

    Raises:
        ValueError: the file is missing, damaged, or holds something else than a Trainer's checkpoint.
    """
    content = read_plain(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{path} is not a Trainer's checkpoint: it has no state_dict")


def check_same_run(saved: Path, now: str) -> None:
    """Refuse to go on with another model or other data than the run's saved configuration names.

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
                f"{saved.parent} is of another run: {name} was {before.get(name)}, now {after.get(name)}; "
                "use the same model and data, or start anew without --resume"
            )


def _settings(text: str) -> dict[str, Any]:
    """Model and data of a configuration, flat: ``{"model.init_args.lr": 0.1, …}``."""
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

    for section in ("model", "data"):
        visit(section, content.get(section) if isinstance(content, dict) else None)
    return flat
