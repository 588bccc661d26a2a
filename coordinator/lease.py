"""How many of the next calls cannot be due, so that every rank may answer them alone.

Leases are counted in calls, not in steps: ranks whose steps differ would use up a lease in steps at different
iterations, and one would wait in the round while another waits in a collective of the training.
"""

from __future__ import annotations

import math
from collections import deque

from logsync.coordinator.frequency import FrequencyManager, LogStepType, earliest
from logsync.coordinator.messages import Rhythm

__all__ = ["Cadence", "due_step"]

_ROUNDS = 8
"""How many rounds the rhythm is remembered for: a change of pace is forgotten after them."""


class Cadence:
    """The counting rank's rhythm over the last rounds, and the lease that follows from it."""

    def __init__(self) -> None:
        self._rounds: deque[Rhythm] = deque(maxlen=_ROUNDS)

    def clear(self) -> None:
        """Forget everything: the next lease is 0. After a load, a rollback, a change of the counting rank."""
        self._rounds.clear()

    def observe(self, rhythm: Rhythm) -> None:
        """Take in what the counting rank's calls did since the last round."""
        self._rounds.append(rhythm)

    def snapshot(self) -> tuple[Rhythm, ...]:
        """Return what is remembered, for `restore`."""
        return tuple(self._rounds)

    def restore(self, rounds: tuple[Rhythm, ...]) -> None:
        """Go back to a snapshot."""
        self._rounds = deque(rounds, maxlen=_ROUNDS)

    def lease(self, current: LogStepType, due: LogStepType, cap: int) -> int:
        """Return how many calls after the one at step `current` cannot reach step `due`, at most `cap`.

        Holds while no increment exceeds the largest, and no gap between two changes is below the smallest, of the
        rounds remembered. A `due` of infinity is never reached.
        """
        if due == math.inf:
            return cap
        rise = max((r.rise for r in self._rounds if r.rise is not None), default=None)
        if not rise or current is None or due is None:
            return 0
        gap = max(1, min((r.gap for r in self._rounds if r.gap is not None), default=1))
        try:
            changes = math.ceil((due - current) / rise * (1 - 1e-9))
        except OverflowError:  # further away than floats reach
            return cap
        first = max(1, gap - self._rounds[-1].since)
        return max(0, min(cap, first + (changes - 1) * gap - 1))


def due_step(manager: FrequencyManager, least: LogStepType) -> LogStepType:
    """Return the earliest step at which `manager` could be ready, whatever updates are still to come.

    Args:
        manager: as it stands after the round.
        least: the smallest step of any rank in the round; no later update is taken to be older.

    Returns:
        None for "at once", infinity for "never".
    """
    frequency, last, updated = manager.log_frequency, manager.last_log_step, manager.last_model_update_step
    if frequency is None:
        return math.inf
    if last is None:
        return None
    due = earliest(last, frequency)
    if manager.mode != "on_change" or updated is None:
        return due
    if updated >= last:
        return max(due, earliest(updated, frequency))
    return earliest(last if least is None else max(last, least), frequency)
