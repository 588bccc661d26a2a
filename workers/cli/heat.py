"""Every rank's wait over time, as the cells of a heat map."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from logsync.coordinator.errors import printable
from logsync.workers.cli.runs import Entry, Waited
from logsync.workers.cli.waiting import is_notable

__all__ = ["heat_of"]

_COLUMNS = 400
_ROWS = 256
_TICKS = 16


def heat_of(entries: Sequence[Entry]) -> tuple[dict[str, Any] | None, str]:
    """Return the heat map, or None and why there is none.

    Columns are equal parts of each attempt's entries, rows are ranks or neighbouring ranks; a cell is the longest
    wait in it, in milliseconds.
    """
    told = [entry for entry in entries if entry.waits is not None and math.isfinite(entry.time)]
    if not told:
        return None, (
            "There is no heat map: no line of this file tells of waits. One rank alone waits for nobody, and a file "
            "of an older version does not say."
        )
    told = [entry for entry in told if entry.waits is not None and entry.waits.each_ms]
    if not told:
        return None, "There is no heat map: there were too many ranks for the file to tell each one's wait."
    ranks = max(len(_each(entry)) for entry in told)
    together = -(-ranks // _ROWS)
    edges: list[int] = []
    columns: list[list[int | None]] = []
    slowest: list[str] = []
    for part in _parts(told):
        begin = round(1000 * (part[0].time - _interval_s(part[0])))
        end = max(begin + 1, round(1000 * part[-1].time))
        if edges and begin < edges[-1]:
            begin = edges[-1]
        elif edges and begin > edges[-1]:  # nothing was logged in between
            columns.append([None] * -(-ranks // together))
            slowest.append("")
            edges.append(begin)
        if not edges:
            edges.append(begin)
        edges.append(max(end, edges[-1] + 1))
        columns.append(_column(part, ranks, together))
        slowest.append(_slowest(part))
    last = ranks - 1
    rows = [
        f"rank {row}" if together == 1 else f"ranks {row * together} to {min(last, (row + 1) * together - 1)}"
        for row in range(-(-ranks // together))
    ]
    step = -(-len(rows) // _TICKS)
    return {
        "ranks": ranks,
        "together": _size(told),
        "rows": rows,
        "ticks": list(range(0, len(rows), step)),
        "edges": edges,
        "waits": [list(row) for row in zip(*columns, strict=True)],
        "slowest": slowest,
    }, ""


def _parts(told: Sequence[Entry]) -> list[list[Entry]]:
    """Return `told` in at most so many parts as there are columns, none with entries of two attempts."""
    size = _size(told)
    parts: list[list[Entry]] = []
    for entry in told:
        if not parts or len(parts[-1]) == size or parts[-1][-1].attempt != entry.attempt:
            parts.append([])
        parts[-1].append(entry)
    return parts


def _size(told: Sequence[Entry]) -> int:
    return max(1, -(-len(told) // _COLUMNS))


def _waits(entry: Entry) -> Waited:
    if entry.waits is None:  # _parts is given none of these
        raise ValueError(entry.seq)
    return entry.waits


def _each(entry: Entry) -> tuple[int, ...]:
    return _waits(entry).each_ms


def _interval_s(entry: Entry) -> float:
    interval_s = _waits(entry).interval_s
    return interval_s if math.isfinite(interval_s) and interval_s > 0 else 0.001


def _column(part: Sequence[Entry], ranks: int, together: int) -> list[int | None]:
    longest = [-1] * ranks
    for entry in part:
        for rank, wait_ms in enumerate(_each(entry)):
            longest[rank] = max(longest[rank], wait_ms)
    cells = (max(longest[row : row + together]) for row in range(0, ranks, together))
    return [None if cell < 0 else cell for cell in cells]


def _slowest(part: Sequence[Entry]) -> str:
    """Return who was waited for where that was longest, fit for a plot's text, or nothing."""
    waits = max((_waits(entry) for entry in part), key=lambda waits: waits.most_s - waits.least_s)
    if not is_notable(waits):
        return ""
    host = f" on {html.escape(printable(waits.host, 64))}" if waits.host else ""
    return f"<br>slowest: rank {waits.slowest}{host}"
