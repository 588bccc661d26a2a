"""Train a small network to read digits with Lightning, and log it with logsync.

    python scripts/examples/lightning_digits.py
    torchrun --standalone --nproc-per-node 2 scripts/examples/lightning_digits.py

The digits come with scikit-learn; nothing is downloaded. `--resume CHECKPOINT` goes on from there.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from logsync.workers.integrations.lightning import LogsyncCallback, LogsyncLogger


class Digits(LightningModule):
    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = cross_entropy(self.layers(x), y)
        self.log("train/loss", loss)  # each rank's own; logsync merges them when they are logged
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._log_accuracy(batch, "val/accuracy")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._log_accuracy(batch, "test/accuracy")

    def _log_accuracy(self, batch: Any, name: str) -> None:
        x, y = batch
        self.log(name, (self.layers(x).argmax(dim=1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def trainer_of(args: argparse.Namespace, **options: Any) -> Trainer:
    callback = LogsyncCallback(run_dir=f"{args.run_dir}/log")
    options = {"callbacks": [callback], "logger": LogsyncLogger(callback), **options}
    return Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy="ddp" if "RANK" in os.environ else "auto",
        accumulate_grad_batches=2,
        log_every_n_steps=5,
        default_root_dir=args.run_dir,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    train, held_out = TensorDataset(x[:1500], y[:1500]), TensorDataset(x[1500:], y[1500:])
    return DataLoader(train, batch_size=32, shuffle=True, drop_last=True), DataLoader(held_out, batch_size=32)


def main() -> None:
    args = parse_args()
    seed_everything(0)
    train, held_out = loaders()
    trainer = trainer_of(args)
    model = Digits()
    trainer.fit(model, train, held_out, ckpt_path=args.resume)
    trainer.test(model, held_out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--run-dir", default="runs/lightning-digits")
    parser.add_argument("--resume", help="a checkpoint to go on from")
    return parser.parse_args()


if __name__ == "__main__":
    main()
