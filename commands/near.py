"""What a person may have meant, where a configuration names an option, an argument or a class that is not there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from typing import Any, get_args

from jsonargparse import ArgumentParser, Namespace

from featherlight import callbacks, fed_loop, plugins, ssl_models
from featherlight.callbacks.host import refusal
from featherlight.commands.innermost import innermost
from featherlight.plugins import Plugin

LISTS = ("plugins", "probes", "loggers", "trainer.callbacks", "trainer.logger", "trainer.plugins")
"""Options whose value is a list of classes with arguments; a command has some of them."""

OPTION = re.compile(r"unrecognized arguments: (--[\w.]+)")
IN_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '(\w+)'")
AT_TOP = re.compile(r"Option '([\w.]+)' is not accepted")
OF_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
NEEDED = re.compile(r"Problem with given class_path '([\w.]+)':\s+the following arguments are required: ([\w., ]+)")
NO_CLASS = re.compile(r"(?:([\w.]+): )?(\w+) is not a class that is known here")


def told(text: str, parser: ArgumentParser) -> str:
    """What jsonargparse says, in one line, and where a name is unknown the one that is most like it."""
    line = innermost(text)
    options = [*parser._option_string_actions]
    if found := NEEDED.search(text):
        return _how_to_give(line, *found.groups())
    if found := OF_CLASS.search(text):
        return line + near(found[2], arguments_of(found[1]))
    if found := OPTION.match(text):
        return line + near(found[1], options)
    if found := IN_GROUP.fullmatch(text):
        return line + near(found[2], [name.removeprefix(f"--{found[1]}.") for name in options if name.startswith(f"--{found[1]}.")])
    if found := AT_TOP.fullmatch(line):
        return line + near(found[1], [name.removeprefix("--") for name in options])
    if found := NO_CLASS.match(line):
        return _of_another_kind(found[1] or "", found[2]) or line.replace(
            found[0], found[0] + near(found[2], _names(parser, found[1] or "")), 1
        )
    return line


def near(name: str, names: Iterable[str]) -> str:
    """`` (is it …?)``, or nothing where none is like ``name``."""
    found = get_close_matches(name, [*names], 1)
    return f" (is it {found[0]}?)" if found else ""


def arguments_of(class_path: str) -> list[str]:
    """What jsonargparse knows that a class takes; nothing where it cannot say."""
    parser = ArgumentParser(exit_on_error=False)
    return [added.removeprefix("it.") for added in parser.add_class_arguments(_imported(class_path), "it")]


def to_blame(error: Exception, config: Namespace, paths: Iterable[str] = (*LISTS, "data", "model")) -> str:
    """What ``error`` says, behind the option whose class, made alone, says the same: ``trainer.callbacks.DepthDropout.rate=2.0 is …``."""
    for path in paths:
        value = config.get(path)
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, Namespace) or "class_path" not in item:
                continue
            kind, parser = _imported(item.class_path), ArgumentParser(exit_on_error=False)
            parser.add_subclass_arguments(kind, "it")
            try:
                parser.instantiate_classes(Namespace(it=item))
            except Exception as alone:
                said = innermost(str(alone))
                if said not in innermost(str(error)):
                    continue
                name = said.partition("=")[0]
                place = f"{path}.{kind.__name__}" if isinstance(value, list) else path
                return f"{place}.{said}" if name in arguments_of(item.class_path) else f"{place}: {said}"
    return innermost(str(error))


def _how_to_give(line: str, class_path: str, needed: str) -> str:
    """A class was named without what it needs."""
    path, _, _ = line.partition(": ")
    name = class_path.rpartition(".")[2]
    options = " ".join(f"--{path}.{f'{name}.' * (path in LISTS)}{argument}=VALUE" for argument in needed.split(", "))
    return f"{path}: {name} needs {needed}; give it with {options}"


def _of_another_kind(path: str, name: str) -> str | None:
    """A class of ours that stands where it does not belong."""
    kind = getattr(plugins, name, None)
    if path == "trainer.callbacks" and isinstance(kind, type) and issubclass(kind, Plugin):
        reason = (
            refusal(kind)
            or f"{name} is a plugin without a callback of its own: --{path}+=PluginCallback --{path}.PluginCallback.plugin={name}"
        )
        return f"{path}: {reason}"
    if path == "plugins" and hasattr(callbacks, name):
        return f"{path}: {name} is a callback, for trainer.callbacks of featherlight fit, not a plugin of a federation"
    return None


def _names(parser: ArgumentParser, path: str) -> list[str]:
    """The classes that an option takes; for what is within a class all of ours."""
    action = parser._option_string_actions.get(f"--{path}")
    kinds = [kind for hint in [getattr(action, "_typehint", None)] for kind in _classes(hint)]
    if kinds:
        return sorted({name for kind in kinds for name in _below(kind)})
    return sorted({name for package in (plugins, callbacks, ssl_models, fed_loop) for name in package.__all__ if name[0].isupper()})


def _classes(hint: Any) -> Iterator[type]:
    """Those that a type is made of: of ``list[Plugin] | None``, Plugin."""
    if inner := get_args(hint):
        for one in inner:
            yield from _classes(one)
    elif isinstance(hint, type) and hint.__module__ != "builtins":
        yield hint


def _below(kind: type) -> set[str]:
    """Names of the classes, known so far, that derive from ``kind``."""
    own = {kind.__name__} - {"Plugin"}
    return {name for name in own if not name.startswith("_")}.union(*map(_below, kind.__subclasses__()))


def _imported(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(import_module(module), name)
