"""`logsync show`: what a run has logged so far, in a terminal."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import NamedTuple

import msgspec
from rich import box
from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from logsync.coordinator.errors import printable
from logsync.coordinator.sinks.text import readable, readable_step
from logsync.workers.cli.runs import Entry, RunFile
from logsync.workers.cli.series import Family, Series, families, restarts, series_of
from logsync.workers.cli.waiting import waiting_text
from logsync.workers.cli.words import duration

__all__ = ["Wish", "follow", "show"]

_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
_MOST_ROWS = 40  # metrics shown where no pattern chooses them
_NARROWEST, _WIDEST = 8, 48  # cells of a sparkline
_LONGEST_NAME, _LONGEST_HEADER = 48, 24
_GAP = 2
_PAUSE_S = 0.25


class Wish(NamedTuple):
    """What of a run to show.

    Attributes:
        last: how many entries.
        metrics: a shell-like pattern of names, None for all.
        as_json: whether for machines.
    """

    last: int = 10
    metrics: str | None = None
    as_json: bool = False


def show(run: RunFile, wish: Wish, console: Console) -> None:
    """Print the run as it is now.

    Raises:
        RunError: it cannot be read, or holds no entry.
    """
    run.poll()
    run.refuse_if_bare()
    if wish.as_json:
        _print_json(_summary(run, wish))
    else:
        console.print(_View(run, wish, console).all())


def follow(run: RunFile, wish: Wish, console: Console, wait: Callable[[float], None] = time.sleep) -> None:
    """Show the run and what comes, until it is interrupted: a view on a terminal, one line per entry elsewhere.

    Raises:
        RunError: it cannot be read, or is no log of logsync.
    """
    if console.is_terminal and not wish.as_json:
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            for _ in _changes(run, wait):
                live.update(_View(run, wish, console).fitting(), refresh=True)
        return
    printed: int | None = None
    for stood in _changes(run, wait):
        begin = max(0, len(run.entries) - wish.last) if printed is None else stood
        if printed is not None and stood < printed:
            _print_cut_back(run.entries[:stood], wish)
        for at in range(begin, len(run.entries)):
            restarted = at > 0 and run.entries[at].attempt != run.entries[at - 1].attempt
            _print_entry(run.entries[at], wish, restarted=restarted)
        sys.stdout.flush()
        printed = len(run.entries)


def _changes(run: RunFile, wait: Callable[[float], None]) -> Iterator[int]:
    """Yield once there is a file, and whenever it has changed, how many entries still stand."""
    seen: tuple[int, bool, int] | None = None
    told = False
    while True:
        if run.path.exists():
            before = len(run.entries)
            stood = run.poll()
            now = (len(run.entries), run.torn, run.broken)
            if now != seen or stood < before:
                yield stood
            seen = now
        elif not told:
            told = True
            sys.stderr.write(f"waiting for {printable(str(run.path))}\n")
        wait(_PAUSE_S)


class _View:
    """What a person sees of a run, for the width of a terminal."""

    def __init__(self, run: RunFile, wish: Wish, console: Console) -> None:
        self._run = run
        self._wish = wish
        self._width = console.width
        self._height = console.height
        self._plain = not console.encoding.startswith("utf")
        self._entries = run.entries
        self._series = series_of(run.entries, wish.metrics)
        self._families = families(self._series)
        self._restarts = restarts(run.entries)

    def all(self) -> Group:
        """Return everything."""
        most = len(self._families) if self._wish.metrics is not None else _MOST_ROWS
        return self._group(most, self._wish.last)

    def fitting(self) -> Group:
        """Return what fits the terminal's height: the last entries first, then as many metrics as there is room for."""
        last = max(1, min(self._wish.last, self._height // 3))
        frame = 9 + len(self._head()) + len(self._notes(last))
        return self._group(max(1, self._height - last - frame), last)

    def _group(self, most: int, last: int) -> Group:
        if not self._entries:
            return Group(*self._head(), Text("no entry yet", "dim"))
        parts: list[Table | Text] = [*self._head(), Text(), self._metrics(most)]
        if len(self._families) > most:
            more = len(self._families) - most
            parts.append(Text(f"and {more} more metric{'s' * (more > 1)}; --metrics PATTERN chooses", "dim"))
        return Group(*parts, Text(), *self._table(last), *self._notes(last))

    def _head(self) -> list[Text]:
        lines = [Text(printable(str(self._run.path)), "bold")]
        if self._entries:
            first, last = self._entries[0], self._entries[-1]
            count = len(self._entries)
            facts = [f"{count} entr{'y' if count == 1 else 'ies'}"]
            facts.append(f"steps {readable_step(first.step)} to {readable_step(last.step)}")
            if math.isfinite(last.time - first.time):
                facts.append(f"over {duration(last.time - first.time)}")
                facts.append(f"the last {duration(max(0.0, time.time() - last.time))} ago")
            lines.append(Text((" , " if self._plain else " · ").join(facts)))
        for at in self._restarts[-3:]:
            entry = self._entries[at]
            again = f"restarted: attempt {entry.attempt} begins at step {readable_step(entry.step)}"
            lines.append(Text(f"{self._mark} {again}", "yellow"))
        if len(self._restarts) > 3:  # noqa: PLR2004 - as above
            lines.insert(-3, Text(f"{self._mark} restarted {len(self._restarts)} times, the last three:", "yellow"))
        waited = waiting_text(self._entries)
        if waited is not None:
            lines.append(Text(waited))
        return lines + [Text(f"! {note}", "yellow") for note in self._run.notes()]

    @property
    def _mark(self) -> str:
        return ">" if self._plain else "↻"

    # -- metrics -----------------------------------------------------------------------------------------------

    def _metrics(self, most: int) -> Table:
        shown = self._families[:most]
        across = [self._across(family) for family in shown]
        wanted = [cell_len(printable(family.name)) for family in shown]
        name_width = min(max([*wanted, 6]), _LONGEST_NAME, max(12, self._width // 3))
        room = self._width - name_width - _GAP
        columns = {"last": 10}
        for extra, width in (("lowest", 10), ("highest", 10), ("ranks", max(map(cell_len, [*across, "ranks"])))):
            needed = sum(columns.values()) + _GAP * len(columns) + width + _GAP + _NARROWEST
            if needed <= room and (extra != "ranks" or any(across)):
                columns[extra] = width
        cells = max(_NARROWEST, min(_WIDEST, room - sum(columns.values()) - _GAP * len(columns)))
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
        table.add_column("metric", width=name_width, no_wrap=True, overflow="ellipsis", style="cyan")
        for name in columns:
            table.add_column(name, justify="left" if name == "ranks" else "right", no_wrap=True)
        table.add_column("over the run", no_wrap=True)
        for family, ranks in zip(shown, across, strict=True):
            series = self._series[family.name]
            finite = [value for value in series.values if math.isfinite(value)]
            texts = {
                "last": _value(series.values[-1]),
                "lowest": _value(min(finite, default=math.nan)),
                "highest": _value(max(finite, default=math.nan)),
                "ranks": Text(ranks),
            }
            table.add_row(
                Text(printable(family.name)), *(texts[name] for name in columns), self._sparkline(series, cells)
            )
        return table

    def _across(self, family: Family) -> str:
        """Return the newest spread over ranks, nothing where it is not known."""
        if family.spread:
            parts = ("min", "max", "argmax_rank")
            low, high, rank = (self._series[f"{family.name}/{part}"].values[-1] for part in parts)
            return f"{readable(low)} to {readable(high)} (rank {readable(rank)})"
        own = {rank: self._series[name].values[-1] for rank, name in family.ranks.items()}
        finite = {rank: value for rank, value in own.items() if math.isfinite(value)}
        if not finite:
            return ""
        highest = max(finite, key=finite.__getitem__)
        return f"{readable(min(finite.values()))} to {readable(finite[highest])} (rank {highest})"

    def _sparkline(self, series: Series, cells: int) -> Text:
        """Return means of equal parts of the run as bars, a red x for what is not finite, restarts as a line."""
        bars_wanted = max(1, cells - len(self._restarts)) if len(self._restarts) <= cells // 2 else cells // 2
        parts: list[list[float]] = [[] for _ in range(min(bars_wanted, len(self._entries)))]
        for at, value in zip(series.at, series.values, strict=True):
            parts[at * len(parts) // len(self._entries)].append(value)
        means = [sum(part) / len(part) if part else None for part in parts]
        finite = [mean for mean in means if mean is not None and math.isfinite(mean)]
        lowest, highest = min(finite, default=0.0), max(finite, default=0.0)
        bars = _ASCII_BARS if self._plain else _BARS
        restarted = {at * len(parts) // len(self._entries) for at in self._restarts}
        line = Text(style="green")
        for cell, mean in enumerate(means):
            if cell in restarted:
                line.append("|" if self._plain else "╎", "bold yellow")
            if mean is None:
                line.append(" ")
            elif not math.isfinite(mean):
                line.append("x" if self._plain else "✗", "bold red")
            elif not highest - lowest > 0 or math.isinf(highest - lowest):
                line.append(bars[len(bars) // 2 - 1])
            else:
                line.append(bars[min(len(bars) - 1, int((mean - lowest) / (highest - lowest) * len(bars)))])
        return line

    # -- entries -----------------------------------------------------------------------------------------------

    def _table(self, last: int) -> list[Table | Text]:
        begin = max(0, len(self._entries) - last)
        entries = self._entries[begin:]
        if not entries:
            return []
        again = {at - begin for at in self._restarts}
        columns: dict[str, list[Text]] = {
            "seq": [Text(str(entry.seq)) for entry in entries],
            "step": [Text(readable_step(entry.step)) for entry in entries],
            "time": [Text(_clock(entry.time), "dim") for entry in entries],
        }
        if self._restarts:
            columns["attempt"] = [
                Text(f"{self._mark} {entry.attempt}", "bold yellow") if at in again else Text(str(entry.attempt), "dim")
                for at, entry in enumerate(entries)
            ]
        used = sum(_width(name, cells) + _GAP for name, cells in columns.items())
        left_out = 0
        for family in self._families:
            cells = [_value(entry.metrics.get(family.name)) for entry in entries]
            header = _header(family.name, plain=self._plain)
            if not any(cells):
                continue
            if used + _width(header, cells) > self._width or header in columns:
                left_out += 1
                continue
            columns[header] = cells
            used += _width(header, cells) + _GAP
        table = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, _GAP - 1, 0, 0), header_style="bold", show_edge=False
        )
        for name in columns:
            table.add_column(Text(name), justify="right", no_wrap=True)
        for at, row in enumerate(zip(*columns.values(), strict=True)):
            if at in again:
                table.add_section()
            table.add_row(*row)
        metrics = "1 more metric" if left_out == 1 else f"{left_out} more metrics"
        more = f"and {metrics} in these entries; a wider terminal, --metrics PATTERN or --json shows them"
        return [table, Text(more, "dim")] if left_out else [table]

    def _notes(self, last: int) -> list[Text]:
        found = []
        for entry in self._entries[max(0, len(self._entries) - last) :]:
            text = _note(entry)
            if text:
                found.append(Text(f"seq {entry.seq}: {text}", "yellow"))
        return found


def _header(name: str, *, plain: bool) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_HEADER else ("..." if plain else "…") + name[3 - _LONGEST_HEADER :]


def _width(header: str, cells: Sequence[Text]) -> int:
    return max(cell_len(header), *(cell.cell_len for cell in cells))


def _value(value: float | None) -> Text:
    if value is None:
        return Text()
    return Text(readable(value), "" if math.isfinite(value) else "bold red")


def _clock(when: float) -> str:
    if not math.isfinite(when):
        return "-"
    local = datetime.fromtimestamp(when).astimezone()
    same_day = local.date() == datetime.now().astimezone().date()
    return local.strftime("%H:%M:%S" if same_day else "%Y-%m-%d %H:%M:%S")


def _note(entry: Entry) -> str:
    notes = []
    if entry.partial:
        notes.append("partial" if entry.calls is None else f"partial, from {entry.calls} calls")
    for name, ranks in entry.nan_ranks.items():
        notes.append(f"{printable(name)} is not finite because of rank {', '.join(map(str, ranks))}")
    return "; ".join(notes)


# -- for pipes and machines ------------------------------------------------------------------------------------


def _print_entry(entry: Entry, wish: Wish, *, restarted: bool) -> None:
    metrics = {name: entry.metrics[name] for name in series_of([entry], wish.metrics)}
    if wish.as_json:
        _print_json(entry._replace(metrics=metrics).as_json())
        return
    if restarted:
        print_line(f"# restarted: attempt {entry.attempt}")
    values = [f"{printable(name)}={readable(value)}" for name, value in metrics.items()]
    note = _note(entry)
    head = [f"step={readable_step(entry.step)}", f"seq={entry.seq}", f"attempt={entry.attempt}"]
    print_line(" ".join(head + values + [f"({note})"] * bool(note)))


def _print_cut_back(left: Sequence[Entry], wish: Wish) -> None:
    seq = left[-1].seq if left else None
    if wish.as_json:
        _print_json({"cut_back_to_seq": seq})
    else:
        to = "replaced" if seq is None else f"cut back to seq {seq}"
        print_line(f"# the file was {to}, as a run that is resumed or started again does; what follows is new")


def _print_json(value: object) -> None:
    print_line(msgspec.json.encode(value).decode())


def print_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _summary(run: RunFile, wish: Wish) -> dict[str, object]:
    series = series_of(run.entries, wish.metrics)
    entries = run.entries
    begins = [0, *restarts(entries)]
    return {
        "path": str(run.path),
        "entries": len(entries),
        "broken_lines": run.broken,
        "torn": run.torn,
        "attempts": [
            {"attempt": entries[at].attempt, "seq": entries[at].seq, "step": entries[at].step, "time": entries[at].time}
            for at in begins
        ],
        "waits": waiting_text(entries),
        "metrics": {name: _metric(found) for name, found in series.items()},
        "last": [
            entry._replace(metrics={name: value for name, value in entry.metrics.items() if name in series}).as_json()
            for entry in entries[max(0, len(entries) - wish.last) :]
        ],
    }


def _metric(series: Series) -> dict[str, object]:
    finite = [value for value in series.values if math.isfinite(value)]
    return {
        "entries": len(series.values),
        "last": series.values[-1],
        "lowest": min(finite, default=None),
        "highest": max(finite, default=None),
        "not_finite": len(series.values) - len(finite),
    }
