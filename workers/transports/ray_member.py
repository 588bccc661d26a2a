"""A rank's side of the talk with the coordinator's actor, without Ray: ask again, and bring a new actor up to date."""

from __future__ import annotations

import collections
import contextlib
import copy
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import msgspec

from logsync.coordinator.errors import (
    CoordinatorLost,
    FrameTooLarge,
    LogsyncError,
    PeerLost,
    TransportError,
    printable,
)
from logsync.coordinator.messages import MAX_FRAME, decode_decision
from logsync.workers.hosting import Plan, Recovered
from logsync.workers.transports.base import Position
from logsync.workers.transports.ray_wire import (
    KEPT,
    WIRE,
    Answer,
    Ask,
    Exchange,
    Held,
    Hyperparams,
    Join,
    Leave,
    Loaded,
    Poll,
    Quit,
    Release,
    decode_answer,
    encode,
    error_of,
)

__all__ = ["Line", "LineBroken", "RankSession"]

_logger = logging.getLogger(__name__)

_SLICE_S = 0.25  # how often a wait looks up
_PAUSE_S = 0.2  # before the actor is tried again
_OVERTIME_S = 3.0  # what the actor gets beyond the timeout, to say itself who is missing
_GOODBYE_S = 2.0
_FLUSH_S = 60.0
_PROCESS = secrets.token_hex(8)


class LineBroken(Exception):
    """The actor could not be asked, or its answer was lost; it may have heard the question."""


class Line(Protocol):
    """The way to the actor of one name."""

    job: str
    node: str

    def connect(self, *, succeeds: bool) -> None:
        """Find the actor, or make it; `succeeds` if this rank knew one that is gone. May be called again.

        Raises:
            LineBroken: not now.
        """

    def ask(self, data: bytes) -> Callable[[float], bytes]:
        """Send a question; what is returned waits so many seconds for the answer, and raises TimeoutError.

        Raises:
            LineBroken: the actor is gone, or is not reached. So may what is returned.
        """

    def place(self, session: str, plan: Plan) -> Callable[[float], object]:
        """Send a plan, as `ask` sends bytes."""

    def replace(self) -> None:
        """End the actor, which is of an earlier job."""


class RankSession:
    """One log of this process, as the actor knows it.

    Args:
        line: the way to the actor.
        timeout_s, warn_after_s: as given to `connect`.
        plan: how the root is to be made; rank 0's.
    """

    def __init__(
        self, line: Line, rank: int, world_size: int, *, timeout_s: float, warn_after_s: float, plan: Plan | None
    ) -> None:
        self.position: Position = _nowhere
        self.loaded: Loaded | None = None  # what the next turn tells
        self.last_words: Callable[[int], Leave] | None = None  # given how many entries the root has made
        self.held = Held("", 0, b"", b"")
        self.entry_seq = -1  # of the entry in the last reply
        self.session = secrets.token_hex(8)
        self._line = line
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._warn_after_s = warn_after_s
        self._plan = plan
        self._joined = ""  # the incarnation of the actor that knows this session
        self._joining = threading.Lock()
        self._kept: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=KEPT)
        self._notes: dict[int, dict[str, float]] = {}
        self._released = -1
        self._unsaid: Release | None = None
        self._settings: Hyperparams | None = None  # not said yet
        self._lost: LogsyncError | None = None
        self._closed = threading.Event()
        self._failures = 0
        self._last_failure = ""
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._serve, name="logsync-ray", daemon=True)

    # -- rounds ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Find the actor and take the rank there.

        Raises:
            LogsyncError: the actor refuses this rank, or is not reached within the timeout.
        """
        give_up = self._patience(impatient=True)
        while True:
            try:
                self._line.connect(succeeds=False)
                self._join(give_up)
            except LineBroken as error:
                self._failed(error)
                give_up()
                time.sleep(_PAUSE_S)
                continue
            break
        self._thread.start()

    def exchange(self, frame: bytes, *, patient: bool) -> bytes:
        """Send a frame and return the reply to its turn, whatever becomes of the actor meanwhile."""
        if self._lost is not None:
            raise copy.copy(self._lost)
        started = time.monotonic()
        too_large = len(frame) if len(frame) > MAX_FRAME else 0

        def ask() -> Exchange:
            call, step = self.position()
            waited_s = time.monotonic() - started
            sent = b"" if too_large else frame
            release = self._unsaid
            turn = self.held.turn
            return Exchange(self.session, turn, sent, patient, waited_s, too_large, call, step, release, self.loaded)

        answer = self._ask(ask, self._patience(impatient=not patient))
        self._unsaid = None
        if answer.kind == "error":
            error = error_of(answer)
            if isinstance(error, FrameTooLarge):  # no reply, but a turn
                self.held = msgspec.structs.replace(
                    self.held, turn=self.held.turn + 1, refused=answer.error, culprits=answer.ranks
                )
                self.entry_seq = -1
            else:
                self._lost = error
            raise error
        self.loaded = None
        self._take(answer)
        return answer.body

    def _take(self, answer: Answer) -> None:
        """Keep what the next actor must know."""
        kept = self._kept
        while kept and kept[0][0] <= answer.durable_seq:
            kept.popleft()
        ahead = answer.next_seq if answer.entry_seq < 0 else answer.entry_seq
        while kept and kept[-1][0] >= ahead:  # a state was loaded: these are being replaced
            kept.pop()
        if answer.entry_seq >= 0:
            kept.append((answer.entry_seq, answer.body))
        held = {seq for seq, _ in kept}
        for seq in [seq for seq in self._notes if seq not in held]:
            del self._notes[seq]
        self._released = min(self._released, ahead - 1)
        self.entry_seq = answer.entry_seq
        self.held = Held(
            answer.run,
            answer.turn + 1,
            answer.body,
            answer.memory,
            durable_seq=answer.durable_seq,
            next_seq=answer.next_seq,
            entries_made=answer.entries_made,
        )

    @property
    def recovered(self) -> Recovered:
        """What this rank knows of entries that may not be written yet."""
        found = [decode_decision(reply).entry for _, reply in self._kept]
        entries = {entry.seq: entry for entry in found if entry is not None}
        return Recovered(self.held.memory, entries, dict(self._notes), self._released)

    def release(self, seq: int, notes: dict[str, float]) -> None:
        """Have the log's thread, or the next turn, tell that entry `seq` is complete; never waits."""
        if notes:
            self._notes[seq] = notes
        self._released = seq
        self._unsaid = Release(self.session, seq, notes)

    def keep_hyperparams(self, plan: Plan, values: bytes) -> None:
        """Have the log's thread tell the run's settings; never waits. The next actor hears of them by `plan`."""
        self._plan = plan
        self._settings = Hyperparams(self.session, values)

    def close(self, reason: str | None) -> None:
        """Say goodbye; waits for the sinks if this is rank 0, and at most some seconds otherwise."""
        if self._closed.is_set():
            return
        self._closed.set()
        call, step = self.position()
        why = None if reason is None else reason[:2000].encode(errors="replace").decode()
        try:
            within = _deadline(_GOODBYE_S)
            for unsaid in (self._unsaid, self._settings):
                if unsaid is not None and self._lost is None:
                    self._ask(partial(_same, unsaid), within)
            answer = self._ask(lambda: Quit(self.session, why, call, step), within)
            made = answer.entries_made
        except LogsyncError as error:
            _logger.debug("rank %d could not say that it leaves: %s", self._rank, error)
            made = self.held.entries_made
        words = Leave(self.session) if self.last_words is None else self.last_words(made)
        try:
            self._ask(lambda: words, _deadline(_FLUSH_S if self._rank == 0 and self._lost is None else _GOODBYE_S))
        except LogsyncError as error:
            if self._rank == 0:
                _logger.warning("the coordinator's actor has not said that everything is written: %s", error)

    # -- asking ------------------------------------------------------------------------------------------------

    def _ask(self, make: Callable[[], Ask], give_up: Callable[[], object]) -> Answer:
        """Ask until there is an answer; `give_up` is called again and again meanwhile, and raises if it is enough."""
        while True:
            try:
                self._join(give_up)
                joined = self._joined
                answer = self._wait(self._line.ask(encode(make())), give_up, joined)
            except LineBroken as error:
                self._failed(error)
                give_up()
                time.sleep(_PAUSE_S)
                self._reconnect()
                continue
            if answer is None:
                continue
            if answer.kind != "stranger":
                return answer
            if self._joined == joined:
                self._joined = ""
            give_up()

    def _reconnect(self) -> None:
        try:
            self._line.connect(succeeds=self.held.turn > 0)
        except LineBroken as error:
            self._failed(error)

    def _failed(self, error: LineBroken) -> None:
        self._failures += 1
        self._last_failure = printable(str(error).strip().split("\n")[0], 300)

    def _join(self, give_up: Callable[[], object]) -> None:
        """Take the rank at an actor that does not know this session, and tell it all that this rank knows."""
        if self._joined:
            return
        while not self._joining.acquire(timeout=_SLICE_S):
            give_up()
        try:
            if self._joined:
                return
            if self._plan is not None:
                self._wait_for(self._line.place(self.session, self._plan), give_up)
            answer = self._wait(self._line.ask(encode(self._introduction())), give_up)
            if answer is not None and answer.kind == "stale":
                self._line.replace()
                msg = "the actor was of an earlier job"
                raise LineBroken(msg)
            if answer is not None and answer.kind == "error":
                raise error_of(answer)
            if answer is not None:
                if self._failures:
                    _logger.info("rank %d has told a new coordinator's actor where the run stands", self._rank)
                self._joined = answer.incarnation
        finally:
            self._joining.release()

    def _introduction(self) -> Join:
        held = self.held
        return Join(
            WIRE,
            self.session,
            _PROCESS,
            self._line.job,
            self._rank,
            self._world_size,
            socket.gethostname()[:300],
            os.getpid(),
            self._line.node,
            self._timeout_s,
            self._warn_after_s,
            None
            if held.turn == 0
            else msgspec.structs.replace(
                held,
                entries=tuple(reply for _, reply in tuple(self._kept)),
                notes=dict(self._notes),
                released=self._released,
            ),
        )

    def _wait(
        self, wait: Callable[[float], bytes], give_up: Callable[[], object], joined: str | None = None
    ) -> Answer | None:
        """Return the answer, or None if it is not worth waiting for: another actor than `joined` has taken over."""
        while True:
            try:
                answer = decode_answer(wait(_SLICE_S))
            except TimeoutError:
                give_up()
                if joined is not None and self._joined != joined:
                    return None
                continue
            self._heard = time.monotonic()
            return answer

    def _wait_for(self, wait: Callable[[float], object], give_up: Callable[[], object]) -> None:
        while True:
            try:
                wait(_SLICE_S)
            except TimeoutError:
                give_up()
                continue
            return

    def _patience(self, *, impatient: bool) -> Callable[[], None]:
        """Return what raises when it has taken too long; a patient rank waits as long as the actor is there."""
        started = time.monotonic()
        tried = self._failures

        def give_up() -> None:
            if self._closed.is_set():
                msg = "the log was closed while a round of it was open"
                raise PeerLost(msg, ranks=(self._rank,))
            if self._lost is not None:
                raise copy.copy(self._lost)
            now = time.monotonic()
            if now - (started if impatient else max(started, self._heard)) < self._timeout_s + _OVERTIME_S:
                return
            failures = self._failures - tried
            said = f"; it was tried {failures + 1} times, and last said: {self._last_failure}" if failures else ""
            msg = (
                f"the coordinator's actor gave rank {self._rank} no answer for {now - started:.1f} s (timeout "
                f"{self._timeout_s:g} s){said}. Look at the state of the cluster: ray list actors"
            )
            self._lost = CoordinatorLost(msg, round=self.held.turn)
            raise self._lost

        return give_up

    # -- the thread --------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        """Keep one poll open at the actor: it tells warnings, and a new actor is told what this rank knows."""

        def poll() -> Poll:
            return Poll(self.session, *self.position())

        while True:
            try:
                answer = self._ask(poll, self._meanwhile)
            except LogsyncError as error:
                if not self._closed.is_set() and self._lost is None:
                    self._lost = error if isinstance(error, TransportError) else CoordinatorLost(str(error))
                return
            except Exception:  # e.g. the interpreter is being torn down
                _logger.debug("the log's thread ended", exc_info=True)
                return
            if answer.kind == "error" and self._lost is None:
                self._lost = error_of(answer)
                return
            for notice in answer.notices:
                _logger.warning("%s", printable(notice, 2000))

    def _meanwhile(self) -> None:
        """While a poll is open: say what is to be said, and end with the log."""
        if self._closed.is_set() or self._lost is not None:
            msg = "closed"
            raise PeerLost(msg)
        for unsaid in (self._unsaid, self._settings):
            if unsaid is None:
                continue
            with contextlib.suppress(LineBroken, LogsyncError):  # else it is said again, an entry by the next turn
                self._wait(self._line.ask(encode(unsaid)), _deadline(_GOODBYE_S))
                if self._unsaid is unsaid:
                    self._unsaid = None
                if self._settings is unsaid:
                    self._settings = None


def _same(ask: Ask) -> Ask:
    return ask


def _deadline(seconds: float) -> Callable[[], None]:
    until = time.monotonic() + seconds

    def give_up() -> None:
        if time.monotonic() >= until:
            msg = f"the coordinator's actor gave no answer for {seconds:g} s"
            raise CoordinatorLost(msg)

    return give_up


def _nowhere() -> tuple[int, int | float | None]:
    return 0, None
