"""A script that ends without close() and without destroy_process_group()."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from logsync.workers import connect


def main() -> None:
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    log = connect(10, run_dir=folder, sinks=["jsonl"], timeout=20)
    for step in range(25):
        log.record(loss=float(step + rank))
        log.log_ready(step)
    (folder / f"result.rank{rank}.json").write_text("true")


if __name__ == "__main__":
    main()
