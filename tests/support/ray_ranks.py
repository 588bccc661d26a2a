"""What ranks of the Ray tests do when they come wrong, end, or come back; run in their worker processes."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from logsync.coordinator.errors import LogsyncError
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.jsonl import JsonlSink
from logsync.workers import connect
from logsync.workers.training_log import Stats

__all__ = [
    "Followed",
    "MortalSink",
    "come_back",
    "fail_on_rank_1",
    "follow",
    "follow_nobody",
    "follow_slowly",
    "follow_to_death",
    "lead",
    "lose_the_coordinator",
    "options",
    "refused",
    "train_while",
    "wait_alone",
    "warnings_of_logsync",
]


def options(rank: int, world_size: int, name: str, **more: Any) -> dict[str, Any]:
    given = {"transport": "ray", "rank": rank, "world_size": world_size, "name": name, "timeout": 30.0}
    return {"sinks": [], "run_dir": "not-used", **given, **more}


def refused(rank: int, world_size: int, name: str, **more: Any) -> tuple[str, str]:
    """Try to connect; return the class and the text of the error."""
    try:
        connect(1, **options(rank, world_size, name, **more))
    except (LogsyncError, TypeError) as error:
        return type(error).__name__, str(error)
    return "nothing was raised", ""


def train_while(rank: int, world_size: int, name: str, gate: str) -> list[float]:
    """Make rounds until a file is there, which rank 0 sees for all; leaves a file after the first one."""
    sums = []
    with connect(1, **options(rank, world_size, name)) as log:
        goes_on, step = True, 0
        while goes_on:
            log.record({"one": 1.0}, reduce="sum")
            log.record({"stop": float(rank == 0 and os.path.exists(gate))}, reduce="max")  # noqa: PTH110
            assert log.log_ready(step)
            assert log.last_entry is not None
            sums.append(log.last_entry.metrics["one"])
            goes_on = not log.last_entry.metrics["stop"]
            step += 1
            Path(f"{gate}.begun").touch()
            time.sleep(0.02)
    return sums


def come_back(  # noqa: PLR0917 - an actor's call takes no keywords here
    rank: int, world_size: int, name: str, run_dir: str, first: int, last: int
) -> list[int]:
    """Train from one step to another and return those that logged; rank 1 is killed when it began at 0."""
    logged = []
    with connect(2, **options(rank, world_size, name, sinks=["jsonl"], run_dir=run_dir)) as log:
        for step in range(first, last):
            log.record({"one": 1.0}, reduce="sum")
            if log.log_ready(step):
                logged.append(step)
            if rank and first == 0 and step == 10:
                os.kill(os.getpid(), signal.SIGKILL)
    return logged


@contextlib.contextmanager
def warnings_of_logsync() -> Iterator[list[str]]:
    """Keep what logsync warns of in this process."""
    warned: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.append(record.getMessage())

    keep = Keep(logging.WARNING)
    logging.getLogger("logsync").addHandler(keep)
    try:
        yield warned
    finally:
        logging.getLogger("logsync").removeHandler(keep)


def wait_alone(rank: int, world_size: int, name: str, warn_after: float) -> tuple[str, list[str], list[str]]:
    """Make rounds until the other rank is missing; return the error, whom it is about, and what was warned of."""
    with warnings_of_logsync() as warned:
        try:
            with connect(1, **options(rank, world_size, name, timeout=2.0, warn_after=warn_after)) as log:
                for step in range(100):
                    log.log_ready(step)
                    if rank and step == 3:
                        os.kill(os.getpid(), signal.SIGKILL)
        except LogsyncError as error:
            return f"{type(error).__name__}: {error}", list(map(str, error.ranks)), warned
    return "nothing was raised", [], warned


class MortalSink(JsonlSink):
    """A file of entries whose process is killed, once each, before it writes one entry and after another.

    Args:
        folder: where it notes what it has died of.
        before, after: the `seq` of those entries.
    """

    def __init__(self, folder: Path, *, before: int, after: int) -> None:
        super().__init__()
        self._folder = folder
        self._before = before
        self._after = after

    def write(self, entry: LogEntry) -> None:
        if entry.seq == self._before:
            self._die_once("before")
        super().write(entry)
        if entry.seq == self._after:
            self._die_once("after")

    def _die_once(self, moment: str) -> None:
        with contextlib.suppress(FileExistsError):
            (self._folder / f"died-{moment}").touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)


def lead(rank: int, world_size: int, name: str, run_dir: str, gate: str) -> float:
    """Log at every second step until a file is there, which rank 0 sees for all; returns what this rank has made."""
    made = 0.0
    with connect(2, **options(rank, world_size, name, sinks=["jsonl"], run_dir=run_dir)) as log:
        goes_on, step = True, 0
        while goes_on:
            log.record({"made": 1.0}, reduce="sum")
            log.record({"stop": float(rank == 0 and os.path.exists(gate))}, reduce="max")  # noqa: PTH110
            made += 1.0
            if log.log_ready(step):
                assert log.last_entry is not None
                goes_on = not log.last_entry.metrics["stop"]
            step += 1
            time.sleep(0.02)
    return made


class Followed(NamedTuple):
    """What a follower has seen: what it made, the `seq` of each entry that it was told of, and what it cost."""

    made: float
    seqs: list[int]
    stats: Stats


def follow(rank: int, _: int, name: str, label: str | None, logs: int) -> Followed:  # noqa: ARG001 - as every function of a rank
    """Follow a log for so many entries."""
    made = 0.0
    seqs: list[int] = []
    deadline = time.monotonic() + 40
    with connect(2, transport="ray", name=name, lockstep=False, label=label) as log:
        while len(seqs) < logs:
            assert time.monotonic() < deadline, f"only entries {seqs} were told"
            log.record({"made": 1.0}, reduce="sum")
            made += 1.0
            if log.log_ready():
                assert log.last_entry is not None
                seqs.append(log.last_entry.seq)
            time.sleep(0.002)
    return Followed(made, seqs, log.stats)


def follow_slowly(rank: int, _: int, name: str, run_dir: str) -> int:  # noqa: ARG001 - as above
    """Follow a log, and miss some of its entries; return how often a log was ready."""
    path = Path(run_dir, "metrics.jsonl")
    ready = 0
    deadline = time.monotonic() + 40
    with connect(2, transport="ray", name=name, lockstep=False, label="slow") as log:
        while ready < 2:
            written = path.read_bytes().count(b"\n") if path.exists() else 0
            log.record(reward=1.0)
            ready += log.log_ready()
            while path.read_bytes().count(b"\n") < written + 3 and time.monotonic() < deadline:
                time.sleep(0.01)
    return ready


def follow_to_death(rank: int, _: int, name: str) -> None:  # noqa: ARG001 - as above
    """Follow a log, and be killed right after an entry."""
    with connect(2, transport="ray", name=name, lockstep=False, label="victim") as log:
        while not log.log_ready():
            log.record(reward=1.0)
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)


def follow_nobody(rank: int, _: int, name: str) -> tuple[int, float]:  # noqa: ARG001 - as above
    """Make calls where nothing is logged; return how many said that a log was made, and the seconds of waiting."""
    with connect(2, transport="ray", name=name, lockstep=False) as log:
        log.record(reward=1.0)
        return sum(log.log_ready(step) for step in range(1000)), log.stats.wait_s


def lose_the_coordinator(rank: int, world_size: int, name: str, on_failure: str, gate: str) -> tuple[str, str, int]:
    """Make rounds until they fail; return the error, what was said, and how many calls were answered False since."""
    with warnings_of_logsync() as warned:
        try:
            given = options(rank, world_size, name, timeout=2.0, on_failure=on_failure)
            with connect(1, **given) as log:
                step = 0
                while log.log_ready(step):
                    step += 1
                    Path(f"{gate}.begun").touch()
                    time.sleep(0.01)
                return "", "\n".join(warned), sum(not log.log_ready(step + later) for later in range(5))
        except LogsyncError as error:
            return f"{type(error).__name__}: {error}", "\n".join(warned), 0


def fail_on_rank_1(rank: int, world_size: int, name: str, run_dir: str) -> list[bool]:
    """Log at every call; rank 1 raises in its own code at step 3, and rank 0 goes on alone."""
    given = options(rank, world_size, name, sinks=["jsonl"], run_dir=run_dir, on_failure="detach")
    answers = []
    with connect(1, **given) as log:
        for step in range(6):
            if rank == 1 and step == 3:
                msg = "its own code"
                raise OSError(msg)
            log.record({"one": 1.0}, reduce="sum")
            answers.append(log.log_ready(step))
    return answers
