"""Named blocks of any model: found by module path, by pattern or by what the model is.

The blocks of a model are a chain in forward order. What is registered before the first block is the stem, what comes after
the last one is the tail.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Layout:
    """Where a family of models keeps its blocks, below the module that has the attributes named in ``known_by``."""

    known_by: tuple[str, ...]
    blocks: tuple[str, ...]
    stem: tuple[str, ...] | None = None


LAYOUTS = {
    "ResNet (torchvision, timm)": Layout(("layer1", "layer2", "layer3", "layer4"), ("layer1", "layer2", "layer3", "layer4")),
    "VisionTransformer (timm)": Layout(("patch_embed", "blocks"), ("blocks.*",)),
    "VisionTransformer (torchvision)": Layout(
        ("conv_proj", "encoder.layers"), ("encoder.layers.*",), ("conv_proj", "class_token", "encoder.pos_embedding")
    ),
    "encoder of layers (Hugging Face BERT, ViT)": Layout(("embeddings", "encoder.layer"), ("encoder.layer.*",), ("embeddings",)),
    "decoder of blocks (Hugging Face GPT-2)": Layout(("wte", "h"), ("h.*",)),
}
"""What ``blocks="auto"`` recognises."""


@dataclass(frozen=True)
class Tower:
    """The blocks of one model, in forward order, and what stands before them.

    Args:
        paths: module paths of the blocks.
        stem: paths of modules and of bare parameters that come before the first block.
    """

    model: nn.Module = field(repr=False)
    paths: tuple[str, ...]
    stem: tuple[str, ...]

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.get_submodule(path) for path in self.paths)

    def enclosing(self, index: int) -> list[nn.Module]:
        """Block ``index`` and every module around it, innermost first: a mark on any of them holds for the block."""
        names = self.paths[index].split(".")
        return [self.model.get_submodule(".".join(names[:depth])) for depth in range(len(names), 0, -1)]

    def stem_modules(self) -> list[nn.Module]:
        return [member for member in map(self.member, self.stem) if isinstance(member, nn.Module)]

    def stem_parameters(self) -> list[nn.Parameter]:
        found: list[nn.Parameter] = []
        for member in map(self.member, self.stem):
            found += list(member.parameters()) if isinstance(member, nn.Module) else [member]
        return found

    def moved(self, online: str, target: str) -> Tower | None:
        """The same tower in a structural twin, or None where this tower does not lie inside ``online``."""
        if not all(path == online or path.startswith(f"{online}.") for path in self.paths):
            return None
        inside = [path for path in self.stem if path == online or path.startswith(f"{online}.")]
        return Tower(
            self.model,
            tuple(target + path[len(online) :] for path in self.paths),
            tuple(target + path[len(online) :] for path in inside),
        )

    def member(self, path: str) -> nn.Module | nn.Parameter:
        """The module or bare parameter at ``path``."""
        parent, _, name = path.rpartition(".")
        member = getattr(self.model.get_submodule(parent), name)
        assert isinstance(member, nn.Module | nn.Parameter)
        return member


def find_blocks(
    model: nn.Module, blocks: str | Sequence[str] = "auto", stem: Sequence[str] | None = None, tail: Sequence[str] | None = None
) -> Tower:
    """Resolve the blocks of ``model``.

    Args:
        blocks: module paths or patterns in forward order; ``*`` stands within one component of a path, so that
            ``"backbone.layer*"`` is the four groups of a ResNet and ``"backbone.layer*.*"`` each residual block;
            ``"auto"`` recognises the families in :data:`LAYOUTS`.
        stem: paths of modules or parameters that come before the first block. By default, what their parent
            registers before the first block, and the parent's own parameters (position embeddings, class token).
        tail: paths of what comes after the last block, for models that register some of it before the blocks: it is no part
            of the stem then. Everything that is neither stem nor block counts as tail anyway.

    Raises:
        ValueError: nothing matches; the message lists what the model has there.

    Example:
        >>> from torch import nn
        >>> tower = find_blocks(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)), ["1", "2"])
        >>> tower.paths, tower.stem
        (('1', '2'), ('0',))
    """
    if blocks == "auto":
        patterns, stem = _recognise(model, stem)
    else:
        patterns = [blocks] if isinstance(blocks, str) else list(blocks)
    if not patterns:
        raise ValueError("blocks is empty; name module paths or a pattern such as 'backbone.layer*', or use 'auto'")
    everything = [path for path, _ in model.named_modules() if path]
    paths: list[str] = []
    for pattern in patterns:
        found = [path for path in everything if _matches(path, pattern)]
        if not found:
            raise ValueError(_nothing_at(model, pattern))
        if set(found) <= set(paths):
            raise ValueError(f'block "{pattern}" is named twice; name each block once: {", ".join(paths)}')
        paths += [path for path in found if path not in paths]
    for path in paths:
        if any(path.startswith(f"{other}.") for other in paths):
            raise ValueError(f'block "{path}" lies inside another block; blocks must stand one after the other: {", ".join(paths)}')
    before = _stem_before(model, paths[0]) if stem is None else _existing(model, stem)
    after = _existing(model, tail or (), "tail")
    if stem is not None and (twice := [path for path in after if path in before]):
        raise ValueError(f'"{twice[0]}" is named as stem and as tail; what comes before the blocks is stem, what comes after them tail')
    return Tower(model, tuple(paths), tuple(path for path in before if path not in after))


def _matches(path: str, pattern: str) -> bool:
    components, wanted = path.split("."), pattern.split(".")
    return len(components) == len(wanted) and all(map(fnmatchcase, components, wanted))


def _nothing_at(model: nn.Module, pattern: str) -> str:
    parent, where = model, []
    for name in pattern.split("."):
        child = dict(parent.named_children()).get(name)
        if child is None:
            break
        parent = child
        where.append(name)
    inside = f' inside "{".".join(where)}"' if where else ""
    has = ", ".join(name for name, _ in parent.named_children()) or "no modules"
    return f'block "{pattern}" not found; this {type(model).__name__} has{inside}: {has}'


def _recognise(model: nn.Module, stem: Sequence[str] | None) -> tuple[list[str], Sequence[str] | None]:
    for path, module in model.named_modules():
        if not any(parameter.requires_grad for parameter in module.parameters()):
            continue
        for layout in LAYOUTS.values():
            if all(_has(module, attribute) for attribute in layout.known_by):
                prefix = f"{path}." if path else ""
                known = None if layout.stem is None else [prefix + name for name in layout.stem if _has(module, name)]
                return [prefix + name for name in layout.blocks], stem if stem is not None else known
    families = "; ".join(LAYOUTS)
    children = ", ".join(name for name, _ in model.named_children()) or "no modules"
    raise ValueError(f"blocks='auto' does not know this {type(model).__name__} (it knows {families}); it has {children}: name its blocks")


def _has(module: nn.Module, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(module, name):
            return False
        module = getattr(module, name)
    return True


def _existing(model: nn.Module, named: Iterable[str], what: str = "stem") -> list[str]:
    members = {path for path, _ in model.named_modules(remove_duplicate=False)}
    members |= {path for path, _ in model.named_parameters(remove_duplicate=False)}
    named = list(named)
    for path in named:
        if path not in members:
            raise ValueError(_nothing_at(model, path).replace("block", what, 1))
    return named


def _stem_before(model: nn.Module, first: str) -> list[str]:
    """What every ancestor registers before the way to the first block, from the top-level child (or the first real module) down.

    The root itself is looked at only where nothing but containers lies between it and the blocks, and those have no stem of
    their own: a LightningModule's own first members need not come before its backbone.
    """
    names = first.split(".")
    stem: list[str] = []
    only_containers = True
    for depth in range(len(names) - 1, -1, -1):
        path = ".".join(names[:depth])
        level = model.get_submodule(path)
        if depth == 0 and (stem or not only_containers):
            break
        prefix = f"{path}." if path else ""
        own = [prefix + name for name, _ in level.named_parameters(recurse=False)]
        before: list[str] = []
        for name, _ in level.named_children():
            if name == names[depth]:
                break
            before.append(prefix + name)
        stem = own + before + stem
        only_containers = only_containers and isinstance(level, _CONTAINERS)
    return stem
