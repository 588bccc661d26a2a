"""What only the collective transport can show: `collective_job.py FOLDER`, under torchrun with 3 ranks."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from logsync.coordinator.errors import ForkedProcess
from logsync.workers import connect
from support.torchrun import wait_for

OTHERS = ("all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast_object_list", "gather", "reduce")


def replies_are_broadcast_on_our_own_group() -> Any:
    """Record every call of torch.distributed.broadcast, and refuse the other collectives' front doors."""
    broadcast, seen = dist.broadcast, []

    def recorded(tensor: torch.Tensor, src: int | None = None, group: Any = None, **options: Any) -> Any:
        seen.append((group is dist.group.WORLD or group is None, group.group_desc, str(tensor.dtype), src))
        return broadcast(tensor, src=src, group=group, **options)

    def refused(*_: Any, **__: Any) -> None:
        msg = "a collective of the default group"
        raise AssertionError(msg)

    kept = {name: getattr(dist, name) for name in OTHERS}
    with connect(10, sinks=[]) as log:
        dist.broadcast = recorded  # type: ignore[assignment]
        for name in OTHERS:
            setattr(dist, name, refused)
        try:
            for step in range(35):
                log.record(x=1.0)
                log.log_ready(step)
        finally:
            dist.broadcast = broadcast
            for name, function in kept.items():
                setattr(dist, name, function)
        rounds = log.stats.rounds
    return {"rounds": rounds, "broadcasts": [list(one) for one in seen]}


def a_log_of_some_ranks() -> Any:
    """Ranks 1 and 2 share a log; rank 0 does something else."""
    members = dist.new_group([1, 2], backend="gloo")
    if dist.get_rank() == 0:
        return None
    with connect(5, sinks=[], process_group=members) as log:
        for step in range(11):
            log.record({"who": float(dist.get_rank())}, reduce="last", across="sum")
            log.log_ready(step)
        assert log.last_entry is not None
        return log.rank, log.world_size, log.is_coordinator, log.last_entry.metrics


def many_logs_and_rounds_cost_no_file_descriptors() -> Any:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    counts = []
    for _ in range(4):
        with connect(1, sinks=[], max_lease=0) as log:
            log.log_ready(0)
            before = open_files()
            for step in range(1, 30):
                log.log_ready(step)
            assert open_files() == before
        counts.append(open_files())
    return counts


def a_forked_child_is_refused() -> Any:
    with connect(1, sinks=[], max_lease=0) as log:
        log.log_ready(0)
        child = os.fork()
        if child == 0:
            try:
                log.log_ready(1)
            except ForkedProcess:
                os._exit(7)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), log.log_ready(1)


def a_signal_is_served_while_a_rank_waits(folder: Path) -> Any:
    """Rank 0 waits in a round; the others join only when its handler has run."""
    served = folder / "served"

    def handler(_: int, __: FrameType | None) -> None:
        served.write_text("the handler ran")

    if dist.get_rank() == 0:
        signal.signal(signal.SIGUSR2, handler)
        (folder / "pid").write_text(str(os.getpid()))
    with connect(1, sinks=[], max_lease=0) as log:
        log.log_ready(0)
        if dist.get_rank() == 1:
            wait_for(folder / "pid", 20)
            os.kill(int((folder / "pid").read_text()), signal.SIGUSR2)
        if dist.get_rank() != 0:
            wait_for(served, 20)
        started = time.monotonic()
        ready = log.log_ready(1)
        return ready, time.monotonic() - started < 20


def the_process_group_is_destroyed_before_the_log_is_closed() -> Any:
    entries: list[Any] = []
    log = connect(10, sinks=[entries.append])
    for step in range(15):
        log.record({"x": 1.0}, reduce="sum")
        log.log_ready(step)
    dist.destroy_process_group()
    log.close()
    return [(entry.step, entry.metrics, entry.partial) for entry in entries]


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results = {
        "broadcasts": replies_are_broadcast_on_our_own_group(),
        "some_ranks": a_log_of_some_ranks(),
        "files": many_logs_and_rounds_cost_no_file_descriptors(),
        "fork": a_forked_child_is_refused(),
        "signal": a_signal_is_served_while_a_rank_waits(folder),
        "destroyed": the_process_group_is_destroyed_before_the_log_is_closed(),
    }
    (folder / f"result.rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
