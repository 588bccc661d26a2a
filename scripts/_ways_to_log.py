"""Ways to log the means of a step's metrics over the ranks and over an interval, for bench_training.py.

Each takes a step's number and its metrics, on every rank and at every step. But for ours, rank 0 writes what it has as
a line of JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from logsync.workers import TrainingLog

METRICS = 8
EVERY = 50

Values = dict[str, torch.Tensor]


class Lines:
    """Rank 0's file of logs, as a script would write it."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder, "lines.jsonl")

    def write(self, step: int, names: Iterable[str], means: list[float]) -> None:
        if dist.get_rank() == 0:
            with self._path.open("a") as file:
                file.write(json.dumps({"step": step, **dict(zip(names, means, strict=True))}) + "\n")


Logs = Callable[[int, Values], None]


def nothing(_: int, __: Values) -> None:
    """Do nothing."""


def ready(log: TrainingLog) -> Logs:
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


def fused(lines: Lines) -> Logs:
    sums = Sums()

    def logs(step: int, values: Values) -> None:
        sums.add(values)
        if step % EVERY == 0:
            dist.all_reduce(sums.total)
            lines.write(step, values, sums.means(sums.total))

    return logs


def flag(lines: Lines) -> Logs:
    sums = Sums()

    def logs(step: int, values: Values) -> None:
        sums.add(values)
        flag = torch.tensor([step % EVERY == 0 and dist.get_rank() == 0], dtype=torch.uint8)
        dist.broadcast(flag, src=0)
        if flag.item():
            dist.all_reduce(sums.total)
            lines.write(step, values, sums.means(sums.total))

    return logs


def each(lines: Lines) -> Logs:
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


def accelerate(lines: Lines) -> Logs:
    from accelerate import Accelerator  # noqa: PLC0415 - it may not be installed

    sums, accelerator = Sums(), Accelerator(cpu=True)

    def logs(step: int, values: Values) -> None:
        sums.add(values)
        if step % EVERY == 0:
            gathered = accelerator.gather(sums.total[None])
            lines.write(step, values, sums.means(gathered.sum(dim=0)))

    return logs


def torchmetrics(lines: Lines) -> Logs:
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
