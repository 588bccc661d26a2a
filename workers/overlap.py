"""A round that runs on the log's thread while the training goes on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from logsync.coordinator.errors import Step
from logsync.coordinator.messages import Report, encode
from logsync.workers.ledger import Unsure, with_updates
from logsync.workers.transports.base import Transport
from logsync.workers.window import Taken

__all__ = ["Flight", "Outcome", "Overlap"]


class Flight:
    """One round that is under way.

    Args:
        report: the frame, still without its window.
        taking: waits for the devices that hold values of the window, and returns what was taken.
        unsure: updates that only a device knows of, if there are any.
        transport: carries the frame.
        made: how many entries the root had made before.
    """

    def __init__(
        self, report: Report, taking: Callable[[], Taken], unsure: Unsure | None, transport: Transport, made: int
    ) -> None:
        self.taken = Taken.nothing()
        self.updates: list[tuple[int, Step]] = []  # of `unsure` those that were not skipped
        self.frame = b""
        self.waited_s = 0.0
        self.made = made
        self.is_built = threading.Event()  # `taken` and `frame` are there
        self._report = report
        self._taking = taking
        self._unsure = unsure
        self._transport = transport

    def __call__(self) -> bytes:
        """Build the frame and exchange it; on the log's thread."""
        try:
            self.taken = self._taking()
            report = msgspec.structs.replace(self._report, window=self.taken.message)
            if self._unsure is not None:
                self.updates = self._unsure.applied()
                report = msgspec.structs.replace(report, events=tuple(with_updates(report.events, self.updates)))
            self.frame = encode(report)
        finally:
            self.is_built.set()
        started = time.perf_counter()
        try:
            return self._transport.exchange(self.frame)
        finally:
            self.waited_s = time.perf_counter() - started


class Outcome(NamedTuple):
    """What became of a round."""

    reply: bytes
    error: BaseException | None = None


class Overlap:
    """Runs one exchange at a time on a daemon thread, which an exit does not wait for."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], bytes] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, exchange: Callable[[], bytes]) -> None:
        """Have `exchange` run; the one before must have been waited for."""
        if self._thread is None:
            thread = threading.Thread(target=self._serve, name="logsync-overlap", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no thread can be had: the others wait for this frame all the same
                self._outcomes.put(_outcome_of(exchange))
                return
            self._thread = thread
        self._jobs.put(exchange)

    def wait(self) -> Outcome:
        """Wait for the exchange; signal handlers run meanwhile.

        A handler that raises leaves the exchange as it is, to be waited for again.
        """
        return self._outcomes.get()

    def end(self) -> None:
        """Let the thread end once it is through; nobody waits for it."""
        self._jobs.put(None)

    def _serve(self) -> None:
        while (exchange := self._jobs.get()) is not None:
            self._outcomes.put(_outcome_of(exchange))
            del exchange  # not kept alive until the next round


def _outcome_of(exchange: Callable[[], bytes]) -> Outcome:
    try:
        return Outcome(exchange())
    except BaseException as error:  # noqa: BLE001 - it belongs to the caller, who will come for it
        return Outcome(b"", error)
