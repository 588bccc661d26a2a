"""What a round costs on Ray, beside what Ray itself offers for the same; all of it interleaved in one run.

    python scripts/bench_ray.py

Prints medians and quartiles of:

    a bare actor call    by as many workers at once, with the same bytes; what Ray takes at least
    a bare round         an actor that answers when all have asked; what any agreement through an actor takes
    our round            a log at every call, of 8 metrics
    ray.train.report     of the same metrics, which keeps rank 0's only
    a leased call        one of ours that cannot be due, answered without communication

Workers are processes on this machine. Where there are more of them than cores, they wait for each other's turn: compare
the lines of one size, and the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from logsync.workers import TrainingLog, connect

METRICS = [f"metric-{number}" for number in range(8)]
FRAME = 400  # bytes of a frame of ours with these metrics, and about what a reply has
TARGET = 1.5


class Bare:
    """An actor that only answers."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._waiting = 0
        self._all = asyncio.Event()

    async def ask(self, data: bytes) -> bytes:
        return data

    async def meet(self, data: bytes) -> bytes:
        """Answer when all workers have asked."""
        self._waiting += 1
        met = self._all
        if self._waiting == self._workers:
            self._waiting, self._all = 0, asyncio.Event()
            met.set()
        await met.wait()
        return data


class Worker:
    """One rank, which is asked to measure one thing after the other."""

    def __init__(self, rank: int, world_size: int, bare: Any) -> None:
        self._bare = bare
        self._log = open_log(1, f"bench-{world_size}", rank, world_size)
        self._leased = open_log(10**9, f"leased-{world_size}", rank, world_size)
        self._step = 0

    def measure(self, what: str, times: int) -> list[float]:
        """Return the seconds of each of so many calls."""
        data = bytes(FRAME)
        if what == "bare":
            return timed(times, lambda: ray.get(self._bare.ask.remote(data)))
        if what == "meet":
            return timed(times, lambda: ray.get(self._bare.meet.remote(data)))
        if what == "leased":
            self._leased.write(0)  # a lease is for the calls after it; two rounds say how steps grow
            for step in range(1, 5):
                self._leased.log_ready(step)
            started = time.perf_counter()
            for step in range(5, 905):
                self._leased.log_ready(step)
            return [(time.perf_counter() - started) / 900]
        return timed(times, self._round)

    def _round(self) -> None:
        self._log.record(dict.fromkeys(METRICS, 1.0))
        self._log.log_ready(self._step)
        self._step += 1

    def close(self) -> None:
        self._log.close()
        self._leased.close()


def open_log(log_frequency: int, name: str, rank: int, world_size: int) -> TrainingLog:
    return connect(log_frequency, transport="ray", rank=rank, world_size=world_size, name=name, sinks=[])


def timed(times: int, call: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return found


def measure_reports(times: int) -> list[float]:
    """Return the seconds of `ray.train.report` on rank 0 of two workers."""
    from ray import train  # noqa: PLC0415 - it takes long to load
    from ray.train.torch import TorchTrainer  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seconds.json")  # without a checkpoint Ray Train keeps no metrics

        def loop(_: dict[str, Any]) -> None:
            found = timed(times + 1, lambda: train.report(dict.fromkeys(METRICS, 1.0)))
            if train.get_context().get_world_rank() == 0:
                path.write_text(json.dumps(found[1:]))  # the first one waits for the others to start

        workers = train.ScalingConfig(num_workers=2)
        TorchTrainer(loop, train_loop_config={}, scaling_config=workers).fit()
        seconds: list[float] = json.loads(path.read_text())
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4, 8], metavar="WORKERS")
    parser.add_argument("--repeats", type=int, default=10, help="how often each is measured, in turn")
    parser.add_argument("--calls", type=int, default=50, help="calls of a measurement")
    parser.add_argument("--reports", type=int, default=4, help="calls of ray.train.report; 0 leaves it out")
    args = parser.parse_args()
    if args.repeats < 2:  # noqa: PLR2004 - quartiles
        parser.error("--repeats must be at least 2")
    ray.init(log_to_driver=False, configure_logging=False)
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    worlds = {}
    for size in args.sizes:
        bare = ray.remote(num_cpus=0)(Bare).remote(size)
        make: Any = ray.remote(num_cpus=0)(Worker)
        worlds[size] = [make.remote(rank, size, bare) for rank in range(size)]

    for repeat in range(args.repeats + 1):
        for size, workers in worlds.items():
            for what in ("bare", "meet", "ours", "leased"):
                each = ray.get([worker.measure.remote(what, args.calls) for worker in workers])
                if repeat:  # the first is for warming up
                    found[what, size] += [seconds for one in each for seconds in one]
        if args.reports and repeat == args.repeats // 2:
            found["report", 2] = measure_reports(args.reports)
    for workers in worlds.values():
        ray.get([worker.close.remote() for worker in workers])
    print_table(found, args.sizes)


def print_table(found: dict[tuple[str, int], list[float]], sizes: list[int]) -> None:
    names = {"bare": "a bare actor call", "meet": "a bare round", "ours": "our round", "leased": "a leased call"}
    print(f"{'':22}{'workers':>8}{'lower':>12}{'median':>12}{'upper':>12}   of a bare call")
    for size in sizes:
        bare = statistics.median(found["bare", size])
        for what, name in names.items():
            seconds = found[what, size]
            low, median, high = statistics.quantiles(seconds, n=4)
            print(f"{name:22}{size:8}{in_ms(low)}{in_ms(median)}{in_ms(high)}   {median / bare:10.3f}")
    if found["report", 2]:
        median = statistics.median(found["report", 2])
        bare = statistics.median(found["bare", sizes[0]])
        spread = f"{in_ms(min(found['report', 2]))}{in_ms(median)}{in_ms(max(found['report', 2]))}"
        print(f"{'ray.train.report':22}{2:8}{spread}   {median / bare:10.3f}")
    worst = max(statistics.median(found["ours", size]) / statistics.median(found["bare", size]) for size in sizes)
    verdict = "reached" if worst <= TARGET else "missed"
    print(f"a round is at most {worst:.2f} x a bare call by as many workers at once; {TARGET} x is {verdict}")


def in_ms(seconds: float) -> str:
    return f"{1000 * seconds:9.4f} ms"


if __name__ == "__main__":
    main()
