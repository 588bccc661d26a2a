"""One rank of a job that something happens to, and the process that such ranks are forked from.

`rank.py` imports torch once and then forks a rank for every plan that comes on its stdin, so that a case costs no
import. A rank tells what it sees in FOLDER/rank<R>.events, one JSON object a line, and when it has told everything it
stays, its connections open, until FOLDER/go exists: its end must not help the others.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

import logsync.workers.transports.collective  # noqa: F401 - imported here so that no rank has to
from logsync.coordinator.errors import LogsyncError
from logsync.workers import TrainingLog, connect

HARD_LIMIT_S = 80
NOTES_S = 20
EXCEPTION = "the loss of batch 17 is not finite\nand a second line"


def main() -> None:
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "forking a process that has threads"
    die_with_parent()
    gc.freeze()  # or every rank, at its end, looks through (and copies) the memory of all of torch
    for line in sys.stdin:
        if os.fork() == 0:
            die_with_parent()
            keep(json.loads(line))
            return
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def keep(plan: dict[str, Any]) -> None:
    """Be the parent of a rank, and tell how it ended."""
    events = Events(Path(plan["folder"]) / f"rank{plan['rank']}.events")
    pid = os.fork()
    if pid == 0:
        die_with_parent()
        Rank(plan, events).play()
        return  # and out of main(): a rank ends as every script does
    _, status = os.waitpid(pid, 0)
    events.tell("ended", code=os.waitstatus_to_exitcode(status))
    os._exit(0)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Events(logging.Handler):
    """What happens, as lines of a file; warnings of the log are told, too."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.WARNING)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def tell(self, event: str, **fields: Any) -> None:
        os.write(self._file, json.dumps({"event": event, "at": time.monotonic(), **fields}).encode() + b"\n")

    def emit(self, record: logging.LogRecord) -> None:
        self.tell("warning", level=record.levelname, text=record.getMessage())


class Rank:
    """A training loop in which this rank does its deed at its moment."""

    def __init__(self, plan: dict[str, Any], events: Events) -> None:
        self.plan = plan
        self.folder = Path(plan["folder"])
        self.rank: int = plan["rank"]
        self.events = events
        self.step = 0
        self.due: list[int] = []  # in epochs, the steps that were answered True

    def play(self) -> None:
        self._settle_in()
        dist.init_process_group("gloo")
        failure: dict[str, Any] | None = None
        left_at = 0.0
        self.log = log = connect(self.plan["frequency"], run_dir=self.plan["run_dir"], **self.plan["connect"])
        try:
            with log:
                self._be_known(log)
                try:
                    if self.plan["lengths"]:
                        self._train_epochs(log)
                    else:
                        self._train(log)
                except LogsyncError as error:
                    failure = described(error)
                    failure["again"] = [outcome(log.log_ready, self.step + 1), outcome(log.write, self.step + 1)]
                    left_at = time.monotonic()
                    raise
        except LogsyncError as error:
            if failure is None:  # it came from the end of the with block
                failure, left_at = {**described(error), "again": []}, time.monotonic()
            failure["leave_s"] = time.monotonic() - left_at
            failure["again"] += [outcome(log.log_ready, self.step + 1)]
            started = time.monotonic()
            failure["close"] = outcome(log.close)
            failure["close_s"] = time.monotonic() - started
            self.events.tell("failed", **failure)
        except ValueError as error:
            self.events.tell("raised", text=str(error))
        else:
            self.events.tell("done", step=self.step, due=self.due)
        self._wait_for("go")

    def _settle_in(self) -> None:
        os.setsid()
        output = os.open(self.folder / f"rank{self.rank}.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        faulthandler.dump_traceback_later(HARD_LIMIT_S, exit=True)
        faulthandler.register(signal.SIGUSR1, all_threads=True)
        logging.getLogger("logsync").addHandler(self.events)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are started without
        if self.plan["netns"]:
            enter_netns(self.plan["netns"])
        os.environ.update(self.plan["environ"])
        self.events.tell("here", pid=os.getpid())

    def _be_known(self, log: TrainingLog) -> None:
        """Wait until this rank's first note is in the store: one that dies before that cannot be told from others."""
        watch: Any = log._transport
        watch = watch._watch
        deadline = time.monotonic() + NOTES_S
        while self.rank not in watch._read() and time.monotonic() < deadline:
            time.sleep(0.01)

    def _train(self, log: TrainingLog) -> None:
        for step in range(self.plan["steps"]):
            self.step = step
            if step == self.plan["moment"]:
                if self.plan["deed"] != "kill_soon":
                    self.events.tell("fault")
                if self.plan["deed"] == "close":
                    log.close()
                    return
                DEEDS[self.plan["deed"]](self)
            log.record(x=float(step))
            log.log_ready(step)
            time.sleep(0.002)

    def _train_epochs(self, log: TrainingLog) -> None:
        lengths, forgets = self.plan["lengths"][self.rank], self.plan["forgets"].get(str(self.rank))
        for epoch, length in enumerate(lengths):
            for batch in range(length):
                self.step = 100 * epoch + batch
                if self.step == self.plan["moment"]:
                    self._do_the_deed()
                log.record({"seen": 1.0}, reduce="sum", per_rank=True)
                if log.log_ready(self.step):
                    self.due.append(self.step)
                time.sleep(0.002)
            if epoch != forgets:
                log.end_epoch()
            if self.plan["moment"] == -2 - epoch:  # after the end of its epoch, in its own code
                self._do_the_deed()

    def _do_the_deed(self) -> None:
        self.events.tell("fault")
        DEEDS[self.plan["deed"]](self)

    def _on_sigterm(self, _: int, __: FrameType | None) -> None:
        self.events.tell("handler")
        raise SystemExit(7)

    def _wait_for(self, name: str) -> None:
        while not (self.folder / name).exists():
            time.sleep(0.01)

    # -- deeds -------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_soon(self) -> None:
        """Go on, and be killed somewhere in a round or between two."""
        timer = threading.Timer(self.plan["seconds"], self._kill_now)
        timer.daemon = True
        timer.start()

    def _kill_now(self) -> None:
        self.events.tell("fault")
        self.kill()

    def exit(self) -> None:
        os._exit(3)

    def stop(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def sleep(self) -> None:
        time.sleep(self.plan["seconds"])

    def starve(self) -> None:
        """Keep every Python thread of this process from running: C's sleep, called with the interpreter's lock held."""
        ctypes.PyDLL(None).sleep(self.plan["seconds"])

    def wait(self) -> None:
        """Have a step that lasts until the test says so."""
        self._wait_for(f"on{self.rank}")

    def rest(self) -> None:
        """Be in its own code, after the end of its epoch, until that of all is there or cannot come any more."""
        while self.log._absence is not None and self.log._absence._thread.is_alive():
            time.sleep(0.01)

    def throw(self) -> None:
        raise ValueError(EXCEPTION)

    def leave_a_child(self) -> None:
        """Be killed while a forked child, a data loader's worker say, lives on with this rank's connections."""
        if os.fork() == 0:
            deadline = time.monotonic() + HARD_LIMIT_S
            while not (self.folder / "go").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            os._exit(0)
        self.kill()

    def reset(self) -> None:
        """Break every connection but the store's, as a middlebox does: the peers receive a TCP reset."""
        store = int(self.plan["environ"]["MASTER_PORT"])
        for entry in list(Path("/proc/self/fd").iterdir()):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as connection:
                ends = (connection.getpeername(), connection.getsockname())
                if connection.family == socket.AF_INET and store not in {port for _, port in ends}:
                    # Python has no word for it: a connect() to "no family" ends a connection by a reset.
                    ctypes.CDLL(None).connect(connection.fileno(), bytes(16), 16)


DEEDS: dict[str, Callable[[Rank], None]] = {
    "kill": Rank.kill,
    "kill_soon": Rank.kill_soon,
    "exit": Rank.exit,
    "stop": Rank.stop,
    "sleep": Rank.sleep,
    "starve": Rank.starve,
    "wait": Rank.wait,
    "rest": Rank.rest,
    "throw": Rank.throw,
    "leave_a_child": Rank.leave_a_child,
    "reset": Rank.reset,
}


def described(error: LogsyncError) -> dict[str, Any]:
    return {"type": type(error).__name__, "text": str(error), "ranks": error.ranks, "round": error.round}


def outcome(call: Callable[..., object], *arguments: object) -> dict[str, Any] | None:
    try:
        call(*arguments)
    except LogsyncError as error:
        return described(error)
    return None


def enter_netns(name: str) -> None:
    with Path("/run/netns", name).open() as namespace:
        # os.setns is Python 3.12's.
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000):  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


if __name__ == "__main__":
    main()
