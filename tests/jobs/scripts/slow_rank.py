"""Rank 1 sleeps in every interval, and everybody talks: `slow_rank.py FOLDER`, under torchrun."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import msgspec
import torch.distributed as dist

from logsync.workers import connect, get_logger

FOLDER = Path(sys.argv[1])
# At import: no process group yet.
logger = get_logger("train", directory=FOLDER / "text")
everywhere = get_logger("train.all", all_ranks=True)


def main() -> None:
    logger.info("starting")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    waits = []
    with connect(1, run_dir=FOLDER, timeout=20.0) as log:
        for step in range(6):
            with log.timer("load"):
                if rank == 1:
                    time.sleep(0.25)
            log.record(loss=1.0)
            log.log_ready(step)
            assert log.last_entry is not None
            waits.append(msgspec.to_builtins(log.last_entry.waits))
            logger.info("step %d", step)
        everywhere.info("done")
        logger.warning("careful")
    dist.destroy_process_group()
    logger.info("destroyed")
    (FOLDER / f"result.rank{rank}.json").write_text(json.dumps(waits))


if __name__ == "__main__":
    main()
