"""Two logs, and in each a rank that raises inside the `with` block: first rank 1, then rank 0, which ends the job."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

from logsync.coordinator.errors import TransportError
from logsync.workers import connect

BAD_STEP = 25
LAST_STEP = 1000


class MistakeError(Exception):
    """A mistake in the user's code."""


def make_mistake(rank: int) -> None:
    msg = f"rank {rank} divides by zero"
    raise MistakeError(msg)


def train(name: str, folder: Path, rank: int, culprit: int) -> None:
    """Train until the culprit raises; leave behind what became of this rank."""
    outcome: dict[str, object] = {"error": None}
    start = time.monotonic()
    try:
        with connect(10, name=name, run_dir=folder / name, sinks=["jsonl"], timeout=20) as log:
            for step in range(LAST_STEP):
                log.record(loss=step)
                if rank == culprit and step == BAD_STEP:
                    start = time.monotonic()
                    make_mistake(rank)
                start = time.monotonic()
                log.log_ready(step)
                outcome["step"] = step
    except (MistakeError, TransportError) as error:
        outcome["error"] = type(error).__name__
        outcome["transport_error"] = isinstance(error, TransportError)
        outcome["text"] = str(error)
        outcome["seconds"] = time.monotonic() - start
        raise
    finally:
        (folder / f"{name}.rank{rank}.json").write_text(json.dumps(outcome))


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        train("rank1_raises", folder, rank, culprit=1)
    except (MistakeError, TransportError):
        dist.barrier()  # the training's own group is as good as before
    try:
        train("rank0_raises", folder, rank, culprit=0)
    finally:
        # torchrun ends the other ranks as soon as one has failed, and this one is to tell what it saw.
        deadline = time.monotonic() + 30
        while not all((folder / f"rank0_raises.rank{r}.json").exists() for r in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.01)


if __name__ == "__main__":
    main()
