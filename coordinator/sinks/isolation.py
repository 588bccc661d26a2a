"""All sinks of a log: none can disturb training or another sink."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Mapping

import msgspec

from logsync.coordinator.errors import ConfigError, printable
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo, Sink, SinkSpec, make_sink, name_of
from logsync.coordinator.sinks.lane import Lane, say

__all__ = ["SinkSet"]

_CLOSING_SHARE = 0.2  # of the time that close() may take is kept for the sinks' own close()


class SinkSet:
    """Several sinks, each on a lane of its own: none can disturb training or another. See `Lane`.

    Threads start with the first entry, or when a run is resumed.

    Args:
        sinks: as given to `connect`.
        close_timeout_s: how long `close` may take in all.

    Raises:
        ValueError: an unknown name, a wrong option, or the same destination twice.
        TypeError: something that is not a sink, or sinks that are not a list.
    """

    def __init__(self, sinks: Iterable[SinkSpec], *, close_timeout_s: float = 10.0) -> None:
        if isinstance(sinks, str) or not isinstance(sinks, Iterable):
            msg = f'sinks is a list, such as ["console", "jsonl"]; given {printable(repr(sinks), 100)}'
            raise TypeError(msg)
        self._close_timeout_s = close_timeout_s
        self._run: RunInfo | None = None
        self._lanes: list[Lane] = []
        self._sinks: list[Sink] = []
        self._count = 0  # entries that were given to the lanes
        self._prepared_at = 0  # how many of them before the last prepare()
        self._newest_seq = -1
        for spec in sinks:
            sink, name = make_sink(spec), name_of(spec)
            taken = {lane.name for lane in self._lanes}
            if name in taken and isinstance(spec, str):
                msg = f"sinks names {name!r} twice; the two would write over each other"
                raise ValueError(msg)
            if name in taken:
                name = next(other for n in itertools.count(2) if (other := f"{name} ({n})") not in taken)
            self._lanes.append(Lane(name, sink))
            self._sinks.append(sink)

    @property
    def lost(self) -> dict[str, int]:
        """How many entries each sink has lost so far; sinks that lost none are left out."""
        return {lane.name: lane.lost for lane in self._lanes if lane.lost}

    def load(self) -> str:
        """Import what the sinks need, now rather than in the middle of training; only where they run.

        Returns:
            What must be installed first; empty if nothing is missing.
        """
        missing: list[str] = []
        for lane, sink in zip(self._lanes, self._sinks, strict=True):
            load = getattr(sink, "load", None)
            if load is not None:
                try:
                    load()
                except ConfigError as error:
                    missing.append(str(error))
                except Exception as error:  # noqa: BLE001 - opening the sink will say the same, and no rank waits for us
                    text = "sink %s could not be loaded: %s: %s"
                    say(logging.WARNING, text, lane.name, type(error).__name__, printable(str(error)))
        return "; ".join(missing)

    def prepare(self, run: RunInfo) -> None:
        """Say what run the entries to come belong to; open sinks are closed, to open again with this run."""
        self._run = run
        self._prepared_at = self._count
        for lane in self._lanes:
            lane.reopen(run)

    @property
    def settled_seq(self) -> int | None:
        """The last `seq` since `prepare` that every sink has written or lost, as all before it; None if there is none.

        For one thread at a time, the one that calls `write`.
        """
        settled = min((lane.settled for lane in self._lanes), default=self._count)
        # Entries of one run follow each other without a gap.
        return self._newest_seq - (self._count - settled) if settled > self._prepared_at else None

    def write(self, entry: LogEntry) -> None:
        """Queue `entry` for every sink, with what they have lost so far; never waits, never raises for a sink."""
        if self._run is None:
            say(logging.ERROR, "entry seq %d (step %s) was dropped: the sinks are closed", entry.seq, entry.step)
            return
        self._count += 1
        self._newest_seq = entry.seq
        lost: dict[str, float] = {}
        for name, count in self.lost.items():  # two files of one kind are one number
            metric = f"logsync/dropped/{name.partition(':')[0]}"
            lost[metric] = lost.get(metric, 0.0) + count
        for lane in self._lanes:
            # An entry is frozen, but its dicts are not: a sink that changes them must not change another sink's.
            own = msgspec.structs.replace(
                entry,
                metrics={**entry.metrics, **lost},
                ranks=dict(entry.ranks),
                nan_ranks=dict(entry.nan_ranks),
            )
            lane.put(own, self._run)

    def hyperparams(self, values: Mapping[str, object]) -> None:
        """Have the sinks that can keep the run's settings; never waits."""
        if self._run is None:
            say(logging.ERROR, "hyperparameters (%s) were dropped: the sinks are closed", printable(", ".join(values)))
            return
        for lane in self._lanes:
            lane.put_hyperparams(values, self._run)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until the sinks have taken what was queued; returns whether they have."""
        deadline = time.monotonic() + timeout_s
        return not [lane for lane in self._lanes if not lane.wait(deadline, until_idle=True)]

    def close(self) -> None:
        """Flush and close the sinks as far as the time goes, and report what each has lost; once."""
        if self._run is None:
            return
        self._run = None
        deadline = time.monotonic() + self._close_timeout_s
        for lane in self._lanes:
            lane.end()
        unwritten: list[int] = []
        for lane in self._lanes:
            done = lane.wait(deadline - _CLOSING_SHARE * self._close_timeout_s)
            unwritten.append(0 if done else lane.drop_queue())
        for lane, count in zip(self._lanes, unwritten, strict=True):
            ended = lane.wait(deadline)
            lost = count + lane.give_up()
            if lost or not ended:
                became = "was not done" if ended else "did not end"
                how = f"{became} within {self._close_timeout_s:g} s" if lane.has_thread else "never had a thread"
                say(logging.ERROR, "sink %s %s: %d entries were not written to it", lane.name, how, lost)
        for lane in self._lanes:
            if lane.lost:
                said = f"; last error: {lane.last_error}" if lane.last_error else ""
                say(logging.ERROR, "sink %s lost %d of %d entries%s", lane.name, lane.lost, lane.taken, said)
