"""While a rank waits: tell the others where it is, warn about who is missing, and find out why a round failed."""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from logsync.coordinator.errors import CoordinatorLost, PeerFailed, ProtocolError, RoundTimeout, TransportError
from logsync.coordinator.messages import decode_decision
from logsync.workers.transports.base import Position
from logsync.workers.transports.notes import Note, Notes, dead_neighbours, pid_space, ranks_text, within
from logsync.workers.transports.postmortem import (
    GAVE_UP,
    LastRound,
    error_of_verdict,
    failed_in,
    has_timed_out,
    heard_of,
    judge,
    last_known,
    leavers,
    missed_by,
)

__all__ = ["Watch"]

_logger = logging.getLogger(__name__)

T = TypeVar("T")

_STORE_S = 2.0  # what the store gets to answer
_ROOT_ASKS_S = 2.5  # how long the root waits for the others' notes before it judges
_OTHERS_ASK_S = 4.0  # how long the others wait for its verdict


class Watch:
    """One rank's part in knowing who is where; it never communicates while rounds are healthy and quick.

    Args:
        store: the job's; None where there is none, and then errors name nobody.
        timeout_s, warn_after_s: as given to `connect`.
    """

    def __init__(self, store: Any, rank: int, world_size: int, *, timeout_s: float, warn_after_s: float) -> None:
        self.position: Position = _nowhere
        # Long before anybody warns, so that a warning does not name ranks that wait as well.
        self.first_pause_s = min(1.0, timeout_s / 8, warn_after_s / 2)
        self.beat_s = max(0.05, min(warn_after_s, timeout_s / 4))
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._warn_after_s = warn_after_s
        self._notes: Notes | None = None
        self._unanswered: threading.Thread | None = None
        self._has_begun = False  # there have been notes
        self._silent_since: float | None = None  # when a patient rank's reading began to fail
        self._is_final = False  # this rank has said that it failed or left
        self._ended = False
        self._round = 0
        self._last: LastRound | None = None
        self._beat = 0
        self._warned_s = 0.0
        self._beats: dict[int, tuple[int, float]] = {}  # each rank's last beat, and when it was first seen

    def round_done(self, reply: bytes) -> None:
        """Note that a round is complete; the first one tells the run, and with it where the notes are."""
        self._last = LastRound(self._rank, self._round, *self.position())
        self._round += 1
        if self._round == 1:
            self._begin(reply)

    def round_begins(self) -> None:
        """Forget the wait before; called when this rank begins to wait."""
        self._warned_s = 0.0
        self._beats.clear()
        self._silent_since = None

    def idle(self) -> None:
        """Show that this process lives; called every `beat_s` between rounds."""
        self._leave("idle")

    def waiting(self, waited_s: float, *, patient: bool) -> float:
        """Tell that this rank waits; warn if it has been long. Returns seconds until the next call.

        Raises:
            TransportError: the round cannot end well. Other ranks say that they have lost the group, or a rank's
                process has ended: gloo has been seen to miss a closed connection, about once in fifty kills. Or this
                rank is patient, and a peer shows no life.
        """
        self._leave("waiting")
        warns = waited_s - self._warned_s >= 0.99 * self._warn_after_s
        if warns or patient:
            notes = self._read()
            if patient:
                self._check_beats(notes)
            if warns:
                self._warned_s = waited_s
                self._warn(notes, waited_s, patient=patient)
                if not patient and (dead_neighbours(notes) or failed_in(notes, self._round)):
                    lost = self.explain("", waited_s)
                    raise lost
        return max(0.05, min(self._warn_after_s - (waited_s - self._warned_s), self.beat_s))

    def leave(self, reason: str) -> None:
        """Leave the reason why this rank goes, for at most 2 s."""
        # A file's name in an exception's text need not be UTF-8.
        self._leave("left", text=reason[:2000].encode(errors="replace").decode())

    def end(self) -> None:
        """Let go of the store's clients, each of which holds a connection."""
        self._ended = True
        self._notes = None
        self.position = _nowhere

    def explain(self, detail: str, waited_s: float) -> TransportError:
        """Return the error for a round that failed: the root's verdict, or what can be known without it."""
        seen = self._read()
        dead = dead_neighbours(seen)
        text = GAVE_UP if has_timed_out(waited_s, self._timeout_s) else ""
        self._leave("failed", dead=dead, text=text)
        if self._rank and 0 not in dead and 0 not in leavers(seen):
            found = self._verdict_of_root()
            if found is not None:
                return found
        before, seen = seen, self._ask_all(0.0 if self._rank else _ROOT_ASKS_S) or seen
        verdict = judge(
            seen,
            rank=self._rank,
            world_size=self._world_size,
            round_number=self._round,
            waited_s=waited_s,
            timeout_s=self._timeout_s,
            detail=_gist(detail),
            before=before,
            last=self._last,
        )
        if self._rank == 0:
            self._ask(lambda notes: notes.judge(verdict))
        return error_of_verdict(verdict)

    def _begin(self, reply: bytes) -> None:
        store, self._store = self._store, None
        try:
            run = decode_decision(reply).run
        except ProtocolError:
            return
        if store is not None and run:
            within(_STORE_S, lambda: self._connect(store, run))
            self._leave("idle")

    def _connect(self, store: Any, run: str) -> None:
        """Make the store's clients, which may come after the patience for them has ended."""
        notes = Notes(store, run, self._rank, self._world_size)
        if not self._ended:
            self._notes = notes
            self._has_begun = True

    def _ask(self, question: Callable[[Notes], T]) -> T | None:
        """Have the store answer within 2 s; one that does not is not asked again before it has answered.

        Its silence may be a partition that heals. A rank that left no notes from then on would be blamed for the next
        fault of any other.
        """
        notes = self._notes
        if notes is None or not self._answers():
            return None
        answer = within(_STORE_S, lambda: question(notes))
        if isinstance(answer, tuple):
            return answer[0]
        if answer is None:  # a client that has lost its connection never connects again
            self._notes = None
        self._unanswered = answer
        notes.give_up()
        return None

    def _answers(self) -> bool:
        """Say whether the store can be asked."""
        return self._notes is not None and (self._unanswered is None or not self._unanswered.is_alive())

    def _read(self) -> dict[int, Note]:
        return self._ask(Notes.read) or {}

    def _leave(
        self, doing: Literal["idle", "waiting", "failed", "left"], *, dead: tuple[int, ...] = (), text: str = ""
    ) -> None:
        if self._notes is None or (self._is_final and doing != "left"):
            return
        self._is_final = doing in {"failed", "left"}
        self._beat += 1
        call, step = self.position()
        note = Note(
            doing, self._round, self._beat, call, step, socket.gethostname(), os.getpid(), pid_space(), dead, text
        )
        self._ask(lambda notes: notes.leave(note))

    def _warn(self, notes: dict[int, Note], waited_s: float, *, patient: bool) -> None:
        if not notes:
            _logger.warning(
                "round %d has waited %.0f s; the job's store does not answer, so it is not known for whom",
                self._round,
                waited_s,
            )
            return
        present = heard_of(notes, self._round) | {self._rank}
        missing = missed_by(self._rank, notes, self._round, self._world_size)
        # One voice: the root's, or if it is late itself the lowest waiting rank's. A rank that has closed is patient.
        if missing and self._rank == min(present) and not patient:
            _logger.warning(
                "round %d has waited %.0f s for %s: %s",
                self._round,
                waited_s,
                ranks_text(missing),
                last_known(missing, notes, self._last),
            )

    def _check_beats(self, notes: dict[int, Note]) -> None:
        """Let a patient rank go when a peer shows no life for the timeout."""
        now = time.monotonic()
        if not notes:  # where the store answers, this rank's own is there
            self._check_silence(now)
            return
        self._silent_since = None
        gone = leavers(notes)
        if gone:
            verdict = judge(
                notes,
                rank=self._rank,
                world_size=self._world_size,
                round_number=self._round,
                waited_s=0.0,
                timeout_s=self._timeout_s,
                detail="nothing",
                last=self._last,
            )
            raise PeerFailed(verdict.text, ranks=verdict.ranks, round=self._round)
        for rank in set(range(self._world_size)) - {self._rank}:
            beat = notes[rank].beat if rank in notes else -1
            if self._beats.get(rank, (None, 0.0))[0] != beat:
                self._beats[rank] = (beat, now)
        silent = [rank for rank, (_, since) in self._beats.items() if now - since > self._timeout_s]
        if silent:
            msg = (
                f"rank {self._rank} makes no more calls and waits for the others, but {ranks_text(silent)} showed no "
                f"life for {self._timeout_s:g} s: {last_known(silent, notes, self._last)}"
            )
            kind = CoordinatorLost if 0 in silent else RoundTimeout
            raise kind(msg, ranks=tuple(silent), round=self._round)

    def _check_silence(self, now: float) -> None:
        """Let a patient rank go when the store, through which it would hear of its peers, is silent for the timeout."""
        self._beats.clear()  # they may have been beating
        if not self._has_begun:
            return  # there is none: gloo's connections are all that is known
        if self._silent_since is None:
            self._silent_since = now
        if now - self._silent_since > self._timeout_s:
            msg = (
                f"rank {self._rank} makes no more calls and waits for the others, but the job's store has not answered "
                f"for {self._timeout_s:g} s, so nothing is known of them"
            )
            raise CoordinatorLost(msg, ranks=(0,), round=self._round)

    def _verdict_of_root(self) -> TransportError | None:
        deadline = time.monotonic() + _OTHERS_ASK_S
        while self._answers() and time.monotonic() < deadline:
            verdict = self._ask(Notes.verdict)
            if verdict is not None:  # there is one failure only, though this rank may be a round ahead of the root
                return error_of_verdict(verdict)
            time.sleep(0.05)
        return None

    def _ask_all(self, patience_s: float) -> dict[int, Note]:
        """Read the notes until every rank has left one for this round or is known to be dead, or patience ends."""
        deadline = time.monotonic() + patience_s
        while True:
            seen = self._read()
            known = heard_of(seen, self._round).union(*(note.dead for note in seen.values()))
            if len(known) >= self._world_size or not self._answers() or time.monotonic() >= deadline:
                return seen
            time.sleep(0.05)


def _gist(detail: str) -> str:
    """Return what gloo said without the path of its source file and its advice."""
    return re.sub(r"^\[[^\]]*\] *", "", detail).partition(". This is typically")[0]


def _nowhere() -> tuple[int, None]:
    return 0, None
