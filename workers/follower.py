"""The log of a process that does not march with the ranks: a rollout worker, an evaluator, a data server."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from logsync.coordinator.errors import ForkedProcess, LogClosed
from logsync.coordinator.messages import LogEntry, Window, decode_decision
from logsync.workers.timer import Timer, Timers
from logsync.workers.training_log import Stats
from logsync.workers.transports.base import Following
from logsync.workers.window import OpenWindow

__all__ = ["FollowerLog"]

_logger = logging.getLogger(__name__)


class FollowerLog:
    """One log of a job, as a follower has it; made by `connect(..., lockstep=False)`. Use it from one thread.

    A follower has no rank among the ranks that train, and no step: it comes and goes as it likes, and nobody waits for
    it, nor it for anybody. `log_ready` is True once after a log was made, and then what this process has recorded goes
    into the next entry. With a label its metrics are named `<label>/<name>`; without one, and among followers of one
    label, they merge by their reductions with everything else of the same name.
    """

    def __init__(self, following: Following, name: str, label: str | None) -> None:
        self._following = following
        self._name = name
        self._label = label
        self._window = OpenWindow(label or "")
        self.record: Callable[..., None] = self._window.record
        self._timers = Timers(self._window)
        self._calls = 0
        self._pid = os.getpid()
        self._closed = False
        following.start(label)

    @property
    def name(self) -> str:
        """The name of the log that this process follows."""
        return self._name

    @property
    def label(self) -> str | None:
        """What stands before the names of this process's metrics."""
        return self._label

    @property
    def transport(self) -> str:
        """How windows travel: "ray"."""
        return "ray"

    @property
    def is_coordinator(self) -> bool:
        """Never: rank 0 speaks for the coordinator."""
        return False

    @property
    def last_entry(self) -> LogEntry | None:
        """The last entry that this process has heard of; None before the first one since it came."""
        reply = self._following.reply
        return decode_decision(reply).entry if reply else None

    @property
    def stats(self) -> Stats:
        """What the log has cost this process: `rounds` are calls of the actor, and there is no waiting."""
        return Stats(self._calls, self._following.asked, self._following.bytes_sent, 0.0)

    def log_ready(self, step: object = None, check_model_update: object = False) -> bool:  # noqa: ARG002, FBT002 - as ranks call it
        """Say whether a log was made since this was True last; never waits and never communicates by itself.

        What is recorded up to a True goes into the next entry. Of logs that come closer together than the calls of
        this process only one is noticed; what it sends then is late, and counted in the entry that takes it, as
        `logsync/late_windows`.

        Args:
            step, check_model_update: for a loop that ranks run, too; a follower's do not count.

        Raises:
            LogClosed: the log is closed.
            ForkedProcess: another process has opened it.
        """
        self._calls += 1
        if not self._following.has_news and not self._closed:
            return False
        self._check_usable()
        self._following.hand_over(self._taking())
        return True

    def annotate(self, values: Mapping[str, Any]) -> None:
        """Do nothing: an entry is annotated by rank 0."""

    def timer(self, name: str) -> Timer:
        """Return a context manager that records the seconds of a section; see `TrainingLog.timer`."""
        return self._timers[name]

    def close(self) -> None:
        """Send what is recorded and stop listening; takes five seconds at most. A second call does nothing.

        It goes into the next entry, if there will be one.
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        self.record = _refuse_to_record
        self._timers.close()
        if not self._following.close(self._taking()):
            _logger.warning(
                "what follower %s recorded last may not have reached the coordinator", self._label or "without a label"
            )

    def __enter__(self) -> FollowerLog:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _taking(self) -> Callable[[], Window]:
        taken = self._window.take_later()  # devices are waited for on the log's thread
        return lambda: taken().message

    def _check_usable(self) -> None:
        if self._closed:
            msg = "the log is closed"
            raise LogClosed(msg)
        if os.getpid() != self._pid:
            msg = f"process {os.getpid()} was forked from {self._pid}, whose log this is"
            raise ForkedProcess(msg)


def _refuse_to_record(*_: object, **__: object) -> None:
    msg = "record() after the log was closed"
    raise LogClosed(msg)
