"""A job whose ranks are threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import SinkSpec
from logsync.workers import TrainingLog, connect
from logsync.workers.transports.threads import ThreadWorld

__all__ = ["Job"]

T = TypeVar("T")
DEADLINE_S = 20.0


class Job:
    """Ranks as threads, and the entries of their log."""

    def __init__(
        self,
        world_size: int,
        frequency: float | None,
        *,
        timeout: float = 20.0,
        sinks: Sequence[SinkSpec] = (),
        **options: Any,
    ) -> None:
        self.world_size = world_size
        self.entries: list[LogEntry] = []
        self._world = ThreadWorld(world_size, timeout_s=timeout)
        self._frequency = frequency
        self._sinks = [self.entries.append, *sinks]
        self._options = options

    def connect(self, rank: int) -> TrainingLog:
        transport = self._world.transports[rank]
        return connect(self._frequency, transport=transport, sinks=self._sinks, **self._options)

    def play(self, train: Callable[[TrainingLog], T]) -> list[T]:
        """Have every rank train; returns what they returned, or raised, by rank."""
        results: list[Any] = [None] * self.world_size

        def be(rank: int) -> None:
            try:
                with self.connect(rank) as log:
                    results[rank] = train(log)
            except Exception as error:  # noqa: BLE001 - the test looks at it
                results[rank] = error

        threads = [threading.Thread(target=be, args=(rank,), daemon=True) for rank in range(self.world_size)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + DEADLINE_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not [t for t in threads if t.is_alive()], "a rank hangs"
        return results

    def total(self, name: str) -> float:
        return sum(entry.metrics.get(name, 0.0) for entry in self.entries)
