"""Log, and meet SIGTERM in one way or another: `terminated.py SCENARIO FOLDER`."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from logsync.coordinator.messages import LogEntry
from logsync.workers import TrainingLog, connect

ENTRIES = 5


class Slow:
    """A destination that takes its time for each entry."""

    def __init__(self, path: Path, pause_s: float) -> None:
        self.path = path
        self.pause_s = pause_s

    def __call__(self, entry: LogEntry) -> None:
        time.sleep(self.pause_s)
        with self.path.open("a") as file:
            file.write(f"{entry.seq}\n")


def logged(folder: Path, pause_s: float = 0.2) -> TrainingLog:
    """Return a log whose last entry is not handed over yet, while a destination is far behind."""
    log = connect(1, run_dir=folder, sinks=["jsonl", Slow(folder / "slow.txt", pause_s)])
    for step in range(ENTRIES):
        log.record(loss=float(step))
        assert log.log_ready(step)
    return log


def ready(folder: Path) -> None:
    (folder / "ready").touch()


def training(folder: Path) -> None:
    log = logged(folder)
    ready(folder)
    while log is not None:
        time.sleep(0.01)


def stuck(folder: Path) -> None:
    """Where no handler in Python runs, as in a collective that never ends; with a lock in hand, as bad luck has it."""
    log = logged(folder)
    assert logging.lastResort is not None
    logging.lastResort.acquire()
    mutex = ctypes.create_string_buffer(256)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    ready(folder)
    libc.pthread_mutex_lock(mutex)
    print(log)


def closing(folder: Path) -> None:
    log = logged(folder)
    ready(folder)
    log.close()
    time.sleep(60)


def blocked_sink(folder: Path) -> None:
    log = logged(folder, 1000.0)
    ready(folder)
    while log is not None:
        time.sleep(0.01)


def own_handler_before(folder: Path) -> None:
    def leave(_signum: int, _frame: FrameType | None) -> None:
        sys.exit(7)

    signal.signal(signal.SIGTERM, leave)
    with logged(folder):
        assert signal.getsignal(signal.SIGTERM) is leave
        ready(folder)
        time.sleep(60)


def own_handler_after(folder: Path) -> None:
    told: list[int] = []
    log = logged(folder)
    before = signal.getsignal(signal.SIGTERM)
    assert callable(before)

    def note(signum: int, frame: FrameType | None) -> None:
        before(signum, frame)  # as launchers chain what they find
        told.append(signum)

    signal.signal(signal.SIGTERM, note)
    ready(folder)
    while not told:
        time.sleep(0.01)
    log.record(loss=5.0)
    assert log.log_ready(5)
    log.close()
    assert signal.getsignal(signal.SIGTERM) is note


def forked_child(folder: Path) -> None:
    log = logged(folder)
    child = os.fork()
    if child == 0:
        (folder / "child").touch()
        time.sleep(60)
    while not (folder / "child").exists():
        time.sleep(0.01)
    end(child)
    for _ in range(100):  # each at another moment of its birth
        child = os.fork()
        if child == 0:
            time.sleep(60)
        end(child)
    log.record(loss=5.0)
    assert log.log_ready(5)
    log.close()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ready(folder)
    time.sleep(60)


def end(child: int) -> None:
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def closed_meanwhile(folder: Path) -> None:
    """Be told when the log is flushed, and SIGTERM's default action about to be put back."""
    log = logged(folder)
    put_back = signal.signal

    def late(signum: int, handler: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return put_back(signum, handler)

    signal.signal = late  # type: ignore[assignment]
    ready(folder)
    log.close()
    time.sleep(60)


def several(folder: Path) -> None:
    """Two logs, after one that was closed on another thread."""
    first = connect(1, run_dir=folder / "first", sinks=["jsonl"])
    closing = threading.Thread(target=first.close)
    closing.start()
    closing.join()
    other = connect(1, run_dir=folder / "other", sinks=["jsonl"], name="other")
    other.record(x=1)
    assert other.log_ready(0)
    training(folder)
    print(other)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
