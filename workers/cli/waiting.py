"""Who waited for whom over a whole run, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from logsync.coordinator.errors import printable
from logsync.workers.cli.runs import Entry, Waited

__all__ = ["is_notable", "waiting_text"]

_NOTABLE_S = 0.01  # less is a busy machine
_NOTABLE_SHARE = 0.1


def is_notable(waits: Waited) -> bool:
    """Say whether ranks waited for the slowest one for 10 ms, and for a tenth of the time between two logs."""
    spread_s = waits.most_s - waits.least_s
    return spread_s >= _NOTABLE_S and spread_s >= _NOTABLE_SHARE * waits.interval_s > 0


def waiting_text(entries: Iterable[Entry]) -> str | None:
    """Return which rank the others waited for most, None if the entries say nothing of waits."""
    told = [entry.waits for entry in entries if entry.waits is not None]
    if not told:
        return None
    notable = [waits for waits in told if is_notable(waits)]
    if not notable:
        return f"ranks kept pace: in {len(told)} log intervals none waited 10 ms, and a tenth of one, for another"
    ((rank, host), times) = Counter((waits.slowest, waits.host) for waits in notable).most_common(1)[0]
    named = f"rank {rank}" + (f" on {printable(host, 64)}" if host else "")
    longest = max(waits.most_s - waits.least_s for waits in notable)
    return (
        f"in {len(notable)} of {len(told)} log intervals ranks waited for a slower one, up to {longest:.3g} s; "
        f"it was {named} in {times} of them"
    )
