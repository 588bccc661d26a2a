"""See what logsync says when something goes wrong: train three ranks here, and hurt one of them.

    python scripts/try_fault.py kill              rank 2 is killed at step 25
    python scripts/try_fault.py stop --rank 0     rank 0 is stopped there
    python scripts/try_fault.py                   lists what can be tried

Every rank is a process of its own, and they meet on the loopback interface. What a rank says is shown with its number.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from logsync.coordinator.errors import AgreedError, LogsyncError
from logsync.workers import TrainingLog, connect

RANKS = 3
STEPS = 50
MOMENT = 25  # the step at which it happens
LONGEST_S = 60.0


class Fault(NamedTuple):
    """What happens, to which rank if none is given, and what `connect` is told to do about it."""

    what: str
    rank: int = 2
    on_failure: str = "raise"


FAULTS = {
    "kill": Fault("it is killed, as by the kernel when memory is out"),
    "exit": Fault("it exits without a word"),
    "raise": Fault("its code raises"),
    "stop": Fault("it is stopped, or hangs, for longer than the timeout"),
    "slow": Fault("one of its steps takes 2.5 s: longer than warn_after, shorter than timeout"),
    "skip": Fault("it makes one call less than the others"),
    "nonsense": Fault("it gives a step that is none"),
    "full-disk": Fault("the disk that metrics.jsonl is on is full from here on", rank=0),
    "uneven": Fault("its loader has no more batches, and it calls end_epoch()"),
    "detach": Fault("it is killed, and the others have on_failure='detach'", on_failure="detach"),
}


def main() -> None:
    faults = "\n".join(f"  {name:<10} {fault.what}" for name, fault in FAULTS.items())
    parser = argparse.ArgumentParser(
        description=f"Train {RANKS} ranks and hurt one of them at step {MOMENT}.",
        epilog=f"faults:\n{faults}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("fault", nargs="?", choices=FAULTS, metavar="FAULT")
    parser.add_argument("--rank", type=int, choices=range(RANKS), help="whom it happens to (2; full-disk: 0)")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds that a round waits (%(default)g)")
    parser.add_argument("--warn-after", type=float, default=1.0, help="seconds until a warning (%(default)g)")
    given = parser.parse_args()
    if given.fault is None:
        parser.print_help()
    elif "RANK" in os.environ:
        be_a_rank(given)
    else:
        start_ranks(given)


# -- one rank ----------------------------------------------------------------------------------------------------------


def be_a_rank(given: argparse.Namespace) -> None:
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stdout)
    dist.init_process_group("gloo")
    hurt = dist.get_rank() == given.rank
    try:
        with connect(  # type: ignore[call-overload]  # on_failure is one of the two
            1,
            run_dir=os.environ["RUN_DIR"],
            sinks=["jsonl"],
            timeout=given.timeout,
            warn_after=given.warn_after,
            on_failure=FAULTS[given.fault].on_failure,
        ) as log:
            said = train(log, given.fault if hurt else "")
    except LogsyncError as error:
        said = f"{type(error).__name__}, .ranks == {error.ranks}: {error}"
    except KeyError as error:
        said = f"raised {error!r}"
    print(f"{said}\nended", flush=True)
    while not Path(os.environ["RUN_DIR"], "go").exists():  # a rank's end must not be what the others notice
        time.sleep(0.05)


def train(log: TrainingLog, fault: str) -> str:
    agreed = []  # errors that all ranks have alike, and after which the log goes on
    for step in range(STEPS):
        given: float = step
        if fault and step == MOMENT:
            print("now", flush=True)
            if fault == "uneven":
                break
            if fault == "skip":
                continue
            if fault == "nonsense":
                given = float("nan")
            hurt_oneself(log, fault)
        log.record(loss=1 / (step + 1))
        try:
            log.log_ready(given)
        except AgreedError as error:
            agreed.append(f"{type(error).__name__}, .ranks == {error.ranks}: {error}")
        time.sleep(0.01)
    log.end_epoch()
    how = "detached" if log.detached else "logging"
    return "\n".join([*agreed, f"trained to the end, {how}"])


def hurt_oneself(log: TrainingLog, fault: str) -> None:
    if fault in {"kill", "detach"}:
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "exit":
        os._exit(3)
    elif fault == "raise":
        what = "bad batch"
        raise KeyError(what)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "slow":
        time.sleep(2.5)
    elif fault == "full-disk":
        size = Path(log.run_dir, "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, resource.RLIM_INFINITY))


# -- all ranks ---------------------------------------------------------------------------------------------------------


def start_ranks(given: argparse.Namespace) -> None:
    victim = FAULTS[given.fault].rank if given.rank is None else given.rank
    print(f"rank {victim} of {RANKS}, step {MOMENT}: {FAULTS[given.fault].what}", flush=True)
    # As under torchrun: the job's store is in the process that starts the ranks.
    tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch does not list it
    store = tcp_store("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as run_dir:
        environ = {
            **os.environ,
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "RUN_DIR": run_dir,
        }
        command = [sys.executable, __file__, given.fault, "--rank", str(victim), "--timeout", str(given.timeout)]
        command += ["--warn-after", str(given.warn_after)]
        ranks = [
            subprocess.Popen(  # noqa: S603 - this very script
                command, env={**environ, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
            )
            for rank in range(RANKS)
        ]
        voices = [Voice(rank, process) for rank, process in enumerate(ranks)]
        try:
            for voice in voices:
                voice.start()
            for voice in voices[:victim] + voices[victim + 1 :]:
                voice.ended.wait(LONGEST_S)
            ranks[victim].send_signal(signal.SIGCONT)
            voices[victim].ended.wait(LONGEST_S)
            Path(run_dir, "go").touch()
            for process in ranks:
                process.wait(LONGEST_S)
        finally:
            for process, voice in zip(ranks, voices, strict=True):
                process.kill()
                voice.join()
        lines = Path(run_dir, "metrics.jsonl").read_text().splitlines()
        print(f"metrics.jsonl has {len(lines)} lines, the last one: {lines[-1]}")


class Voice(threading.Thread):
    """Show what a rank says, and how long after the moment at which it happened."""

    began = 0.0

    def __init__(self, rank: int, process: subprocess.Popen[str]) -> None:
        super().__init__(daemon=True)
        self.ended = threading.Event()
        self._rank = rank
        self._process = process

    def run(self) -> None:
        """Read until the rank's end."""
        for line in self._process.stdout or ():
            if line == "now\n":
                Voice.began = time.monotonic()
            elif line == "ended\n":
                self.ended.set()
            else:
                after = f", after {time.monotonic() - Voice.began:.1f} s" if Voice.began else ""
                print(f"[rank {self._rank}{after}] {line}", end="", flush=True)
        self.ended.set()


if __name__ == "__main__":
    main()
