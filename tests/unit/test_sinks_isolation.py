"""A sink that sleeps, raises, never returns or has no disk: who waits for it (nobody), and what is counted."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Sized
from pathlib import Path

import pytest

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks import lane as lanes
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.isolation import SinkSet
from logsync.coordinator.sinks.lane import Lane
from support.sinks import Gate, wait_for

RUN = RunInfo(Path("unused"), "train", attempt=0, world_size=2, next_seq=0, resumed=False)


def entry(seq: int) -> LogEntry:
    return LogEntry(seq, seq * 10, 1.5, 0, 10, 2, {"loss": seq / 4})


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open_gate.set()  # the lane's thread is not left behind


def prepared(*sinks: object, **options: float) -> SinkSet:
    made = SinkSet(list(sinks), **options)  # type: ignore[arg-type]
    made.prepare(RUN)
    return made


def test_a_sink_that_blocks_keeps_neither_the_writer_nor_another_sink_waiting(gate: Gate) -> None:
    seen: list[LogEntry] = []
    sinks = prepared(gate, seen.append)

    for seq in range(100):
        sinks.write(entry(seq))

    wait_for(lambda: len(seen) == 100)
    assert gate.seqs == []
    gate.open_gate.set()
    sinks.close()
    assert gate.seqs == list(range(100))
    assert sinks.lost == {}


def test_of_more_entries_than_the_queue_holds_the_oldest_are_lost_and_counted(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lanes, "CAPACITY", 5)
    sinks = prepared(gate)
    sinks.write(entry(0))
    wait_for(lambda: gate.tries == 1)
    for seq in range(1, 20):
        sinks.write(entry(seq))
    gate.open_gate.set()
    sinks.close()

    assert gate.seqs == [0, *range(15, 20)]
    assert sinks.lost == {"Gate": 14}
    assert "sink Gate lost 14 of 20 entries" in caplog.text


def test_what_a_sink_has_lost_is_a_metric_of_the_entries_that_follow(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "CAPACITY", 1)
    seen: list[LogEntry] = []
    sinks = prepared(gate, seen.append)
    given = [entry(seq) for seq in range(4)]
    for count, one in enumerate(given, 1):
        sinks.write(one)
        wait_for(lambda count=count: gate.tries == 1 and len(seen) == count)  # type: ignore[misc]
    gate.open_gate.set()
    sinks.close()

    assert [e.metrics.get("logsync/dropped/Gate") for e in seen] == [None, None, None, 1.0]
    assert all("logsync/dropped/Gate" not in one.metrics for one in given)


def test_a_dead_server_is_tried_ever_less_often_and_an_outage_that_passes_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses: list[float] = []
    ready = threading.Event()

    class Watched(Lane):
        def _rest(self) -> None:
            super()._rest()
            pauses.append(self._pause_s)
            if len(pauses) >= 6:
                sink.error = None
                ready.set()

    monkeypatch.setattr(lanes, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(lanes, "LONGEST_PAUSE_S", 0.008)
    sink = Gate()
    sink.open_gate.set()
    sink.error = ConnectionError("the server is gone")
    lane = Watched("Gate", sink)
    for seq in range(3):
        lane.put(entry(seq), RUN)
    assert lane.wait(time.monotonic() + 20, until_idle=True)

    assert ready.is_set()
    assert pauses == [0.001, 0.002, 0.004, 0.008, 0.008, 0.008]
    assert sink.seqs == [0, 1, 2]
    assert lane.lost == 0
    told = [(r.levelno, r.getMessage()) for r in caplog.records]
    assert [level for level, _ in told] == [logging.ERROR, logging.WARNING]
    assert "ConnectionError: the server is gone; entry seq 0 (step 0) waits, and is tried again" in told[0][1]
    assert told[1][1] == "sink Gate works again; it has lost 0 entries so far"
    lane.end()
    assert lane.wait(time.monotonic() + 20)


def test_close_tries_what_waits_once_more_without_a_pause_and_counts_what_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lanes, "FIRST_PAUSE_S", 1000.0)
    monkeypatch.setattr(lanes, "LONGEST_PAUSE_S", 1000.0)
    sink = Gate()
    sink.open_gate.set()
    sink.error = TimeoutError("no answer")
    sinks = prepared(sink)
    for seq in range(3):
        sinks.write(entry(seq))
    wait_for(lambda: sink.tries == 1)
    began = time.monotonic()
    sinks.close()

    assert time.monotonic() - began < 10
    assert sink.tries == 4
    assert sink.closed == 1
    assert sinks.lost == {"Gate": 3}


def test_close_does_not_wait_for_ever_and_tells_what_was_not_written(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[LogEntry] = []
    sinks = prepared(gate, seen.append, close_timeout_s=0.3)
    for seq in range(4):
        sinks.write(entry(seq))
    sinks.close()

    assert [e.seq for e in seen] == [0, 1, 2, 3]
    assert "sink Gate did not end within 0.3 s: 4 entries were not written to it" in caplog.text
    assert sinks.lost == {"Gate": 4}


def test_a_change_of_the_run_comes_in_its_place_among_the_entries() -> None:
    order: list[object] = []

    class Ordered(Gate):
        def open(self, run: RunInfo) -> None:
            order.append(run.attempt)

        def write(self, got: LogEntry) -> None:
            super().write(got)
            order.append(f"entry {got.seq}")

        def close(self) -> None:
            order.append("close")

    sink = Ordered()
    sinks = prepared(sink)
    sinks.write(entry(0))
    wait_for(lambda: sink.tries == 1)
    sinks.write(entry(1))
    sinks.prepare(RunInfo(Path("unused"), "train", attempt=1, world_size=2, next_seq=1, resumed=True))
    sinks.write(entry(1))
    sink.open_gate.set()
    sinks.close()

    assert order == [0, "entry 0", "entry 1", "close", 1, "entry 1", "close"]


def test_hyperparameters_are_kept_at_every_opening_and_a_sink_that_cannot_is_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Keeps(Gate):
        kept: list[object] = []  # noqa: RUF012 - one test's

        def hyperparams(self, values: object) -> None:
            self.kept.append(values)
            if len(self.kept) == 3:
                raise ValueError

    sink = Keeps()
    sink.open_gate.set()
    sinks = prepared(sink)
    sinks.hyperparams({"lr": 0.1})
    sinks.write(entry(0))
    sinks.prepare(RunInfo(Path("unused"), "train", attempt=1, world_size=2, next_seq=1, resumed=True))
    assert sinks.flush()
    assert sink.kept == [{"lr": 0.1}] * 2
    sinks.hyperparams({"lr": 0.2})
    sinks.write(entry(1))
    sinks.close()

    assert sink.kept[2] == {"lr": 0.2}
    assert "the hyperparameters are not kept there" in caplog.text
    assert sink.seqs == [0, 1]


def test_flush_serves_signals_and_can_be_interrupted(gate: Gate) -> None:
    sinks = prepared(gate)
    sinks.write(entry(0))
    lane = sinks._lanes[0]
    real = lane._changed.wait

    def interrupted(timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        return real(timeout)

    lane._changed.wait = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        sinks.flush(20)
    lane._changed.wait = real  # type: ignore[method-assign]
    gate.open_gate.set()
    assert sinks.flush(20)


def test_a_sink_on_a_full_device_costs_the_others_nothing(tmp_path: Path) -> None:
    sinks = SinkSet(["jsonl:/dev/full", "jsonl"], close_timeout_s=5)
    sinks.prepare(RunInfo(tmp_path, "train", attempt=0, world_size=1, next_seq=0, resumed=False))
    for seq in range(50):
        sinks.write(entry(seq))
    sinks.close()

    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 50
    assert sinks.lost == {"jsonl:/dev/full": 50}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stuck_in", ["time.sleep(600)", "pair[0].recv(1)", "lock.acquire()"])
def test_a_process_ends_although_a_sink_never_returns(stuck_in: str, tmp_path: Path) -> None:
    script = f"""
        import socket, threading, time
        from logsync.workers import connect

        pair = socket.socketpair()
        lock = threading.Lock()
        lock.acquire()

        def stuck(entry):
            {stuck_in}

        log = connect(1, sinks=["jsonl", stuck], run_dir={str(tmp_path)!r})
        log._host._sinks._close_timeout_s = 0.5
        for step in range(5):
            log.log_ready(step)
        log.close()
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=40, check=False
    )

    assert ran.returncode == 0, ran.stderr
    assert "did not end within 0.5 s: 5 entries were not written to it" in ran.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.timeout(60)
def test_a_forked_child_writes_nothing_and_ends(gate: Gate, tmp_path: Path) -> None:
    sinks = SinkSet([gate, "jsonl"])
    sinks.prepare(RunInfo(tmp_path, "train", attempt=0, world_size=1, next_seq=0, resumed=False))
    sinks.write(entry(0))
    wait_for(lambda: gate.tries == 1)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if all(not lane._thread.is_alive() for lane in sinks._lanes if lane._thread) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    gate.open_gate.set()
    sinks.close()

    assert gate.seqs == [0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_no_thread_is_started_before_the_first_entry_and_none_is_left_after_close() -> None:
    before = set(threading.enumerate())
    sinks = prepared(print, Gate())
    assert set(threading.enumerate()) == before
    sinks._lanes[1]._sink.open_gate.set()  # type: ignore[attr-defined]
    sinks.write(entry(0))
    sinks.close()
    assert set(threading.enumerate()) == before


def test_an_entry_is_settled_when_every_sink_has_written_or_lost_it_and_all_before_it(gate: Gate) -> None:
    taken: list[int] = []

    def quick(one: LogEntry) -> None:
        if one.seq == 1:
            msg = "lost"
            raise ValueError(msg)
        taken.append(one.seq)

    sinks = prepared(gate, quick)
    assert sinks.settled_seq is None
    for seq in range(3):
        sinks.write(entry(seq))
    wait_for(lambda: taken == [0, 2])
    assert sinks.settled_seq is None

    gate.open_gate.set()
    assert sinks.flush()
    assert sinks.settled_seq == 2
    sinks.close()


def test_what_is_known_of_given_entries_does_not_grow_where_nobody_asks() -> None:
    sinks = SinkSet([lambda _: None])
    sinks.prepare(RUN)
    for seq in range(8000):
        sinks.write(entry(seq))

    assert all(len(kept) <= 1 for kept in vars(sinks).values() if isinstance(kept, Sized))
    assert sinks.flush()
    assert sinks.settled_seq == 7999
    sinks.close()
