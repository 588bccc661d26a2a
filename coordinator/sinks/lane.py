"""One sink on a thread of its own: what it does, and how long it takes, is nobody else's business."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, TypeAlias

from logsync.coordinator.errors import printable
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo, Sink

__all__ = ["Lane", "say"]

_logger = logging.getLogger(__name__)

CAPACITY = 1000
"""Entries that wait for a sink; of more, the oldest are dropped."""

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 60.0


class _Job(NamedTuple):
    do: Literal["open", "write", "hyperparams", "close"]
    run: RunInfo
    entry: LogEntry | None = None
    number: int = 0  # of the entry: how many were put before it


_Outcome: TypeAlias = Literal["done", "again", "lost"]


class Lane:
    """A sink, a bounded queue before it, and the thread that hands the sink what is in the queue.

    What passes (an `OSError`: the network, the disk; or a sink that does not open) makes the entry wait: it is tried
    again after pauses that double from 0.1 s to a minute, give or take a quarter, so that a dead server costs next to
    nothing and a short outage loses nothing. Any other exception of `write` loses the entry that raised it. Both are
    told once, with the traceback, and so is the first success afterwards.

    Every entry that was put is written, counted in `lost`, or still on its way.

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
        self._thread: threading.Thread | None = None
        self._waiting_entries = 0
        self._current: _Job | None = None  # what the thread has taken out of the queue
        self._is_counted_lost = False  # the current entry is, although its write may yet succeed
        self._is_open = False
        self._failing = False  # told, and not well again since
        self._pause_s = 0.0  # until the next try
        self._ending = False
        self._given_up = False  # close() has stopped waiting for what was queued
        self._hyperparams: dict[str, object] = {}
        self._unkept = False  # the sink does not have them yet
        self._keep_from = 0.0  # when to try again
        self._keep_pause_s = 0.0

    # -- from any thread; never blocks -------------------------------------------------------------------------

    def put(self, entry: LogEntry, run: RunInfo) -> None:
        """Queue an entry of `run`."""
        with self._changed:
            if self._waiting_entries >= CAPACITY:
                self._drop_oldest()
            self._waiting_entries += 1
            self._jobs.append(_Job("write", run, entry, self.taken))
            self.taken += 1
        self._serve_on_a_thread()

    def put_hyperparams(self, values: Mapping[str, object], run: RunInfo) -> None:
        """Have the sink keep the run's settings, now if it is open, and whenever it opens."""
        with self._changed:
            self._hyperparams = _merged(self._hyperparams, values)
            self._unkept = True
            self._keep_from = 0.0
            if self._thread is None:
                return
            self._jobs.append(_Job("hyperparams", run))
            self._changed.notify_all()

    def reopen(self, run: RunInfo) -> None:
        """Queue the change to another run: close, and open at once if it is resumed."""
        with self._changed:
            if self._thread is not None or self._jobs:
                self._jobs.append(_Job("close", run))
            if run.resumed:
                self._jobs.append(_Job("open", run))
            if not self._jobs:
                return
        self._serve_on_a_thread()

    @property
    def has_thread(self) -> bool:
        """Whether a thread was started; without an entry, or where the system has none to give, there is none."""
        return self._thread is not None

    @property
    def is_idle(self) -> bool:
        """Whether everything that was queued is done."""
        with self._changed:
            return not self._jobs and self._current is None

    @property
    def settled(self) -> int:
        """How many entries, from the first that was put, are written or lost without a gap."""
        with self._changed:
            jobs = (job for job in (self._current, *self._jobs) if job is not None and job.entry is not None)
            return min((job.number for job in jobs), default=self.taken)

    def end(self) -> None:
        """Begin the end: what waits is tried once more, without pauses, and the sink is closed."""
        with self._changed:
            self._ending = True
            if not self._jobs:
                self._changed.notify_all()
                return
        self._serve_on_a_thread()

    def wait(self, deadline: float, *, until_idle: bool = False) -> bool:
        """Wait for the thread's end, or until nothing is queued; returns whether it came to that by the deadline."""
        with self._changed:
            thread = self._thread
            while until_idle and (self._jobs or self._current is not None):
                left = deadline - self._clock()
                if left <= 0 or thread is None:
                    return False
                # In slices, so that signals are served.
                self._changed.wait(min(left, 0.2))
        if until_idle:
            return True
        while thread is not None and thread.is_alive():
            if self._clock() >= deadline:
                return False
            thread.join(max(0.0, min(0.2, deadline - self._clock())))
        return not self._jobs

    def drop_queue(self) -> int:
        """Hand the sink nothing more, so that it can be closed; returns how many entries are lost by that."""
        with self._changed:
            self._given_up = True
            unwritten = self._waiting_entries
            self._jobs.clear()
            self._waiting_entries = 0
            self.lost += unwritten
            self._changed.notify_all()
            return unwritten

    def give_up(self) -> int:
        """Count the entry that is being written as lost; it is taken back should it succeed after all.

        Returns:
            How many that are: one or none.
        """
        with self._changed:
            unwritten = self._current is not None and self._current.entry is not None
            self._is_counted_lost = unwritten
            self.lost += unwritten
            return int(unwritten)

    def _serve_on_a_thread(self) -> None:
        """See to it that a thread serves the queue; where none can be had, the next call tries again."""
        with self._changed:
            self._changed.notify_all()
            if self._thread is not None:
                return
            self._thread = threading.Thread(target=self._serve, name=f"logsync-{self.name}", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as problem:  # the system has no more, or the interpreter is about to end
                self._thread = None
                error = problem
            else:
                return
        self._tell(error, "what it is given waits until a thread can be started")

    def _drop_oldest(self) -> None:
        index = next(i for i, job in enumerate(self._jobs) if job.do == "write")
        del self._jobs[index]
        self._waiting_entries -= 1
        self.lost += 1

    # -- on the lane's thread ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            outcome = self._do(job)
            with self._changed:
                self._current = None
                self._settle(job, outcome)
                self._changed.notify_all()
        self._close()

    def _next(self) -> _Job | None:
        """Wait for the next job and take it; None at the end."""
        with self._changed:
            while not self._jobs and not self._ending:
                self._changed.wait()
            if not self._jobs:
                return None
            self._current = job = self._jobs.popleft()
            self._waiting_entries -= job.entry is not None
            return job

    def _settle(self, job: _Job, outcome: _Outcome) -> None:
        """Count what became of `job`, once, or put it back to be the first again."""
        was_counted, self._is_counted_lost = self._is_counted_lost, False
        if outcome == "again" and not self._given_up:
            self._jobs.appendleft(job)  # later entries wait behind it
            self._waiting_entries += job.entry is not None
            self._rest()
        elif job.entry is not None and (outcome != "done") != was_counted:
            self.lost += -1 if was_counted else 1
            if was_counted:
                say(
                    logging.WARNING,
                    "sink %s has written entry seq %d after all; it lost %d of %d entries",
                    self.name,
                    job.entry.seq,
                    self.lost,
                    self.taken,
                )

    def _rest(self) -> None:
        """Wait before the next try; an end cuts it short."""
        self._pause_s = _longer(self._pause_s)
        until = self._clock() + self._pause_s * random.uniform(0.75, 1.25)  # noqa: S311 - no secret
        while not self._ending and (left := until - self._clock()) > 0:
            self._changed.wait(left)

    def _do(self, job: _Job) -> _Outcome:
        if job.do == "close":
            self._close()
        elif self._is_open or job.do != "hyperparams":  # which come with the opening
            return self._open_and_write(job)
        return "done"

    def _open_and_write(self, job: _Job) -> _Outcome:
        passing: type[Exception] = Exception
        try:
            if not self._is_open:
                self._sink.open(job.run)
                self._is_open = True
                self._unkept, self._keep_from = True, 0.0
            self._keep_hyperparams()
            passing = OSError
            if job.entry is not None:
                self._sink.write(job.entry)
        except BaseException as error:  # noqa: BLE001 - whatever a sink raises, training goes on
            what = "it" if job.entry is None else f"entry seq {job.entry.seq} (step {job.entry.step})"
            if isinstance(error, passing) and not self._ending:
                self._tell(error, f"{what} waits, and is tried again after a while")
                return "again"
            self._tell(error, f"{what} is lost to it")
            return "lost"
        if job.do != "hyperparams":
            self._well()
        return "done"

    def _keep_hyperparams(self, *, is_last_try: bool = False) -> None:
        """Hand the sink the hyperparameters if it lacks them; what passes is tried again, and no entry waits for it."""
        keep = getattr(self._sink, "hyperparams", None)
        with self._changed:
            values = dict(self._hyperparams)
            due = self._unkept and bool(values) and (is_last_try or self._clock() >= self._keep_from)
            if keep is None or not due:
                return
            self._unkept = False  # unless more come meanwhile
        try:
            keep(values)
        except BaseException as error:  # noqa: BLE001 - as above
            with self._changed:
                again = isinstance(error, OSError) and not is_last_try
                is_told = self._keep_pause_s > 0 and again
                if again:
                    self._unkept = True
                    self._keep_pause_s = _longer(self._keep_pause_s)
                    self._keep_from = self._clock() + self._keep_pause_s
            if not is_told:
                what = "wait, and are tried again after a while" if again else "are not kept there"
                say(
                    logging.ERROR,
                    "sink %s raised %s; the hyperparameters %s",
                    self.name,
                    _first_line(error),
                    what,
                    exc_info=error,
                )
        else:
            self._keep_pause_s = 0.0

    def _close(self) -> None:
        if not self._is_open:
            return
        self._keep_hyperparams(is_last_try=True)
        self._is_open = False
        try:
            self._sink.close()
        except BaseException as error:  # noqa: BLE001 - as above
            self._tell(error, "closing it did not work, so what it had not flushed may be lost")

    def _well(self) -> None:
        self._pause_s = 0.0
        if self._failing:
            self._failing = False
            say(logging.WARNING, "sink %s works again; it has lost %d entries so far", self.name, self.lost)

    def _tell(self, error: BaseException, consequence: str) -> None:
        # Text, not the exception: its traceback would keep the entry and the sink's locals alive.
        self.last_error = _first_line(error)
        if not self._failing:
            self._failing = True
            say(
                logging.ERROR,
                "sink %s raised %s; %s. Training and the other sinks go on; further errors are counted and reported at "
                "close",
                self.name,
                self.last_error,
                consequence,
                exc_info=error,
            )


def say(level: int, text: str, *values: object, exc_info: BaseException | None = None) -> None:
    """Log it; a handler that raises, or that ends its thread, does so neither to training nor to a lane."""
    with contextlib.suppress(Exception, SystemExit):
        _logger.log(level, text, *values, exc_info=exc_info)


def _first_line(error: BaseException) -> str:
    try:
        return printable(traceback.format_exception_only(type(error), error)[-1].strip())
    except Exception:  # noqa: BLE001 - an exception whose text raises one
        return type(error).__name__


def _longer(pause_s: float) -> float:
    return min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * pause_s))


def _merged(old: Mapping[str, object], new: Mapping[str, object]) -> dict[str, object]:
    """Return both, copied; of what both name, the new value, and of two groups again both."""
    both = {**old, **new}
    for name, value in new.items():
        if isinstance(value, Mapping):
            before = old.get(name)
            both[name] = _merged(before if isinstance(before, Mapping) else {}, value)
    return both
