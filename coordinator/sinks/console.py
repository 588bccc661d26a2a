"""Entries on standard output: a table on a terminal, one plain line each in a pipe or a file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from logsync.coordinator.errors import printable
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.text import note, readable, readable_step

__all__ = ["ConsoleSink"]

_ROWS_PER_HEADER = 40
_NARROWEST = 8
_GAP = 2
_NOT_FINITE = ("nan", "inf", "-inf")


class ConsoleSink:
    """Print each entry to what `sys.stdout` is when the sink opens.

    On a terminal, entries are rows under a header, which comes again when a metric joins, a column needs more room,
    or 40 rows have passed (then it forgets metrics that stayed away). An entry that is too wide for the terminal is
    printed as a line. In a pipe or a file every entry is one line without colours:
    `logsync train step=50 seq=1 train/loss=0.1234`.

    Where ranks waited for one of them (10 ms, and a tenth of the time between logs), the entry names it and its host.

    Progress bars of tqdm on the same terminal stay below what is printed. Values have four significant digits: this
    is for reading. The exact numbers are in `metrics.jsonl`.
    """

    def __init__(self) -> None:
        self._console: Console | None = None
        self._name = ""
        self._widths: dict[str, int] = {}
        self._seen: set[str] = set()
        self._rows = 0

    def open(self, run: RunInfo) -> None:
        """Look up standard output and begin a new table."""
        # Not rich's own guess: FORCE_COLOR or a notebook would put escapes and tables into files.
        is_terminal = getattr(sys.stdout, "isatty", bool)()  # a home-made tee often has only write and flush
        self._console = Console(file=sys.stdout, force_terminal=is_terminal, force_jupyter=False)
        self._name = printable(run.name)
        self._widths = {}
        self._seen = set()
        self._rows = 0

    def write(self, entry: LogEntry) -> None:
        """Print one entry."""
        if self._console is None:
            msg = "write() on a ConsoleSink that is not open"
            raise ValueError(msg)
        values = {printable(key): readable(value) for key, value in entry.metrics.items()}
        cells = {"step": f"{self._name} {readable_step(entry.step):>6}", **values}
        widths = self._fitting(cells, self._console.width) if self._console.is_terminal else None
        if widths is None:
            _print(self._console, self._as_line(entry, values))
            return
        if widths != self._widths or self._rows >= _ROWS_PER_HEADER:
            _print(self._console, _row({key: key for key in widths}, widths, "bold"))
            self._widths, self._seen, self._rows = widths, set(), 0
        _print(self._console, _row(cells, widths))
        self._seen.update(cells)
        self._rows += 1
        remark = note(entry)
        if remark:
            _print(self._console, Text(f"  ^ {remark}", "yellow"))

    def close(self) -> None:
        """Flush; standard output stays open."""
        if self._console is not None:
            self._console.file.flush()
            self._console = None

    def _fitting(self, cells: dict[str, str], room: int) -> dict[str, int] | None:
        """Return columns for `cells`: with those of the table so far, else alone, else None."""
        present = self._widths if self._rows < _ROWS_PER_HEADER else self._seen
        so_far = {key: width for key, width in self._widths.items() if key in present}
        for start in (so_far, {}):
            widths = {
                key: max(start.get(key, _NARROWEST), cell_len(key), cell_len(cells.get(key, "-")))
                for key in {**start, **cells}
            }
            if sum(widths.values()) + _GAP * (len(widths) - 1) <= room:
                return widths
        return None

    def _as_line(self, entry: LogEntry, values: dict[str, str]) -> Text:
        line = Text(f"logsync {self._name} step={readable_step(entry.step)} seq={entry.seq}")
        for key, value in values.items():
            line.append(f" {key}=").append(value, _style(value))
        remark = note(entry)
        return line.append(f" ({remark})") if remark else line


def _print(console: Console, text: Text) -> None:
    with _bars_out_of_the_way(console):
        console.print(text, soft_wrap=True)  # rich would fold at 80 columns where there is no terminal


@contextlib.contextmanager
def _bars_out_of_the_way(console: Console) -> Iterator[None]:
    """Have the progress bars of tqdm, if the script draws some, make room on a terminal and come again below."""
    tqdm: Any = getattr(sys.modules.get("tqdm"), "tqdm", None)
    if not console.is_terminal or not getattr(tqdm, "_instances", None):
        yield
        return
    with tqdm.external_write_mode(file=console.file):
        yield


def _row(cells: dict[str, str], widths: dict[str, int], style: str = "") -> Text:
    row = Text(style=style)
    for key, width in widths.items():
        cell = cells.get(key, "-")
        row.append(" " * (width - cell_len(cell) + (_GAP if row else 0))).append(cell, _style(cell))
    return row


def _style(value: str) -> str:
    return "red" if value in _NOT_FINITE else ""
