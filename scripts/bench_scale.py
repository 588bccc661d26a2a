"""Time the coordinator's core alone as the world grows: one round of N ranks that hold 32 metrics each.

    python scripts/bench_scale.py [--quick] [--gbit 25] [--step-ms 250]

The ranks are simulated: their frames are made beforehand, and differ in every value. A round is decoded, checked,
merged and encoded; the time is the median of a few rounds, the memory is the peak of one more round above what was
there before. Growth is the exponent from the size above: 1 is linear.

Beside it the system calls of a message are timed: a root that reads a frame from each of many local sockets, and
writes a reply to each; or, on a tree, one that gets the frames of a node's ranks as one message from the node's first.
What follows for large jobs is computed from these figures, at steps of --step-ms, a log every 50 steps, and a root
whose link carries --gbit. A network's latency, and waiting for the slowest rank, are not in it.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import platform
import resource
import socket
import time
import tracemalloc
from statistics import median
from typing import NamedTuple

from logsync.coordinator.core import Coordinator
from logsync.coordinator.messages import (
    PROTOCOL,
    Hello,
    KeySpec,
    Report,
    Rhythm,
    Settings,
    Window,
    encode,
    encode_hello,
    pack_values,
)

METRICS = 32
EVERY = 50
AIM_S = 1.0  # for the largest world
SOCKETS = 128
PER_NODE = 8
SIZES = (16, 64, 256, 1024, 4096, 16384)


class Round(NamedTuple):
    """What a round costs the root: seconds, bytes it gets, bytes of the reply, bytes of memory."""

    seconds: float
    received: int
    reply: int
    memory: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small worlds only")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each world (%(default)d)")
    parser.add_argument("--gbit", type=float, default=25.0, help="of the root's link, per second (%(default)g)")
    parser.add_argument("--step-ms", type=float, default=250.0, help="of a training step (%(default)g)")
    given = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}")
    print(f"{'ranks':>6} {'ms':>9} {'us a rank':>10} {'growth':>7} {'in, MB':>8} {'reply, kB':>10} {'peak, MB':>9}")
    found: dict[int, Round] = {}
    for size in SIZES[:3] if given.quick else SIZES:
        found[size] = measured(size, given.rounds)
        show(size, found)
    if not given.quick:
        print(
            f"the aim is {AIM_S:g} s for {SIZES[-1]} ranks: {'met' if found[SIZES[-1]].seconds < AIM_S else 'MISSED'}"
        )
    reason(found, given.gbit, given.step_ms)


def measured(size: int, rounds: int) -> Round:
    """Return what a round of `size` ranks costs."""
    settings = Settings("train", EVERY, "exact", "step", "auto", 1800.0, 1000)
    root = Coordinator(settings, size, run="run", run_dir="runs/bench")
    root.handle([encode_hello(Hello(rank, size, "bench", settings)) for rank in range(size)])
    took = []
    for number in range(1, rounds + 1):
        frames = frames_of(size, number)
        gc.collect()
        began = time.perf_counter()
        reply, entries = root.handle(frames, float(number))
        took.append(time.perf_counter() - began)
        if len(entries) != 1:
            msg = f"round {number} made {len(entries)} entries"
            raise SystemExit(msg)
    frames = frames_of(size, rounds + 1)
    tracemalloc.start()
    root.handle(frames, 0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Round(median(took), sum(map(len, frames)), len(reply), peak)


def frames_of(size: int, number: int) -> list[bytes]:
    """Return all ranks' frames of round `number`."""
    schema = encode([KeySpec(f"train/metric_{metric}") for metric in range(METRICS)])
    call = 1 + (number - 1) * EVERY
    rhythm = Rhythm(rise=1, gap=1, current=call)
    return [
        encode(
            Report(
                PROTOCOL,
                "run",
                number,
                rank,
                size,
                "decision",
                call,
                call,
                False,  # noqa: FBT003 - check_model_update
                rhythm,
                window=Window(
                    schema, pack_values([x for m in range(METRICS) for x in (m + rank / 7 + number / 3, 32.0)])
                ),
                waited_s=0.001,
            )
        )
        for rank in range(size)
    ]


def show(size: int, found: dict[int, Round]) -> None:
    cost = found[size]
    smaller = [other for other in found if other < size]
    growth = ""
    if smaller:
        before = found[smaller[-1]]
        growth = f"{math.log(cost.seconds / before.seconds) / math.log(size / smaller[-1]):.2f}"
    print(
        f"{size:>6} {1e3 * cost.seconds:>9.2f} {1e6 * cost.seconds / size:>10.1f} {growth:>7} "
        f"{cost.received / 1e6:>8.2f} {cost.reply / 1e3:>10.1f} {cost.memory / 1e6:>9.1f}"
    )


def message_s(length: int, rounds: int = 20) -> tuple[float, float]:
    """Return the seconds that a root needs to read a message of `length` bytes, and to write one."""
    pairs = [socket.socketpair() for _ in range(SOCKETS)]
    message, reads, writes = bytes(length), [], []
    for _ in range(rounds):
        began = time.perf_counter()
        for ours, _ in pairs:
            ours.sendall(message)
        writes.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _, theirs in pairs:
            theirs.recv(length, socket.MSG_WAITALL)
        reads.append(time.perf_counter() - began)
    for both in pairs:
        for one in both:
            one.close()
    return median(reads) / SOCKETS, median(writes) / SOCKETS


def reason(found: dict[int, Round], gbit: float, step_ms: float) -> None:
    """Print what that means for large jobs."""
    largest = max(found)
    cost = found[largest]
    frame, reply = cost.received // largest, max(one.reply for one in found.values())
    byte_s = 8 / (gbit * 1e9)
    interval_s = EVERY * step_ms / 1000
    print(
        f"\nat {largest} ranks; a message of {frame} bytes in, of {reply} bytes out; steps of {step_ms:g} ms, a log "
        f"every {interval_s:g} s, {gbit:g} Gbit/s:"
    )
    parts = ("deciding", "reading", "writing", "the link")
    print(
        f"{'ranks':>6} {'to the root':>15} {'sockets':>8} {' '.join(f'{part:>9}' for part in parts)} {'a round':>9} "
        f"{'leased':>7} {'every call':>11}"
    )
    costs: dict[str, dict[str, float]] = {}
    for how, each in (("directly", 1), (f"by nodes of {PER_NODE}", PER_NODE)):
        reading, _ = message_s(each * frame)
        _, writing = message_s(reply)  # to each by the root, at worst: a broadcast's tree shares that
        costs[how] = {
            "deciding": cost.seconds / largest,
            "reading": reading / each,
            "writing": writing / each,
            "the link": (frame + reply / each) * byte_s,
        }
        for size in (1_000, 10_000):
            columns = " ".join(f"{f'{1e3 * size * costs[how][part]:.1f} ms':>9}" for part in parts)
            whole = size * sum(costs[how].values())
            share = whole / interval_s
            sockets = size - 1 if each == 1 else size // each - 1 + each - 1
            print(
                f"{size:>6} {how:>15} {sockets:>8} {columns} {f'{1e3 * whole:.1f} ms':>9} {share:>7.2%} "
                f"{EVERY * share:>11.1%}"
            )
    for how, of_rank in costs.items():
        first = max(of_rank, key=of_rank.__getitem__)
        most = interval_s / sum(of_rank.values())
        print(
            f"{how}: what saturates first is {first}. The root is busy with nothing else at {most:,.0f} ranks with a "
            f"lease, which makes one round of {EVERY} calls, and at {most / EVERY:,.0f} with a round at every call."
        )
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    print(f"this machine allows a process {files:,} open files; directly, every rank needs as many as there are ranks")


if __name__ == "__main__":
    main()
