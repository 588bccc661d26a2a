"""A clock, and a network that loses, doubles and delays messages, and sends a request again until its reply comes."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from logsync.coordinator.messages import Decision, decode_decision
from support.simulation.parts import Member, Root
from support.simulation.scenarios import Noise

__all__ = ["Clock", "Network"]

RESEND = 200


class Clock:
    """What is to happen, in order of time. `jitter` seeds the pauses; 0 makes them all alike."""

    def __init__(self, jitter: int) -> None:
        self.now = 0
        self._jitter = jitter
        self._queue: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._scheduled = 0

    def at(self, when: int, act: Callable[..., None], *arguments: Any) -> None:
        self._scheduled += 1
        heapq.heappush(self._queue, (when, self._scheduled, act, arguments))

    def pause(self, *what: int) -> int:
        """Return how long `what` takes, from 1 to 40."""
        return 1 + (hash((self._jitter, *what)) % 40 if self._jitter else 0)

    def tick(self) -> bool:
        """Let happen what is next; say whether there was anything."""
        if not self._queue:
            return False
        self.now, _, act, arguments = heapq.heappop(self._queue)
        act(*arguments)
        return True


class _Packet(NamedTuple):
    """Which message: a request ("up") or reply, of whom, in which round, and the how manieth copy of it."""

    way: str
    rank: int
    round: int
    copy: int


class Network:
    """Between the ranks and the root of one life.

    Args:
        key: of its pauses.
        hear: is given a reply, with its rank and round.
        decided: is given what the root has decided, before the replies are under way.
    """

    def __init__(
        self,
        clock: Clock,
        root: Root,
        noise: Collection[Noise],
        facts: Counter[str],
        *,
        key: int,
        hear: Callable[[int, int, bytes], None],
        decided: Callable[[Decision], None],
    ) -> None:
        self.down = False  # the life is over: what is still under way finds nobody
        self._clock = clock
        self._root = root
        self._noise = {("up" if n.up else "down", n.rank, n.round): n.kind for n in noise}
        self._facts = facts
        self._key = key
        self._hear = hear
        self._decided = decided

    def request(self, member: Member, number: int, frame: bytes, copy: int = 0) -> None:
        """Bring the frame of a round to the root, unless its reply has come meanwhile."""
        if member.waiting != number or not member.running or member.stopped:
            return
        self._carry(_Packet("up", member.rank, number, copy), frame)
        # Sent again until the reply comes. Only what is lost needs it; without noise it would change nothing.
        if {("up", member.rank, number), ("down", member.rank, number)} & self._noise.keys():
            self._clock.at(self._clock.now + RESEND, self.request, member, number, frame, copy + 1)

    def _carry(self, packet: _Packet, data: bytes) -> None:
        kind = self._noise.get(packet[:3]) if packet.copy == 0 else None
        if kind is not None:
            self._facts[f"{kind} messages"] += 1
        if kind == "lost":
            return
        way, rank, number, copy = packet
        now, pause = self._clock.now, self._clock.pause
        arrive = self._arrive if way == "up" else self._hear
        late = 2 * RESEND if kind == "slow" else 0
        self._clock.at(now + pause(self._key, way == "up", rank, number, copy) + late, arrive, rank, number, data)
        if kind == "doubled":
            again = 3 * pause(self._key, way == "up", rank, number, -1)
            self._clock.at(now + again, arrive, rank, number, data)

    def _arrive(self, rank: int, number: int, frame: bytes) -> None:
        """Bring a request to the root. One of an earlier life finds another run there, or nobody."""
        root = self._root
        if self.down or not root.alive:
            self._facts["late requests"] += 1
            return
        before = root.round.number
        self._facts["requests again"] += number < before or rank not in root.round.missing
        replies = root.take(rank, number, frame)
        fresh = root.round.number != before
        if fresh:
            self._decided(decode_decision(root.reply))
        for receiver, reply in replies:
            self._carry(_Packet("down", receiver, number, 0 if fresh else 1), reply)
