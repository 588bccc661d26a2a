"""Entries as rows of a CSV file that never changes its columns, however late a metric comes."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.files import Appender, Record, absolute, open_for
from logsync.coordinator.waits import flat_metrics

__all__ = ["CsvSink"]

_COLUMNS = ("seq", "step", "time", "attempt", "metric", "value")
_TIME, _ATTEMPT, _METRIC = map(_COLUMNS.index, ("time", "attempt", "metric"))


class CsvSink:
    """One row per metric and entry, in `run_dir/metrics.csv` or the file that is given.

    The columns are `seq,step,time,attempt,metric,value`, so that a metric which appears late needs no wider header: no
    row is ever rewritten. `pandas.read_csv(path).pivot(index=["seq", "step"], columns="metric", values="value")` is
    the table with a column per metric. Floats come back exactly; NaN and infinities are `nan`, `inf` and `-inf`, a
    missing step is empty.

    A resumed run continues the file as `metrics.jsonl` is continued: rows from its first `seq` on are cut off, and so
    is an entry whose rows are torn or not all there. A run that is not resumed renames what it finds to
    `metrics.csv.1`, or the next free number.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = absolute(path)
        self._file: Appender | None = None

    def open(self, run: RunInfo) -> None:
        """Make the folder, continue the file or set it aside, and open it for appending."""
        path = run.run_dir / "metrics.csv" if self._path is None else self._path
        file = open_for(run, path, partial(_entries, last_entry=run.last_entry))
        try:
            if file.is_empty:
                file.append((",".join(_COLUMNS) + "\n").encode())
            missing = file.missing_entry(run)
            if missing is not None:
                file.append(_rows(missing))
        except BaseException:
            file.close()
            raise
        self._file = file

    def write(self, entry: LogEntry) -> None:
        """Append the entry's rows; if that fails, leave the file as it was."""
        if self._file is None:
            msg = "write() on a CsvSink that is not open"
            raise ValueError(msg)
        self._file.append(_rows(entry))

    def close(self) -> None:
        """Bring the file to the disk and close it; a second call does nothing."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def _rows(entry: LogEntry) -> bytes:
    text = io.StringIO(newline="")
    # Names in quotes, always: a carriage return in one would end the row.
    writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    step = "" if entry.step is None else entry.step
    head = (entry.seq, step, entry.time, entry.attempt)
    writer.writerows((*head, key, value) for key, value in flat_metrics(entry).items())
    return text.getvalue().encode()


class _Row(NamedTuple):
    data: bytes
    cells: list[str]

    @property
    def seq(self) -> int | None:
        """The entry's number; -1 for the header, None for what is no row of ours."""
        if tuple(self.cells) == _COLUMNS:
            return -1
        return self.begun if len(self.cells) == len(_COLUMNS) else None

    @property
    def begun(self) -> int | None:
        """The number of the entry that this row, which may be torn, was a part of."""
        return int(self.cells[0]) if len(self.cells) > 1 and self.cells[0].isdecimal() else None

    @property
    def is_whole(self) -> bool:
        # An end that is cut off can look whole: "0.12" of "0.1234".
        return self.seq is not None and self.data.endswith(b"\n")

    @property
    def time(self) -> float | None:
        try:
            return float(self.cells[_TIME])
        except (IndexError, ValueError):
            return None

    @property
    def attempt(self) -> int | None:
        try:
            return int(self.cells[_ATTEMPT])
        except (IndexError, ValueError):
            return None


def _entries(file: BinaryIO, last_entry: LogEntry | None) -> Iterator[Record]:
    """Yield an entry's rows as one record, which is torn where its last row is, or rows of `last_entry` are missing."""
    incomplete: Record | None = None
    for seq, group in itertools.groupby(_numbered(file), key=itemgetter(0)):
        rows = [row for _, row in group]
        data = b"".join(row.data for row in rows)
        if incomplete is not None:
            if seq is None:  # what a kill left of the next row, or a crash of the disk
                incomplete = incomplete._replace(data=incomplete.data + data)
                continue
            yield incomplete
            incomplete = None
        if seq is None:
            yield from (Record(row.data, None, whole=False) for row in rows)
            continue
        record = Record(data, seq, whole=rows[-1].is_whole, time=rows[0].time, attempt=rows[0].attempt)
        if last_entry is not None and seq == last_entry.seq:
            there = {row.cells[_METRIC] for row in rows if row.seq == seq}
            if not flat_metrics(last_entry).keys() <= there:
                incomplete = record._replace(whole=False)
                continue
        yield record
    if incomplete is not None:
        yield incomplete


def _numbered(file: BinaryIO) -> Iterator[tuple[int | None, _Row]]:
    """Yield rows with the entry that they belong to: a torn one is a part of the entry before it, or nobody's."""
    before: int | None = None
    for row in _rows_of(file):
        seq = row.seq
        if seq is None and before is not None and row.begun == before:
            seq = before
        before = seq
        yield seq, row


def _rows_of(file: BinaryIO) -> Iterator[_Row]:
    lines: list[bytes] = []

    def decoded() -> Iterator[str]:
        for line in file:
            lines.append(line)
            yield line.decode(errors="replace")

    rows = csv.reader(decoded())
    while True:
        try:
            row = next(rows, None)
        except csv.Error:  # zeros, which a crash can leave, in some Pythons
            row = []
        if row is None:
            return
        yield _Row(b"".join(lines), row)
        lines.clear()
