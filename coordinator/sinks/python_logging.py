"""Entries as records of Python's logging."""

from __future__ import annotations

import logging

from logsync.coordinator.errors import printable
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.text import note, readable, readable_step

__all__ = ["LoggingSink"]


class LoggingSink:
    """One INFO record per entry, for the logger `logsync.metrics` or the one that is given.

    The message is `train step=50 seq=1 train/loss=0.1234`, with four significant digits; the record's attribute
    `entry` is the `LogEntry` with the exact numbers, for handlers that want those. Where the records go, and whether
    INFO is shown at all, is the program's logging configuration; nothing of it is touched here.
    """

    def __init__(self, logger: str = "logsync.metrics") -> None:
        self._logger = logging.getLogger(logger)
        self._name = ""

    def open(self, run: RunInfo) -> None:
        """Remember the log's name."""
        self._name = printable(run.name)

    def write(self, entry: LogEntry) -> None:
        """Log one record."""
        values = "".join(f" {printable(key)}={readable(value)}" for key, value in entry.metrics.items())
        remark = note(entry)
        self._logger.info(
            "%s step=%s seq=%d%s%s",
            self._name,
            readable_step(entry.step),
            entry.seq,
            values,
            f" ({remark})" if remark else "",
            extra={"entry": entry},
        )

    def close(self) -> None:
        """Do nothing; handlers belong to the program."""
