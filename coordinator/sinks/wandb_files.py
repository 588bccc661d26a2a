"""What W&B has on disk of a run: logs in LevelDB's format, whose records are W&B's protocol buffers."""

from __future__ import annotations

import contextlib
import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["history", "records"]

_BLOCK = 32 * 1024
_IDENTITY = 7  # the bytes that a file begins with
_HEAD = struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = range(1, 5)


def history(folder: Path, run_id: str) -> Iterator[dict[str, Any]]:
    """Yield the rows that the attempts of a run have put into W&B's `folder`, oldest first.

    A job that was killed may have lost its last rows: W&B's own process keeps them in memory for a while.
    """
    for path in sorted(folder.glob(f"*run-*/run-{run_id}.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                yield {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
                }


def records(path: Path) -> Iterator[Any]:
    """Yield the records of one file, up to the first that is torn."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    undecodable = importlib.import_module("google.protobuf.message").DecodeError
    with contextlib.suppress(undecodable):
        for data in _chunks(path):
            yield record.FromString(data)


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        parts = b""
        at = len(file.read(_IDENTITY))
        while True:
            if _BLOCK - at % _BLOCK < _HEAD.size:
                at += len(file.read(_BLOCK - at % _BLOCK))
            head = file.read(_HEAD.size)
            if len(head) < _HEAD.size:
                return
            _, length, kind = _HEAD.unpack(head)
            data = file.read(length)
            if len(data) < length or not _FULL <= kind <= _LAST:
                return
            at += _HEAD.size + length
            parts += data
            if kind in {_FULL, _LAST}:
                yield parts
                parts = b""
