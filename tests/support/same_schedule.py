"""One schedule, whatever carries the frames: its seed decides the data, and ranks share what one alone would see.

Run as a script by torchrun: same_schedule.py RUN_DIR
"""

from __future__ import annotations

import random
import sys
from typing import Any

from logsync.workers import connect

__all__ = ["SAMPLES", "follow_the_schedule"]

SAMPLES = 8  # of a step, over all ranks
STEPS = 60


def follow_the_schedule(rank: int, world_size: int, run_dir: str, transport: str) -> list[int]:
    """Log a run of 60 steps; returns the steps that logged."""
    chance = random.Random(20)
    logged = []
    given: dict[str, Any] = {"rank": rank, "world_size": world_size} if transport == "ray" else {}
    with connect(
        7, transport=transport, mode="on_update", run_dir=run_dir, sinks=["jsonl"], name="same", **given
    ) as log:
        for step in range(STEPS):
            # Eighths, and few of them: sums are exact, in whatever order they are added up.
            samples = [chance.randrange(-800, 800) / 8 for _ in range(SAMPLES)]
            updated_on, faster = chance.randrange(2), chance.randrange(2)
            for sample in samples[rank::world_size]:
                log.record({"loss": sample}, weight=2)
                log.record({"tokens": abs(sample)}, reduce="sum")
                log.record({"worst": sample}, reduce="max")
            if step % 5 == 0 and updated_on % world_size == rank:
                log.model_updated(step)
            if step == 30 and faster % world_size == rank:
                log.log_frequency = 4
            if log.log_ready(step):
                logged.append(step)
                log.annotate({"rate": 1 / (step + 1)})
            if step == 45:
                log.write(step, {"evaluated": samples[0]})
    return logged


if __name__ == "__main__":
    import torch.distributed as dist

    dist.init_process_group("gloo")
    print(follow_the_schedule(dist.get_rank(), dist.get_world_size(), sys.argv[1], "collective"))
    dist.destroy_process_group()
