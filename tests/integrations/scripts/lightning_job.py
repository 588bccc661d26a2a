"""Run the example with Lightning, and then a hostile module, beside Lightning's own logger and through a restart."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from logsync.workers.integrations.lightning import LogsyncCallback, LogsyncLogger

EXAMPLE, FOLDER = sys.argv[1], Path(sys.argv[2])


class Hostile(LightningModule):
    """Logs on all ranks, and some on rank 0 only, by `self.log` and by its loggers themselves."""

    def __init__(self, callback: LogsyncCallback | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.callback = callback

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch[0]).square().mean()
        self.log("own", loss)
        self.log("twin", loss, sync_dist=True)
        self.log("of_epoch", loss, on_step=False, on_epoch=True, sync_dist=True)
        if self.global_rank == 0:
            self.log("only_zero", 5.0, rank_zero_only=True)
            for logger in self.loggers:
                if batch_idx == 1:
                    logger.log_metrics({"direct": 1.0}, step=self.global_step)
        if self.callback is not None:
            self.callback.training_log.record({"images": len(batch[0])}, reduce="sum")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.layer(batch[0]).mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loaders() -> tuple[DataLoader[Any], DataLoader[Any]]:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(2 * 8 * 4, 4))
    return DataLoader(data, batch_size=4), DataLoader(data, batch_size=4)


def fit(name: str, module: Hostile, callbacks: list[Any], loggers: list[Any], **options: Any) -> Trainer:
    """Train for epochs of 8 batches a rank, 4 steps."""
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=options.pop("max_epochs", 2),
        accumulate_grad_batches=2,
        log_every_n_steps=3,
        default_root_dir=FOLDER / name,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        logger=loggers,
    )
    trainer.fit(module, *loaders(), **options)
    return trainer


def main() -> None:
    sys.argv = [EXAMPLE, "--run-dir", str(FOLDER / "example")]
    runpy.run_path(EXAMPLE, run_name="__main__")

    callback = LogsyncCallback(run_dir=FOLDER / "beside" / "log", sinks=["jsonl"])
    keep = ModelCheckpoint(FOLDER / "beside", "{epoch}", save_top_k=-1)
    csv = CSVLogger(FOLDER / "beside", "csv", "", flush_logs_every_n_steps=1)
    fit("beside", Hostile(), [callback, keep], [LogsyncLogger(callback), csv])

    # The job again, from the end of its first epoch; all that came after is made anew.
    before = (FOLDER / "beside" / "log" / "metrics.jsonl").read_text()
    dist.barrier()
    callback = LogsyncCallback(run_dir=FOLDER / "beside" / "log", sinks=["jsonl"])
    checkpoint = str(FOLDER / "beside" / "epoch=0.ckpt")
    fit("again", Hostile(), [callback], [LogsyncLogger(callback)], ckpt_path=checkpoint)

    callback = LogsyncCallback(3, run_dir=FOLDER / "agreed", sinks=["jsonl"])
    module = Hostile(callback)
    trainer = fit("agreed", module, [callback], [])
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, *loaders())
    fit("alone", Hostile(), [], [LogsyncLogger(run_dir=FOLDER / "alone", sinks=["jsonl"])], max_epochs=1)
    result = {"before": before, "open": callback.is_open}
    (FOLDER / f"result.rank{dist.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
