"""Ranks that come twice, come wrong, end, and come back."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from logsync.coordinator.errors import LogsyncError
from logsync.workers import connect
from support.ray_jobs import lines
from support.ray_world import RankProcess, RayWorld

pytestmark = pytest.mark.timeout(100)


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


def wait_for(path: Path, tasks: list[Any]) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} does not come"
        ended = ray.wait(tasks, timeout=0.02)[0]
        assert not ended, ray.get(ended)


def test_who_comes_wrong_is_told_and_the_others_go_on(world: RayWorld, tmp_path: Path) -> None:
    gate = tmp_path / "stop"
    tasks = [rank.call.remote(train_while, "refusals", str(gate)) for rank in world.ranks]
    wait_for(tmp_path / "stop.begun", tasks)
    stranger = RankProcess.remote(0, 1)

    def told(rank: int, world_size: int, **more: Any) -> tuple[str, str]:
        found: tuple[str, str] = ray.get(
            stranger.call.remote(lambda *_: refused(rank, world_size, "refusals", **more)), timeout=40
        )
        return found

    twice = told(1, 2)
    large = told(1, 3)
    outside = told(2, 2)
    gate.touch()
    sums = ray.get(tasks, timeout=40)
    ray.kill(stranger)

    assert twice[0] == "LaunchError", twice
    assert "rank 1 is taken: rank 1 on " in twice[1], twice
    assert "call " in twice[1], twice
    assert large == ("ConfigMismatch", "world_size is 2 in the log that runs, but 3 on rank 1")
    assert outside == ("LaunchError", "rank=2 does not name a rank of a world of world_size=2")
    assert sums[0] == sums[1] == [2.0] * len(sums[0])
    assert len(sums[0]) > 1


def test_different_settings_of_a_process_that_comes_back_are_refused(world: RayWorld) -> None:
    kind, text = ray.get(
        [rank.call.remote(lambda r, n: refused(r, n, "settings", timeout=20.0 + r)) for rank in world.ranks], timeout=40
    )[1]

    assert kind == "ConfigMismatch", text
    assert "timeout is 20.0 on rank 0, but rank 1: 21.0" in text


def come_back(  # noqa: PLR0917 - an actor's call takes no keywords here
    rank: int, world_size: int, name: str, run_dir: str, first: int, last: int
) -> list[int]:
    logged = []
    with connect(2, **options(rank, world_size, name, sinks=["jsonl"], run_dir=run_dir)) as log:
        for step in range(first, last):
            log.record({"one": 1.0}, reduce="sum")
            if log.log_ready(step):
                logged.append(step)
            if rank and first == 0 and step == 10:
                os.kill(os.getpid(), signal.SIGKILL)
    return logged


def test_a_worker_that_was_killed_comes_back_as_its_rank(world: RayWorld, tmp_path: Path) -> None:
    victim = RankProcess.remote(1, 2)
    survivor = world.ranks[0].call.remote(come_back, "again", str(tmp_path), 0, 30)
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(victim.call.remote(come_back, "again", str(tmp_path), 0, 30), timeout=40)
    heir = RankProcess.remote(1, 2)
    resumed = ray.get(heir.call.remote(come_back, "again", str(tmp_path), 12, 30), timeout=40)
    logged = ray.get(survivor, timeout=40)
    ray.kill(heir)

    assert logged == list(range(0, 30, 2))
    assert resumed == list(range(12, 30, 2))
    entries = lines(tmp_path)
    assert [entry["step"] for entry in entries] == [*range(0, 30, 2), 29]
    # Steps 11 and 12: the victim's went with it, and its heir began at 12.
    assert [entry["step"] for entry in entries if entry.get("partial")] == [12]
    assert [entry["one"] for entry in entries] == [2.0, *[4.0] * 5, 3.0, *[4.0] * 8, 2.0]


def wait_alone(rank: int, world_size: int, name: str, warn_after: float) -> tuple[str, list[str], list[str]]:
    """Make rounds until the other rank is missing; return the error, whom it is about, and what was warned of."""
    import logging  # noqa: PLC0415 - this runs in a worker

    warned: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warned.append(record.getMessage())

    keep = Keep(logging.WARNING)
    logging.getLogger("logsync").addHandler(keep)
    try:
        with connect(1, **options(rank, world_size, name, timeout=4.0, warn_after=warn_after)) as log:
            for step in range(100):
                log.log_ready(step)
                if rank and step == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
    except LogsyncError as error:
        return f"{type(error).__name__}: {error}", list(map(str, error.ranks)), warned
    finally:
        logging.getLogger("logsync").removeHandler(keep)
    return "nothing was raised", [], warned


def test_a_worker_that_is_gone_is_named_with_its_place(world: RayWorld) -> None:
    victim = RankProcess.remote(1, 2)
    pid = ray.get(victim.pid.remote(), timeout=30)
    survivor = world.ranks[0].call.remote(wait_alone, "gone", 1.0)
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(victim.call.remote(wait_alone, "gone", 1.0), timeout=40)
    text, ranks, warned = ray.get(survivor, timeout=40)

    assert text.startswith("RoundTimeout: round 5 failed: it waited 4."), text
    assert ranks == ["1"]
    assert f"(pid {pid}, node " in text
    assert "was last heard of at call 4, step 3" in text
    assert warned, "nothing was said while it waited"
    assert "for rank 1: rank 1 on " in warned[0]
    assert len(warned) <= 4


def test_without_ray_init_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    assert refused(0, 1, "none")[0] == "LaunchError"
    assert "ray.init()" in refused(0, 1, "none")[1]
