"""A sink's lane: every entry is written or counted, whatever raises, and hyperparameters arrive after all."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks import lane as lanes
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.isolation import SinkSet
from logsync.coordinator.sinks.lane import Lane
from support.sinks import Gate, entry, run, wait_for

RUN = run(Path("unused"))


class Store:
    """Keeps entries and hyperparameters; raises what it is told to."""

    def __init__(self) -> None:
        self.seqs: list[int] = []
        self.kept: list[object] = []
        self.refused: BaseException | None = None
        self.asked = 0

    def open(self, run: RunInfo) -> None:
        pass

    def write(self, got: LogEntry) -> None:
        self.seqs.append(got.seq)

    def hyperparams(self, values: object) -> None:
        self.asked += 1
        if self.refused is not None:
            raise self.refused
        self.kept.append(values)

    def close(self) -> None:
        pass


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open_gate.set()


def prepared(*sinks: object, info: RunInfo = RUN, **options: float) -> SinkSet:
    made = SinkSet(list(sinks), **options)  # type: ignore[arg-type]
    made.prepare(info)
    return made


# Written or counted


def test_what_is_under_way_when_close_gives_up_is_counted_once_and_taken_back_if_it_arrives(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = prepared(gate, close_timeout_s=0.2)
    for seq in range(3):
        sinks.write(entry(seq))
    wait_for(lambda: gate.tries == 1)
    sinks.close()
    assert sinks.lost == {"Gate": 3}
    assert "sink Gate did not end within 0.2 s: 3 entries were not written to it" in caplog.text

    gate.open_gate.set()
    wait_for(lambda: gate.closed == 1)
    assert gate.seqs == [0]
    assert sinks.lost == {"Gate": 2}
    assert "sink Gate has written entry seq 0 after all; it lost 2 of 3 entries" in caplog.text


def test_what_is_under_way_when_close_gives_up_and_then_fails_stays_counted_once(gate: Gate) -> None:
    gate.error = ConnectionError("gone")
    sinks = prepared(gate, close_timeout_s=0.2)
    for seq in range(3):
        sinks.write(entry(seq))
    wait_for(lambda: gate.tries == 1)
    sinks.close()
    gate.open_gate.set()

    wait_for(lambda: gate.closed == 1)
    assert sinks.lost == {"Gate": 3}


def test_a_sink_that_is_too_slow_for_its_queue_is_closed_in_time_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Slow(Gate):
        def write(self, got: LogEntry) -> None:
            if got.seq == 3:
                wait_for(lambda: sinks._lanes[0]._given_up)
            self.seqs.append(got.seq)

    sink = Slow()
    sinks = prepared(sink, close_timeout_s=3)
    for seq in range(200):
        sinks.write(entry(seq))
    sinks.close()

    assert sink.closed == 1
    assert sink.seqs == [0, 1, 2, 3]
    assert sinks.lost == {"Slow": 196}
    assert "sink Slow was not done within 3 s: 196 entries were not written to it" in caplog.text


def test_a_write_that_fails_at_the_moment_of_giving_up_is_counted_once() -> None:
    given_up: list[tuple[int, int, int]] = []

    class Failing(Gate):
        def write(self, got: LogEntry) -> None:
            given_up.append((got.seq, lane.drop_queue(), lane.give_up()))
            raise ValueError

    sink = Failing()
    lane = Lane("it", sink)
    with lane._changed:  # the thread starts when both are queued
        lane.put(entry(0), RUN)
        lane.put(entry(1), RUN)
    lane.end()

    assert lane.wait(time.monotonic() + 20)
    assert given_up == [(0, 1, 1)]
    assert lane.lost == lane.taken == 2
    assert sink.closed == 1


def test_what_two_sinks_of_one_kind_have_lost_is_one_sum(tmp_path: Path) -> None:
    seen: list[LogEntry] = []
    sinks = prepared("csv:/dev/full", f"csv:{tmp_path}/no/\0name", seen.append)
    first, second, _ = sinks._lanes
    first.lost, second.lost = 5, 2
    sinks.write(entry(0))
    assert sinks._lanes[2].wait(time.monotonic() + 20, until_idle=True)
    sinks.close()

    assert seen[0].metrics["logsync/dropped/csv"] == 7.0


# Threads and log handlers that fail


def test_where_no_thread_can_be_started_nothing_is_raised_and_a_later_entry_finds_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    sink = Store()
    sinks = prepared(sink)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        sinks.write(entry(0))
        sinks.write(entry(1))
    assert "can't start new thread; what it is given waits until a thread can be started" in caplog.text
    assert sink.seqs == []

    sinks.write(entry(2))
    sinks.close()
    assert sink.seqs == [0, 1, 2]
    assert sinks.lost == {}


@pytest.mark.timeout(60)
def test_entries_that_never_found_a_thread_are_counted_at_the_interpreters_exit_too(tmp_path: Path) -> None:
    script = f"""
        import atexit, threading
        from logsync.workers import connect

        def refuse(self):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        log = connect(None, sinks=["jsonl"], run_dir={str(tmp_path)!r})
        log.record(loss=1.0)
        log.log_ready(0)
        atexit.register(setattr, threading.Thread, "start", refuse)  # runs before our own, as newer Pythons refuse
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=40, check=False
    )

    assert ran.returncode == 0, ran.stderr
    assert "sink jsonl lost 1 of 1 entries; last error: RuntimeError: can't create new thread" in ran.stderr


@pytest.mark.parametrize("error", [RuntimeError("handler"), SystemExit(3)])
def test_a_log_handler_that_raises_costs_no_entry(error: BaseException) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - logging's signature
            raise error

    class Picky(Store):
        def write(self, got: LogEntry) -> None:
            if got.seq == 0:
                raise ValueError
            super().write(got)

    handler = Handler()
    logger = logging.getLogger("logsync.coordinator.sinks")
    logger.addHandler(handler)
    try:
        sink = Picky()
        sinks = prepared(sink)
        for seq in range(5):
            sinks.write(entry(seq))
        assert sinks.flush()
        sinks.close()
    finally:
        logger.removeHandler(handler)

    assert sink.seqs == [1, 2, 3, 4]
    assert sinks.lost == {"Picky": 1}


# Hyperparameters


def test_hyperparameters_survive_an_outage_that_passes_and_no_entry_waits_for_them(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lanes, "FIRST_PAUSE_S", 0.001)
    sink = Store()
    sink.refused = ConnectionError("down for a second")
    sinks = prepared(sink)
    sinks.hyperparams({"lr": 0.1})
    sinks.write(entry(0))
    assert sinks.flush()
    assert sink.seqs == [0]
    assert "works again" not in caplog.text

    sink.refused = None
    time_is_up = sinks._lanes[0]._keep_from
    wait_for(lambda: time.monotonic() > time_is_up)
    sinks.write(entry(1))
    assert sinks.flush()
    assert sink.kept == [{"lr": 0.1}]
    sinks.close()
    assert sink.asked == 2
    (told,) = [r.getMessage() for r in caplog.records]
    assert told.endswith("down for a second; the hyperparameters wait, and are tried again after a while")


def test_hyperparameters_are_tried_a_last_time_at_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "FIRST_PAUSE_S", 60.0)
    sink = Store()
    sink.refused = TimeoutError()
    sinks = prepared(sink)
    sinks.hyperparams({"lr": 0.1})
    for seq in range(5):
        sinks.write(entry(seq))
    assert sinks.flush()
    assert sink.asked == 1
    sink.refused = None
    sinks.close()

    assert sink.kept == [{"lr": 0.1}]


def test_hyperparameters_that_a_sink_refuses_for_good_are_told_of_and_not_called_well(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink = Store()
    sink.refused = ValueError("no")
    sinks = prepared(sink)
    sinks.hyperparams({"lr": 0.1})
    for seq in range(3):
        sinks.write(entry(seq))
    sinks.close()

    assert sink.asked == 1
    assert [r.getMessage() for r in caplog.records] == [
        "sink Store raised ValueError: no; the hyperparameters are not kept there"
    ]


@pytest.mark.parametrize("opened", [False, True])
def test_hyperparameters_that_come_later_join_the_first(tmp_path: Path, *, opened: bool) -> None:
    sinks = prepared("jsonl", info=run(tmp_path))
    if opened:
        sinks.write(entry(0))
        assert sinks.flush()
    sinks.hyperparams({"model": "x", "optimizer": {"name": "adam", "lr": 1}})
    sinks.hyperparams({"optimizer": {"lr": 2}, "seed": 3})
    sinks.write(entry(1))
    sinks.close()

    assert json.loads((tmp_path / "hyperparams.json").read_text()) == {
        "model": "x",
        "optimizer": {"name": "adam", "lr": 2},
        "seed": 3,
    }
