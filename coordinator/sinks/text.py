"""Numbers as people read them: four digits."""

from __future__ import annotations

import math

from logsync.coordinator.errors import Step

__all__ = ["readable", "readable_step"]

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
