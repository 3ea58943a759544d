"""What jsonargparse says of a bad option, without the layers around it: the option's name, and what is wrong with it."""

from __future__ import annotations

import re

KEY = re.compile(r'Parser key "([^"]+)":$')
LAYERS = re.compile(
    r"(Does not validate against any of the Union subtypes$|Subtypes: |Errors:$|Given value|Problem with given class_path )"
)
ALTERNATIVES = (
    re.compile(r"Expected a <class 'NoneType'>"),
    re.compile(r"Expected a path but .* either not accessible or invalid"),
    re.compile(r"Not a valid subclass of \w+"),
    re.compile(r"Subclass types expect one of:$"),
    re.compile(r"a class path \(str\)$|a dict with(out)? (class_path|parameters) "),
)
"""What is said of the other things that an option might have been."""


WHOLE = (
    (
        re.compile(r"Option 'federation\..*' is not accepted"),
        "the file configures a federation: it is for featherlight federate, cost or compare",
    ),
    (re.compile(r"Option 'trainer\..*' is not accepted"), "the file configures a Trainer: it is for featherlight fit, cost or compare"),
    (re.compile(r'Parser key "config": File does not exist: \'?(.*?)\'?'), r"cannot read \1: there is no such file"),
)
"""What is said of a file, and how a person says it."""


def innermost(text: str, most: int = 240) -> str:
    """One line of ``text``.

    Example:
        >>> innermost('''Parser key "data":
        ...   Does not validate against any of the Union subtypes
        ...   Subtypes: [<class 'DataModule'>, <class 'NoneType'>]
        ...   Errors:
        ...     - Problem with given class_path 'ImageData':
        ...         Parser key "num_clients":
        ...           Expected a <class 'int'>. Got value: many
        ...     - Expected a <class 'NoneType'>
        ...   Given value: many''')
        'data.num_clients: expected an int, got many'
    """
    for pattern, plain in WHOLE:
        if found := pattern.fullmatch(" ".join(text.split())):
            return found.expand(plain)
    if not LAYERS.search(text) and not text.startswith("Parser key"):
        return " ".join(text.split())
    keys: list[str] = []
    said: list[str] = []
    value = ""
    for raw in text.splitlines():
        line = raw.strip().removeprefix("- ")
        if found := KEY.match(line):
            if not said:
                keys.append(found[1])
        elif line.startswith("Given value: "):
            value = value or line.removeprefix("Given value: ")
        elif line and not LAYERS.match(line) and not any(kind.match(line) for kind in ALTERNATIVES):
            said.append(line)
    told = list(dict.fromkeys(map(_plain, said)))
    if any("is not a class that is known here" in line for line in told):  # and then not what else it might have been
        told = [line for line in told if not line.startswith("expected")]
    told = told or ["is not valid"]
    message = ", or ".join(told)
    if all(line.startswith("expected") for line in told) and "got " not in message and value and len(value) < 60:
        message += f", got {value}"
    name = ".".join(key for number, key in enumerate(keys) if key not in keys[:number])
    message = message if len(message) <= most else f"{message[: most - 1]}…"
    return f"{name}: {message}" if name else message


def _plain(line: str) -> str:
    """``Expected a <class 'int'>. Got value: many`` as a person says it."""
    line = re.sub(r"<class '([\w.]+)'>", lambda found: found[1].rsplit(".", 1)[-1], line)
    line = re.sub(r"Expected a dot import path string: (.*)", r"\1 is not a class that is known here; give its name or its path", line)
    line = re.sub(r"\. Got value: ", ", got ", line)
    line = re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", line)
    line = re.sub(r"^Expected a(?: one of)?(?= )", lambda found: "expected one of" if "one of" in found[0] else "expected a", line)
    return re.sub(r"^expected a (?=[aeiou])", "expected an ", line)
