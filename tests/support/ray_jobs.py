"""What ranks of the Ray tests do, and how the coordinator's actor is found and killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from logsync.coordinator.sinks.base import SinkSpec
from logsync.workers import connect
from logsync.workers.transports.ray_actor import RayTransport
from support.ray_world import RayWorld

__all__ = [
    "Trained",
    "check_file",
    "coordinator",
    "keep_killing",
    "kill_actor",
    "kill_for_good",
    "kill_process",
    "lines",
    "start",
    "train",
    "wait_for_line",
]

Trained = tuple[list[int], dict[int, dict[str, float]]]


def train(  # noqa: PLR0917 - an actor's call takes no keywords here
    rank: int,
    world_size: int,
    run_dir: str,
    steps: int,
    pause_s: float = 0.0,
    name: str = "train",
    every: int = 3,
    node_id: str | None = None,
    sink: SinkSpec = "jsonl",
) -> Trained:
    """Train so many steps; returns the steps that logged, and every entry's values as this rank saw them."""
    logged: list[int] = []
    seen: dict[int, dict[str, float]] = {}
    options: dict[str, Any] = {"run_dir": run_dir, "sinks": [sink], "timeout": 60.0, "name": name}
    transport = RayTransport(rank, world_size, node_id=node_id)
    with connect(every, transport=transport, **options) as log:
        for step in range(steps):
            time.sleep(pause_s * (1 + rank))
            log.record({"made": 1.0}, reduce="sum")
            log.record({"loss": float(step + rank)})
            if log.log_ready(step):
                logged.append(step)
                assert log.last_entry is not None
                seen[log.last_entry.seq] = log.last_entry.metrics
                log.annotate({"lr": 1.0 / (step + 1)})
    return logged, seen


def start(world: RayWorld, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Have every rank of a world call a function; returns Ray's references."""
    return [rank.call.remote(function, *arguments) for rank in world.ranks]


def wait_for_line(run_dir: Path, number: int, tasks: list[Any]) -> None:
    """Wait until so many entries are written."""
    deadline = time.monotonic() + 30
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline, "the log does not grow"
        ended_early = ray.wait(tasks, timeout=0.01)[0]
        assert not ended_early, ray.get(ended_early)


def check_file(run_dir: Path, found: list[Trained], steps: int, every: int = 3) -> None:
    """Assert that the log is whole: every entry once, with everybody's values, as the ranks saw them."""
    due = list(range(0, steps, every))
    entries = lines(run_dir)
    extra = 0 if due[-1] == steps - 1 else 1  # what is open at the end
    assert [entry["seq"] for entry in entries] == list(range(len(due) + extra))
    assert [entry["step"] for entry in entries][: len(due)] == due
    assert sum(entry["made"] for entry in entries) == steps * len(found)
    assert not any(entry.get("partial") for entry in entries), entries
    for logged, seen in found:
        assert logged == due
        for entry in entries[: len(due)]:
            assert seen[entry["seq"]]["loss"] == entry["loss"]
            assert entry["lr"] == 1.0 / (entry["step"] + 1), "what rank 0 added is missing"


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def coordinator(name: str = "train") -> Any:
    """Return the handle of the coordinator's actor, waiting for it to come up."""
    job = ray.get_runtime_context().get_job_id()
    deadline = time.monotonic() + 30
    while True:
        try:
            return ray.get_actor(f"{job}/{name}", namespace="logsync")
        except ValueError:  # noqa: PERF203 - it waits anyway
            assert time.monotonic() < deadline, "the coordinator's actor did not come up"
            time.sleep(0.05)


def kill_actor(name: str = "train") -> None:
    """Kill the actor by Ray, which starts it again."""
    ray.kill(coordinator(name), no_restart=False)


def kill_for_good(name: str = "train") -> None:
    """Kill the actor by Ray, which does not start it again: the ranks do."""
    ray.kill(coordinator(name), no_restart=True)


def keep_killing(name: str, tasks: list[Any]) -> None:
    """Kill the actor again and again, until the ranks have given up."""
    job = ray.get_runtime_context().get_job_id()
    while len(ray.wait(tasks, num_returns=len(tasks), timeout=0.05)[0]) < len(tasks):
        with contextlib.suppress(ValueError, ray.exceptions.RayError):  # there is none, just now
            ray.kill(ray.get_actor(f"{job}/{name}", namespace="logsync"), no_restart=False)


def kill_process(name: str = "train") -> None:
    """SIGKILL the actor's process."""
    deadline = time.monotonic() + 30
    while True:
        try:
            pid = ray.get(coordinator(name).__ray_call__.remote(lambda _: os.getpid()), timeout=10)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):  # it is being started again
            assert time.monotonic() < deadline, "the coordinator's actor did not come up"
            continue
        os.kill(pid, signal.SIGKILL)
        return
