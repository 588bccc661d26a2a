"""Average the numbers of a global batch per step, whatever the world size; stop, and go on from a checkpoint.

`resumable.py FOLDER CHECKPOINT STOP_AT`: checkpoints in the bodies of `if log_ready` up to step 40; at STOP_AT, if it
is not 0, the job is ended as by a preemption: in the middle, without closing anything in order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from logsync.workers import connect

STEPS = 100
BATCH = 12
LAST_CHECKPOINT = 40


def main() -> None:
    folder, checkpoint, stop_at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    rank, world_size = 0, 1
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        rank, world_size = dist.get_rank(), dist.get_world_size()
    start = 0
    with connect(10, name="resumable", sinks=["jsonl"], timeout=20) as log:
        if checkpoint.exists():
            saved = torch.load(checkpoint, weights_only=True)
            log.load_state_dict(saved["log"])
            start = saved["step"]
        logged = []
        for step in range(start, STEPS):
            batch = torch.arange(step, step + BATCH, dtype=torch.float64).square()
            share = batch[rank::world_size]
            log.record({"mean": share.mean()}, weight=len(share))
            log.record({"items": len(share)}, reduce="sum")
            if log.log_ready(step):
                logged.append(step)
                if rank == 0 and step <= LAST_CHECKPOINT:
                    torch.save({"log": log.state_dict(), "step": step + 1}, checkpoint)
            if step == stop_at > 0:
                outcome = {"run_dir": log.run_dir, "logged": logged}
                (folder / f"stopped.rank{rank}.json").write_text(json.dumps(outcome))
                sys.exit(0)
    outcome = {"run_dir": log.run_dir, "logged": logged}
    (folder / f"ended.rank{rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
