"""A thousand logs with every kind of broken destination beside the file: nothing waits, and losses are counted."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from logsync.coordinator.host import Host
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.workers import connect
from support.sinks import lanes, wait_for
from support.torchrun import entries

LOGS = 1000
FULL = Path("/dev/full")


class Sleepy:
    """Takes a second for each entry, as a far server does."""

    def __init__(self) -> None:
        self.written = 0

    def open(self, run: RunInfo) -> None:
        pass

    def write(self, entry: LogEntry) -> None:
        time.sleep(1)
        self.written += 1
        assert entry.metrics

    def close(self) -> None:
        pass


class Raising:
    """Takes every tenth entry."""

    def __init__(self) -> None:
        self.written = 0

    def open(self, run: RunInfo) -> None:
        pass

    def write(self, entry: LogEntry) -> None:
        if entry.seq % 10:
            msg = f"no place for {entry.seq}"
            raise RuntimeError(msg)
        self.written += 1

    def close(self) -> None:
        pass


@pytest.fixture
def deaf() -> Iterator[int]:
    """A port where connections are taken and nothing is ever answered."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.timeout(90)
@pytest.mark.skipif(not FULL.exists(), reason="a disk that is always full is /dev/full, which this system lacks")
def test_a_thousand_logs_beside_broken_destinations_are_all_in_the_file_and_what_is_missing_elsewhere_is_counted(
    deaf: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    sleepy, raising = Sleepy(), Raising()
    log = connect(
        1,
        run_dir=tmp_path,
        sinks=["jsonl", sleepy, raising, f"csv:{FULL}", f"mlflow:http://127.0.0.1:{deaf}"],
    )
    assert isinstance(log._host, Host)
    sinks = log._host._sinks
    for step in range(LOGS):
        if step == LOGS - 1:  # what is lost by now is a metric of the last entry
            wait_for(lambda: "Raising" in sinks.lost)
        log.record(loss=float(step))
        assert log.log_ready(step)
    began = time.monotonic()
    log.close()
    closed_s = time.monotonic() - began
    # Only one that sleeps for a second, or waits for an answer, may still be at it; then its entry may yet arrive.
    wait_for(lambda: not lanes(sinks))

    written = entries(tmp_path)
    assert [(entry["seq"], entry["step"], entry["loss"]) for entry in written] == [
        (n, n, float(n)) for n in range(LOGS)
    ]
    assert sinks.lost == {
        "Sleepy": LOGS - sleepy.written,
        "Raising": LOGS - LOGS // 10,
        f"csv:{FULL}": LOGS,
        f"mlflow:http://127.0.0.1:{deaf}": LOGS,
    }
    for name in sinks.lost:
        assert re.search(rf"sink {re.escape(name)} lost \d+ of {LOGS} entries", caplog.text)
    assert raising.written == LOGS // 10
    dropped = [entry.get("logsync/dropped/Raising", 0) for entry in written]
    assert dropped == sorted(dropped)
    assert dropped[-1] > 0
    assert closed_s < 20  # 10 s is the bound; the rest is for a machine that is busy
