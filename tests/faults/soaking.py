"""Log for a while on ranks that stall, change the frequency and report updates at random, to a sink that fails.

`soaking.py SECONDS SEED`: every rank leaves the calls at which a log was ready in ready.rank<R>.txt, and a summary in
summary.rank<R>.json.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import IO

import torch.distributed as dist

from logsync.coordinator.messages import LogEntry
from logsync.workers import TrainingLog, connect

FREQUENCIES = (1, 3, 10, 30, 100, 300)
WARN_AFTER_S = 1.0
TIMEOUT_S = 30.0
WRITE_EVERY = 5003
RSS_SAMPLES = 400
PERIOD = 97 * 89


def value_of(rank: int, step: int) -> int:
    """Return what `rank` records at `step`, of period PERIOD; whole numbers, so that sums are exact in any order."""
    return (step % 97) * (7 + rank) + (step % 89)


def weight_of(rank: int) -> int:
    return rank + 1


def main() -> None:
    seconds, seed = float(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    flaky = FlakySink(random.Random(f"{seed} sink"))
    with (
        Path(f"ready.rank{rank}.txt").open("w") as ready,
        connect(
            10,
            mode="on_update",
            run_dir="run",
            sinks=["jsonl", flaky],
            timeout=TIMEOUT_S,
            warn_after=WARN_AFTER_S,
        ) as log,
    ):
        summary = soak(log, seconds, random.Random(f"{seed} {rank}"), ready)
    dist.destroy_process_group()
    stats = log.stats
    summary |= {"calls": stats.calls, "rounds": stats.rounds, "taken": flaky.taken, "failed": flaky.failed}
    Path(f"summary.rank{rank}.json").write_text(json.dumps(summary))


class FlakySink:
    """Fails every now and then."""

    def __init__(self, dice: random.Random) -> None:
        self.taken = 0
        self.failed = 0
        self._dice = dice

    def __call__(self, _: LogEntry) -> None:
        if self._dice.random() < 0.05:
            self.failed += 1
            msg = f"the server said {self.failed}"
            raise ConnectionError(msg)
        self.taken += 1


def soak(log: TrainingLog, seconds: float, dice: random.Random, ready: IO[str]) -> dict[str, object]:
    done: Counter[str] = Counter()
    rss: list[float] = []
    began = time.monotonic()
    first: float | None = None
    step = 0
    while True:
        misbehave(log, dice, done, step)
        value = value_of(log.rank, step)
        log.record({"mean": value}, weight=weight_of(log.rank))
        log.record({"sum": value}, reduce="sum")
        log.record({"max": value}, reduce="max", spread=True)
        answer = log.log_ready(step)
        if answer:
            ready.write(f"{step}\n")
            log.annotate({"rate": 0.5})
        if step % WRITE_EVERY == WRITE_EVERY - 1:
            ready.write(f"{step} {log.write(step, {'written': log.rank}).seq}\n")
            done["writes"] += 1
        if len(rss) < (time.monotonic() - began) / seconds * RSS_SAMPLES:
            rss.append(resident_mb())
        # The newest entry is the same on every rank, so all stop at the same call.
        if answer and log.last_entry is not None:
            first = log.last_entry.time if first is None else first
            if log.last_entry.time - first >= seconds:
                return {**done, "steps": step + 1, "rss": rss}
        step += 1


def misbehave(log: TrainingLog, dice: random.Random, done: Counter[str], step: int) -> None:
    """Do what other ranks cannot foresee."""
    luck = dice.random()
    if luck < 0.1:
        log.model_updated(step)
        done["updates"] += 1
    elif luck < 0.101:
        time.sleep(dice.expovariate(1 / 0.02))
        done["stalls"] += 1
    elif luck < 0.101 + 1 / 200_000:
        time.sleep(dice.uniform(1.2, 2.5) * WARN_AFTER_S)
        done["long_stalls"] += 1
    elif luck > 0.999:
        log.log_frequency = dice.choice(FREQUENCIES)
        done["changes"] += 1


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
