"""What healthy jobs do, one log after the other: `healthy.py FOLDER [SCENARIO ...]`, under torchrun or plain python."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from logsync.workers import TrainingLog, connect

TIMEOUT_S = 20.0


class Numbers(Dataset[torch.Tensor]):
    """`length` samples that are their own index."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        if index >= self.length:
            raise IndexError(index)
        return torch.tensor(float(index))


def train_collective() -> None:
    """Stand for a training step: a collective of the training's own group, in which ranks can get stuck."""
    if dist.is_initialized():
        dist.all_reduce(torch.ones(1))


def uneven_epochs(folder: Path, rank: int) -> dict[str, Any]:
    """1,000 calls on loaders of 100 and 101 batches; each rank counts in epochs of its own loader."""
    loader = DataLoader(Numbers(100 + rank), batch_size=1)

    def batches() -> Any:
        while True:
            yield from loader

    answers = []
    with connect(0.1, frequency_type="epoch", run_dir=folder, sinks=["jsonl"], timeout=TIMEOUT_S) as log:
        for batch, _ in enumerate(islice(batches(), 1000)):
            train_collective()
            log.record(batch=batch)
            answers.append(log.log_ready(batch / len(loader)))
        stats = log.stats
    return {"answers": answers, "calls": stats.calls, "rounds": stats.rounds}


def rank_0_only_body(folder: Path, rank: int) -> dict[str, Any]:
    """The body of `if log_ready` does everything on rank 0 and nothing elsewhere."""
    ready = []
    with connect(10, run_dir=folder, sinks=["jsonl"], timeout=TIMEOUT_S) as log:
        for step in range(55):
            train_collective()
            log.record(loss=step)
            if log.log_ready(step):
                ready.append(step)
                if rank == 0:
                    samples = torch.randn(400, 400)
                    log.annotate({"norm": (samples @ samples).norm()})
                    torch.save(log.state_dict(), folder / f"step{step}.pt")
                    assert log.last_entry is not None
                    (folder / f"step{step}.txt").write_text(str(log.last_entry.metrics["loss"]))
    return {"ready": ready}


def schedules(folder: Path, rank: int) -> dict[str, Any]:
    """Log at all kinds of cadence; return the steps that were logged."""

    def run(name: str, frequency: Any, steps: list[Any], *, updates: int = 0, **options: Any) -> list[Any]:
        ready = []
        with connect(frequency, name=name, run_dir=folder / name, sinks=["jsonl"], timeout=TIMEOUT_S, **options) as log:
            for call, step in enumerate(steps):
                log.record(call=call)
                if updates and call % updates == 0 and rank == log.world_size - 1:
                    log.model_updated(step)
                if log.log_ready(step):
                    ready.append(step)
                if call == len(steps) // 2:
                    log.write(step)
            if frequency is not None:
                assert log.stats.rounds < len(steps), "no call was answered under a lease"
        return ready

    return {
        "step": run("step", 7, list(range(100))),
        "micro_batches": run("micro_batches", 5, [n // 4 for n in range(160)]),
        "batch": run("batch", 9, list(range(3, 90)), frequency_type="batch"),
        "epoch": run("epoch", 0.3, [n / 64 for n in range(200)], frequency_type="epoch"),
        "on_update": run("on_update", 10, list(range(120)), mode="on_update", updates=25),
        "never": run("never", None, list(range(50))),
        "no_lease": run("no_lease", 7, list(range(100)), max_lease=3),
    }


def ddp(folder: Path, rank: int) -> dict[str, Any]:
    """Train a tiny model with and without a log between DDP's collectives."""

    def train(log: TrainingLog | None) -> tuple[list[float], list[float], list[int]]:
        torch.manual_seed(0)
        first = nn.Linear(4, 8)
        network = nn.Sequential(first, nn.Tanh(), nn.Linear(8, 1))
        model = DistributedDataParallel(network)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        data = torch.Generator().manual_seed(1 + rank)
        losses, logged = [], []
        for step in range(60):
            x = torch.randn(8 + rank, 4, generator=data)
            loss = (model(x) - x.sum(dim=1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if log is not None:
                log.record({"loss": loss, "norm": first.weight.norm()}, weight=len(x))
                if log.log_ready(step):
                    logged.append(step)
        weights = torch.cat([p.detach().reshape(-1) for p in network.parameters()])
        return losses, weights.tolist(), logged

    _, without, _ = train(None)
    with connect(20, run_dir=folder, sinks=["jsonl"], timeout=TIMEOUT_S) as log:
        losses, weights, logged = train(log)
        entry = log.last_entry
    assert entry is not None
    return {
        "losses": losses,
        "weight": 8 + rank,
        "weights": weights,
        "without": without,
        "logged": logged,
        "last_entry": entry.metrics,
    }


def loader_workers(folder: Path, _: int) -> dict[str, Any]:
    """Fork loader workers beside an open log, in two epochs, the second one left early."""
    seen = 0.0
    with connect(5, run_dir=folder, sinks=["jsonl"], timeout=TIMEOUT_S) as log:
        step = 0
        for _epoch in range(2):
            loader = DataLoader(Numbers(40), batch_size=2, num_workers=2, multiprocessing_context="fork")
            for batch in islice(loader, 12):
                log.record(mean=batch.mean(), weight=len(batch))
                seen += float(batch.sum())
                log.log_ready(step)
                step += 1
    return {"seen": seen, "steps": step}


def merged(folder: Path, rank: int) -> dict[str, Any]:
    """Record random values in every way, and dump them."""
    data = np.random.default_rng(rank)
    steps, world = 64, dist.get_world_size()
    values, weights = data.normal(size=(steps, 6)), data.integers(1, 100, size=steps)
    np.savez(folder / f"dump{rank}.npz", values=values, weights=weights)
    with connect(10, run_dir=folder, sinks=["jsonl"], timeout=TIMEOUT_S) as log:
        for step in range(steps):
            a, b, c, d, e, f = values[step]
            log.record({"loss": torch.tensor(a), "bare": float(a)}, weight=int(weights[step]))
            log.record({"tokens": b}, reduce="sum")
            log.record({"speed": float(c)}, across="sum", weight=weights[step])
            log.record(lowest=np.float64(d), reduce="min")
            log.record(highest=torch.tensor(d), reduce="max")
            log.record({"newest": e}, reduce="last")
            log.record({"spread": f}, spread=True, per_rank=True)
            if rank == world - 1:
                log.record({"some/ranks": a})
            log.log_ready(step)
    return {"steps": steps}


def group_destroyed_first(folder: Path, rank: int) -> dict[str, Any]:
    """Destroy the process groups inside the `with` block; must be the last scenario."""
    with connect(10, run_dir=folder, sinks=["jsonl"], timeout=TIMEOUT_S) as log:
        for step in range(25):
            log.record(loss=float(step + rank))
            log.log_ready(step)
        dist.destroy_process_group()
    return {}


ALL: list[Callable[[Path, int], dict[str, Any]]] = [
    uneven_epochs,
    rank_0_only_body,
    schedules,
    ddp,
    loader_workers,
    merged,
    group_destroyed_first,
]


def main() -> None:
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    rank = 0
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    for scenario in ALL:
        name = scenario.__name__
        if wanted and name not in wanted:
            continue
        (folder / name).mkdir(exist_ok=True)
        result = scenario(folder / name, rank)
        (folder / f"{name}.rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
