"""Train with the older package name of Lightning, in one process: `pytorch_lightning_alone.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from logsync.workers.integrations.lightning import LogsyncCallback, LogsyncLogger

FOLDER = Path(sys.argv[1])


class Small(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 7:
            msg = "a bad batch"
            raise ValueError(msg)
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main() -> None:
    callback = LogsyncCallback(run_dir=FOLDER / "log", sinks=["jsonl"])
    assert isinstance(callback, pl.Callback)
    logger = LogsyncLogger(callback)
    assert isinstance(logger, pl.loggers.Logger)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=2,
        default_root_dir=FOLDER,
        enable_progress_bar=False,
        callbacks=[callback],
        logger=logger,
    )
    try:
        trainer.fit(Small(), DataLoader(TensorDataset(torch.randn(40, 4)), batch_size=4))
    except ValueError as error:
        print(f"left by {error}, the log is {'open' if callback.is_open else 'closed'}")


if __name__ == "__main__":
    main()
