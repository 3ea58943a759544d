"""The front's weights from a file: a Lightning or a federation's checkpoint, another library's, or safetensors; plain data, never code."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}
_COUNT = "num_batches_tracked"
"""Files from before torch 0.4.1 lack it, and nothing depends on it where a norm has a momentum."""


def load_front(path: str, entries: Mapping[str, Tensor]) -> None:
    """Copy into ``entries`` what the file at ``path`` has under their names. Tensors without data (a prediction's) are left alone.

    The names may stand below another prefix there. Where they are others altogether, the file must begin with entries of the same kinds
    and shapes in the same order: so torchvision's VGG-11 with batch norm is that of :func:`featherlight.ssl_models.make_backbone`.

    Args:
        path: a file, or an address (``https://…``), which is downloaded once, to where torch keeps torchvision's weights; a hash in its
            name, as in ``vgg11_bn-6002323d.pth``, is checked.
        entries: name → live tensor, in the model's order.

    Raises:
        ValueError: the file cannot be read, or lacks an entry, or has it in another shape, or not finite.
    """
    if any(value.is_meta or isinstance(value, FakeTensor) for value in entries.values()):
        return
    needed = [name for name in entries if name.rpartition(".")[2] != _COUNT]
    found = {name: value for name, value in _read(path).items() if isinstance(value, Tensor)}
    if not needed:
        return
    named = _below_another_prefix(path, needed, found) or _in_order(path, {name: entries[name] for name in needed}, found)
    for name, theirs in named.items():
        if found[theirs].shape != entries[name].shape:
            shapes = tuple(found[theirs].shape), tuple(entries[name].shape)
            raise ValueError(f'front_checkpoint={path} has "{theirs}" of shape {shapes[0]}, needed is {shapes[1]}')
        if not bool(torch.isfinite(found[theirs]).all()):
            raise ValueError(f'front_checkpoint={path} has "{theirs}" with numbers that are not finite: train the front anew')
    with torch.no_grad():
        for name, theirs in named.items():
            entries[name].copy_(found[theirs])


def _below_another_prefix(path: str, needed: list[str], found: Mapping[str, Tensor]) -> dict[str, str]:
    """Each name with the file's, where those have another prefix, a shorter or a longer one; nothing where it is not so."""
    if all(name in found for name in needed):
        return {name: name for name in needed}
    parts = needed[0].split(".")
    for dropped in range(len(parts)):
        drop, rest = "".join(f"{part}." for part in parts[:dropped]), ".".join(parts[dropped:])
        prefixes = [name.removesuffix(rest) for name in found if name == rest or (not dropped and name.endswith(f".{rest}"))]
        ways = [{name: prefix + name.removeprefix(drop) for name in needed} for prefix in prefixes]
        ways = [way for way in ways if all(other in found for other in way.values())] if all(n.startswith(drop) for n in needed) else []
        if len(ways) > 1:
            which = " and ".join(f'"{way[needed[0]]}"' for way in ways)
            raise ValueError(f"front_checkpoint={path} has the front more than once ({which}): save the one that is meant")
        if ways:
            return ways[0]
    return {}


def _in_order(path: str, entries: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, str]:
    """Each name with the file's at the same place, all of the same kind (``weight``, ``running_mean``, …) and shape."""
    missing = next((name for name in entries if name not in found), next(iter(entries)))
    theirs = [name for name in found if name.rpartition(".")[2] != _COUNT]
    known = ", ".join(theirs[:3])
    refused = f'front_checkpoint={path} has no "{missing}" (it has {known}, …): the front needs the same names there'
    if path.endswith(".safetensors"):  # sorted by name
        raise ValueError(refused)
    for (name, value), other in zip(entries.items(), [*theirs, *[""] * len(entries)]):
        if not other:
            raise ValueError(refused)
        if name.rpartition(".")[2] != other.rpartition(".")[2] or found[other].shape != value.shape:
            raise ValueError(
                f'{refused}, or the same layers in order; but where it has "{other}" of shape {tuple(found[other].shape)}, '
                f'the front has "{name}" of shape {tuple(value.shape)}'
            )
    return dict(zip(entries, theirs))


def _read(path: str) -> Mapping[str, Tensor]:
    try:
        if path.endswith(".safetensors") and "://" not in path:
            return _safetensors(Path(path).read_bytes())
        if "://" in path:
            state = torch.hub.load_state_dict_from_url(path, map_location="cpu", check_hash=True, weights_only=True)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        for inside in ("state_dict", "server"):  # Lightning's, a federation's
            if isinstance(state, dict) and isinstance(state.get(inside), dict):
                return state[inside]
    except FileNotFoundError as error:
        raise ValueError(f"front_checkpoint={path} does not exist") from error
    except Exception as error:  # whatever damaged bytes make of an unpickler
        raise ValueError(f"front_checkpoint={path} cannot be read: {_reason(error)}") from error
    if isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values()):
        return state
    raise ValueError(f"front_checkpoint={path} holds no weights: give a Lightning checkpoint, a state_dict, or safetensors")


def _reason(error: Exception) -> str:
    """In our words where torch refuses what is no tensor: torch's own go on to say how to run it."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is no file of weights alone"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _safetensors(raw: bytes) -> dict[str, Tensor]:
    """The format without its library, which this package's torch-only part does not have: length, JSON header, data."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw[8 + length :])
    found = {}
    for name, entry in header.items():
        if name != "__metadata__" and 0 not in entry["shape"]:
            begin, end = entry["data_offsets"]
            dtype = _DTYPES[entry["dtype"]]
            flat = torch.frombuffer(data, dtype=dtype, offset=begin, count=(end - begin) // dtype.itemsize)
            found[name] = flat.reshape(entry["shape"])
    return found
