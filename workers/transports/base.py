"""What a transport is: one verb, and what it promises; and what a follower needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from logsync.coordinator.messages import Window

__all__ = ["Following", "Position", "Root", "Transport"]

Root = Callable[[Sequence[bytes | bytearray | memoryview]], bytes]
"""The root's side of a round: all ranks' frames, by rank, to the reply. It never raises."""

Position = Callable[[], tuple[int, int | float | None]]
"""Where this rank is: the number and the step of its last call. May be asked from any thread."""


class Transport(Protocol):
    """Carry one frame from every rank to the root, and one reply back.

    A call of `exchange` is a round. Every rank makes the same rounds in the same order, from one thread at a time.

    Guarantees:
        - The root runs exactly once per round, after every frame has arrived, with the frames in order of rank.
        - Every rank receives the same reply, byte for byte.
        - What the root refuses travels on the reply: the group goes on working.
        - A round that the transport cannot complete raises a `TransportError` on every rank, at the latest after the
          timeout; so does every later one.
        - While a rank waits, its Python signal handlers run.
        - `close` on another thread ends an `exchange` that waits: it raises a `TransportError`.
        - A transport keeps no frame or reply longer than the round takes.

    Attributes:
        name: how the transport is called in logs: "local", "collective", ...
        rank: this process's rank, from 0.
        world_size: how many ranks there are.
    """

    name: str
    rank: int
    world_size: int

    def start(self, root: Root | None, position: Position | None = None) -> None:
        """Make ready; called once, before the first round.

        Args:
            root: the root's function on rank 0, None elsewhere.
            position: tells where this rank is, for the error of another rank that misses it.

        Raises:
            CollectiveSetupError: the group could not be built.
        """

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        """Send `frame`, wait for all ranks, and return the reply.

        Args:
            frame: at most `messages.MAX_FRAME` bytes.
            patient: this rank has nothing else to do, and waits for as long as the others take.

        Raises:
            FrameTooLarge: on all ranks alike, if one rank's frame is more than the transport carries.
            RoundTimeout: a rank did not come.
            PeerFailed: a rank left and gave its reason.
            PeerLost, CoordinatorLost: a rank ended, or the connection to it broke.
        """

    def close(self, reason: str | None = None) -> None:
        """Let go of the group without waiting for anybody; a second call does nothing.

        Args:
            reason: why this rank leaves before the end; the others' next round fails, and their error says it.
        """


class Following(Protocol):
    """A follower's talk with the coordinator; `FollowSession` says what each does."""

    has_news: bool
    reply: bytes
    asked: int
    bytes_sent: int

    def start(self, label: str | None) -> None:
        """Begin to listen; never waits."""

    def hand_over(self, taking: Callable[[], Window]) -> None:
        """Send a window; after news, once."""

    def close(self, taking: Callable[[], Window]) -> bool:
        """Send a last window; returns whether it has arrived."""
