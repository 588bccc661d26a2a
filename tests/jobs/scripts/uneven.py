"""Train on loaders of different lengths: `uneven.py join` under DistributedDataParallel and Join, `uneven.py alone`.

Every rank leaves in uneven.rank<R>.json what it was answered and what it had recorded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from logsync.workers import TrainingLog, connect

EPOCHS = 3
EPOCH = 100  # steps from the first one of an epoch to the first one of the next
FREQUENCY = 4


def length(rank: int, epoch: int) -> int:
    """How many batches a rank has; each is the shortest once, and none has a batch in some epoch."""
    return (5 + 7 * rank + 11 * epoch) % 23 if (rank + epoch) % 4 else 0


def main() -> None:
    joins = sys.argv[1] == "join"
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(7)
    net: torch.nn.Module = torch.nn.Linear(2, 1)
    if joins:
        net = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    told: list[tuple[int, bool, float]] = []
    with connect(FREQUENCY, run_dir="run", sinks=["jsonl"], timeout=30) as log:
        for epoch in range(EPOCHS):
            if joins:
                with Join([net]):  # type: ignore[list-item]  # torch's DDP is Joinable, its stubs do not say so
                    train(log, net, optimizer, epoch, told)
                    log.end_epoch()
            else:
                train(log, net, optimizer, epoch, told)
                log.end_epoch()
        log.write(EPOCHS * EPOCH)
    Path(f"uneven.rank{rank}.json").write_text(json.dumps({"told": told, "calls": log.stats.calls}))
    dist.destroy_process_group()


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
        log.record({"batches": 1, "weight": log.rank + 1}, reduce="sum")
        told.append((step, log.log_ready(step), value))


if __name__ == "__main__":
    main()
