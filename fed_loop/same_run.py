"""Whether a run is the one that a checkpoint is of: if not, which settings differ, and how."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DERIVED = {
    "entries": "its model's entries have other names or shapes",
    "clients": "its clients have other numbers of samples",
}
"""Fingerprints of no value that a person knows, and what to say where nothing but them differs."""


def check_same_run(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuse to go on from a run of another configuration.

    Args:
        path: the checkpoint; before: its settings, each as Python writes it; now: today's.

    Raises:
        ValueError: names the settings that differ, the first of them with both values.
    """
    if told := differences(before, now):
        raise ValueError(f"checkpoint {path} is of another run: {told}; use the same configuration, or another folder")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], most: int = 2) -> str:
    """Which settings differ, by their innermost names.

    Example:
        >>> differences({"model": "Net({'lr': 0.1, 'width': 8})"}, {"model": "Net({'lr': 0.2, 'width': 8})"})
        'model.lr was 0.1, now 0.2'
    """
    told: list[str] = []
    derived: list[str] = []
    for name in dict.fromkeys([*before, *now]):
        one, other = before.get(name), now.get(name)
        if one == other:
            continue
        if name in DERIVED:
            one, other = (str(value).split(" with ")[0] for value in (one, other))
            if name == "entries" or one == other:
                derived.append(DERIVED[name])
                continue
        left, right = dict(_flat(name, str(one))), dict(_flat(name, str(other)))
        inner = [key for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]
        told += [f"{key} was {shortened(left.get(key))}, now {shortened(right.get(key))}" for key in inner]
        told += [] if inner else [f"{name} was {shortened(one)}, now {shortened(other)}"]
    more = [f"and {len(told) - most} more"] if len(told) > most else []
    return ", ".join([*told[:most], *more] or derived)


def shortened(value: Any, most: int = 40) -> str:
    """A setting's value, of at most so many characters."""
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def digest(value: Any) -> str:
    """A short fingerprint of plain data."""
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()


def _flat(name: str, text: str) -> Iterator[tuple[str, str]]:
    """Settings one by one, out of ``{…}``, ``Class({…})`` and ``Class(lr=…)``; what is no expression stays as it is."""
    try:
        yield from _walk(name, ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError):
        yield name, text


def _walk(name: str, node: ast.expr) -> Iterator[tuple[str, str]]:
    match node:
        case ast.Call(func=ast.Name(id=kind), args=[ast.Dict() as inside], keywords=[]):
            yield name, kind
            yield from _walk(name, inside)
        case ast.Call(func=ast.Name(id=kind), args=[]):
            yield name, kind
            for word in node.keywords:
                yield from _walk(f"{name}.{word.arg}", word.value)
        case ast.Dict():
            for key, value in zip(node.keys, node.values, strict=True):
                part = str(key.value) if isinstance(key, ast.Constant) else ast.unparse(key) if key else "**"
                yield from _walk(f"{name}.{part}", value)
        case ast.Constant(value=str(text)) if text:
            yield from _flat(name, text)
        case _:
            yield name, ast.unparse(node)
