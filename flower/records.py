"""Requests and replies as Flower's records: the payload is one array of bytes, the very safetensors message that is counted."""

from __future__ import annotations

from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

TOLD, CARRIED, FORMAT = "featherlight.told", "featherlight.carried", "featherlight.bytes"


def written(told: str, payload: bytes = b"") -> RecordDict:
    """A header, JSON, and bytes."""
    array = Array(dtype="uint8", shape=(len(payload),), stype=FORMAT, data=payload)
    return RecordDict({TOLD: ConfigRecord({"json": told}), CARRIED: ArrayRecord({"payload": array})})


def read(records: RecordDict) -> tuple[str, bytes]:
    """From :func:`written`.

    Raises:
        ValueError: it is none of ours.
    """
    told: Any = records.config_records.get(TOLD)
    carried: Any = records.array_records.get(CARRIED)
    if told is None or carried is None or not isinstance(told.get("json"), str) or "payload" not in carried:
        raise ValueError(f"a message without {TOLD} and {CARRIED} came, which is none of featherlight's: {sorted(records)}")
    return told["json"], carried["payload"].data
