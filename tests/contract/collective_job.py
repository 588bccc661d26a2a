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
from unittest import mock

import torch
import torch.distributed as dist

from logsync.coordinator.errors import ConfigMismatch, ForkedProcess, TransportError
from logsync.workers import connect
from logsync.workers.transports.notes import _connections
from support.torchrun import wait_for

CONNECTED: dict[str, Any] = {"sinks": [], "max_lease": 0}


def replies_are_broadcast_on_our_own_group() -> Any:
    """Count what happens on each group: gloo numbers its collectives, whichever door they come through."""
    broadcast, seen = dist.broadcast, []
    default = dist.group.WORLD
    assert default is not None
    before = numbered(default)

    def recorded(tensor: torch.Tensor, src: int | None = None, group: Any = None, **options: Any) -> Any:
        seen.append((group is default or group is None, group.group_desc, str(tensor.dtype), src, numbered(group)))
        return broadcast(tensor, src=src, group=group, **options)

    with connect(10, sinks=[]) as log:
        dist.broadcast = recorded  # type: ignore[assignment]
        try:
            for step in range(35):
                log.record(x=1.0)
                log.log_ready(step)
        finally:
            dist.broadcast = broadcast
        rounds = log.stats.rounds
    on_default = numbered(default) - before
    broadcast(torch.zeros(1), src=0)
    assert numbered(default) == before + on_default + 1, "gloo does not number its collectives"
    return {"rounds": rounds, "broadcasts": [list(one) for one in seen], "on_default": on_default}


def numbered(group: Any) -> int:
    return int(group._get_sequence_number_for_group())


def a_log_of_some_ranks() -> Any:
    """Ranks 1 and 2 share a log, and then another; rank 0 does something else, and rank 1 is in one group more."""
    members = dist.new_group([1, 2], backend="gloo")
    if dist.get_rank() == 0:
        return None
    if dist.get_rank() == 1:
        dist.new_group([1], backend="gloo", use_local_synchronization=True)
    with connect(5, sinks=[], process_group=members, timeout=20) as log:
        log.log_ready(0)
    with connect(5, sinks=[], process_group=members, timeout=20) as log:
        for step in range(11):
            log.record({"who": float(dist.get_rank())}, reduce="last", across="sum")
            log.log_ready(step)
        assert log.last_entry is not None
        return log.rank, log.world_size, log.is_coordinator, log.last_entry.metrics


def nodes_of_two_and_one() -> dict[str, str]:
    rank = dist.get_rank()
    return {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2" if rank < 2 else "1"}


def connections_to_ranks() -> int:
    """Return how many there are, without those to the store, and without sockets that only listen."""
    others = (f":{int(os.environ['MASTER_PORT']):04X}", ":0000")
    return sum(1 for _, end in _connections().values() if not end.endswith(others))


def on_a_tree_ranks_are_connected_to_their_node_and_first_ranks_to_each_other() -> Any:
    opened = {}
    for shape in ("flat", "tree"):
        with mock.patch.dict(os.environ, nodes_of_two_and_one()):
            before = connections_to_ranks()
            with connect(1, **CONNECTED, transport=f"collective:{shape}") as log:
                opened[shape] = connections_to_ranks() - before
                log.record({"who": float(dist.get_rank())}, reduce="sum")
                log.log_ready(0)
                assert log.last_entry is not None
                assert log.last_entry.metrics == {"who": 3.0}
    return opened


def ways_to_the_root_that_differ_are_told_on_all_ranks() -> Any:
    shape = "flat" if dist.get_rank() == 2 else "tree"
    try:
        connect(1, **CONNECTED, transport=f"collective:{shape}", timeout=60)
    except ConfigMismatch as error:
        said = error.ranks, str(error)
    with connect(1, **CONNECTED) as log:
        return *said, log.log_ready(0)


def many_logs_and_rounds_cost_no_file_descriptors() -> Any:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    counts = []
    for _ in range(4):
        with connect(1, **CONNECTED) as log:
            log.log_ready(0)
            before = open_files()
            for step in range(1, 30):
                log.log_ready(step)
            assert open_files() == before
        counts.append(open_files())
    return counts


def a_forked_child_is_refused() -> Any:
    with connect(1, **CONNECTED) as log:
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


def signals_are_served_while_a_rank_waits(folder: Path) -> Any:
    """Rank 0 waits in a round; the others join only when its handlers have run."""
    signals = (signal.SIGTERM, signal.SIGINT)

    def handler(number: int, _: FrameType | None) -> None:
        (folder / f"served{number}").touch()

    kept = [signal.signal(number, handler) for number in signals] if dist.get_rank() == 0 else []
    with connect(1, **CONNECTED) as log:
        log.log_ready(0)
        if dist.get_rank() == 0:
            (folder / "pid").write_text(str(os.getpid()))
        for number in signals:
            if dist.get_rank() == 1:
                wait_for(folder / "pid", 20)
                os.kill(int((folder / "pid").read_text()), number)
            if dist.get_rank() != 0:
                wait_for(folder / f"served{number}", 20)
        ready = log.log_ready(1)
    for number, before in zip(signals, kept, strict=False):
        signal.signal(number, before)
    return ready


def ctrl_c_in_a_round_frees_the_others(folder: Path) -> Any:
    """Rank 1 is interrupted in a round, in which it waits for rank 0 and rank 2 beside it."""
    waiter, interrupted = folder / "waiter", folder / "interrupted"

    def handler(_: int, frame: FrameType | None) -> None:
        while frame is not None and frame.f_code.co_name != "exchange":
            frame = frame.f_back
        if frame is not None and not interrupted.exists():
            interrupted.touch()
            raise KeyboardInterrupt

    answers: list[bool] = []
    try:
        with connect(1, **CONNECTED) as log:
            log.log_ready(0)
            if dist.get_rank() == 1:
                signal.signal(signal.SIGINT, handler)
                waiter.write_text(str(os.getpid()))
            if dist.get_rank() == 0:
                wait_for(waiter, 20)
                deadline = time.monotonic() + 20
                while not interrupted.exists():
                    assert time.monotonic() < deadline, "rank 1 does not come to the round"
                    os.kill(int(waiter.read_text()), signal.SIGINT)
                    time.sleep(0.01)
            answers += [log.log_ready(step) for step in range(1, 4)]
    except KeyboardInterrupt:
        return "KeyboardInterrupt", [], ""
    except TransportError as error:
        return type(error).__name__, error.ranks, str(error)
    return "nothing was raised", [], str(answers)


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
        "connections": on_a_tree_ranks_are_connected_to_their_node_and_first_ranks_to_each_other(),
        "ways": ways_to_the_root_that_differ_are_told_on_all_ranks(),
        "files": many_logs_and_rounds_cost_no_file_descriptors(),
        "fork": a_forked_child_is_refused(),
        "signals": signals_are_served_while_a_rank_waits(folder),
        "interrupted": ctrl_c_in_a_round_frees_the_others(folder),
        "destroyed": the_process_group_is_destroyed_before_the_log_is_closed(),
    }
    (folder / f"result.rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
