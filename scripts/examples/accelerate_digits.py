"""Train a small network to read digits with Accelerate, and log it with logsync.

    python scripts/examples/accelerate_digits.py
    torchrun --standalone --nproc-per-node 2 scripts/examples/accelerate_digits.py

The digits come with scikit-learn; nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from logsync.workers import connect
from logsync.workers.integrations.accelerate import LogsyncTracker


def main() -> None:
    args = parse_args()
    set_seed(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))

    tracker = LogsyncTracker()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, log_with=tracker)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.99)
    loader = DataLoader(digits, batch_size=32, shuffle=True, drop_last=True)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)

    step = 0
    with connect(10, run_dir=args.run_dir) as log:
        tracker.join(log)
        accelerator.init_trackers("digits", config={"lr": 3e-3, "batch_size": 32})
        accelerator.register_for_checkpointing(log)
        log.watch_optimizer(optimizer)
        for _ in range(args.epochs):
            for x, y in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                log.record({"train/loss": loss}, weight=len(x))  # merged over the ranks
                if not accelerator.sync_gradients:
                    continue
                step += 1
                if log.log_ready(step):
                    accelerator.log({"train/lr": schedule.get_last_lr()[0]}, step=step)
        accelerator.save_state(f"{args.run_dir}/checkpoint")
    accelerator.end_training()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--run-dir", default="runs/accelerate-digits")
    return parser.parse_args()


if __name__ == "__main__":
    main()
