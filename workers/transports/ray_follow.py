"""A follower's side of the talk with the coordinator's actor, without Ray: on a thread, so that nobody waits."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

from logsync.coordinator.errors import LogsyncError, printable
from logsync.coordinator.messages import Window
from logsync.workers.transports.ray_member import LineBroken
from logsync.workers.transports.ray_wire import EARLIER, WIRE, Answer, Follow, decode_answer, encode

__all__ = ["FollowSession", "FollowerLine"]

_logger = logging.getLogger(__name__)

_SLICE_S = 0.25  # how often a wait looks up
_PAUSE_S = 0.5  # before the actor is looked for again
_GOODBYE_S = 5.0


class FollowerLine(Protocol):
    """The way to the actor of one name."""

    job: str

    def find(self) -> None:
        """Find the actor; never makes one.

        Raises:
            LineBroken: it is not there.
        """

    def ask(self, data: bytes) -> Callable[[float], bytes]:
        """Send a question; what is returned waits so many seconds for the answer, and raises TimeoutError.

        Raises:
            LineBroken: the actor is gone, or is not reached. So may what is returned.
        """


class FollowSession:
    """One follower's log, as the actor knows it.

    One call of the actor is open at any time: it brings a window, and is answered when the next entry is made. It is
    made again where the actor was lost: windows are numbered, and none is merged twice.
    """

    def __init__(self, line: FollowerLine) -> None:
        self.has_news = False
        """Whether an entry was made of which `hand_over` has not been told."""
        self.reply = b""
        """The last reply with an entry that was heard of."""
        self.asked = 0
        self.bytes_sent = 0
        self._line = line
        self._who = ""
        self._session = secrets.token_hex(8)
        self._run = ""
        self._made = 0
        self._number = 0
        self._window = Window()
        self._unsettled: dict[int, Window] = {}  # by number, those that arrived and may be in no entry yet
        self._again = False  # the actor that they arrived at may be gone
        self._found = False
        self._reached = False  # the actor was found once
        self._taking: Callable[[], Window] | None = None
        self._last: Callable[[], Window] | None = None
        self._handed = threading.Event()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="logsync-follower", daemon=True)

    def start(self, label: str | None) -> None:
        """Begin to listen; never waits."""
        place = f"on {printable(socket.gethostname(), 80)} (pid {os.getpid()})"
        self._who = f"{label} {place}" if label else place
        self._thread.start()

    def hand_over(self, taking: Callable[[], Window]) -> None:
        """Have the thread send a window, which `taking` makes there; after news, once."""
        self.has_news = False
        self._taking = taking
        self._handed.set()

    def close(self, taking: Callable[[], Window]) -> bool:
        """Send a last window; returns whether the actor has said within some seconds that it has it."""
        self._last = taking
        self._closed.set()
        self._handed.set()
        self._thread.join(_GOODBYE_S)
        return self._last is None

    # -- on the thread -----------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while not self._closed.is_set():
                answer = self._told(closing=False)
                if answer is not None and answer.kind == "reply":
                    self._settle(answer)
                    self._run, self._made, self.reply = answer.run, answer.entries_made, answer.body
                    self._handed.clear()
                    if self._closed.is_set():  # since before that
                        break
                    self.has_news = True
                    self._handed.wait()
                    self._take(self._taking)
                    self._taking = None
            self._say_goodbye()
        except Exception:  # e.g. the interpreter is being torn down
            _logger.debug("the follower's thread ended", exc_info=True)

    def _settle(self, answer: Answer) -> None:
        """Keep the window that has arrived until it is in an entry, which for one that was late takes another log."""
        if answer.run != self._run:
            self._unsettled.clear()
        if self._window.schema:
            self._unsettled[self._number] = self._window
        self._window = Window()
        for number in [n for n in self._unsettled if n <= answer.merged]:
            del self._unsettled[number]
        while len(self._unsettled) > EARLIER:
            del self._unsettled[next(iter(self._unsettled))]

    def _take(self, taking: Callable[[], Window] | None) -> None:
        """Make the next window of what was handed over."""
        self._number += 1
        self._window = Window()
        if taking is not None:
            try:
                self._window = taking()
            except Exception:  # a device that failed
                _logger.exception("what follower %s recorded is lost", self._who)

    def _say_goodbye(self) -> None:
        """Send what may not have arrived, and what was recorded since."""
        until = time.monotonic() + _GOODBYE_S
        if self._window.schema:
            self._told(closing=True, until=until)
        self._take(self._last)
        if not self._window.schema or self._told(closing=True, until=until) is not None:
            self._last = None

    def _told(self, *, closing: bool, until: float = float("inf")) -> Answer | None:
        """Ask until there is an answer; None when the log was closed meanwhile, or at the deadline of a goodbye."""
        while time.monotonic() < until and (closing or not self._closed.is_set()):
            try:
                if not self._found:
                    self._line.find()
                    self._found = self._reached = True
                answer = self._asked(closing=closing, until=until)
            except LineBroken as error:
                if closing and not self._reached:  # there is no log: why should there be one now
                    return None
                self._found = False
                self._again = True
                _logger.debug("follower %s does not reach the coordinator's actor: %s", self._who, error)
                self._pause(_PAUSE_S if not closing else _SLICE_S)
                continue
            except LogsyncError as error:  # its answer is none
                _logger.warning("follower %s was not understood: %s", self._who, error)
                self._pause(_PAUSE_S)
                continue
            if answer is not None and answer.kind == "stranger":  # another job's; this one's is not there yet
                self._found = False
                self._pause(_PAUSE_S if not closing else _SLICE_S)
                continue
            self._again = self._again and answer is None
            if answer is not None and answer.kind == "error":
                _logger.warning("follower %s was refused: %s", self._who, printable(answer.error, 1000))
                self._window = Window()
                self._pause(_PAUSE_S)
                if not closing:
                    continue
            return answer
        return None

    def _asked(self, *, closing: bool, until: float) -> Answer | None:
        data = encode(
            Follow(
                WIRE,
                self._session,
                self._who,
                self._run,
                self._made,
                self._number,
                self._window,
                closing,
                self._line.job,
                self._unsettled if self._again else {},
            )
        )
        self.asked += 1
        self.bytes_sent += len(data)
        wait = self._line.ask(data)
        while time.monotonic() < until and (closing or not self._closed.is_set()):
            with contextlib.suppress(TimeoutError):
                return decode_answer(wait(_SLICE_S))
        return None

    def _pause(self, seconds: float) -> None:
        if self._closed.is_set():
            time.sleep(seconds)
        else:
            self._closed.wait(seconds)
