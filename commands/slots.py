"""Named slots: an argument of one item of a list, by the item's class: ``--plugins.LayerFreezing.blocks_per_stage 2``.

jsonargparse knows such a list as a whole, and its last item. An option that names a class is therefore put in other words here, in which
jsonargparse reads it as any other: the list as it was configured, item by item, each followed by what is said of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from featherlight.commands.near import LISTS, NEEDED, arguments_of, near, told

OPTION = re.compile(r"--(?P<path>[a-z_][\w.]*)\.(?P<kind>[A-Z]\w*)(?:\.(?P<name>\w[\w.]*\+?))?$")
SHOWN = 170
"""Most characters of a message's list of names."""

HELP = (
    "An argument of an item of a list is overridden by the item's class: --LIST.CLASS.ARGUMENT VALUE, such as {example}; "
    "--LIST+=CLASS adds an item."
)


class Slot(NamedTuple):
    """``--PATH.KIND.NAME=VALUE``; a ``+`` at the end of the name appends."""

    path: str
    kind: str
    name: str
    value: str

    @property
    def option(self) -> str:
        return f"--{self.path}.{self.kind}.{self.name}".rstrip("+.")


def split(arguments: Sequence[str]) -> tuple[list[str], list[Slot]]:
    """``arguments`` without the options that name a class of a list, and these.

    Raises:
        ValueError: one of them names no argument, or has no value.

    Example:
        >>> split(["--federation.rounds", "3", "--probes.KNN.k", "5"])
        (['--federation.rounds', '3'], [Slot(path='probes', kind='KNN', name='k', value='5')])
    """
    rest: list[str] = []
    slots: list[Slot] = []
    words = iter(arguments)
    for word in words:
        option, given, value = word.partition("=")
        if not (found := OPTION.match(option)):
            rest.append(word)
            continue
        path, kind, name = found["path"], found["kind"], (found["name"] or "").removeprefix("init_args.")
        if not name:
            raise ValueError(f"{option} names no argument: write --{path}.{kind}.ARGUMENT VALUE, or --{path}+={kind} to add one")
        value = value if given else next(words, "--")
        if not given and value.startswith("--"):
            raise ValueError(f"{option} has no value; write {option}=VALUE")
        slots.append(Slot(path, kind, name, value))
    return rest, slots


def spelled_out(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """``arguments`` as ``parser`` reads them: named slots in the words of jsonargparse, behind everything else.

    Raises:
        ValueError: no such list, class or argument, a class that stands twice, or a value that the argument does not take.
        ArgumentError: what else is wrong with ``arguments``.
    """
    rest, slots = split(arguments)
    asked = [word for word in rest if word in ("-h", "--help") or word.startswith("--print_config")]
    if not slots or any(word in ("-h", "--help") for word in asked):
        return rest
    plain = [word for word in rest if word not in asked]
    plain, configured = _whole(parser, plain, slots)
    more = [word for path in dict.fromkeys(slot.path for slot in slots) for word in _items(configured, path, slots)]
    try:
        parser.parse_args([*plain, *more])
    except ArgumentError as error:
        raise ValueError(_told(str(error), parser, slots)) from error
    return [*plain, *more, *asked]


def _whole(parser: ArgumentParser, arguments: list[str], slots: Sequence[Slot]) -> tuple[list[str], dict[str, Any]]:
    """``arguments``, classes that they add having what they must have, where ``slots`` give it; and what is configured by them."""
    while True:
        try:
            return arguments, yaml.safe_load(parser.dump(parser.parse_args(arguments), skip_none=False, skip_check=True))
        except ArgumentError as error:
            before, arguments = arguments, _with_needed(arguments, str(error), slots)
            if arguments == before:
                raise


def _with_needed(arguments: list[str], text: str, slots: Sequence[Slot]) -> list[str]:
    """``--LIST+=CLASS`` with the argument without which, as ``text`` says, there is no such class."""
    if not (found := NEEDED.search(text)):
        return arguments
    class_path, needed = found[1], found[2].split(", ")
    kind = class_path.rpartition(".")[2]
    given = {slot.name: yaml.safe_load(slot.value) for slot in slots if slot.kind == kind and slot.name in needed}
    added = re.compile(rf"(--[\w.]+\+=)([\w.]+\.)?{kind}$")
    return [
        f"{place[1]}{json.dumps({'class_path': class_path, 'init_args': given})}" if given and (place := added.match(word)) else word
        for word in arguments
    ]


def _items(configured: dict[str, Any], path: str, slots: Sequence[Slot]) -> list[str]:
    """The list at ``path``, and after each item what is said of it; where one item stands alone, that of it."""
    value = _at(configured, path, next(slot for slot in slots if slot.path == path).option)
    alone = isinstance(value, dict)
    items = [item for item in ([value] if alone else value if isinstance(value, list) else []) if isinstance(item, dict)]
    of: list[list[Slot]] = [[] for _ in items]
    for slot in (slot for slot in slots if slot.path == path):
        of[_place(items, slot)].append(slot)
    words: list[str] = []
    for number, (item, own) in enumerate(zip(items, of)):
        if not alone:
            words.append(f"--{path}+={json.dumps(item)}" if number else f"--{path}={json.dumps([item])}")
        words += [f"--{path}.init_args.{slot.name}={slot.value}" for slot in own]
    return words


def _at(configured: dict[str, Any], path: str, option: str) -> Any:
    value: Any = configured
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value or path not in LISTS:
            known = [name for name in LISTS if name.partition(".")[0] in configured]
            raise ValueError(f"{option}: {path} is no list of classes here; lists: {', '.join(known)}")
        value = value[key]
    return value


def _place(items: Sequence[dict[str, Any]], slot: Slot) -> int:
    """Which of ``items`` is meant."""
    kinds = [item["class_path"].rpartition(".")[2] for item in items]
    if (times := kinds.count(slot.kind)) > 1:
        raise ValueError(f"{slot.option}: {slot.kind} stands {times} times in {slot.path}; change its arguments in the file")
    if not times:
        there = f"it has {', '.join(kinds)}" if kinds else "it is empty"
        raise ValueError(f"{slot.option}: there is no {slot.kind} in {slot.path}; {there}. Add one with --{slot.path}+={slot.kind}")
    place = kinds.index(slot.kind)
    names, name = arguments_of(items[place]["class_path"]), slot.name.rstrip("+").partition(".")[0]
    if names and name not in names:
        raise ValueError(f"{slot.option}: {slot.kind} has no {name}{near(name, names)}; it has {_shortened(names)}")
    return place


def _shortened(names: Sequence[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rpartition(',')[0]}, …"


def _told(text: str, parser: ArgumentParser, slots: Sequence[Slot]) -> str:
    """What jsonargparse says, with the class named that it leaves out."""
    message = told(text, parser)
    for slot in slots:
        name = slot.name.rstrip("+")
        if message.startswith(f"{slot.path}.{name}") or (message.startswith(f"{slot.path}: ") and len(slots) == 1):
            return f"{slot.option}: {message.partition(': ')[2]}"
    return message
