"""Entries as lines of JSON in a file that can be cut back, continued and read while it grows."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path

import msgspec

from logsync.coordinator.errors import printable
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo

__all__ = ["JsonlSink"]

_logger = logging.getLogger(__name__)


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

    A resumed run continues the file: entries from its first `seq` on are cut off, and so is a torn last line. A run
    that is not resumed never touches what it finds: the old file is renamed to `metrics.jsonl.1`, or the next free
    number.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        # Made absolute now: training scripts change their directory.
        self._path = None if path is None else Path(path).expanduser().absolute()
        self._file: io.FileIO | None = None
        self._torn_at: int | None = None

    def open(self, run: RunInfo) -> None:
        """Make the folder, continue the file or set it aside, and open it for appending."""
        path = run.run_dir / "metrics.jsonl" if self._path is None else self._path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_size:
            if run.resumed:
                _cut_back(path, run.next_seq)
            else:
                _set_aside(path)
        # Unbuffered: one write() per line, and nothing left that a later flush or close could fail to write.
        self._file = path.open("ab", buffering=0)
        self._torn_at = None

    def write(self, entry: LogEntry) -> None:
        """Append one line; if that fails, leave the file as it was."""
        if self._file is None:
            msg = "write() on a JsonlSink that is not open"
            raise ValueError(msg)
        self._take_back_torn_line(self._file)
        line = _line(entry)
        start = os.fstat(self._file.fileno()).st_size
        rest = memoryview(line)
        try:
            while rest:  # a full disk takes a part and says why only when asked for the rest
                rest = rest[self._file.write(rest) :]
        except BaseException:
            if start < os.fstat(self._file.fileno()).st_size < start + len(line):
                self._torn_at = start
                with contextlib.suppress(OSError):  # then the next write or close tries again
                    self._take_back_torn_line(self._file)
            raise

    def close(self) -> None:
        """Bring the file to the disk and close it; a second call does nothing."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            self._take_back_torn_line(file)
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a pipe cannot be synced
                os.fsync(file.fileno())

    def _take_back_torn_line(self, file: io.FileIO) -> None:
        if self._torn_at is not None:
            file.truncate(self._torn_at)
            self._torn_at = None


class _Head(msgspec.Struct):
    seq: int


_head = msgspec.json.Decoder(_Head)
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


def _cut_back(path: Path, next_seq: int) -> None:
    """Leave in the file the lines before the first with a `seq` of `next_seq` or more, and no torn one."""
    with path.open("r+b") as file:
        keep, torn, strangers = _lines_to_keep(file, next_seq)
        if keep < file.seek(0, os.SEEK_END):
            file.truncate(keep)
            _logger.info("cut %s back to %d bytes, to continue it at seq %d", path, keep, next_seq)
        file.seek(max(keep - 1, 0))
        if file.read(1) not in {b"", b"\n"}:  # killed between a line and its end
            file.write(b"\n")
    if torn:
        _logger.warning("dropped the torn last line of %s: %s", path, printable(repr(torn), 100))
    if strangers:
        _logger.warning("%s has %d lines that are no entries of logsync; they are kept as they are", path, strangers)


def _lines_to_keep(lines: Iterable[bytes], next_seq: int) -> tuple[int, bytes, int]:
    """Return how many bytes to keep, the torn last line if there is one, and how many lines have no `seq`."""
    keep = strangers = 0
    last = b""
    for line in lines:
        seq = _seq_of(line)
        if seq is not None and seq >= next_seq:
            return keep, b"", strangers
        keep += len(line)
        strangers += seq is None
        last = line
    if last and not _parses(last):
        return keep - len(last), last, strangers - 1
    return keep, b"", strangers


def _seq_of(line: bytes) -> int | None:
    try:
        return _head.decode(line).seq
    except _NOT_JSON:
        return None


def _parses(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except _NOT_JSON:
        return False
    return True


def _set_aside(path: Path) -> None:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{number}")):
        number += 1
    path.rename(aside)
    _logger.warning(
        "%s held a log that this run does not continue; it is now %s. To continue a log, give the state of its "
        "checkpoint to load_state_dict() before the first log_ready()",
        path,
        aside,
    )
