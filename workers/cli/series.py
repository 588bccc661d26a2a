"""Entries turned by 90 degrees: one series per metric, what belongs together, and fewer points of it."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from logsync.coordinator.reduction import SPREAD
from logsync.workers.cli.runs import Entry

__all__ = ["Family", "Series", "extremes", "families", "restarts", "series_of"]

_RANK = re.compile(r"(.+)/rank([0-9]{1,7})")


class Series(NamedTuple):
    """The values of one metric, and which entries they are in, counted from 0."""

    at: array[int]
    values: array[float]

    @classmethod
    def empty(cls) -> Series:
        """Return a series of nothing yet."""
        return cls(array("q"), array("d"))


class Family(NamedTuple):
    """A metric and what `spread` and `per_rank` made of it.

    Attributes:
        name: the merged metric's.
        spread: whether `name`/min, /max, /std and /argmax_rank are there.
        ranks: the metrics of single ranks, by rank.
    """

    name: str
    spread: bool
    ranks: dict[int, str]


def series_of(entries: Iterable[Entry], pattern: str | None = None) -> dict[str, Series]:
    """Return a series for every metric whose name fits the shell-like `pattern`, in the order in which they came."""
    found: dict[str, Series] = {}
    refused: set[str] = set()
    for at, entry in enumerate(entries):
        for name, value in entry.metrics.items():
            series = found.get(name)
            if series is None:
                if name in refused or not (pattern is None or fnmatchcase(name, pattern)):
                    refused.add(name)
                    continue
                series = found[name] = Series.empty()
            series.at.append(at)
            series.values.append(value)
    return found


def families(names: Iterable[str]) -> list[Family]:
    """Return the metrics `names`, those that were made of another one within that one's family."""
    given = dict.fromkeys(names)
    spread = {name for name in given if all(f"{name}/{suffix}" in given for suffix in SPREAD)}
    members = {f"{name}/{suffix}" for name in spread for suffix in SPREAD}
    ranks: dict[str, dict[int, str]] = {}
    for name in given:
        match = _RANK.fullmatch(name)
        if match and match[1] in given:
            members.add(name)
            ranks.setdefault(match[1], {})[int(match[2])] = name
    return [
        Family(name, name in spread, dict(sorted(ranks.get(name, {}).items()))) for name in given if name not in members
    ]


def restarts(entries: Sequence[Entry]) -> list[int]:
    """Return which entries are the first of another attempt than the entry before."""
    return [at for at in range(1, len(entries)) if entries[at].attempt != entries[at - 1].attempt]


def extremes(values: Sequence[float], groups: int, *, low: bool = True, high: bool = True) -> list[int]:
    """Return which of `values` to draw: all, or of each of `groups` equal parts the lowest and highest.

    The first and the last are always there, and so is the first of each part that is not finite.
    """
    if len(values) <= groups * (low + high):
        return list(range(len(values)))
    chosen = {0, len(values) - 1}
    for group in range(groups):
        begin, end = group * len(values) // groups, (group + 1) * len(values) // groups
        finite = [at for at in range(begin, end) if math.isfinite(values[at])]
        if low and finite:
            chosen.add(min(finite, key=values.__getitem__))
        if high and finite:
            chosen.add(max(finite, key=values.__getitem__))
        if len(finite) < end - begin:
            chosen.add(next(at for at in range(begin, end) if not math.isfinite(values[at])))
    return sorted(chosen)
