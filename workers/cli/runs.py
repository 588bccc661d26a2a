"""A run's `metrics.jsonl`, read while it may grow, be cut back or be replaced. Nothing in it is trusted."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from logsync.coordinator.errors import Step, printable
from logsync.coordinator.messages import RESERVED

__all__ = ["Entry", "RunError", "RunFile", "Waited", "find"]

_FILE = "metrics.jsonl"
_LONGEST_LINE = 64 * 2**20  # bytes; an entry holds at most 2**20 metrics, and usually a few hundred bytes
_STRANGE_LINES = 1000  # so many without an entry before them, and the file is somebody else's
_PROOF = 4096  # bytes before the place that was read up to; if they changed, the file was cut back and has grown again
_NAMED_RUNS = 3
_LATEST_S = 250e9  # in the year 9892; calendars end with 9999
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class RunError(Exception):
    """There is nothing that could be shown; the text says why, and what to do."""


class Waited(msgspec.Struct, frozen=True):
    """What a line says of the waits between the entry before and this one, seconds and, for each rank, milliseconds.

    A rank that is not known to have waited has -1 in `each_ms`, which is empty where there are too many ranks.
    """

    slowest: int
    least_s: float
    most_s: float
    interval_s: float = 0.0
    host: str = ""
    each_ms: tuple[int, ...] = ()


class Entry(NamedTuple):
    """One line; `time` is NaN and `calls` is None where the line does not say."""

    seq: int
    step: Step
    time: float
    attempt: int
    metrics: dict[str, float]
    partial: bool
    calls: int | None
    ranks: dict[str, int]
    nan_ranks: dict[str, tuple[int, ...]]
    waits: Waited | None

    def as_json(self) -> dict[str, object]:
        """Return the entry for msgspec's encoder, in the words of the file, its metrics in an object of their own."""
        found: dict[str, object] = {"seq": self.seq, "step": self.step, "time": self.time, "attempt": self.attempt}
        found["metrics"] = self.metrics
        nonfinite = {name: str(value) for name, value in self.metrics.items() if not math.isfinite(value)}
        extra = {
            "partial": self.partial,
            "calls": self.calls,
            "ranks": self.ranks,
            "nonfinite": nonfinite,
            "nan_ranks": self.nan_ranks,
            "waits": self.waits,
        }
        return found | {key: value for key, value in extra.items() if value}


def find(given: Path) -> Path:
    """Return the file of the run `given`, which is one or is the run's folder.

    Raises:
        RunError: there is none.
    """
    name = printable(str(given))
    if not given.exists():
        msg = f"there is no file or folder {name}{_nearby(given.parent)}"
        raise RunError(msg)
    if not given.is_dir():
        return given
    path = given / _FILE
    if not path.exists():
        msg = f"{name} is a folder without a {_FILE}{_nearby(given)}"
        raise RunError(msg)
    return path


def _nearby(folder: Path) -> str:
    """Return a hint at the newest runs in `folder`, if there are any."""
    try:
        runs = sorted(folder.glob(f"*/{_FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return ""
    if not runs:
        return ""
    named = ", ".join(printable(str(path.parent)) for path in runs[:_NAMED_RUNS])
    return f"; the newest run{'s' * (len(runs) > 1)} of {len(runs)} in {printable(str(folder))}: {named}"


class RunFile:
    """A run's file as far as it was read.

    Attributes:
        entries: those that are there now, in the file's order.
        broken: how many lines are no entries.
        first_broken: the number of the first of them, counted from 1; 0 if there is none.
        torn: whether the file ends in the middle of a line that is no entry (yet).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] | None = None
        self._forget()

    def _forget(self) -> None:
        self.entries: list[Entry] = []
        self.broken = self.first_broken = 0
        self.torn = False
        self._lines = 0
        self._offset = 0
        self._before = b""
        self._tail = False  # the last entry's line has no end yet
        self._stood = 0

    def poll(self) -> int:
        """Read what is new.

        Returns:
            How many of the entries known before still stand, those of a file that was cut back or replaced compared
            by number and time. What follows them in `entries` is new.

        Raises:
            RunError: it cannot be read, or is no log of logsync.
        """
        known = self.entries
        try:
            with self.path.open("rb") as file:
                self._read_from(file)
        except OSError as error:
            msg = f"cannot read {printable(str(self.path))}: {error.strerror}"
            raise RunError(msg) from error
        if known is self.entries:
            return self._stood
        return sum(1 for _ in _common(known, self.entries))

    def _read_from(self, file: BinaryIO) -> None:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            msg = f"{printable(str(self.path))} is no regular file"
            raise RunError(msg)
        identity = (status.st_dev, status.st_ino)
        if identity != self._identity or status.st_size < self._offset or not self._same_before(file):
            self._identity = identity
            self._forget()
        last = self.entries.pop() if self._tail else None  # read again, now that it may be whole
        self._tail = self.torn = False
        self._stood = len(self.entries)
        file.seek(self._offset)
        while line := file.readline(_LONGEST_LINE):
            self._take(line)
        if last is not None:
            self._stood += sum(1 for _ in _common([last], self.entries[self._stood :]))

    def _take(self, line: bytes) -> None:
        entry = _entry(line)
        if not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
            self._tail, self.torn = entry is not None, entry is None
        else:
            self._offset += len(line)
            self._before = (self._before + line)[-_PROOF:]
            self._lines += 1
            if entry is None:
                self._strange()
        if entry is not None:
            self.entries.append(entry)

    def _strange(self) -> None:
        self.broken += 1
        self.first_broken = self.first_broken or self._lines
        if self.broken >= _STRANGE_LINES and not self.entries:
            raise RunError(self._not_ours())

    def _same_before(self, file: BinaryIO) -> bool:
        file.seek(self._offset - len(self._before))
        return file.read(len(self._before)) == self._before

    def refuse_if_bare(self) -> None:
        """Raise `RunError`, saying what is wrong with the file, if it holds no entry."""
        if self.entries:
            return
        if self.broken or self.torn:
            raise RunError(self._not_ours())
        msg = f"{printable(str(self.path))} is empty: nothing was logged yet"
        raise RunError(msg)

    def _not_ours(self) -> str:
        lines = self._lines + self.torn
        first = "the first " * (lines >= _STRANGE_LINES)
        none = "its only line is not" if lines == 1 else f"none of {first or 'its '}{lines} lines is"
        return f"{printable(str(self.path))} is no log of logsync: {none} an entry, a JSON object with a seq and a step"

    def notes(self) -> list[str]:
        """Return what a reader must know of the file beside its entries."""
        found = []
        if self.broken:
            one = f"line {self.first_broken} is no entry and left out"
            many = f"{self.broken} lines are no entries and left out, the first of them line {self.first_broken}"
            found.append(one if self.broken == 1 else many)
        if self.torn:
            found.append("the last line is torn and left out: the run was killed, or is just writing it")
        return found


def _common(known: list[Entry], found: list[Entry]) -> Iterator[Entry]:
    for old, new in zip(known, found, strict=False):
        if old.seq != new.seq or old.time != new.time:
            return
        yield new


def _entry(line: bytes) -> Entry | None:
    """Return the entry of `line`, None if it is none. Fields that are not known are left out."""
    try:
        found = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    seq, step = found.get("seq"), found.get("step")
    if type(seq) is not int or seq < 0 or "step" not in found or type(step) not in (int, float, type(None)):
        return None
    nonfinite = _dict(found.get("nonfinite"))
    metrics: dict[str, float] = {}
    for name, value in found.items():
        if name in RESERVED:
            continue
        if type(value) is float or (type(value) is int and abs(value) <= 2**1023):
            metrics[name] = float(value)
        elif value is None:
            metrics[name] = _NOT_FINITE.get(str(nonfinite.get(name)), math.nan)
    attempt, calls = found.get("attempt"), found.get("calls")
    return Entry(
        seq=seq,
        step=step,
        time=_seconds(found.get("time")),
        attempt=attempt if type(attempt) is int and attempt >= 0 else 0,
        metrics=metrics,
        partial=found.get("partial") is True,
        calls=calls if type(calls) is int else None,
        ranks={name: count for name, count in _dict(found.get("ranks")).items() if type(count) is int},
        nan_ranks={
            name: tuple(rank for rank in ranks if type(rank) is int)
            for name, ranks in _dict(found.get("nan_ranks")).items()
            if isinstance(ranks, list)
        },
        waits=_waited(found.get("waits")),
    )


def _seconds(value: object) -> float:
    """Return a time that a calendar has, or NaN."""
    return float(value) if isinstance(value, (int, float)) and 0 <= value < _LATEST_S else math.nan


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _waited(value: object) -> Waited | None:
    if not isinstance(value, dict):
        return None
    try:
        return msgspec.convert(value, Waited)
    except msgspec.ValidationError:
        return None
