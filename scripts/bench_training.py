"""Time whole training loops by how they log: what is left of the throughput of a loop that does not log at all.

    python scripts/bench_training.py [--quick] [--picture PATH.svg]

The script starts its ranks itself, with torchrun, on the loopback interface. A step is a forward and a backward pass of
a small model and the optimizer; then the ranks wait for each other, as the gradients' all_reduce makes them, and sleep
until the step has taken 5 ms, or 50 ms. So it is where a GPU computes and carries the gradients: the processor has
time, and what logging adds comes on top. They meet in shared memory, because gloo would carry gradients on the
processor, and four ranks on two cores would measure the scheduler.

Every side has 8 metrics of each step, logs the means over 50 steps and over the ranks, and rank 0 writes them as a line
of JSON. The sides take turns in blocks of steps with a barrier before each; a block takes as long as its slowest rank,
and is compared with the block without logging of the same turn. What costs much takes part in some of the turns only.

Lightning's side is a Trainer with the same step in training_step, by manual optimization. Its own loop costs something
without any log, so it is compared with a Trainer that logs nothing; starting and ending a fit is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import logging
import mmap
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import _ways_to_log
import torch
import torch.distributed as dist
from _picture import bars
from _ranks import end_with_parent, run_ranks
from _ways_to_log import EVERY, METRICS, Lines, Logs, Values

from logsync.workers import connect

AIM = 0.99  # of the throughput without logging, at steps of 5 ms
FEW = 4
POLL_S = 5e-5
TIMEOUT_S = 280

Turns = dict[str, float]  # seconds per step by turn; a number in text, as JSON has it


class Side(NamedTuple):
    """A way to log.

    `base` names the loop without logging that it is compared with, `needs` a package. A `light` one takes part in every
    turn.
    """

    title: str
    base: str = "nothing"
    needs: str = ""
    light: bool = False


class Pace(NamedTuple):
    """How long a step takes, and how many blocks of how many steps the light sides and the others have."""

    step_ms: float
    blocks: int
    heavy_blocks: int
    steps: int


SIDES = {
    "nothing": Side("no logging", light=True),
    "log_ready": Side("logsync, log_ready", light=True),
    "log_step": Side("logsync, log_step", light=True),
    "fused": Side("one fused all_reduce at the interval, by hand", light=True),
    "accelerate": Side("Accelerate's gather at the interval", needs="accelerate", light=True),
    "torchmetrics": Side("torchmetrics' MeanMetric at the interval", needs="torchmetrics"),
    "flag": Side("a flag broadcast every step, then all_reduce"),
    "each": Side("an all_reduce per metric every step"),
    "lightning alone": Side("Lightning's Trainer without logging", needs="lightning"),
    "lightning": Side("Lightning's self.log(sync_dist=True)", "lightning alone", needs="lightning"),
}


def main() -> None:
    args = parse_args()
    if args.ranks_write_to is not None:
        be_a_rank(args)
        return
    skipped = sorted({side.needs for side in SIDES.values() if not installed(side)})
    if skipped:
        print(f"skipped, not installed: {', '.join(skipped)}")
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"torch {torch.__version__}; {METRICS} metrics, a log every {EVERY} steps"
    )
    print(f"{'ranks':>5} {'step':>6}  {'how':48} {'throughput':>10} {'quartiles':>15} {'us a step':>10}")
    shares: dict[str, dict[str, float]] = {}
    for world_size in args.ranks:
        given = ("--quick",) if args.quick else ()
        of_paces = run_ranks(__file__, world_size, given, TIMEOUT_S)
        for pace, times in zip(args.plan, of_paces, strict=True):
            shares[f"{pace.step_ms:g} ms steps, {world_size} ranks"] = report(world_size, pace.step_ms, times)
    print(f"the range instead of the quartiles where there are fewer than {FEW} blocks")
    if args.picture is not None:
        ours = {side.title for name, side in SIDES.items() if name.startswith("log_")}
        args.picture.write_text(bars(shares, ours, "throughput of a training loop that logs, of one that does not"))


def report(world_size: int, step_ms: float, times: dict[str, list[Turns]]) -> dict[str, float]:
    """Print what was measured; return the median share of the throughput by the side's title."""
    taken = {side: slowest(of_ranks) for side, of_ranks in times.items()}
    shares = {}
    for side, own in taken.items():
        pairs = [(taken[SIDES[side].base][turn], seconds) for turn, seconds in own.items()]
        ratios = [without / with_it for without, with_it in pairs]
        cost_us = median(1e6 * (with_it - without) for without, with_it in pairs)
        row = f"{world_size:5} {step_ms:4g}ms  {SIDES[side].title:48}"
        if side in {"nothing", "lightning alone"}:
            print(f"{row} {'':10} {'':15} {1e6 * median(own.values()):10.0f}")
            continue
        middle = median(ratios)
        low, _, high = quantiles(ratios, n=4) if len(ratios) >= FEW else (min(ratios), middle, max(ratios))
        aimed = side.startswith("log_") and step_ms <= 5  # noqa: PLR2004 - what the aim is about
        verdict = "" if not aimed else " met" if middle >= AIM else " MISSED"
        print(f"{row} {middle:10.2%} {f'{low:.1%} - {high:.1%}':>15} {cost_us:+10.0f}{verdict}")
        shares[SIDES[side].title] = middle
    return shares


def slowest(of_ranks: list[Turns]) -> Turns:
    """Return what each turn took the slowest rank."""
    return {turn: max(times[turn] for times in of_ranks) for turn in of_ranks[0]}


# -- what a rank does ----------------------------------------------------------------------------------------------


class Together:
    """Lets the ranks of this machine wait for each other in a file that all have mapped, at next to no cost."""

    def __init__(self, path: Path) -> None:
        self._rank = dist.get_rank()
        size = 8 * dist.get_world_size()
        if self._rank == 0:
            path.write_bytes(bytes(size))
        dist.barrier()
        with path.open("r+b") as file:
            self._steps = memoryview(mmap.mmap(file.fileno(), size)).cast("q")
        self._step = 0

    def meet(self) -> None:
        """Return when every rank has come here as often as this one."""
        self._step += 1
        self._steps[self._rank] = self._step
        while min(self._steps) < self._step:
            time.sleep(POLL_S)


class Work:
    """A step of training that takes at least `step_s`."""

    def __init__(self, together: Together) -> None:
        torch.manual_seed(dist.get_rank())
        self.step_s = 0.0
        self._together = together
        self._model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01)
        self._x = torch.randn(16, 32)
        self._names = [f"train/metric_{number}" for number in range(METRICS)]

    def step(self) -> Values:
        """Train once; return the metrics."""
        until = time.perf_counter() + self.step_s
        loss = self._model(self._x).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        values = dict(zip(self._names, (loss.detach() * torch.arange(1.0, METRICS + 1)).unbind(), strict=True))
        self._together.meet()
        if (left := until - time.perf_counter()) > 0:
            time.sleep(left)
        return values


def trains(work: Work, logs: Logs) -> Callable[[int, int], float]:
    def train(first: int, steps: int) -> float:
        began = time.perf_counter()
        for step in range(first, first + steps):
            logs(step, work.step())
        return time.perf_counter() - began

    return train


def trains_by_lightning(work: Work, folder: str, *, logs: bool) -> Callable[[int, int], float]:
    import lightning.pytorch as pl  # noqa: PLC0415 - it may not be installed
    from lightning.pytorch.loggers import CSVLogger  # noqa: PLC0415 - as above

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False  # the step is the same as on every other side
            self.nothing = torch.nn.Parameter(torch.zeros(1))
            self.began = self.ended = 0.0

        def configure_optimizers(self) -> None:
            return None

        def on_train_batch_start(self, *_: object) -> None:
            self.began = self.began or time.perf_counter()

        def training_step(self, *_: object) -> None:
            values = work.step()
            if logs:
                for name, value in values.items():
                    self.log(name, value, sync_dist=True)

        def on_train_end(self) -> None:
            self.ended = time.perf_counter()

    def train(_: int, steps: int) -> float:
        module = Module()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy="ddp",
            max_steps=-1,
            max_epochs=1,
            limit_train_batches=steps,
            log_every_n_steps=EVERY,
            logger=CSVLogger(folder, name="") if logs else False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(10**5))))
        return module.ended - module.began

    return train


def be_a_rank(args: argparse.Namespace) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    between = dist.new_group(backend="gloo")
    work = Work(Together(args.ranks_write_to.with_name("together")))
    with contextlib.ExitStack() as open_till_the_end:
        folder = open_till_the_end.enter_context(tempfile.TemporaryDirectory())
        lines = Lines(folder)
        logs = [
            open_till_the_end.enter_context(connect(EVERY, sinks=["jsonl"], run_dir=f"{folder}/{name}", name=name))
            for name in ("ready", "step")
        ]
        makers: dict[str, Callable[[], Callable[[int, int], float]]] = {
            "nothing": lambda: trains(work, _ways_to_log.nothing),
            "log_ready": lambda: trains(work, _ways_to_log.ready(logs[0])),
            "log_step": lambda: trains(work, logs[1].log_step),
            "fused": lambda: trains(work, _ways_to_log.fused(lines)),
            "accelerate": lambda: trains(work, _ways_to_log.accelerate(lines)),
            "torchmetrics": lambda: trains(work, _ways_to_log.torchmetrics(lines)),
            "flag": lambda: trains(work, _ways_to_log.flag(lines)),
            "each": lambda: trains(work, _ways_to_log.each(lines)),
            "lightning alone": lambda: trains_by_lightning(work, folder, logs=False),
            "lightning": lambda: trains_by_lightning(work, folder, logs=True),
        }
        sides = {side: make() for side, make in makers.items() if installed(SIDES[side])}
        turn = Turn(sides, between)
        turn.take(EVERY, heavy=True)  # to warm up, with steps as short as they are
        of_paces = []
        for pace in args.plan:
            work.step_s = pace.step_ms / 1000
            of_paces.append(take_turns(turn, pace))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, of_paces, group=between)
    if dist.get_rank() == 0:
        found = [
            {side: [times[side] for times in of_ranks] for side in sides} for of_ranks in zip(*gathered, strict=True)
        ]
        args.ranks_write_to.write_text(json.dumps(found))
    dist.destroy_process_group()


class Turn:
    """Every side's block, one after the other, in an order that changes."""

    def __init__(self, sides: dict[str, Callable[[int, int], float]], between: dist.ProcessGroup) -> None:
        self._sides = sides
        self._between = between
        self._names = list(sides)
        self._taken = self._first = 0

    def take(self, steps: int, *, heavy: bool) -> dict[str, float]:
        """Return seconds per step of each side; of the light sides only, unless `heavy`."""
        gc.collect()
        times = {}
        for name in self._names:
            if heavy or SIDES[name].light:
                dist.barrier(group=self._between)
                times[name] = self._sides[name](self._first, steps) / steps
        self._first += steps
        self._taken += 1
        self._names = self._names[3:] + self._names[:3] if self._taken % 2 else self._names[::-1]
        return times


def take_turns(turn: Turn, pace: Pace) -> dict[str, Turns]:
    """Return what the steps of each side took at this pace."""
    times: dict[str, Turns] = {}
    for number in range(pace.blocks):
        heavy = number * pace.heavy_blocks % pace.blocks < pace.heavy_blocks
        for side, seconds in turn.take(pace.steps, heavy=heavy).items():
            times.setdefault(side, {})[str(number)] = seconds
    return times


def installed(side: Side) -> bool:
    return not side.needs or importlib.util.find_spec(side.needs) is not None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="world sizes")
    parser.add_argument("--quick", action="store_true", help="two ranks, short steps, one block of each side")
    parser.add_argument("--picture", type=Path, help="write the table as a picture, too")
    parser.add_argument("--ranks-write-to", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.plan = [Pace(5.0, 12, 2, 100), Pace(50.0, 2, 1, 50)]
    if args.quick:
        args.ranks, args.plan = [2], [Pace(2.0, 1, 1, EVERY)]
    return args


if __name__ == "__main__":
    main()
