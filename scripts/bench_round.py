"""Time a round: 32 metrics recorded on every rank, exchanged, merged and decoded, at 2 and at 4 ranks.

    python scripts/bench_round.py [--quick] [--check]

The script starts its ranks itself, with torchrun, on the loopback interface. A round of ours is compared with what it
cannot do without: a gather to rank 0 and a broadcast from it, of the same number of bytes, on a gloo group of its own,
called from the main thread. Between the two stands our transport alone, with a root that answers the same bytes
without looking: what is above it is recording, encoding, deciding, merging and decoding. From 4 ranks on, that
transport also goes by a tree, as if every two ranks were a node. The sides take turns in small blocks with a barrier,
on a third group, before each; a block takes as long as it takes the slowest rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.distributed as dist
from _ranks import end_with_parent, run_ranks

from logsync.coordinator.messages import encode
from logsync.workers import connect
from logsync.workers.transports.base import Root
from logsync.workers.transports.collective import CollectiveTransport

METRICS = 32
TARGETS = {2: 1.5, 4: 1.4}
TIMEOUT_S = 240
SIDES = ("ours", "transport", "tree", "bare")

Side = Callable[[int, int], None]  # given the first step, and how many rounds to make


def main() -> None:
    args = parse_args()
    if args.ranks_write_to is not None:
        be_a_rank(args)
        return
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"torch {torch.__version__}; {args.blocks} blocks of {args.rounds} rounds, {METRICS} metrics"
    )
    print(f"{'ranks':>5}  {'what':44} {'us':>7}  {'ratio':>5} {'quartiles':>13} {'target':>7}")
    given = ("--blocks", args.blocks, "--rounds", args.rounds)
    missed = sum(report(size, run_ranks(__file__, size, given, TIMEOUT_S)) for size in args.ranks)
    if args.check and missed:
        sys.exit(f"{missed} targets missed")


def report(world_size: int, found: dict[str, Any]) -> bool:
    """Print what was measured at one world size; return whether the target was missed."""
    sides = [side for side in SIDES if side in found["times"]]
    times = {side: [slowest * 1e6 for slowest in map(max, zip(*found["times"][side], strict=True))] for side in sides}
    target = TARGETS.get(world_size)
    what = {
        "ours": "round of ours: record, log_ready, entry",
        "transport": "our transport alone, same bytes",
        "tree": "the same by a tree of nodes of 2",
        "bare": f"gather + broadcast of slots of {found['slot']} bytes",
    }
    missed = False
    for side in sides:
        ratios = [ours / bare for ours, bare in zip(times[side], times["bare"], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        verdict = ""
        if side == "ours" and target is not None:
            missed = middle > target
            verdict = f"{target:7g} {'MISSED' if missed else 'met'}"
        ratio = "" if side == "bare" else f"{middle:5.2f} {f'{low:.2f} - {high:.2f}':>13}"
        print(f"{world_size:5}  {what[side]:44} {median(times[side]):7.0f}  {ratio} {verdict}")
    print(f"{'':5}  (frames of {found['frame']} bytes, replies of {found['reply']})")
    return missed


# -- what a rank does ----------------------------------------------------------------------------------------------


class Weighed(CollectiveTransport):
    """Our transport, noting how long the last reply was."""

    reply = 0

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        """Make a round."""
        answer = super().exchange(frame, patient=patient)
        self.reply = len(answer)
        return answer


def be_a_rank(args: argparse.Namespace) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    between, theirs = dist.new_group(backend="gloo"), dist.new_group(backend="gloo")
    weighed = Weighed(timeout_s=60)
    values = {f"train/metric_{n}": n + rank / 7 for n in range(METRICS)}
    with connect(1, sinks=[], max_lease=0, transport=weighed) as log:

        def ours(first: int, rounds: int) -> None:
            for step in range(first, first + rounds):
                log.record(values, weight=32)
                if not log.log_ready(step):
                    sys.exit("a call was no log")

        ours(0, 10)
        before = log.stats.bytes_sent
        ours(10, 10)
        frame = (log.stats.bytes_sent - before) // 10
        reply = weighed.reply
        if log.last_entry is None or reply < len(encode(log.last_entry)):
            sys.exit("the last reply held no entry")
        slot = shared_slot(max(frame, reply))

        transport = CollectiveTransport(timeout_s=60)
        root: Root | None = (lambda _, answer=b"r" * reply: answer) if rank == 0 else None
        transport.start(root)

        out, back = torch.zeros(slot, dtype=torch.uint8), torch.zeros(slot, dtype=torch.uint8)
        inbox = [torch.zeros(slot, dtype=torch.uint8) for _ in range(world_size)] if rank == 0 else None

        def bare(_: int, rounds: int) -> None:
            for _ in range(rounds):
                dist.gather(out, inbox, dst=0, group=theirs)
                dist.broadcast(back, src=0, group=theirs)

        sides: dict[str, Side] = {"ours": ours, "transport": alone(transport, frame), "bare": bare}
        tree = CollectiveTransport(timeout_s=60, shape="tree")
        if world_size >= 4:  # noqa: PLR2004 - two nodes of two
            os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_WORLD_SIZE": "2"}
            tree.start(root)
            sides["tree"] = alone(tree, frame)
        times = take_turns(sides, between, args)
        transport.close()
        tree.close()
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, times, group=between)
    if rank == 0:
        found = {
            "times": {side: [times[side] for times in gathered] for side in sides},
            "frame": frame,
            "reply": reply,
            "slot": slot,
        }
        args.ranks_write_to.write_text(json.dumps(found))
    dist.destroy_process_group()


def alone(transport: CollectiveTransport, frame: int) -> Side:
    """Return what makes rounds with frames of that many bytes."""
    sent = b"f" * frame

    def exchange(_: int, rounds: int) -> None:
        for _ in range(rounds):
            transport.exchange(sent)

    return exchange


def take_turns(sides: dict[str, Side], between: dist.ProcessGroup, args: argparse.Namespace) -> dict[str, list[float]]:
    """Return seconds per round of every block, by side."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    names = list(sides)
    step = 100
    gc.collect()
    gc.freeze()
    gc.disable()
    for block in range(-2, args.blocks):  # two blocks to warm up
        for name in names:
            dist.barrier(group=between)
            start = time.perf_counter()
            sides[name](step, args.rounds)
            elapsed = time.perf_counter() - start
            if block >= 0:
                times[name].append(elapsed / args.rounds)
        step += args.rounds
        names = names[1:] + names[:1] if block % 2 else names[::-1]
    gc.enable()
    gc.unfreeze()
    return times


def shared_slot(length: int) -> int:
    """Return the size of the slots that our transport would use: a power of two with a quarter to spare."""
    head = 16
    return max(1024, 1 << (length + length // 4 + head - 1).bit_length())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="world sizes")
    parser.add_argument("--blocks", type=int, default=100, help="samples of each side")
    parser.add_argument("--rounds", type=int, default=20, help="rounds in a block")
    parser.add_argument("--quick", action="store_true", help="30 blocks")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--ranks-write-to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.blocks = min(args.blocks, 30)
    return args


if __name__ == "__main__":
    main()
