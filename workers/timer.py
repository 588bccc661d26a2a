"""Seconds of a section of the training loop, as a metric with spread."""

from __future__ import annotations

from contextlib import ContextDecorator
from time import perf_counter

from logsync.coordinator.errors import LogClosed
from logsync.workers.window import Cell, OpenWindow, checked_name

__all__ = ["Timer", "Timers"]


class Timer(ContextDecorator):
    """Adds the seconds of each section that it encloses to one metric; see `TrainingLog.timer`.

    Sections may overlap in any order: the sum of their seconds does not depend on which end belongs to which start.
    """

    def __init__(self, cell: Cell) -> None:
        self._cell = cell
        self._starts: list[float] = []

    def __enter__(self) -> None:
        self._starts.append(perf_counter())

    def __exit__(self, *_: object) -> None:
        # As record() does for a mean; a section that raised took its time, too.
        cell = self._cell
        cell.value += perf_counter() - self._starts.pop()
        cell.weight += 1.0


class Timers(dict[str, Timer]):
    """A log's timers by name, made when first asked for: a look-up is all that the next step pays."""

    def __init__(self, window: OpenWindow) -> None:
        super().__init__()
        self._window: OpenWindow | None = window

    def __missing__(self, name: str) -> Timer:
        if self._window is None:
            msg = "timer() after the log was closed"
            raise LogClosed(msg)
        timer = self[name] = Timer(self._window.mean_with_spread(f"time_s/{checked_name(name)}"))
        return timer

    def close(self) -> None:
        """Forget all timers; a new one is refused."""
        self.clear()
        self._window = None
