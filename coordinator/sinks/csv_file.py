"""Entries as rows of a CSV file that never changes its columns, however late a metric comes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.files import Appender, Record, absolute, open_for
from logsync.coordinator.waits import flat_metrics

__all__ = ["CsvSink"]

_Value = TypeVar("_Value")
_COLUMNS = ("seq", "step", "time", "attempt", "metric", "value")


class CsvSink:
    """One row per metric and entry, in `run_dir/metrics.csv` or the file that is given.

    The columns are `seq,step,time,attempt,metric,value`, so that a metric which appears late needs no wider header: no
    row is ever rewritten. `pandas.read_csv(path).pivot(index=["seq", "step"], columns="metric", values="value")` is
    the table with a column per metric. Floats come back exactly; NaN and infinities are `nan`, `inf` and `-inf`, a
    missing step is empty.

    A resumed run continues the file as `metrics.jsonl` is continued: rows from its first `seq` on are cut off, and so
    is a torn last row. A run that is not resumed renames what it finds to `metrics.csv.1`, or the next free number.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._path = absolute(path)
        self._file: Appender | None = None

    def open(self, run: RunInfo) -> None:
        """Make the folder, continue the file or set it aside, and open it for appending."""
        file = open_for(run, run.run_dir / "metrics.csv" if self._path is None else self._path, _records)
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


def _records(file: BinaryIO) -> Iterator[Record]:
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
        data = b"".join(lines)
        lines.clear()
        seq = _seq_of(row)
        # An end that is cut off can look whole: "0.12" of "0.1234".
        whole = seq is not None and data.endswith(b"\n")
        yield Record(data, seq, whole=whole, time=_read(float, row, "time"), attempt=_read(int, row, "attempt"))


def _read(convert: Callable[[str], _Value], row: list[str], column: str) -> _Value | None:
    try:
        return convert(row[_COLUMNS.index(column)])
    except (IndexError, ValueError):
        return None


def _seq_of(row: list[str]) -> int | None:
    if tuple(row) == _COLUMNS:
        return -1
    if len(row) != len(_COLUMNS) or not row[0].isdecimal():
        return None
    return int(row[0])
