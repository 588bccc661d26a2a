"""Ranks that only torch.distributed knows, since no launcher started them: `spawned.py FOLDER`, by plain python."""

from __future__ import annotations

import multiprocessing
import sys

import torch.distributed as dist

from logsync.workers import get_logger

logger = get_logger("train")


def main(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    logger.info("begun")
    logger.warning("careful")
    dist.destroy_process_group()
    logger.info("over")


if __name__ == "__main__":
    logger.info("alone")
    ranks = [multiprocessing.get_context("spawn").Process(target=main, args=(rank, sys.argv[1])) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        assert process.exitcode == 0
