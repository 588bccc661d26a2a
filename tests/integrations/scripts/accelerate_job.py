"""Accelerate's own behaviour around a tracker and a scaler, and then the example, which ends the process group."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.amp import GradScaler

from logsync.workers import connect
from logsync.workers.integrations.accelerate import LogsyncTracker

EXAMPLE, FOLDER = sys.argv[1], Path(sys.argv[2])


def track_alone(accelerator: Accelerator, tracker: LogsyncTracker) -> list[str]:
    """Log on every rank and on one, save in the middle, and go on from there as a resumed job would."""
    accelerator.init_trackers("alone", config={"lr": 0.1})
    accelerator.register_for_checkpointing(tracker)
    for step in range(3):
        accelerator.log({"loss": 1.0 + step, "note": "text"}, step=step)
    if accelerator.is_main_process:
        accelerator.log({"only_here": 7.0}, step=3)
    accelerator.save_state(str(FOLDER / "checkpoint"))
    accelerator.wait_for_everyone()  # save_state() does not wait for the main process
    accelerator.log({"loss": 9.0}, step=4)
    accelerator.load_state(str(FOLDER / "checkpoint"))
    accelerator.log({"loss": 10.0}, step=4)
    for one in accelerator.trackers:
        one.finish()
    return [] if tracker.tracker is None else ["left open"]


def skipped_steps(accelerator: Accelerator, *, fused: bool) -> list[Any]:
    """Step Accelerate's optimizer under a real scaler: what changed, what Accelerate says, and what the log saw."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = AcceleratedOptimizer(torch.optim.Adam([parameter], lr=0.1, fused=fused), scaler=GradScaler("cpu"))
    accelerator._optimizers = [optimizer]  # what prepare() does; its fp16 needs a GPU
    seen = []
    with connect(1, sinks=[], transport="local") as log:
        log.watch_optimizer(optimizer)
        for step in range(6):
            before = parameter.detach().clone()
            loss = parameter.sum() * (float("inf") if step in (0, 2, 3) else 1.0)
            optimizer.scaler.scale(loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            log.log_ready(step)
            changed = not torch.equal(before, parameter)
            seen.append([changed, accelerator.optimizer_step_was_skipped, log.last_model_update_step])
    return seen


def main() -> None:
    tracker = LogsyncTracker("alone", sinks=["jsonl"], run_dir=FOLDER / "alone")
    accelerator = Accelerator(cpu=True, log_with=tracker)
    rank = dist.get_rank()
    result = {
        "world_size": dist.get_world_size(),
        "left": track_alone(accelerator, tracker),
        "plain": skipped_steps(accelerator, fused=False),
        "fused": skipped_steps(accelerator, fused=True),
    }
    sys.argv = [EXAMPLE, "--run-dir", str(FOLDER / "example")]
    runpy.run_path(EXAMPLE, run_name="__main__")
    result["group_left"] = dist.is_initialized()
    (FOLDER / f"result.rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
