"""Train on loaders of different lengths: `uneven.py MODE [MODE]`, under torchrun.

Mode `join` trains under DistributedDataParallel and Join, `alone` without either, and `late` as `join`, but it tells
the end of an epoch after the Join block. Every rank leaves in MODE.rank<R>.json what it was answered and what it had
recorded, or the error that ended it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from logsync.coordinator.errors import TransportError
from logsync.workers import TrainingLog, connect

EPOCHS = 3
EPOCH = 100  # steps from the first one of an epoch to the first one of the next
FREQUENCY = 4


def length(rank: int, epoch: int) -> int:
    """How many batches a rank has; each is the shortest once, and none has a batch in some epoch."""
    return (5 + 7 * rank + 11 * epoch) % 23 if (rank + epoch) % 4 else 0


def main() -> None:
    dist.init_process_group("gloo")
    for mode in sys.argv[1:]:
        result = play(mode)
        Path(f"{mode}.rank{dist.get_rank()}.json").write_text(json.dumps(result))
        if "error" in result:
            os._exit(1)  # at an orderly end torch would wait for the collectives that it has open
    dist.destroy_process_group()


def play(mode: str) -> dict[str, Any]:
    torch.manual_seed(7)
    net: torch.nn.Module = torch.nn.Linear(2, 1)
    if mode != "alone":
        net = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    told: list[tuple[int, bool, float]] = []
    timeout = 3.0 if mode == "late" else 30.0
    try:
        with connect(FREQUENCY, name=mode, run_dir=mode, sinks=["jsonl"], timeout=timeout) as log:
            for epoch in range(EPOCHS):
                if mode == "alone":
                    train(log, net, optimizer, epoch, told)
                    log.end_epoch()
                    continue
                with Join([net]):  # type: ignore[list-item]  # torch's DDP is Joinable, its stubs do not say so
                    train(log, net, optimizer, epoch, told)
                    if mode == "join":
                        log.end_epoch()
                if mode == "late":
                    log.end_epoch()
            log.write(EPOCHS * EPOCH)
    except TransportError as error:
        return {"error": type(error).__name__, "ranks": error.ranks, "told": told}
    return {"told": told, "calls": log.stats.calls}


def train(
    log: TrainingLog,
    net: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    told: list[tuple[int, bool, float]],
) -> None:
    for batch in range(length(log.rank, epoch)):
        step = epoch * EPOCH + batch
        loss = net(torch.full((4, 2), 0.1 * (log.rank + 1))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.item()
        log.record({"loss": value}, weight=log.rank + 1)
        log.record({"batches": 1}, reduce="sum")
        told.append((step, log.log_ready(step), value))


if __name__ == "__main__":
    main()
