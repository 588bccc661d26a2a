"""How the command line words what several of its parts say."""

from __future__ import annotations

__all__ = ["duration"]

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def duration(seconds: float) -> str:
    """Return `seconds` in the two largest units."""
    if seconds < _MINUTE:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004 - then whole ones will do
    if seconds < _HOUR:
        return f"{int(seconds // _MINUTE)} min {int(seconds % _MINUTE)} s"
    if seconds < _DAY:
        return f"{int(seconds // _HOUR)} h {int(seconds % _HOUR // _MINUTE)} min"
    return f"{int(seconds // _DAY)} d {int(seconds % _DAY // _HOUR)} h"
