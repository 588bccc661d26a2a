"""Entries and runs as sinks meet them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo, Sink

__all__ = ["entry", "feed", "run"]


def entry(seq: int, metrics: dict[str, float] | None = None, **changes: object) -> LogEntry:
    """An entry at step 10 * seq and time 1000 + seq."""
    values = {"loss": seq / 2} if metrics is None else metrics
    plain = LogEntry(seq=seq, step=seq * 10, time=1000.0 + seq, attempt=0, calls=10, world_size=2, metrics=values)
    return msgspec.structs.replace(plain, **changes)


def run(
    run_dir: Path,
    next_seq: int = 0,
    *,
    resumed: bool = False,
    run_id: str = "",
    last_entry: LogEntry | None = None,
) -> RunInfo:
    return RunInfo(
        run_dir=run_dir,
        name="train",
        attempt=int(resumed),
        world_size=2,
        next_seq=next_seq,
        resumed=resumed,
        run_id=run_id,
        last_entry=last_entry,
    )


def feed(make: Callable[[], Sink], info: RunInfo, *entries: LogEntry, close: bool = True) -> Sink:
    """What one start of the job does; without `close`, one that is killed."""
    sink = make()
    sink.open(info)
    for one in entries:
        sink.write(one)
    if close:
        sink.close()
    return sink
