"""Entries as records of Python's logging."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import make_sink
from logsync.coordinator.sinks.python_logging import LoggingSink
from support.sinks import entry, feed, run

RUN = run(Path("unused"))


def test_an_entry_is_one_info_record_of_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        feed(LoggingSink, RUN, entry(1, {"train/loss": 0.12341234, "a\nb": 2.0}), entry(2, {"x": 1.0}, step=None))

    assert caplog.record_tuples == [
        ("logsync.metrics", logging.INFO, r"train step=10 seq=1 train/loss=0.1234 a\nb=2"),
        ("logsync.metrics", logging.INFO, "train step=- seq=2 x=1"),
    ]


def test_a_note_says_what_is_partial_and_which_rank_was_not_finite(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        feed(LoggingSink, RUN, entry(0, {"a": math.nan}, partial=True, nan_ranks={"a": (3,)}))

    assert caplog.messages == ["train step=0 seq=0 a=nan (partial, from 10 calls; not finite because of rank 3: a)"]


def test_the_record_carries_the_exact_entry(caplog: pytest.LogCaptureFixture) -> None:
    one = entry(1, {"x": 1 / 3})
    with caplog.at_level(logging.INFO):
        feed(LoggingSink, RUN, one)

    (record,) = caplog.records
    carried = record.__dict__["entry"]
    assert isinstance(carried, LogEntry)
    assert carried == one


def test_the_logger_can_be_named_and_its_level_is_heeded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mine.quiet"), "level", logging.WARNING)
    with caplog.at_level(logging.INFO):
        feed(lambda: make_sink("logging:mine.loud"), RUN, entry(0))
        feed(lambda: make_sink("logging:mine.quiet"), RUN, entry(0))

    assert [record.name for record in caplog.records] == ["mine.loud"]


def test_no_handler_and_no_level_is_touched() -> None:
    loggers = [logging.getLogger(name) for name in (None, "logsync", "logsync.metrics")]
    before = [(logger.level, list(logger.handlers), logger.propagate) for logger in loggers]

    feed(LoggingSink, RUN, entry(0))

    assert [(logger.level, logger.handlers, logger.propagate) for logger in loggers] == before
