"""Time whole training loops by how they log: what is left of the throughput of a loop that does not log at all.

    python scripts/bench_training.py [--quick] [--picture PATH.svg]

The script starts its ranks itself, with torchrun, on the loopback interface. A step is a forward and a backward pass of
a small model, an all_reduce of its gradients as DDP makes it, and the optimizer; then the rank sleeps until the step
has taken 5 ms, or 50 ms: as where a GPU computes, the processor has time, and what logging adds comes on top. Every
side has 8 metrics of each step, logs the means over 50 steps and over the ranks, and rank 0 writes them as a line of
JSON. The sides take turns in blocks of steps with a barrier before each; a block takes as long as its slowest rank.

Lightning's own loop costs something without any log, so its side is compared with a Trainer that logs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import logging
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from _ranks import end_with_parent, run_ranks

from logsync.workers import TrainingLog, connect

METRICS = 8
EVERY = 50
AIM = 0.99  # of the throughput without logging, at steps of 5 ms
TIMEOUT_S = 280

Values = dict[str, torch.Tensor]


class Side(NamedTuple):
    """A way to log; `base` names the loop without logging that it is compared with, `needs` a package."""

    title: str
    base: str = "nothing"
    needs: str = ""


SIDES = {
    "nothing": Side("no logging"),
    "log_ready": Side("logsync, log_ready"),
    "log_step": Side("logsync, log_step"),
    "fused": Side("one fused all_reduce at the interval, by hand"),
    "accelerate": Side("Accelerate's gather at the interval", needs="accelerate"),
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
    for step_ms, blocks, steps in args.plan:
        for world_size in args.ranks:
            given = ("--step-ms", step_ms, "--blocks", blocks, "--steps", steps)
            times = run_ranks(__file__, world_size, given, TIMEOUT_S)
            shares[f"{step_ms:g} ms steps, {world_size} ranks"] = report(world_size, step_ms, times)
    if args.picture is not None:
        args.picture.write_text(picture(shares))


def report(world_size: int, step_ms: float, times: dict[str, list[list[float]]]) -> dict[str, float]:
    """Print what was measured; return the median share of the throughput by side."""
    taken = {side: list(map(max, zip(*of_ranks, strict=True))) for side, of_ranks in times.items()}
    shares = {}
    for side, own in taken.items():
        pairs = list(zip(taken[SIDES[side].base], own, strict=True))
        ratios = [without / with_it for without, with_it in pairs]
        cost_us = median(1e6 * (with_it - without) for without, with_it in pairs)
        row = f"{world_size:5} {step_ms:4g}ms  {SIDES[side].title:48}"
        if side in {"nothing", "lightning alone"}:
            print(f"{row} {'':10} {'':15} {1e6 * median(own):10.0f}")
            continue
        low, middle, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        aimed = side.startswith("log_") and step_ms <= 5  # noqa: PLR2004 - what the aim is about
        verdict = "" if not aimed else " met" if middle >= AIM else " MISSED"
        print(f"{row} {middle:10.2%} {f'{low:.1%} - {high:.1%}':>15} {cost_us:+10.0f}{verdict}")
        shares[side] = middle
    return shares


# -- what a rank does ----------------------------------------------------------------------------------------------


class Work:
    """A step of training that takes at least `step_s`."""

    def __init__(self, step_s: float) -> None:
        torch.manual_seed(dist.get_rank())
        self._step_s = step_s
        self._model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=0.01)
        self._x = torch.randn(16, 32)
        self._names = [f"train/metric_{number}" for number in range(METRICS)]

    def step(self) -> Values:
        """Train once; return the metrics."""
        until = time.perf_counter() + self._step_s
        loss = self._model(self._x).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        gradients = torch.cat(
            [parameter.grad.flatten() for parameter in self._model.parameters() if parameter.grad is not None]
        )
        dist.all_reduce(gradients)
        self._optimizer.step()
        values = dict(zip(self._names, (loss.detach() * torch.arange(1.0, METRICS + 1)).unbind(), strict=True))
        if (left := until - time.perf_counter()) > 0:
            time.sleep(left)
        return values


class Lines:
    """Rank 0's file of logs, as a script would write it."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder, "lines.jsonl")

    def write(self, step: int, names: Iterable[str], means: list[float]) -> None:
        if dist.get_rank() == 0:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **dict(zip(names, means, strict=True))}) + "\n")


Logs = Callable[[int, Values], None]


def logs_nothing(_: int, __: Values) -> None:
    """Do nothing."""


def logs_ready(log: TrainingLog) -> Logs:
    def logs(step: int, values: Values) -> None:
        log.record(values)
        log.log_ready(step)

    return logs


class Sums:
    """The sums of metrics since the last log, as one tensor with their number."""

    def __init__(self) -> None:
        self.total = torch.zeros(METRICS + 1)

    def add(self, values: Values) -> None:
        self.total[:METRICS] += torch.stack(list(values.values()))
        self.total[METRICS] += 1

    def means(self, total: torch.Tensor) -> list[float]:
        self.total = torch.zeros(METRICS + 1)
        means: list[float] = (total[:METRICS] / total[METRICS]).tolist()
        return means


def logs_fused(lines: Lines) -> Logs:
    sums = Sums()

    def logs(step: int, values: Values) -> None:
        sums.add(values)
        if step % EVERY == 0:
            dist.all_reduce(sums.total)
            lines.write(step, values, sums.means(sums.total))

    return logs


def logs_flag(lines: Lines) -> Logs:
    sums = Sums()

    def logs(step: int, values: Values) -> None:
        sums.add(values)
        flag = torch.tensor([step % EVERY == 0 and dist.get_rank() == 0], dtype=torch.uint8)
        dist.broadcast(flag, src=0)
        if flag.item():
            dist.all_reduce(sums.total)
            lines.write(step, values, sums.means(sums.total))

    return logs


def logs_each(lines: Lines) -> Logs:
    sums = Sums()
    world_size = dist.get_world_size()

    def logs(step: int, values: Values) -> None:
        for value in values.values():
            dist.all_reduce(value)
            value.div_(world_size)
        sums.add(values)
        if step % EVERY == 0:
            lines.write(step, values, sums.means(sums.total))

    return logs


def logs_accelerate(lines: Lines) -> Logs:
    from accelerate import Accelerator  # noqa: PLC0415 - it may not be installed

    sums, accelerator = Sums(), Accelerator(cpu=True)

    def logs(step: int, values: Values) -> None:
        sums.add(values)
        if step % EVERY == 0:
            gathered = accelerator.gather(sums.total[None])
            lines.write(step, values, sums.means(gathered.sum(dim=0)))

    return logs


def logs_torchmetrics(lines: Lines) -> Logs:
    from torchmetrics import MeanMetric  # noqa: PLC0415 - it may not be installed

    metrics = [MeanMetric() for _ in range(METRICS)]

    def logs(step: int, values: Values) -> None:
        for metric, value in zip(metrics, values.values(), strict=True):
            metric.update(value)
        if step % EVERY == 0:
            lines.write(step, values, [metric.compute().item() for metric in metrics])
            for metric in metrics:
                metric.reset()

    return logs


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
    work = Work(args.step_ms / 1000)
    with contextlib.ExitStack() as open_till_the_end:
        folder = open_till_the_end.enter_context(tempfile.TemporaryDirectory())
        lines = Lines(folder)
        logs = [
            open_till_the_end.enter_context(connect(EVERY, sinks=["jsonl"], run_dir=f"{folder}/{name}", name=name))
            for name in ("ready", "step")
        ]
        makers: dict[str, Callable[[], Callable[[int, int], float]]] = {
            "nothing": lambda: trains(work, logs_nothing),
            "log_ready": lambda: trains(work, logs_ready(logs[0])),
            "log_step": lambda: trains(work, logs[1].log_step),
            "fused": lambda: trains(work, logs_fused(lines)),
            "accelerate": lambda: trains(work, logs_accelerate(lines)),
            "torchmetrics": lambda: trains(work, logs_torchmetrics(lines)),
            "flag": lambda: trains(work, logs_flag(lines)),
            "each": lambda: trains(work, logs_each(lines)),
            "lightning alone": lambda: trains_by_lightning(work, folder, logs=False),
            "lightning": lambda: trains_by_lightning(work, folder, logs=True),
        }
        sides = {side: make() for side, make in makers.items() if installed(SIDES[side])}
        times = take_turns(sides, between, args)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, times, group=between)
    if dist.get_rank() == 0:
        found = {side: [of_rank[side] for of_rank in gathered] for side in sides}
        args.ranks_write_to.write_text(json.dumps(found))
    dist.destroy_process_group()


def take_turns(
    sides: dict[str, Callable[[int, int], float]], between: dist.ProcessGroup, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Return seconds per step of every block, by side."""
    times: dict[str, list[float]] = {side: [] for side in sides}
    names = list(sides)
    first = 0
    for block in range(-1, args.blocks):  # one to warm up
        gc.collect()
        for name in names:
            dist.barrier(group=between)
            elapsed = sides[name](first, args.steps)
            if block >= 0:
                times[name].append(elapsed / args.steps)
        first += args.steps
        names = names[3:] + names[:3] if block % 2 else names[::-1]
    return times


def installed(side: Side) -> bool:
    return not side.needs or importlib.util.find_spec(side.needs) is not None


# -- the picture ---------------------------------------------------------------------------------------------------


def picture(shares: dict[str, dict[str, float]]) -> str:
    """Return an SVG of the throughput that each side leaves, a group of bars for each pace and world size."""
    width, left, row, head = 860, 330, 20, 46
    parts, y = [], 20
    for title, of_sides in shares.items():
        parts.append(f'<text x="{left}" y="{y + 14}" class="head">{title}</text>')
        y += 26
        for side, share in of_sides.items():
            bar = max(1.0, (width - left - 70) * share)
            kind = "ours" if side.startswith("log_") else "other"
            name = SIDES[side].title.replace("&", "&amp;").replace("<", "&lt;")
            parts.append(f'<text x="{left - 8}" y="{y + 13}" class="name">{name}</text>')
            parts.append(f'<rect x="{left}" y="{y + 2}" width="{bar:.1f}" height="{row - 5}" class="{kind}"/>')
            parts.append(f'<text x="{left + bar + 6:.1f}" y="{y + 13}">{share:.1%}</text>')
            y += row
        y += 16
    style = (
        "text{font:12px system-ui,sans-serif;fill:#24292f}.name{text-anchor:end}.head{font-weight:600}"
        ".ours{fill:#0969da}.other{fill:#8c959f}"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.ours{fill:#58a6ff}.other{fill:#6e7681}}"
    )
    caption = f'<text x="8" y="{y + 10}">throughput of a training loop that logs, of one that does not</text>'
    body = "\n".join([f"<style>{style}</style>", *parts, caption])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + head - 20}">\n{body}\n</svg>\n'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="world sizes")
    parser.add_argument("--quick", action="store_true", help="two ranks, short steps, one block of each side")
    parser.add_argument("--picture", type=Path, help="write the table as a picture, too")
    parser.add_argument("--ranks-write-to", type=Path, help=argparse.SUPPRESS)
    for name, kind in (("--step-ms", float), ("--blocks", int), ("--steps", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.plan = [(5.0, 7, 100), (50.0, 3, 50)]  # milliseconds of a step, blocks, steps of a block
    if args.quick:
        args.ranks, args.plan = [2], [(2.0, 1, EVERY)]
    return args


if __name__ == "__main__":
    main()
