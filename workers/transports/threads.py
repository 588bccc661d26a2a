"""N ranks as threads of one process: for tests, and for notebooks that play a world."""

from __future__ import annotations

import copy
import threading
import time

from logsync.coordinator.errors import FrameTooLarge, PeerFailed, PeerLost, RoundTimeout, printable
from logsync.coordinator.messages import MAX_FRAME
from logsync.coordinator.rounds import Round
from logsync.workers.transports.base import Position, Root

__all__ = ["ThreadTransport", "ThreadWorld"]


class ThreadWorld:
    """A world of `world_size` ranks; give `transports[rank]` to `connect` in the thread that is that rank.

    Args:
        world_size: how many ranks.
        timeout_s: how long a round waits for its last frame.
    """

    def __init__(self, world_size: int, *, timeout_s: float = 60.0) -> None:
        self.transports = [ThreadTransport(self, rank, world_size) for rank in range(world_size)]
        self._timeout_s = timeout_s
        self._world_size = world_size
        self._changed = threading.Condition()
        self._root: Root | None = None
        self._round = Round(0, world_size)
        self._too_large: FrameTooLarge | None = None
        self._outcomes: dict[int, bytes | Exception] = {}  # by round; kept for the ranks that have not fetched theirs
        self._unfetched: dict[int, int] = {}
        self._positions: dict[int, Position] = {}
        self._lost: Exception | None = None

    def _serve(self, root: Root) -> None:
        with self._changed:
            self._root = root
            self._changed.notify_all()

    def _exchange(self, rank: int, frame: bytes, *, patient: bool) -> bytes:
        deadline = None if patient else time.monotonic() + self._timeout_s
        with self._changed:
            if self._lost is not None:
                raise copy.copy(self._lost)
            this = self._round
            if len(frame) > MAX_FRAME:
                msg = f"rank {rank} sent a frame of {len(frame)} bytes, {MAX_FRAME} are the most"
                self._too_large = FrameTooLarge(msg, ranks=(rank,))
                frame = b""
            this.add(rank, frame)
            if this.complete:
                self._decide(this, deadline)
            while this.number not in self._outcomes:
                self._wait(this, deadline)
            outcome = self._outcomes[this.number]
            self._unfetched[this.number] -= 1
            if not self._unfetched[this.number]:
                del self._outcomes[this.number], self._unfetched[this.number]
        if isinstance(outcome, Exception):
            raise copy.copy(outcome)
        return outcome

    def _decide(self, this: Round, deadline: float | None) -> None:
        while self._root is None:
            self._wait(this, deadline)
        too_large, self._too_large = self._too_large, None
        self._outcomes[this.number] = too_large or self._root(this.frames())
        self._unfetched[this.number] = self._world_size
        self._round = Round(this.number + 1, self._world_size)
        self._changed.notify_all()

    def _wait(self, this: Round, deadline: float | None) -> None:
        if self._lost is not None:
            raise copy.copy(self._lost)
        if deadline is not None and time.monotonic() >= deadline:
            missing = ", ".join(self._place(rank) for rank in this.missing[:8])
            msg = f"{missing} did not come to round {this.number} within {self._timeout_s:g} s"
            self._lose(RoundTimeout(msg, ranks=this.missing, round=this.number))
            return
        # In slices: a thread that waits without a timeout cannot be interrupted by Ctrl-C on every platform.
        self._changed.wait(1.0 if deadline is None else min(1.0, max(0.0, deadline - time.monotonic())))

    def _lose(self, error: Exception) -> None:
        self._lost = error
        self._changed.notify_all()

    def _leave(self, rank: int, reason: str | None) -> None:
        with self._changed:
            if self._lost is not None:
                return
            if reason is None:
                self._lose(PeerLost(f"rank {rank} left the group", ranks=(rank,)))
            else:
                msg = f"{self._place(rank)} left the log, because its code raised {printable(reason, 500)}"
                self._lose(PeerFailed(msg, ranks=(rank,)))

    def _place(self, rank: int) -> str:
        position = self._positions.get(rank)
        if position is None:
            return f"rank {rank}"
        call, step = position()
        return f"rank {rank} (call {call}, step {step})"


class ThreadTransport:
    """One rank of a `ThreadWorld`; see `Transport` for the promises."""

    name = "threads"

    def __init__(self, world: ThreadWorld, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._world = world

    def start(self, root: Root | None, position: Position | None = None) -> None:
        """Hand the root to the world."""
        if position is not None:
            self._world._positions[self.rank] = position  # noqa: SLF001 - the two classes are one thing
        if root is not None:
            self._world._serve(root)  # noqa: SLF001

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        """Wait for the other threads; the last one to come runs the root."""
        return self._world._exchange(self.rank, frame, patient=patient)  # noqa: SLF001

    def close(self, reason: str | None = None) -> None:
        """Leave: the others' next round fails."""
        self._world._leave(self.rank, reason)  # noqa: SLF001
