"""What plugins add to a checkpoint: who they are, and the weights that they brought along.

The checkpoint's ``state_dict`` keeps exactly the module's own keys, so that ``load_from_checkpoint`` works without plugins.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

KEY = "featherlight"


class Brought:
    """The entries of ``state_dict`` that are there only while plugins are attached, and that nobody else is shown, so that whatever
    saves the module's state saves an ordinary one.

    Those of modules that plugins added are weights of their own: they wait for the next time that the same module is trained or evaluated.
    Those that plugins added to the module's own layers say what those layers' weights are, and end when plugins are detached: from then
    on the weights are the module's, whatever it loads.
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._apart: set[str] = set()  # of them, those of added modules
        self._kept: dict[str, Tensor] = {}
        self._kept_of: weakref.ref[nn.Module] | None = None
        self._showing = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept_of": None, "_kept": {}}  # a copy in another process has another module

    def follow(self, module: nn.Module, own: set[str]) -> Callable[[], None]:
        """Look after all entries of ``module`` but its ``own``; returns what to call before they go."""
        self._names = set(module.state_dict()) - own
        layers = {name.rpartition(".")[0] for name in own}
        self._apart = {name for name in self._names if name.rpartition(".")[0] not in layers}
        if self._kept_of is None or self._kept_of() is not module:
            self._kept = {}
        self.put_back(module, self._kept)

        def hide(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
            if not self._showing:
                for name in self._names:
                    state.pop(prefix + name, None)

        def fill_in(loading: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
            current = self._all(loading)
            for name in self._apart:
                state.setdefault(prefix + name, current[name])

        handle, hider = module.register_load_state_dict_pre_hook(fill_in), module.register_state_dict_post_hook(hide)

        def undo() -> None:
            handle.remove()
            hider.remove()
            self._kept = {name: value.detach().clone() for name, value in module.state_dict().items() if name in self._apart}
            self._kept_of = weakref.ref(module)

        return undo

    def take(self, module: nn.Module) -> dict[str, Tensor]:
        """The entries of ``module``; once detached, those of added modules, as they were then."""
        current = self._all(module)
        there = sorted(name for name in self._names if name in current or name in self._kept)
        return {name: current[name] if name in current else self._kept[name] for name in there}

    def put_back(self, module: nn.Module, entries: dict[str, Tensor]) -> None:
        """Copy ``entries`` into ``module``."""
        current = self._all(module)
        with torch.no_grad():
            for name in self._names & entries.keys():
                current[name].copy_(entries[name])

    def _all(self, module: nn.Module) -> dict[str, Tensor]:
        """The state of ``module``, these entries among it."""
        self._showing = True
        try:
            return module.state_dict()
        finally:
            self._showing = False


def describe(callbacks: Iterable[Any]) -> list[dict[str, Any]]:
    """Every plugin's arguments as plain data, in order."""
    described = [{"plugin": type(callback.plugin).__name__, **callback.plugin.describe()} for callback in callbacks]
    return json.loads(json.dumps(described, default=repr))  # tuples become lists, as a YAML file has them


def check_same(entry: dict[str, Any] | None, callbacks: Iterable[Any], seed: int) -> dict[str, Any]:
    """Give ``entry`` back where it comes from a run with the same plugins and arguments.

    Raises:
        ValueError: says which argument differs, and how.
    """
    now = describe(callbacks)
    then = entry["plugins"] if entry else []
    names_then, names_now = ([plugin["plugin"] for plugin in run] for run in (then, now))
    if entry is None or names_then != names_now:
        raise ValueError(
            f"the checkpoint was made with {', '.join(names_then) or 'no plugins'}, this run has {', '.join(names_now)}: "
            "give the same callbacks in the same order"
        )
    for old, new in zip([*then, {"plugin": "the run", "seed": entry["seed"]}], [*now, {"plugin": "the run", "seed": seed}]):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                raise ValueError(
                    f"the checkpoint was made with {name}={old.get(name)!r} of {new['plugin']}, this run has {new.get(name)!r}: "
                    "resume with the same arguments, or start anew"
                )
    return entry
