"""Average the numbers of a global batch per step, checkpoint at some of the logs, and be killed at drawn moments.

`resuming.py PLAN`: the plan is a JSON file. `kills` says for each attempt which ranks are killed, at which step and how
many seconds after that step has begun; step STEPS is the end of the `with` block. `savers` says which rank makes the
checkpoints, and `dies_at` at which step rank 0 is killed in the body of `if log_ready`, once its checkpoint is there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from logsync.workers import TrainingLog, connect

STEPS = 300
FREQUENCY = 10
BATCH = 12
MODULUS = 1_000_003


def trained(model: int, step: int) -> int:
    """Return the model after one more step; a step that is left out or done twice shows in all that come later."""
    return (model * 31 + step + 1) % MODULUS


def loss_of(item: int) -> float:
    """Return a whole number, so that sums are exact in any order."""
    return float(item * item % 1009)


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo", timeout=timedelta(seconds=plan["joins_within_s"]))
    with connect(FREQUENCY, run_dir=plan["run_dir"], sinks=["jsonl"], timeout=20) as log:
        train(log, plan)
    dist.destroy_process_group()
    Path(f"ended.rank{log.rank}.json").write_text(json.dumps({"restarts": restart_count()}))


def train(log: TrainingLog, plan: dict[str, Any]) -> None:
    checkpoint = Path(plan["checkpoint"])
    model = start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        log.load_state_dict(saved["log"])
        model, start = saved["model"], saved["step"] + 1
    moments = [(max(k["step"], start), k["after_s"]) for k in of_attempt(plan["kills"], []) if k["rank"] == log.rank]
    for step in range(start, STEPS + 1):
        for moment, after_s in moments:
            if step == moment:
                be_killed(log.rank, step, after_s)
        if step == STEPS:
            return
        model = trained(model, step)
        record(log, model, step)
        if log.log_ready(step) and step // FREQUENCY % plan["checkpoint_every"] == 0:
            if log.rank == of_attempt(plan["savers"], 0):
                save({"log": log.state_dict(), "model": model, "step": step}, checkpoint)
            if log.rank == 0 and step == of_attempt(plan["dies_at"], -1):
                die_once_saved(step)
        time.sleep(0.003)


def record(log: TrainingLog, model: int, step: int) -> None:
    for item in range(step + log.rank, step + BATCH, log.world_size):
        log.record(loss=loss_of(item))
        log.record({"items": 1}, reduce="sum")
    log.record({"model": model}, reduce="last")


def save(state: dict[str, Any], checkpoint: Path) -> None:
    written = checkpoint.with_suffix(".tmp")
    torch.save(state, written)
    written.replace(checkpoint)
    Path(f"saved{state['step']}").touch()


def be_killed(rank: int, step: int, after_s: float) -> None:
    """Be ended by the kernel, at once as by SIGKILL, after a while and whatever this process is doing then.

    Python serves no SIGALRM here. A thread would have to wait for the interpreter's lock, and so for a quiet moment.
    """
    with Path("kills.txt").open("a") as told:
        told.write(f"attempt {restart_count()}: rank {rank}, {after_s:.4f} s after step {step}\n")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, after_s)


def die_once_saved(step: int) -> None:
    while not Path(f"saved{step}").exists():
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def of_attempt(planned: list[Any], otherwise: Any) -> Any:
    return planned[restart_count()] if restart_count() < len(planned) else otherwise


def restart_count() -> int:
    return int(os.environ["TORCHELASTIC_RESTART_COUNT"])


if __name__ == "__main__":
    main()
