"""Tables of docs/ that are made by trying: which plugins go together, and what each puts on the wire.

``python docs/tables.py`` prints them; with ``--write`` it puts them into the pages that show them.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from featherlight import callbacks, plugins
from featherlight.fed_loop import Federation, wire
from featherlight.plugins import Chain, Plugin
from featherlight.ssl_models import ImageData

PAGES = Path(__file__).parent
NEEDED: dict[str, dict[str, Any]] = {
    "ClientPrivacy": {"clip": 1.0, "noise_multiplier": 0.1},
    "FetchSGD": {"columns": 32, "k": 8},
    "IntrinsicProjection": {"dim": 16},
    "MOON": {"through": ("norm", "head")},
    "NormClipping": {"max_norm": 1.0},
    "PartitionedTraining": {"cut": "blocks.0"},
    "PrismSampling": {"keep": 0.5},
    "RepresentationAlignment": {"through": ("norm", "head")},
    "TopK": {"share": 0.1},
}
"""Arguments that a method does not do without, or not on a model this small; the others take their defaults."""

REFUSALS = (ValueError, TypeError, MisconfigurationException)


class Small(pl.LightningModule):
    """A stem, three blocks of one shape, a norm (with statistics or without) and a head: (N, 1, 8, 8) to (N, 10)."""

    def __init__(self, statistics: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Conv2d(1, 4, 3, padding=1)
            self.blocks = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
            self.norm = nn.BatchNorm1d(4) if statistics else nn.LayerNorm(4)
            self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean((2, 3))))

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def methods(where: Any, base: type) -> list[str]:
    """Names of the public methods of ``where``, in alphabetical order."""
    public = {name: getattr(where, name) for name in where.__all__}
    found = [name for name, kind in public.items() if inspect.isclass(kind) and issubclass(kind, base) and kind not in (base, Chain)]
    return sorted(found)


def make(name: str, where: Any = plugins, **options: Any) -> Any:
    """The method called ``name``, with what it needs."""
    staged = "blocks" in inspect.signature(getattr(plugins, name)).parameters
    return getattr(where, name)(**({"blocks": "blocks.*"} if staged else {}), **{**NEEDED.get(name, {}), **options})


def _model(*names: str | None) -> Small:
    """One without statistics for what refuses them."""
    return Small(statistics="ClientPrivacy" not in names)


def digits() -> ImageData:
    """Two clients with two batches of four digits each, and four digits of the server's."""
    data = ImageData("digits", views=1, augment="none", limit_train=20, batch_size=4, num_clients=2, server_fraction=0.2)
    data.setup("fit")
    return data


# -- what goes together -------------------------------------------------------------------------------------------------
def federated(names: tuple[str, ...], data: Any) -> str:
    """Two rounds of a federation with plugins in this order: nothing, or why they are refused."""
    settings = Federation(2, checkpoint_every=0, progress=False, accelerator="cpu")
    chain = [make(name) for name in names]  # what a constructor refuses is an error of this script's
    try:
        result = settings.run(_model(*names), data, chain)
    except REFUSALS as error:
        return str(error)
    return f"{result.rejected} updates rejected" if result.rejected else ""


def under_a_trainer(names: tuple[str, ...], data: Any) -> str:
    """Two epochs under a Trainer with callbacks in this order: nothing, or why they are refused."""
    model = Small()
    members: list[pl.Callback] = [make(name, callbacks) for name in names]
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    try:
        pl.Trainer(accelerator="cpu", max_epochs=2, callbacks=members, **quiet).fit(model, data)
    except REFUSALS as error:
        return str(error)
    return "" if all(value.isfinite().all() for value in model.state_dict().values()) else "what it trained is not finite"


def pairs(names: list[str], attempt: Any) -> list[str]:
    """A row for the plugin that comes first, a column for the second, numbers for reasons, and the reasons, each as it was told first."""
    data, reasons, rows = digits(), dict[str, tuple[int, str]](), []
    for first in names:
        cells = []
        for second in names:
            told = attempt((first, second), data)
            if told:
                reasons.setdefault(_general(told), (len(reasons) + 1, told))
            cells.append(f"({reasons[_general(told)][0]})" if told else "yes")
        rows.append(f"| `{first}` | {' | '.join(cells)} |")
    head = [f"| first, then → | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]
    return [*head, *rows, "", *(f"{number}. {told}" for number, told in reasons.values())]


def _general(reason: str) -> str:
    """Without the names at hand, so that one reason stands once."""
    for name in sorted(methods(plugins, Plugin), key=len, reverse=True):
        reason = reason.replace(name, "…")
    reason = re.sub(r"\b(fetchsgd|topk|intrinsic)\b(\.\w+)?", "…", reason)
    return re.sub(r' \([\w, ]+\)|"[\w.]+"|\bblocks\.\d\.\w+:8', " …", reason).replace("  ", " ").strip()


# -- what travels -------------------------------------------------------------------------------------------------------
WAYS = {
    **{"offer": "down", "_receive": "down", "_turn": "down", "_backward": "down"},
    **{"end": "up", "_send": "up", "_update": "up", "__call__": "up"},
}
"""Which way a message goes, by the function of the loop that has it serialised."""


@contextmanager
def listening(model: nn.Module) -> Iterator[dict[str, set[str]]]:
    """Names of entries of all messages, by the way they go, while the block runs."""
    heard: dict[str, set[str]] = {"down": set(), "up": set()}
    own, save = set(model.state_dict()), wire.save

    def spy(message: dict[str, Tensor], **options: Any) -> bytes:
        around = [info.function for info in inspect.stack(0)[1:12]]
        way = next((WAYS[name] for name in around if name in WAYS), "down" if message.keys() <= own else "up")
        heard[way] |= message.keys()
        return save(message, **options)

    wire.save = spy
    try:
        yield heard
    finally:
        wire.save = save


def kind(name: str, model: nn.Module) -> str:
    """What sort of entry has this name."""
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    if name in buffers:
        return "STATISTICS"
    for own in sorted(parameters, key=len, reverse=True):
        if name == own or name.startswith(f"{own}:"):
            return re.sub(r"@\d+\.\d+", "@#.#", name.replace(own, "WEIGHTS"))
    if (layer := name.rpartition(".")[0]) in dict(model.named_modules()) and layer:
        return name.replace(layer, "LAYER")
    return re.sub(r"\d+", "#", name)


def wires() -> list[str]:
    """What each method alone has put on the wire after three rounds: kinds of entries down, kinds of entries up."""
    ways = [("federated averaging", None, {})]
    ways += [(f"`{name}`", name, {}) for name in methods(plugins, Plugin) if name != "PartitionedTraining"]
    divided = {way: {"way": way, "cut": "norm"} for way in ("replay", "split", "local_loss")}  # statistics are in front, too
    divided["local_loss"]["classes"] = 10
    ways += [(f'`PartitionedTraining("{way}")`', "PartitionedTraining", own) for way, own in divided.items()]
    rows = []
    for shown, name, own in ways:
        model = _model(name)
        with listening(model) as heard:
            chain = [make(name, **own)] if name else []
            Federation(3, checkpoint_every=0, progress=False, accelerator="cpu").run(model, digits(), chain)
        cells = [", ".join(f"`{one}`" for one in sorted({kind(entry, model) for entry in heard[way]})) for way in ("down", "up")]
        rows.append(f"| {shown} | {cells[0]} | {cells[1]} |")
    return ["| method | comes down | goes up |", "|---|---|---|", *rows]


# -- pages --------------------------------------------------------------------------------------------------------------
TABLES = {
    "pairs in a federation": ("composing.md", lambda: pairs(methods(plugins, Plugin), federated)),
    "pairs under a Trainer": ("composing.md", lambda: pairs(methods(callbacks, callbacks.PluginCallback), under_a_trainer)),
    "entries on the wire": ("privacy.md", wires),
}
"""Name of a table to the page that shows it, and how it is made."""


def shown(table: str) -> str:
    """A table as its page has it.

    Raises:
        ValueError: the page has no place for it.
    """
    page = TABLES[table][0]
    found = re.search(_place(table), (PAGES / page).read_text(), re.DOTALL)
    if found is None:
        raise ValueError(f"docs/{page} has no <!-- table: {table} -->")
    return found[2].strip()


def made(table: str) -> str:
    """A table as it comes out now."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "\n".join(TABLES[table][1]())
    finally:
        log.setLevel(level)


def _place(table: str) -> str:
    return rf"(<!-- table: {table} -->\n)(.*?)(<!-- end of table -->)"


def write(table: str, text: str) -> None:
    """Put a table into its page."""
    shown(table)
    path = PAGES / TABLES[table][0]
    path.write_text(re.sub(_place(table), lambda at: f"{at[1]}\n{text}\n\n{at[3]}", path.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    for name in TABLES:
        print(f"## {name}\n\n{(table := made(name))}\n")
        if "--write" in sys.argv:
            write(name, table)
