"""The front's weights from a file: a Lightning or a federation's checkpoint, or safetensors; tensors and plain data, never code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


def load_front(path: str | Path, entries: Mapping[str, Tensor]) -> None:
    """Copy into ``entries`` what the file at ``path`` has under their names. Tensors without data (a prediction's) are left alone.

    Raises:
        ValueError: the file cannot be read, or lacks one of the names, or has it in another shape.
    """
    if any(value.is_meta or isinstance(value, FakeTensor) for value in entries.values()):
        return
    found = _read(Path(path))
    for name, value in entries.items():
        if name not in found:
            known = ", ".join([*found][:3])
            raise ValueError(f'front_checkpoint={path} has no "{name}" (it has {known}, …): the front needs the same names there')
        if found[name].shape != value.shape:
            raise ValueError(f'front_checkpoint={path} has "{name}" of shape {tuple(found[name].shape)}, needed is {tuple(value.shape)}')
    with torch.no_grad():
        for name, value in entries.items():
            value.copy_(found[name])


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return _safetensors(path.read_bytes())
        state = torch.load(path, map_location="cpu", weights_only=True)
        for inside in ("state_dict", "server"):  # Lightning's, a federation's
            if isinstance(state, dict) and isinstance(state.get(inside), dict):
                return state[inside]
    except FileNotFoundError as error:
        raise ValueError(f"front_checkpoint={path} does not exist") from error
    except Exception as error:  # whatever damaged bytes make of an unpickler
        raise ValueError(f"front_checkpoint={path} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if isinstance(state, dict) and state and all(isinstance(value, Tensor) for value in state.values()):
        return state
    raise ValueError(f"front_checkpoint={path} holds no weights: give a Lightning checkpoint, a state_dict, or safetensors")


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
