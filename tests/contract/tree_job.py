"""A log on a tree of nodes: `tree_job.py FOLDER`, under torchrun with 5 ranks, which are nodes of 2, 1 and 2."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from logsync.workers import connect

NODES = [[0, 1], [2], [3, 4]]
TREE: dict[str, Any] = {"transport": "collective:tree", "sinks": [], "timeout": 30}


def frames_of_all_sizes_again_and_again() -> Any:
    """Every second log has 400 metrics on rank 0 and 2,000 on rank 4; return what is open after each of some logs."""
    rank, counts, wrong = dist.get_rank(), [], []
    for _ in range(4):
        with connect(1, **TREE, max_lease=0) as log:
            for step in range(6):
                names = 1 if step % 2 else 400 * (rank + 1)
                log.record({f"m{name}": float(rank) for name in range(names)}, reduce="sum")
                log.log_ready(step)
                found = {} if log.last_entry is None else log.last_entry.metrics
                expected = {f"m{name}": float(sum(r for r in range(5) if name < 400 * (r + 1))) for name in range(2000)}
                if found != ({"m0": 10.0} if step % 2 else expected):
                    wrong.append(step)
        counts.append(len(list(Path("/proc/self/fd").iterdir())))
    return counts, wrong


def a_log_of_some_ranks() -> Any:
    members = dist.new_group([1, 3, 4], backend="gloo")
    if dist.get_rank() in (0, 2):
        return None
    with connect(2, **TREE, process_group=members) as log:
        for step in range(9):
            log.record({"who": float(dist.get_rank())}, reduce="last", across="sum")
            log.log_ready(step)
        assert log.last_entry is not None
        return log.rank, log.world_size, log.last_entry.metrics


def epochs_of_uneven_lengths() -> Any:
    entries: list[Any] = []
    with connect(2, **{**TREE, "sinks": [entries.append]}) as log:
        for epoch in range(2):
            for batch in range(4 + dist.get_rank()):
                log.record({"batches": 1.0}, reduce="sum")
                log.log_ready(100 * epoch + batch)
            log.end_epoch()
    return sum(entry.metrics.get("batches", 0.0) for entry in entries)


def the_process_group_is_destroyed_before_the_log_is_closed() -> Any:
    entries: list[Any] = []
    log = connect(3, **{**TREE, "sinks": [entries.append]})
    for step in range(5):
        log.record({"x": 1.0}, reduce="sum")
        log.log_ready(step)
    dist.destroy_process_group()
    log.close()
    return [(entry.step, entry.metrics, entry.partial) for entry in entries]


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    node = next(node for node in NODES if rank in node)
    os.environ |= {"LOCAL_RANK": str(node.index(rank)), "LOCAL_WORLD_SIZE": str(len(node))}
    results = {
        "sizes": frames_of_all_sizes_again_and_again(),
        "some": a_log_of_some_ranks(),
        "epochs": epochs_of_uneven_lengths(),
        "destroyed": the_process_group_is_destroyed_before_the_log_is_closed(),
    }
    Path(sys.argv[1], f"result.rank{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
