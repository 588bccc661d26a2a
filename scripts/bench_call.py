"""Time what a training step pays between rounds: a call under a lease, record() and timer().

    python scripts/bench_call.py [--quick] [--check]

Every timing is a ratio to a baseline in the same run. The two sides take turns in small blocks, in an order that is
swapped each time; a block's ratio is one sample. Both sides pay for their own loop. No file is written.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import NamedTuple

import torch

from logsync.coordinator.frequency import FrequencyManager
from logsync.workers import TrainingLog, connect
from logsync.workers.transports.threads import ThreadWorld

Block = Callable[[int, int], None]
"""Makes calls for steps from the first number on, as many as the second."""

NEVER = 10**12  # a frequency that is not reached here
FOLDER = tempfile.gettempdir()  # without sinks nothing is written to it


class Comparison(NamedTuple):
    """`ours` against `base`; `target` is the largest ratio that is good."""

    what: str
    ours: Block
    base: Block
    target: float | None = None
    share: float = 1.0  # of the usual number of calls, for what is slow
    renew: Callable[[int], int] = int  # called after each block with the next step; not timed; returns the one after


class Result(NamedTuple):
    """The ratios of all blocks, and nanoseconds per call of both sides."""

    comparison: Comparison
    ratios: list[float]
    ours_ns: float
    base_ns: float


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"torch {torch.__version__}; {args.blocks} blocks of {args.calls} calls"
    )
    print(f"{'what':70} {'ratio':>6} {'quartiles':>13} {'target':>7} {'':8} {'ns/call':>8} {'baseline':>8}")
    missed = 0
    for world_size, world in ((1, "1 rank"), (64, "64 ranks")):
        leased = LeasedLog(world_size, args.calls)
        leased.open()
        for comparison in leased_calls(leased, world):
            missed += report(measure(comparison, args.blocks, args.calls))
        leased.close()
    with connect(None, sinks=[], run_dir=FOLDER, transport="local") as log:
        for comparison in (*records_of_one(log), *records_of_eight(log), sections(log), updates(log)):
            missed += report(measure(comparison, args.blocks, args.calls))
    if args.check and missed:
        sys.exit(f"{missed} targets missed")


# -- what is compared ----------------------------------------------------------------------------------------------


class LeasedLog:
    """A log of `world_size` ranks with a lease of `calls` calls, which `renew` renews.

    The other ranks are threads of this process that only take part in the rounds: they skip what they could answer
    themselves, and sleep while this one is timed.
    """

    def __init__(self, world_size: int, calls: int) -> None:
        self._warm_up = calls // 10
        self._calls = calls
        self._others = world_size - 1
        self._gate = threading.Barrier(world_size)
        self._step = 0
        self._world = ThreadWorld(world_size)
        self._threads = [threading.Thread(target=self._other, args=(r,), daemon=True) for r in range(1, world_size)]

    def open(self) -> None:
        """Start the other ranks, connect, and come to a lease."""
        for thread in self._threads:
            thread.start()
        self.log = self._connect(0)
        self._settle(1)

    def close(self) -> None:
        """End all ranks."""
        self._step = -1
        self._gate.wait()
        self.log.close()
        for thread in self._threads:
            thread.join()

    def renew(self, step: int) -> int:
        """See that the lease is used up and that there was no round before; make one; return the next step."""
        if self.log.stats.rounds != self._rounds:
            sys.exit("a block was not answered under a lease")
        self._step = step
        self._gate.wait()
        self.log.log_ready(step)
        if self.log.stats.rounds != self._rounds + 1:
            sys.exit("a lease was longer than a block")
        return self._settle(step)

    def _settle(self, step: int) -> int:
        """Let the others go to sleep, and warm up what the round has turned out of the caches."""
        while self._gate.n_waiting < self._others:
            time.sleep(1e-4)
        self._rounds = self.log.stats.rounds
        for _ in range(self._warm_up):
            step += 1
            self.log.log_ready(step)
        return step + 1

    def _connect(self, rank: int) -> TrainingLog:
        max_lease = self._warm_up + self._calls
        log = connect(NEVER, sinks=[], run_dir=FOLDER, max_lease=max_lease, transport=self._world.transports[rank])
        for step in range(2):  # the first call logs, the second shows an increment
            log.log_ready(step)
        return log

    def _other(self, rank: int) -> None:
        log = self._connect(rank)
        while True:
            self._gate.wait()
            if self._step < 0:
                break
            log._left = log._lease = 0  # noqa: SLF001 - as if it had made its calls
            log.log_ready(self._step)
        log.close()


def leased_calls(leased: LeasedLog, world: str) -> list[Comparison]:
    log = leased.log
    manager = FrequencyManager(NEVER, "exact", "step")
    manager.log_written(0)

    def ours(first: int, calls: int) -> None:
        for step in range(first, first + calls):
            if log.log_ready(step):
                pass

    def modulo(first: int, calls: int) -> None:
        n = 50
        for step in range(first, first + calls):
            if step % n == 0:
                pass

    def bare(first: int, calls: int) -> None:
        for step in range(first, first + calls):
            if manager.log_ready(step):
                pass

    what = f"log_ready under a lease, {world}"
    return [
        Comparison(f"{what} / step % n == 0", ours, modulo, 3.0, renew=leased.renew),
        Comparison(f"{what} / FrequencyManager.log_ready", ours, bare, 0.25, renew=leased.renew),
    ]


BY_HAND = "d[key] += value * weight"
ITEM = "d[key] += tensor.item() * weight"
WEIGHT = 32


def records_of_one(log: TrainingLog) -> list[Comparison]:  # noqa: C901 - a list of small loops
    sums = {"train/loss": 0.0}
    tensor = torch.tensor(1.5)

    def in_dict(_: int, calls: int) -> None:
        value, weight = 1.5, WEIGHT
        for _ in range(calls):
            log.record({"train/loss": value}, weight=weight)

    def named(_: int, calls: int) -> None:
        value, weight = 1.5, WEIGHT
        for _ in range(calls):
            log.record(loss=value, weight=weight)

    def summed(_: int, calls: int) -> None:
        value = 1.5
        for _ in range(calls):
            log.record(tokens=value, reduce="sum")

    def of_tensor(_: int, calls: int) -> None:
        weight = WEIGHT
        for _ in range(calls):
            log.record({"tensor/loss": tensor}, weight=weight)

    def by_hand(_: int, calls: int) -> None:
        d, key, value, weight = sums, "train/loss", 1.5, WEIGHT
        for _ in range(calls):
            d[key] += value * weight

    def item(_: int, calls: int) -> None:
        d, key, weight = sums, "train/loss", WEIGHT
        for _ in range(calls):
            d[key] += tensor.item() * weight

    return [
        Comparison(f'record({{"k": float}}, weight=w) / {BY_HAND}', in_dict, by_hand, 7.0),
        Comparison(f"record(k=float, weight=w) / {BY_HAND}", named, by_hand),
        Comparison(f'record(k=float, reduce="sum") / {BY_HAND}', summed, by_hand, share=0.25),
        Comparison(f'record({{"k": CPU tensor}}, weight=w) / {ITEM}', of_tensor, item, share=0.25),
    ]


def records_of_eight(log: TrainingLog) -> list[Comparison]:  # noqa: C901 - a list of small loops
    floats = {f"float/{n}": float(n) for n in range(8)}
    tensors = {f"tensor/{n}": torch.tensor(float(n)) for n in range(8)}
    sums = dict.fromkeys((*floats, *tensors), 0.0)

    def of_floats(_: int, calls: int) -> None:
        weight = WEIGHT
        for _ in range(calls):
            log.record(floats, weight=weight)

    def of_tensors(_: int, calls: int) -> None:
        weight = WEIGHT
        for _ in range(calls):
            log.record(tensors, weight=weight)

    def by_hand(_: int, calls: int) -> None:
        d, weight = sums, WEIGHT
        for _ in range(calls):
            for key, value in floats.items():
                d[key] += value * weight

    def items(_: int, calls: int) -> None:
        d, weight = sums, WEIGHT
        for _ in range(calls):
            for key, tensor in tensors.items():
                d[key] += tensor.item() * weight

    return [
        Comparison(f"record(8 floats, weight=w) / 8 x {BY_HAND}", of_floats, by_hand, share=0.25),
        Comparison(f"record(8 CPU tensors, weight=w) / 8 x {ITEM}", of_tensors, items, share=0.1),
    ]


def sections(log: TrainingLog) -> Comparison:
    sums = {"data": 0.0}

    def ours(_: int, calls: int) -> None:
        for _ in range(calls):
            with log.timer("data"):
                pass

    def by_hand(_: int, calls: int) -> None:
        d, key = sums, "data"
        for _ in range(calls):
            start = time.perf_counter()
            d[key] += time.perf_counter() - start

    return Comparison("with log.timer(k) / d[key] += perf_counter() - start", ours, by_hand)


def updates(log: TrainingLog) -> Comparison:
    manager = FrequencyManager(NEVER, "exact", "step")

    def ours(first: int, calls: int) -> None:
        for step in range(first, first + calls):
            log.model_updated(step)

    def bare(first: int, calls: int) -> None:
        for step in range(first, first + calls):
            manager.model_updated(step)

    return Comparison("model_updated(step) / FrequencyManager.model_updated(step)", ours, bare)


# -- how it is timed -----------------------------------------------------------------------------------------------


def measure(comparison: Comparison, blocks: int, calls: int) -> Result:
    calls = max(1, int(calls * comparison.share))
    times: tuple[list[float], list[float]] = ([], [])
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        step = 2
        for block in range(-2, blocks):  # two blocks for new keys, and for the interpreter to specialise
            for which in (0, 1) if block % 2 else (1, 0):
                side = comparison.base if which else comparison.ours
                start = time.perf_counter_ns()
                side(step, calls)
                elapsed = time.perf_counter_ns() - start
                if block >= 0:
                    times[which].append(elapsed / calls)
            step = comparison.renew(step + calls)
    finally:
        gc.enable()
        gc.unfreeze()
    ratios = [ours / base for ours, base in zip(*times, strict=True)]
    return Result(comparison, ratios, median(times[0]), median(times[1]))


def report(result: Result) -> bool:
    """Print one line; return whether the target was missed."""
    low, middle, high = quantiles(result.ratios, n=4)
    target = result.comparison.target
    verdict, shown = "", ""
    if target is not None:
        verdict, shown = "met" if middle <= target else "MISSED", f"{target:g}"
    spread = f"{low:.2f} - {high:.2f}"
    print(
        f"{result.comparison.what:70} {middle:6.2f} {spread:>13} {shown:>7} {verdict:8} "
        f"{result.ours_ns:8.0f} {result.base_ns:8.0f}"
    )
    return verdict == "MISSED"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=200, help="samples of each comparison")
    parser.add_argument("--calls", type=int, default=1000, help="calls in a block")
    parser.add_argument("--quick", action="store_true", help="30 blocks")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    args = parser.parse_args()
    if args.quick:
        args.blocks = min(args.blocks, 30)
    return args


if __name__ == "__main__":
    main()
