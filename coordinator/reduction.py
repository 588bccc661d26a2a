"""What everybody's values add up to.

Ranks send partials: a weighted sum and its weight, never a mean. Partials merge by standing side by side, which is
associative, has an identity, and loses nothing; they are reduced once, at the root. Sums over ranks are correctly
rounded (`math.fsum`), so the result does not depend on the order in which frames came or were merged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import repeat
from typing import NamedTuple

from logsync.coordinator.errors import ProtocolError, ReductionMismatch
from logsync.coordinator.messages import KeySpec, Window, unpack_schema, unpack_values

__all__ = ["SPREAD", "Merged", "Partials"]

SPREAD = ("min", "max", "std", "argmax_rank")
"""What `spread` adds to a key's name."""

_NAMED_RANKS = 16
_CACHED_BYTES = 65_536


class Merged(NamedTuple):
    """Reduced metrics; the fields are those of `LogEntry` of the same names."""

    metrics: dict[str, float]
    ranks: dict[str, int]
    nan_ranks: dict[str, tuple[int, ...]]


class _Column:
    """All ranks' partials of one key."""

    __slots__ = ("ranks", "spec", "values", "weights")

    def __init__(self, spec: KeySpec) -> None:
        self.spec = spec
        self.ranks: list[int] = []
        self.values: list[float] = []
        self.weights: list[float] = []


class Partials:
    """Some ranks' windows, not reduced yet."""

    def __init__(self) -> None:
        self._columns: dict[str, _Column] = {}

    def __bool__(self) -> bool:
        return bool(self._columns)

    def add_windows(self, windows: Iterable[tuple[int, Window]]) -> None:
        """Take in ranks' windows, as (rank, window).

        Raises:
            ProtocolError: a window's bytes are not one.
            ReductionMismatch: two ranks reduce one key differently.
        """
        alike: dict[bytes, tuple[list[int], list[bytes]]] = {}
        for rank, window in windows:
            if window.schema or window.values:
                ranks, rows = alike.setdefault(window.schema, ([], []))
                ranks.append(rank)
                rows.append(window.values)
        for schema, (ranks, rows) in alike.items():
            keys = (_known_keys if len(schema) <= _CACHED_BYTES else _keys)(schema, ranks[0])
            width = len(keys)
            # Column by column, so that thousands of ranks are folded by C loops.
            flat = list(zip(*map(unpack_values, rows, repeat(width), ranks), strict=True))
            for index, spec in enumerate(keys):
                self._extend(spec, ranks, flat[2 * index], flat[2 * index + 1])

    def merge(self, other: Partials) -> None:
        """Take in everything that `other` holds."""
        for column in other._columns.values():
            self._extend(column.spec, column.ranks, column.values, column.weights)

    def misfit(self, other: Partials) -> str:
        """Return why a key of `other` cannot be merged with this one's, empty if all can."""
        for name, column in other._columns.items():
            mine = self._columns.get(name)
            if mine is not None and mine.spec != column.spec:
                return f"metric {name!r} is recorded with {_options(column.spec)}, elsewhere with {_options(mine.spec)}"
        return ""

    def reduce(self, world_size: int) -> Merged:
        """Reduce every key once.

        Raises:
            ReductionMismatch: what spread or per_rank makes of one key is another key's name.
        """
        merged = Merged({}, {}, {})
        self._check_derived()
        for name, column in self._columns.items():
            _reduce_column(name, column, world_size, merged)
        return merged

    def _check_derived(self) -> None:
        """Refuse keys of one rank that collide with what another rank's key makes."""
        for column in self._columns.values():
            spec = column.spec
            made = [f"{spec.name}/{suffix}" for suffix in SPREAD] if spec.spread else []
            made += [f"{spec.name}/rank{rank}" for rank in column.ranks] if spec.per_rank else []
            for other in made:
                if other in self._columns:
                    ranks = (min(column.ranks), min(self._columns[other].ranks))
                    msg = (
                        f"metric {other!r} of rank {ranks[1]} collides with what spread or per_rank makes of "
                        f"{spec.name!r} on rank {ranks[0]}; rename one"
                    )
                    raise ReductionMismatch(msg, ranks=ranks)

    def _extend(self, spec: KeySpec, ranks: list[int], values: Sequence[float], weights: Sequence[float]) -> None:
        column = self._columns.get(spec.name)
        if column is None:
            column = self._columns[spec.name] = _Column(spec)
        elif column.spec != spec:
            first, second = sorted([(min(column.ranks), column.spec), (min(ranks), spec)], key=lambda pair: pair[0])
            msg = (
                f"metric {spec.name!r} is recorded with {_options(first[1])} on rank {first[0]} and with "
                f"{_options(second[1])} on rank {second[0]}; give it one reduction, or two names"
            )
            raise ReductionMismatch(msg, ranks=(first[0], second[0]))
        column.ranks.extend(ranks)
        column.values.extend(values)
        column.weights.extend(weights)


def _keys(schema: bytes, rank: int) -> tuple[KeySpec, ...]:
    keys = unpack_schema(schema, rank)
    if len({spec.name for spec in keys}) < len(keys):
        msg = f"the window of rank {rank} names a key twice"
        raise ProtocolError(msg, ranks=(rank,))
    return keys


# Ranks send the same keys round after round.
_known_keys = lru_cache(maxsize=32)(_keys)


def _options(spec: KeySpec) -> str:
    flags = "".join(f", {flag}=True" for flag in ("spread", "per_rank") if getattr(spec, flag))
    return f"reduce={spec.reduce!r}, across={spec.across!r}{flags}"


def _reduce_column(name: str, column: _Column, world_size: int, merged: Merged) -> None:
    spec, ranks = column.spec, column.ranks
    weighted = spec.reduce == "mean" and spec.across == "mean"
    if weighted:
        value = _ratio(_sum(column.values), _sum(column.weights))
        if math.isfinite(value) and not (spec.spread or spec.per_rank):  # the usual case needs no rank's own value
            merged.metrics[name] = value
            if len(ranks) < world_size:
                merged.ranks[name] = len(ranks)
            return
    folded = _folded(column)
    # A rank whose weights add up to 0 has no value of its own.
    holders = [(r, v) for r, v, w in zip(ranks, folded, column.weights, strict=True) if w != 0]
    if not weighted:
        value = _across(spec.across, holders)
    merged.metrics[name] = value
    if len(ranks) < world_size:
        merged.ranks[name] = len(ranks)
    if not math.isfinite(value):
        merged.nan_ranks[name] = _culprits(column)
    if spec.spread and holders:
        _add_spread(name, holders, merged)
    if spec.per_rank:
        for rank, own in sorted(holders):
            merged.metrics[f"{name}/rank{rank}"] = own


def _culprits(column: _Column) -> tuple[int, ...]:
    """Return the ranks whose values are not finite; all, if it is only together that they are not."""
    own = [r for r, v in zip(column.ranks, column.values, strict=True) if not math.isfinite(v)]
    return _lowest(own or column.ranks)


def _folded(column: _Column) -> list[float]:
    """Return each rank's own value."""
    if column.spec.reduce != "mean":
        return column.values
    return [_ratio(v, w) for v, w in zip(column.values, column.weights, strict=True)]


def _across(across: str, holders: list[tuple[int, float]]) -> float:
    """Fold ranks' values into one; NaN wins over everything but "last"."""
    if not holders:
        return math.nan
    if across == "last":
        return min(holders)[1]
    values = [v for _, v in holders]
    if across == "sum":
        return _sum(values)
    if across == "mean":
        return _sum(values) / len(values)
    if any(map(math.isnan, values)):
        return math.nan
    return min(values) if across == "min" else max(values)


def _add_spread(name: str, holders: list[tuple[int, float]], merged: Merged) -> None:
    values = [v for _, v in holders]
    nans = _lowest(r for r, v in holders if math.isnan(v))
    if nans:
        low = high = deviation = math.nan
        extreme = nans[0]
    else:
        low, high = min(values), max(values)
        mean = _sum(values) / len(values)
        squares = _sum([(v - mean) * (v - mean) for v in values])
        deviation = math.sqrt(squares / len(values)) if math.isfinite(squares) else math.nan
        extreme = min(r for r, v in holders if v == high)
    for suffix, value in zip(SPREAD, (low, high, deviation, float(extreme)), strict=True):
        merged.metrics[f"{name}/{suffix}"] = value
        if not math.isfinite(value):
            merged.nan_ranks[f"{name}/{suffix}"] = nans or _lowest(r for r, v in holders if not math.isfinite(v))


def _ratio(value: float, weight: float) -> float:
    return value / weight if weight else math.nan


def _sum(values: Sequence[float]) -> float:
    """Add up, rounding once; infinities and overflow come out as IEEE arithmetic has them."""
    try:
        return math.fsum(values)
    except OverflowError:  # on the way; the sum itself may be a float
        odd = [v for v in values if not math.isfinite(v)]
        return sum(odd) if odd else _as_float(sum(map(Fraction, values)))
    except ValueError:  # inf - inf
        return math.nan


def _as_float(exact: Fraction | int) -> float:
    try:
        return float(exact)
    except OverflowError:
        return math.inf if exact > 0 else -math.inf


def _lowest(ranks: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(ranks)[:_NAMED_RANKS])
