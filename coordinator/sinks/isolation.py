"""Sinks on threads of their own: what one does, and how long it takes, is nobody else's business."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import msgspec

from logsync.coordinator.errors import printable
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo, Sink, SinkSpec, make_sink, name_of

__all__ = ["Lane", "SinkSet"]

_logger = logging.getLogger(__name__)

CAPACITY = 1000
"""Entries that wait for a sink; of more, the oldest are dropped."""

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 60.0


class _Job(NamedTuple):
    do: Literal["open", "write", "hyperparams", "close"]
    run: RunInfo
    entry: LogEntry | None = None


class Lane:
    """A sink, a bounded queue before it, and the thread that hands the sink what is in the queue.

    What passes (an `OSError`: the network, the disk; or a sink that does not open) makes the entry wait: it is tried
    again after pauses that double from 0.1 s to a minute, give or take a quarter, so that a dead server costs next to
    nothing and a short outage loses nothing. Any other exception of `write` loses the entry that raised it. Both are
    told once, with the traceback, and so is the first success afterwards.

    Args:
        name: how the sink is called in messages.
        sink: its methods are called on the lane's thread only.
        clock: gives seconds.
    """

    def __init__(self, name: str, sink: Sink, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.taken = 0  # entries that were put
        self.lost = 0
        self.last_error = ""
        self._sink = sink
        self._clock = clock
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._hyperparams: Mapping[str, object] | None = None
        self._thread: threading.Thread | None = None
        self._waiting_entries = 0
        self._is_writing = False
        self._busy = False  # the thread has taken a job out of the queue
        self._is_open = False
        self._failing = False  # told, and not well again since
        self._pause_s = 0.0  # until the next try
        self._ending = False
        self._given_up = False  # close() has stopped waiting

    # -- from any thread; never blocks -------------------------------------------------------------------------

    def put(self, entry: LogEntry, run: RunInfo) -> None:
        """Queue an entry of `run`."""
        with self._changed:
            self.taken += 1
            if self._waiting_entries >= CAPACITY:
                self._drop_oldest()
            self._waiting_entries += 1
            self._queue(_Job("write", run, entry))

    def put_hyperparams(self, values: Mapping[str, object], run: RunInfo) -> None:
        """Have the sink keep the run's settings, now if it is open, and whenever it opens."""
        with self._changed:
            self._hyperparams = values
            if self._thread is not None:
                self._queue(_Job("hyperparams", run))

    def reopen(self, run: RunInfo) -> None:
        """Queue the change to another run: close, and open at once if it is resumed."""
        with self._changed:
            if self._thread is not None:
                self._queue(_Job("close", run))
            if run.resumed:
                self._queue(_Job("open", run))

    @property
    def is_idle(self) -> bool:
        """Whether everything that was queued is done."""
        with self._changed:
            return not self._jobs and not self._busy

    def end(self, run: RunInfo) -> None:
        """Queue the end: what waits is tried once more, without pauses, and the sink is closed."""
        with self._changed:
            self._ending = True
            if self._thread is not None:
                self._queue(_Job("close", run))

    def wait(self, deadline: float, *, until_idle: bool = False) -> bool:
        """Wait for the thread's end, or until nothing is queued; returns whether it came to that by the deadline."""
        with self._changed:
            thread = self._thread
            while until_idle and (self._jobs or self._busy):
                left = deadline - self._clock()
                if left <= 0:
                    return False
                # In slices, so that signals are served.
                self._changed.wait(min(left, 0.2))
        if until_idle or thread is None:
            return True
        while thread.is_alive() and self._clock() < deadline:
            thread.join(max(0.0, min(0.2, deadline - self._clock())))
        return not thread.is_alive()

    def give_up(self) -> int:
        """Write nothing more; returns how many entries are lost by that."""
        with self._changed:
            self._given_up = True
            unwritten = self._waiting_entries + (self._busy and self._is_writing)
            self._jobs.clear()
            self._waiting_entries = 0
            self.lost += unwritten
            self._changed.notify_all()
            return unwritten

    def _queue(self, job: _Job) -> None:
        self._jobs.append(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name=f"logsync-{self.name}", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _drop_oldest(self) -> None:
        index = next(i for i, job in enumerate(self._jobs) if job.do == "write")
        del self._jobs[index]
        self._waiting_entries -= 1
        self.lost += 1

    # -- on the lane's thread ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._ending:
                    self._changed.wait()
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._busy = True
                self._is_writing = job.do == "write"
                self._waiting_entries -= self._is_writing
            done = self._do(job)
            with self._changed:
                self._busy = False
                if self._given_up:
                    return
                if not done:
                    # It stays the first: later entries wait behind it.
                    self._jobs.appendleft(job)
                    self._waiting_entries += self._is_writing
                    self._rest()
                self._changed.notify_all()

    def _rest(self) -> None:
        """Wait before the next try; an end cuts it short."""
        self._pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * self._pause_s))
        until = self._clock() + self._pause_s * random.uniform(0.75, 1.25)  # noqa: S311 - no secret
        while not self._ending and (left := until - self._clock()) > 0:
            self._changed.wait(left)

    def _do(self, job: _Job) -> bool:
        """Do it; returns False if it is to be tried again."""
        if job.do == "close":
            self._close()
        elif self._is_open or job.do != "hyperparams":  # which come with the opening
            return self._open_and_write(job)
        return True

    def _open_and_write(self, job: _Job) -> bool:
        passing: type[Exception] = Exception
        try:
            if not self._is_open:
                self._sink.open(job.run)
                self._is_open = True
                self._keep_hyperparams()
            elif job.do == "hyperparams":
                self._keep_hyperparams()
            passing = OSError
            if job.entry is not None:
                self._sink.write(job.entry)
        except BaseException as error:  # noqa: BLE001 - whatever a sink raises, training goes on
            what = "it" if job.entry is None else f"entry seq {job.entry.seq} (step {job.entry.step})"
            if isinstance(error, passing) and not self._ending:
                self._tell(error, f"{what} waits, and is tried again after a while")
                return False
            with self._changed:
                if not self._given_up:  # which has counted it
                    self.lost += job.entry is not None
            self._tell(error, f"{what} is lost to it")
            return True
        self._well()
        return True

    def _keep_hyperparams(self) -> None:
        keep = getattr(self._sink, "hyperparams", None)
        if keep is None or self._hyperparams is None:
            return
        try:
            keep(self._hyperparams)
        except BaseException as error:  # noqa: BLE001 - as above
            self._tell(error, "the hyperparameters are not kept there")

    def _close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._sink.close()
        except BaseException as error:  # noqa: BLE001 - as above
            self._tell(error, "closing it did not work, so what it had not flushed may be lost")

    def _well(self) -> None:
        self._pause_s = 0.0
        if self._failing:
            self._failing = False
            _logger.warning("sink %s works again; it has lost %d entries so far", self.name, self.lost)

    def _tell(self, error: BaseException, consequence: str) -> None:
        # Text, not the exception: its traceback would keep the entry and the sink's locals alive.
        self.last_error = printable(traceback.format_exception_only(type(error), error)[-1].strip())
        if not self._failing:
            self._failing = True
            _logger.error(
                "sink %s raised %s; %s. Training and the other sinks go on; further errors are counted and reported at "
                "close",
                self.name,
                self.last_error,
                consequence,
                exc_info=error,
            )


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

    def load(self) -> None:
        """Import what the sinks need, now rather than in the middle of training."""
        for lane, sink in zip(self._lanes, self._sinks, strict=True):
            load = getattr(sink, "load", None)
            if load is not None:
                try:
                    load()
                except Exception as error:  # noqa: BLE001 - opening the sink will say the same, and no rank waits for us
                    _logger.warning(
                        "sink %s could not be loaded: %s: %s", lane.name, type(error).__name__, printable(str(error))
                    )

    def prepare(self, run: RunInfo) -> None:
        """Say what run the entries to come belong to; open sinks are closed, to open again with this run."""
        self._run = run
        for lane in self._lanes:
            lane.reopen(run)

    def write(self, entry: LogEntry) -> None:
        """Queue `entry` for every sink, with what they have lost so far; never waits, never raises for a sink."""
        if self._run is None:
            _logger.error("entry seq %d (step %s) was dropped: the sinks are closed", entry.seq, entry.step)
            return
        lost = {f"logsync/dropped/{name.partition(':')[0]}": float(count) for name, count in self.lost.items()}
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
        for lane in self._lanes:
            if self._run is not None:
                lane.put_hyperparams(values, self._run)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until the sinks have taken what was queued; returns whether they have."""
        deadline = time.monotonic() + timeout_s
        return not [lane for lane in self._lanes if not lane.wait(deadline, until_idle=True)]

    def close(self) -> None:
        """Flush and close the sinks as far as the time goes, and report what each has lost; once."""
        if self._run is None:
            return
        run, self._run = self._run, None
        deadline = time.monotonic() + self._close_timeout_s
        for lane in self._lanes:
            lane.end(run)
        for lane in self._lanes:
            if not lane.wait(deadline):
                _logger.error(
                    "sink %s did not end within %g s: %d entries were not written to it",
                    lane.name,
                    self._close_timeout_s,
                    lane.give_up(),
                )
            if lane.lost:
                said = f"; last error: {lane.last_error}" if lane.last_error else ""
                _logger.error("sink %s lost %d of %d entries%s", lane.name, lane.lost, lane.taken, said)
