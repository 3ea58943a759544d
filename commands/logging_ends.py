"""A logger's own run ends with ours, so that another run in the same process begins another; W&B without a key is offline."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, WandbLogger

KEYS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")


@contextmanager
def ended(loggers: Sequence[Logger]) -> Iterator[None]:
    """While entered, ``loggers`` may log; afterwards what they have begun is over, for better or worse.

    ``WandbLogger`` goes on with whatever run the process has begun before, so several runs compared would be drawn as one.
    """
    code = 1
    offline = offline_without_key(loggers)
    try:
        yield
        code = 0
    finally:
        if offline:
            del os.environ["WANDB_MODE"]
        if any(isinstance(logger, WandbLogger) for logger in loggers):
            import wandb

            wandb.finish(exit_code=code)


def check_installed(loggers: Any) -> None:
    """What is said of a configured logger, or a list of them, before it is built.

    Raises:
        ValueError: W&B is wanted and not installed.
    """
    from lightning.pytorch.loggers.wandb import _WANDB_AVAILABLE

    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if str(getattr(logger, "class_path", "")).endswith(".WandbLogger") and not _WANDB_AVAILABLE:
            raise ValueError("WandbLogger needs wandb, which is not installed: pip install 'featherlight[wandb]', or leave the logger out")


def offline_without_key(loggers: Sequence[Logger]) -> bool:
    """Where W&B would ask for a key that nobody has given: ``WANDB_MODE=offline``, and one line that says so.

    Returns:
        Whether it was set here.
    """
    wanted = [logger for logger in loggers if isinstance(logger, WandbLogger) and not logger._offline]
    chosen = os.environ.get("WANDB_MODE") or any(logger._wandb_init.get("mode") for logger in wanted)
    if not wanted or chosen or has_key():
        return False
    os.environ["WANDB_MODE"] = "offline"
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        kept = Path(wanted[0].save_dir or ".") / "wandb" / "offline-run-*"
        print(f"no W&B key is set, so this run is logged offline; to upload it: wandb login, then wandb sync {kept}", file=sys.stderr)
    return True


def has_key() -> bool:
    """Whether W&B would find a key: in the environment, or for its host in ``~/.netrc``."""
    if any(os.environ.get(name) for name in KEYS):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    files = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path("~/.netrc"), Path("~/_netrc")]
    for path in files:
        try:
            if netrc(path.expanduser()).hosts.get(host):
                return True
        except (OSError, NetrcParseError):
            continue
    return False
