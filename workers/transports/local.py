"""The single-node fallback: one process, the root in it, and no group."""

from __future__ import annotations

from logsync.workers.transports.base import Position, Root

__all__ = ["LocalTransport"]


class LocalTransport:
    """A world of one rank; see `Transport` for the promises."""

    name = "local"
    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self._root: Root | None = None

    def start(self, root: Root | None, position: Position | None = None) -> None:  # noqa: ARG002 - nobody asks
        """Keep the root."""
        self._root = root

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:  # noqa: ARG002 - nobody to wait for
        """Let the root decide."""
        if self._root is None:
            msg = "exchange() before start(), or after close()"
            raise RuntimeError(msg)
        return self._root([frame])

    def close(self, reason: str | None = None) -> None:  # noqa: ARG002 - nobody to tell
        """Let go of the root."""
        self._root = None
