"""How long ranks waited for each other, and which one the others waited for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter

from logsync.coordinator.errors import printable
from logsync.coordinator.messages import MAX_WAIT_S, MAX_WAITS, LogEntry, Report, Waits

__all__ = ["flat_metrics", "is_notable", "slowest_text", "waits_of"]

_NOTABLE_S = 0.01  # less is a busy machine, or where a rank sits in the broadcast's tree
_NOTABLE_SHARE = 0.1


def waits_of(reports: Sequence[Report], hosts: Mapping[int, str], interval_s: float, world_size: int) -> Waits | None:
    """Return what `reports` say of the rounds since the last entry, None if fewer than two ranks say anything.

    Args:
        reports: those of the ranks that are in the run, lowest rank first.
        hosts: host names by rank, as far as they are known.
        interval_s: how long those rounds took, with the work between them.
        world_size: ranks in the job, those that have left it included.
    """
    waited = [(r.waited_s, r.rank) for r in reports if r.waited_s is not None]
    if len(waited) < 2:  # noqa: PLR2004 - nobody to wait for
        return None
    steps = [(r.step, r.rank) for r in reports if r.step is not None]
    least_s, slowest = min(waited)
    # min() takes the first, which is the lowest rank's.
    least_step, behind = min(steps, key=itemgetter(0)) if steps else (0, slowest)
    each_ms: list[int] = []
    if world_size <= MAX_WAITS:
        each_ms = [-1] * world_size
        for wait_s, rank in waited:
            each_ms[rank] = round(1000 * wait_s)
    return Waits(
        slowest=slowest,
        host=printable(hosts.get(slowest, ""), 64),
        least_s=least_s,
        most_s=max(waited)[0],
        interval_s=min(max(0.0, interval_s), MAX_WAIT_S),
        lag=max(steps, key=itemgetter(0))[0] - least_step if steps else 0,
        behind=behind,
        each_ms=tuple(each_ms),
    )


def is_notable(waits: Waits) -> bool:
    """Say whether a person should hear of it: a rank waited for 10 ms, and for a tenth of the time, for the slowest."""
    spread_s = waits.most_s - waits.least_s
    # An interval of 0 is a clock that was set back.
    return spread_s >= _NOTABLE_S and spread_s >= _NOTABLE_SHARE * waits.interval_s > 0


def slowest_text(waits: Waits) -> str:
    """Return the slowest rank and its host in words, or nothing if they are not worth a person's attention."""
    if not is_notable(waits):
        return ""
    host = f" on {printable(waits.host)}" if waits.host else ""
    spread_s = waits.most_s - waits.least_s
    return (
        f"slowest: rank {waits.slowest}{host}, others waited up to {spread_s:.2f} s of {waits.interval_s:.2f} s for it"
    )


def flat_metrics(entry: LogEntry) -> dict[str, float]:
    """Return the metrics, and the waits under names of their own: most destinations take numbers and nothing else."""
    waits = entry.waits
    if waits is None:
        return entry.metrics
    return {
        **entry.metrics,
        "logsync/wait_s/min": waits.least_s,
        "logsync/wait_s/max": waits.most_s,
        "logsync/wait_s/argmin_rank": float(waits.slowest),
        "logsync/lag_steps": float(waits.lag),
    }
