"""One rank of a small job in which something goes wrong: `victim.py FAULT VICTIM FOLDER`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from logsync.coordinator.errors import LogsyncError
from logsync.workers import TrainingLog, connect

FAULT_STEP = 5


def main() -> None:
    fault, victim, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found: dict[str, object] = {}
    log = connect(1, sinks=["jsonl"], run_dir=folder / "run", timeout=3.0, warn_after=1.0)
    began = time.monotonic()
    try:
        with log:
            for step in range(20):
                log.record(x=1.0)
                if step == FAULT_STEP:
                    began = time.monotonic()
                    if rank == victim:
                        suffer(fault, folder)
                log.log_ready(step)
    except LogsyncError as error:
        found = {"error": type(error).__name__, "ranks": error.ranks, "text": str(error)}
    except KeyError:
        found = {"error": "KeyError"}
    found["seconds"] = time.monotonic() - began
    found["again"] = raised_again(log)
    half = folder / f"{rank}.part"
    half.write_text(json.dumps(found))
    half.rename(folder / f"result.rank{rank}.json")
    # Until all have reported: a process that exits closes its sockets, which would tell the others.
    sys.stdin.readline()


def suffer(fault: str, folder: Path) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "exit":
        os._exit(3)
    elif fault == "raise":
        msg = "bad batch"
        raise KeyError(msg)
    elif fault == "stop":
        (folder / "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "late":
        deadline = time.monotonic() + 20
        while len(list(folder.glob("result.rank*.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)


def raised_again(log: TrainingLog) -> str:
    """Return what a further call raises; it and close() must not wait."""
    began = time.monotonic()
    log.close()
    try:
        log.log_ready(100)
    except LogsyncError as error:
        return type(error).__name__ if time.monotonic() - began < 1 else "it waited"
    return "nothing"


if __name__ == "__main__":
    main()
