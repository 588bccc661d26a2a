"""Entries as lines of JSON in a file that can be cut back, continued and read while it grows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.files import Appender, Record, absolute, open_for, replace

__all__ = ["JsonlSink"]


class JsonlSink:
    """One JSON object per line, in `run_dir/metrics.jsonl` or the file that is given.

    A line holds `seq`, `step`, `time` (Unix seconds) and `attempt`, then the metrics under their own names, and only
    where there is something to say:

        partial, calls    true, and how many calls the entry covers
        ranks             how many ranks contributed, for each key that not all of them held
        nonfinite         "nan", "inf" or "-inf" for each metric that is one: JSON has no such numbers, so the metric
                          itself is null
        nan_ranks         which ranks made a metric NaN or infinite
        waits             which rank was slow, and how long others waited for it: the fields of `Waits`

    Floats come back exactly as they were. Every line is in the kernel's hands when `write` returns, and on the disk
    after `close`. A write that fails half-way (a full disk) is taken back.

    A resumed run continues the file: entries from its first `seq` on are cut off, and so is a torn last line; the
    checkpoint's last entry is added where the run was killed before it was written. A run
    that is not resumed never touches what it finds: the old file is renamed to `metrics.jsonl.1`, or the next free
    number. So does a run that goes on from before its first entry. Hyperparameters go to `hyperparams.json` beside it,
    which is renamed with it.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = absolute(path)
        self._file: Appender | None = None
        self._hyperparams: Path | None = None
        self._stored = -1  # the last seq that was there already when the root was recovered

    def open(self, run: RunInfo) -> None:
        """Make the folder, continue the file or set it aside, and open it for appending."""
        path = run.run_dir / "metrics.jsonl" if self._path is None else self._path
        hyperparams = path.with_name("hyperparams.json")
        self._file = open_for(run, path, _records, hyperparams, keeps_own=run.recovered)
        self._stored = self._file.newest_seq if run.recovered else -1
        missing = self._file.missing_entry(run)
        if missing is not None:
            self.write(missing)
        self._hyperparams = hyperparams if self._file.is_regular else None

    def hyperparams(self, values: Mapping[str, object]) -> None:
        """Write them to `hyperparams.json`; what JSON has no word for becomes its text."""
        if self._hyperparams is not None:  # a pipe has no folder
            encoded = msgspec.json.encode(values, enc_hook=str)
            replace(self._hyperparams, msgspec.json.format(encoded, indent=2) + b"\n")

    def write(self, entry: LogEntry) -> None:
        """Append one line, if it is not there yet; if that fails, leave the file as it was."""
        if self._file is None:
            msg = "write() on a JsonlSink that is not open"
            raise ValueError(msg)
        if entry.seq > self._stored:
            self._file.append(_line(entry))

    def close(self) -> None:
        """Bring the file to the disk and close it; a second call does nothing."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


class _Head(msgspec.Struct):
    seq: int
    # Read apart: a line whose time is no number still has its seq.
    time: msgspec.Raw = msgspec.Raw()
    attempt: msgspec.Raw = msgspec.Raw()


_Value = TypeVar("_Value")
_head = msgspec.json.Decoder(_Head)
_time = msgspec.json.Decoder(float)
_attempt = msgspec.json.Decoder(int)
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def _line(entry: LogEntry) -> bytes:
    record: dict[str, object] = {
        "seq": entry.seq,
        "step": entry.step,
        "time": entry.time,
        "attempt": entry.attempt,
        **entry.metrics,  # msgspec writes NaN and infinities as null
    }
    if entry.partial:
        record["partial"] = True
        record["calls"] = entry.calls
    if entry.ranks:
        record["ranks"] = entry.ranks
    nonfinite = {key: str(value) for key, value in entry.metrics.items() if not math.isfinite(value)}
    if nonfinite:
        record["nonfinite"] = nonfinite
    if entry.nan_ranks:
        record["nan_ranks"] = entry.nan_ranks
    if entry.waits is not None:
        record["waits"] = entry.waits
    return msgspec.json.encode(record) + b"\n"


def _records(file: BinaryIO) -> Iterator[Record]:
    for line in file:
        head = _head_of(line)
        whole = _parses(line)  # what comes behind the head may be garbage all the same
        if head is None:
            yield Record(line, None, whole=whole)
        else:
            time, attempt = _read(_time, head.time), _read(_attempt, head.attempt)
            yield Record(line, head.seq, whole=whole, time=time, attempt=attempt)


def _head_of(line: bytes) -> _Head | None:
    try:
        return _head.decode(line)
    except _NOT_JSON:
        return None


def _read(decoder: msgspec.json.Decoder[_Value], data: msgspec.Raw) -> _Value | None:
    try:
        return decoder.decode(data)
    except _NOT_JSON:
        return None


def _parses(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except _NOT_JSON:
        return False
    return True
