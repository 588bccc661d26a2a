"""Entries and runs as sinks meet them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo, Sink
from logsync.coordinator.sinks.isolation import SinkSet

__all__ = ["Gate", "entry", "feed", "lanes", "run", "wait_for"]


def entry(seq: int, metrics: dict[str, float] | None = None, **changes: object) -> LogEntry:
    """An entry at step 10 * seq and time 1000 + seq."""
    values = {"loss": seq / 2} if metrics is None else metrics
    plain = LogEntry(seq=seq, step=seq * 10, time=1000.0 + seq, attempt=0, calls=10, world_size=2, metrics=values)
    return msgspec.structs.replace(plain, **changes)


def lanes(sinks: SinkSet) -> list[str]:
    """Return the sinks whose threads are alive."""
    return [lane.name for lane in sinks._lanes if lane._thread is not None and lane._thread.is_alive()]


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


class Gate:
    """A sink whose writes wait until they are let through, and that can be told to raise."""

    def __init__(self) -> None:
        self.open_gate = threading.Event()
        self.tries = 0
        self.seqs: list[int] = []
        self.metrics: list[dict[str, float]] = []
        self.error: Exception | None = None
        self.closed = 0

    def open(self, run: RunInfo) -> None:
        pass

    def write(self, got: LogEntry) -> None:
        self.tries += 1
        assert self.open_gate.wait(30)
        if self.error is not None:
            raise self.error
        self.seqs.append(got.seq)
        self.metrics.append(got.metrics)

    def close(self) -> None:
        self.closed += 1


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
