"""`logsync plot`: a run as one page that loads nothing."""

from __future__ import annotations

import base64
import gzip
import html
import math
import re
import time
from array import array
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from logsync.coordinator.errors import printable
from logsync.coordinator.sinks.text import readable, readable_step
from logsync.workers.cli.heat import heat_of
from logsync.workers.cli.runs import Entry, RunFile
from logsync.workers.cli.series import Family, Series, extremes, families, restarts, series_of
from logsync.workers.cli.waiting import waiting_text
from logsync.workers.cli.words import duration

__all__ = ["Page", "make_page"]

_GROUPS = 1000  # of a series on the page, each with its lowest and its highest: about one per pixel
_FEWEST_GROUPS = 60
_POINTS = 1_500_000  # on the whole page, which is what a browser reads in seconds
_RANKS_DRAWN = 16
_BAD_SHOWN = 500

# Units by the end of a name, or by what it begins with.
_UNITS = (
    (re.compile(r".*_per_(s|sec|second)"), "per second"),
    (re.compile(r"time_s/.*|.*[_/](s|sec|secs|seconds)"), "seconds"),
    (re.compile(r".*[_/]ms"), "milliseconds"),
    (re.compile(r".*[_/]us"), "microseconds"),
    (re.compile(r".*_(kb|mb|gb|tb|kib|mib|gib|tib)", re.IGNORECASE), ""),  # the end itself, see _unit
    (re.compile(r".*_bytes"), "bytes"),
    (re.compile(r".*_(pct|percent)"), "%"),
)
_BYTES = {"kb": "kB", "mb": "MB", "gb": "GB", "tb": "TB", "kib": "KiB", "mib": "MiB", "gib": "GiB", "tib": "TiB"}


class Page(NamedTuple):
    """A page and what it tells: for the command's own report."""

    text: str
    metrics: int
    points: int
    thinned: bool
    heat: bool
    notes: list[str]


def make_page(run: RunFile, pattern: str | None, library: str) -> Page:
    """Return the page of a run that was read, with the plotting `library` in it.

    Raises:
        RunError: there is no entry.
    """
    run.refuse_if_bare()
    entries = run.entries
    series = series_of(entries, pattern)
    shown = families(series)
    drawing = _Drawing(entries, series)
    groups = max(_FEWEST_GROUPS, min(_GROUPS, _POINTS // (2 * max(1, len(series)))))
    metrics = [drawing.metric(family, groups) for family in shown]
    waits = drawing.waits(groups)
    heat, why_none = heat_of(entries)
    notes = [("warning", note) for note in run.notes()]
    if drawing.thinned:
        text = (
            f"There is more than a screen shows: a curve of more than {2 * groups:,} values is drawn in {groups:,} "
            "parts, each by its mean (the line) and by its lowest and highest value at their own steps (pale), so that "
            "no peak is lost"
        )
        notes.append(("", text))
    if drawing.crowded:
        notes.append(("", f"more than {_RANKS_DRAWN} ranks are drawn as a band, not one by one"))
    if not shown:
        notes.append(("warning", "no metric's name fits the pattern" if pattern else "no entry holds a metric"))
    data = {
        "title": printable(_title(run.path)),
        "facts": _facts(run, shown, heat),
        "notes": notes,
        "step_title": "step" if drawing.has_steps else "entry",
        "attempts": drawing.attempts(),
        "range": drawing.range(),
        "places": drawing.places(),
        "metrics": metrics + ([waits] if waits is not None and heat is None else []),
        "heat": heat,
        "waited": _waited(entries, heat, why_none),
    }
    text = _filled(
        {
            "TITLE": html.escape(printable(_title(run.path))) + " - logsync",
            "STYLE": _part("page.css"),
            # "<" would let a metric's name end the element that the data is in.
            "DATA": msgspec.json.encode(data).decode().replace("<", "\\u003c"),
            "LIBRARY": base64.b64encode(gzip.compress(library.encode(), mtime=0)).decode(),
            "SCRIPT": _part("page.js"),
        }
    )
    return Page(text, len(shown), drawing.points, drawing.thinned, heat is not None, [note for _, note in notes])


def _title(path: Path) -> str:
    folder = path.absolute().parent.name
    return folder if path.name == "metrics.jsonl" and folder else path.name


def _part(name: str) -> str:
    return resources.files("logsync.workers.cli").joinpath(name).read_text(encoding="utf-8")


def _filled(parts: dict[str, str]) -> str:
    # In one go: what is put in may hold what looks like a place.
    return re.sub("@([A-Z]+)@", lambda place: parts[place[1]], _part("page.html"))


def _facts(run: RunFile, shown: list[Family], heat: dict[str, Any] | None) -> list[tuple[str, str]]:
    first, last = run.entries[0], run.entries[-1]
    steps = f"{readable_step(first.step)} to {readable_step(last.step)}"
    facts = [("entries", f"{len(run.entries):,}"), ("steps", steps)]
    if math.isfinite(first.time) and math.isfinite(last.time):
        begun = datetime.fromtimestamp(first.time, timezone.utc)
        facts += [("began (UTC)", f"{begun:%Y-%m-%d %H:%M:%S}"), ("took", duration(max(0.0, last.time - first.time)))]
    facts.append(("attempts", str(1 + len(restarts(run.entries)))))
    ranks = max([len(family.ranks) for family in shown] + [len(heat["rows"]) if heat else 0])
    if ranks:
        facts.append(("ranks", str(heat["ranks"] if heat else ranks)))
    facts.append(("file", printable(str(run.path.resolve()))))
    facts.append(("drawn (UTC)", f"{datetime.fromtimestamp(time.time(), timezone.utc):%Y-%m-%d %H:%M:%S}"))
    return facts


def _waited(entries: Sequence[Entry], heat: dict[str, Any] | None, why_none: str) -> str:
    told = waiting_text(entries)
    sentences = [f"{told[0].upper()}{told[1:]}."] if told else []
    if heat is None:
        return " ".join([*sentences, why_none])
    interval = "a log interval" if heat["together"] == 1 else f"{heat['together']} log intervals"
    reading = f"A cell is a rank's longest wait in {interval}, and a rank that waits little while the others wait is "
    return " ".join([*sentences, reading + "the one that they wait for."])


class _Drawing:
    """Turns series into what the page draws, and counts the points."""

    def __init__(self, entries: Sequence[Entry], series: dict[str, Series]) -> None:
        self._entries = entries
        self._series = series
        self.has_steps = any(entry.step is not None for entry in entries)
        self._known_places: dict[bytes, int] = {}
        self.points = 0
        self.thinned = False
        self.crowded = False

    def attempts(self) -> list[dict[str, object]]:
        again = restarts(self._entries)
        if not again:
            return []
        places = self._where([0, *again])
        return [
            {"attempt": self._entries[at].attempt, "step": step, "time": when}
            for at, step, when in zip([0, *again], places["step"], places["time"], strict=True)
        ]

    def range(self) -> dict[str, list[Any]]:
        """Return the first and last step and time, which all plots share."""
        places = self._where(range(len(self._entries)))
        known = {name: [x for x in xs if x is not None] for name, xs in places.items()}
        return {name: [min(xs), max(xs)] if xs else [] for name, xs in known.items()}

    def metric(self, family: Family, groups: int) -> dict[str, object]:
        name = family.name
        merged = self._series[name]
        found: dict[str, object] = {
            "name": printable(name),
            "unit": _unit(name),
            "last": readable(merged.values[-1]),
            "merged": self._means(merged, groups),
        }
        if len(merged.values) > 2 * groups:
            found["peaks"] = self._points(merged, groups)
        if family.spread:
            low, high, ranks = (self._series[f"{name}/{part}"] for part in ("min", "max", "argmax_rank"))
            found["low"] = self._points(low, groups, high=False)
            found["high"] = self._points(high, groups, low=False, ranks=ranks)
        elif family.ranks:
            low, high = _envelope([self._series[own] for own in family.ranks.values()])
            found["low"] = self._points(low, groups, high=False)
            found["high"] = self._points(high, groups, low=False)
        if len(family.ranks) <= _RANKS_DRAWN:
            found["ranks"] = [
                self._means(self._series[own], groups) | {"rank": rank} for rank, own in family.ranks.items()
            ]
        else:
            self.crowded = True
        bad = [(at, value) for at, value in zip(*merged, strict=True) if not math.isfinite(value)]
        if bad:
            found["bad"] = self._bad(name, bad)
        return found

    def waits(self, groups: int) -> dict[str, object] | None:
        """Return the shortest and longest waits as a metric, for entries that do not tell each rank's."""
        told = [(at, entry.waits) for at, entry in enumerate(self._entries) if entry.waits is not None]
        if not told:
            return None
        longest = _series((at, waits.most_s) for at, waits in told)
        shortest = _series((at, waits.least_s) for at, waits in told)
        return {
            "name": "waits of the ranks",
            "unit": "seconds",
            "label": "longest wait",
            "last": f"{readable(longest.values[-1])} s",
            "merged": self._means(longest, groups),
            "low": self._points(shortest, groups, high=False),
            "high": self._points(longest, groups, low=False),
        }

    def _means(self, series: Series, groups: int) -> dict[str, object]:
        """Return every point, or of each group the mean of what is finite, at its middle."""
        count = len(series.values)
        if count <= 2 * groups:
            return self._points(series, groups)
        self.thinned = True
        middles: list[int] = []
        means: list[float | None] = []
        for group in range(groups):
            begin, end = group * count // groups, (group + 1) * count // groups
            finite = [value for value in series.values[begin:end] if math.isfinite(value)]
            middles.append(series.at[(begin + end) // 2])
            means.append(_short(math.fsum(finite) / len(finite)) if finite else None)
        self.points += groups
        return {"y": means, "at": self._place(middles)}

    def _points(
        self, series: Series, groups: int, *, low: bool = True, high: bool = True, ranks: Series | None = None
    ) -> dict[str, object]:
        chosen = extremes(series.values, groups, low=low, high=high)
        self.thinned = self.thinned or len(chosen) < len(series.values)
        self.points += len(chosen)
        found: dict[str, object] = {"y": [_short(series.values[at]) for at in chosen]}
        if ranks is not None:
            by_entry = dict(zip(*ranks, strict=True))
            found["rank"] = [_short(by_entry.get(series.at[at], math.nan)) for at in chosen]
        found["at"] = self._place([series.at[at] for at in chosen])
        return found

    def _place(self, at: Sequence[int]) -> int:
        """Return which of `places` says where these entries lie: most metrics are in the same ones."""
        return self._known_places.setdefault(array("q", at).tobytes(), len(self._known_places))

    def places(self) -> list[dict[str, list[Any]]]:
        """Return where the points of everything drawn so far lie."""
        return [self._where(array("q", at)) for at in self._known_places]

    def _where(self, at: Iterable[int]) -> dict[str, list[Any]]:
        """Return where entries lie, in steps and in milliseconds since 1970."""
        entries = [self._entries[each] for each in at]
        return {
            "step": [entry.step if self.has_steps else entry.seq for entry in entries],
            "time": [round(1000 * entry.time) if math.isfinite(entry.time) else None for entry in entries],
        }

    def _bad(self, name: str, bad: list[tuple[int, float]]) -> dict[str, list[Any]]:
        shown = bad[:: max(1, len(bad) // _BAD_SHOWN)]
        texts = []
        for at, value in shown:
            ranks = self._entries[at].nan_ranks.get(name)
            texts.append(f"{value}" + (f", because of rank {', '.join(map(str, ranks))}" if ranks else ""))
        return self._where(at for at, _ in shown) | {"text": texts}


def _envelope(own: Sequence[Series]) -> tuple[Series, Series]:
    lowest: dict[int, float] = {}
    highest: dict[int, float] = {}
    for series in own:
        for at, value in zip(*series, strict=True):
            if math.isfinite(value):
                lowest[at] = min(value, lowest.get(at, value))
                highest[at] = max(value, highest.get(at, value))
    return _series(sorted(lowest.items())), _series(sorted(highest.items()))


def _series(pairs: Iterable[tuple[int, float]]) -> Series:
    made = Series.empty()
    for at, value in pairs:
        made.at.append(at)
        made.values.append(value)
    return made


def _short(value: float) -> float | None:
    """Return `value` in the seven digits that a picture shows, None where there is nothing to draw."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _unit(name: str) -> str:
    end = name.rpartition("_")[2].lower()
    for pattern, unit in _UNITS:
        if pattern.fullmatch(name):
            return unit or _BYTES[end]
    return ""
