"""Train a small network to read handwritten digits, alone or on several ranks, and log it with logsync.

    python scripts/train_digits.py
    torchrun --standalone --nproc-per-node 2 scripts/train_digits.py
    python scripts/train_digits.py --ray 2

All make the same optimizer steps on the same global batches, so their logs have the same steps. The digits come with
scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from logsync.workers import TrainingLog, connect

Batches: TypeAlias = Iterable[tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    args = parse_args()
    if args.ray:
        train_with_ray(args)
    else:
        train(args)


def train_with_ray(args: argparse.Namespace) -> None:
    """Have workers of Ray Train call `train`, and Ray's actor keep the log."""
    import ray  # noqa: PLC0415 - everything else works without it
    from ray.train import FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchConfig, TorchTrainer  # noqa: PLC0415

    # Workers have folders of their own.
    args.run_dir = (args.run_dir or Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-digits")).absolute()
    args.checkpoint = args.checkpoint and args.checkpoint.absolute()
    if not ray.is_initialized():
        ray.init()
    # Where workers are lost, all of them start again, from the checkpoint.
    failures = FailureConfig(max_failures=3 if args.checkpoint else 0)
    TorchTrainer(
        lambda _: train(args),
        train_loop_config={},
        torch_config=TorchConfig(timeout_s=math.ceil(args.timeout)),
        scaling_config=ScalingConfig(num_workers=args.ray, use_gpu=torch.cuda.device_count() >= args.ray),
        run_config=RunConfig(storage_path=str(args.run_dir), failure_config=failures),
    ).fit()


def train(args: argparse.Namespace) -> None:
    rank, world_size, device = join_ranks(args.timeout)
    if args.batch_size % world_size:
        sys.exit(f"--batch-size {args.batch_size} cannot be shared evenly by {world_size} ranks")
    torch.manual_seed(args.seed)

    seen, held_out = digits(device, rank, world_size)
    # Rank r takes every world_size-th image, so that n ranks together see the batches that one would see alone.
    sampler: DistributedSampler[int] = DistributedSampler(seen, world_size, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(seen, args.batch_size // world_size, sampler=sampler, drop_last=True)

    network = make_network().to(device)
    together = dist.is_initialized() and not args.apart
    model = DistributedDataParallel(network) if together else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr)
    schedule = ExponentialLR(optimizer, gamma=0.9)

    step = first_epoch = 0
    accuracy = math.nan
    with connect(
        log_frequency=args.log_every,
        transport="ray" if args.ray else "auto",
        sinks=args.sinks,
        run_dir=args.run_dir,
        name="digits",
        timeout=args.timeout,
    ) as log:
        # The log's state goes into the checkpoint like the rest; a resumed run then continues its file.
        parts: dict[str, Any] = {"network": network, "optimizer": optimizer, "schedule": schedule, "log": log}
        if args.checkpoint and args.checkpoint.exists():
            saved = torch.load(args.checkpoint, map_location=device, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            step, first_epoch, accuracy = saved["step"], saved["epochs"], saved["accuracy"]

        for epoch in range(first_epoch, args.epochs):
            sampler.set_epoch(epoch)
            step = train_epoch(log, model, loader, optimizer, step)
            schedule.step()
            accuracy = evaluate(log, network, *held_out, step)
            if args.checkpoint and rank == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                save(args.checkpoint, {**state, "step": step, "epochs": epoch + 1, "accuracy": accuracy})

    if rank == 0:
        print(f"held-out accuracy {accuracy:.1%} after {args.epochs} epochs; the log is {log.run_dir}/metrics.jsonl")
    if dist.is_initialized() and not args.ray:
        dist.destroy_process_group()


def train_epoch(log: TrainingLog, model: nn.Module, loader: Batches, optimizer: Optimizer, step: int) -> int:
    """Make one pass over this rank's images, and return the step that it came to."""
    before = time.perf_counter()
    for x, y in loader:
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1

        now = time.perf_counter()
        seconds, before = now - before, now
        log.record({"train/loss": loss}, weight=len(x))
        # A mean over time on each rank; the ranks' speeds add up.
        log.record({"train/images_per_s": len(x) / seconds}, weight=seconds, reduce="mean", across="sum")
        if log.log_ready(step):
            log.annotate({"train/lr": optimizer.param_groups[0]["lr"]})
    return step


def evaluate(log: TrainingLog, network: nn.Module, x: torch.Tensor, y: torch.Tensor, step: int) -> float:
    """Log the accuracy on all held-out images, of which this rank has a share, and return it on every rank."""
    with torch.no_grad():
        correct = network(x).argmax(dim=1) == y
    log.record({"eval/accuracy": correct.double().mean()}, weight=len(y))
    return log.write(step).metrics["eval/accuracy"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64, help="images per optimizer step, over all ranks")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of the first epoch")
    parser.add_argument("--log-every", type=int, default=10, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, help="folder for the log (default: a new one under runs/)")
    parser.add_argument("--ray", type=int, default=0, metavar="N", help="train on N workers of Ray Train")
    parser.add_argument("--checkpoint", type=Path, help="file to save to after each epoch, and to go on from")
    parser.add_argument("--sinks", nargs="+", default=["console", "jsonl"], help="where the log goes (console jsonl)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that ranks wait for each other")
    parser.add_argument("--apart", action="store_true", help="a network for each rank; only the log connects them")
    return parser.parse_args()


def join_ranks(timeout_s: float) -> tuple[int, int, torch.device]:
    """Return rank, world size and device; make the process group if torchrun started this process."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.device_count() >= local_ranks:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if dist.is_initialized():  # by Ray Train
        return dist.get_rank(), dist.get_world_size(), device
    if "RANK" not in os.environ:
        return 0, 1, device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s))
    return dist.get_rank(), dist.get_world_size(), device


def digits(device: torch.device, rank: int, world_size: int) -> tuple[TensorDataset, tuple[torch.Tensor, torch.Tensor]]:
    """Return the images to train on, and this rank's share of the 20 % that are held out."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32, device=device).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, device=device)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(device)
    held_out, train = order.tensor_split([len(y) // 5])
    share = held_out[rank::world_size]
    return TensorDataset(x[train], y[train]), (x[share], y[share])


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def save(path: Path, state: dict[str, object]) -> None:
    """Write a checkpoint; a kill half-way leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.part")
    torch.save(state, half)
    half.replace(path)


if __name__ == "__main__":
    main()
