"""What a framework hands to its loggers, as a log takes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

from logsync.coordinator.errors import printable
from logsync.workers.training_log import TrainingLog
from logsync.workers.values import single_number
from logsync.workers.window import checked_name

__all__ = ["Numbers"]

_logger = logging.getLogger(__name__)


class Numbers:
    """Picks the numbers out of what is logged. The rest, such as texts and tables, is left out, and told of once.

    Frameworks let anything be logged, and a run must not end because a metric is a text.
    """

    def __init__(self) -> None:
        self._told: set[str] = set()

    def of(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Return the values that are numbers and have a name that a metric may have; waits for their device."""
        kept: dict[str, float] = {}
        for name, value in values.items():
            try:
                kept[checked_name(name)] = single_number(name, value)
            except (TypeError, ValueError) as error:  # noqa: PERF203 - each value by itself
                if str(name) not in self._told:
                    self._told.add(str(name))
                    _logger.warning("a logged value is left out, now and later: %s", printable(str(error), 300))
        return kept

    def record(self, log: TrainingLog, values: Mapping[str, Any], *, across: Literal["mean", "last"]) -> None:
        """Record the newest values in `log`, for its next entry; never communicates."""
        kept = self.of(values)
        if kept:
            log.record(kept, reduce="last", across=across)
