"""An entry as people read it: numbers in four digits, and a note on what they must know."""

from __future__ import annotations

import math

from logsync.coordinator.errors import Step, printable
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.waits import slowest_text

__all__ = ["note", "readable", "readable_step"]

_RANKS_NAMED = 8
_WHOLE = 1e12  # integers up to here are written out
_LARGE, _HUGE = 1e3, 1e9  # between them four digits would need an exponent, so all before the point are shown


def readable(value: float) -> str:
    """Return `value` with four significant digits, whole numbers whole."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size < _WHOLE and value == int(value):
        return str(int(value))
    return f"{value:.0f}" if _LARGE <= size < _HUGE else f"{value:.4g}"


def readable_step(step: Step) -> str:
    """Return `step`, integers exactly, and "-" where there is none."""
    if step is None:
        return "-"
    return str(step) if isinstance(step, int) else f"{step:.6g}"


def note(entry: LogEntry) -> str:
    """Return what a reader must know about `entry` beside its values, or nothing."""
    notes = [f"partial, from {entry.calls} calls"] if entry.partial else []
    keys_of: dict[tuple[int, ...], list[str]] = {}
    for key, ranks in entry.nan_ranks.items():
        keys_of.setdefault(ranks, []).append(printable(key))
    for ranks, keys in keys_of.items():
        named = ", ".join(map(str, ranks[:_RANKS_NAMED])) + (", ..." if len(ranks) > _RANKS_NAMED else "")
        notes.append(f"not finite because of rank{'s' * (len(ranks) > 1)} {named}: {', '.join(keys)}")
    if entry.waits is not None and (slowest := slowest_text(entry.waits)):
        notes.append(slowest)
    return "; ".join(notes)
