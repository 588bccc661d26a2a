"""Start scripts the way users do, by torchrun or by plain python, and leave no process behind.

Linux only: what is left of a job is found in /proc.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Ran", "entries", "plain_python", "torchrun", "wait_for"]

_MARK = "LOGSYNC_TEST_JOB"
# With its parent gone (pytest-timeout ends the process at once) torchrun gets SIGTERM, and takes its ranks with it.
_DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.execv(sys.argv[1], sys.argv[1:])"
)


@dataclass(frozen=True)
class Ran:
    """How a job ended.

    Attributes:
        returncode: the exit status of torchrun, or of the script.
        output: what all its processes wrote to stdout and stderr.
        folder: where it ran.
    """

    returncode: int
    output: str
    folder: Path

    def result(self, rank: int, name: str = "result") -> Any:
        """Return what `rank` wrote to <name>.rank<rank>.json; a missing one fails with the job's output."""
        path = self.folder / f"{name}.rank{rank}.json"
        assert path.exists(), f"rank {rank} did not come to write {path.name}; the job said:\n{self.output}"
        return json.loads(path.read_text())

    def assert_clean(self) -> None:
        """Assert that the job ended with 0, without a crash or a traceback on the way."""
        assert self.returncode == 0, self.output
        assert "Traceback" not in self.output, self.output
        assert "terminate called" not in self.output, self.output


def torchrun(
    script: Path,
    *arguments: object,
    nproc: int,
    folder: Path,
    timeout_s: float = 60.0,
    environ: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
) -> Ran:
    """Run `script` with `arguments`, in `folder`, on `nproc` ranks of this machine; `options` are torchrun's."""
    command = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(nproc), *options, str(script)]
    return _run([*command, *map(str, arguments)], folder, timeout_s, environ or {})


def plain_python(
    script: Path,
    *arguments: object,
    folder: Path,
    timeout_s: float = 60.0,
    environ: Mapping[str, str] | None = None,
) -> Ran:
    """Run `script` with `arguments`, in `folder`, as one process."""
    return _run([str(script), *map(str, arguments)], folder, timeout_s, environ or {})


def entries(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; one that does not parse is an error."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def wait_for(path: Path, timeout_s: float = 30.0) -> None:
    """Wait until `path` exists."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear within {timeout_s} s"
        time.sleep(0.01)


def _run(arguments: Sequence[str], folder: Path, timeout_s: float, environ: Mapping[str, str]) -> Ran:
    folder.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    # One thread a rank, and gloo on the loopback interface, whatever this machine's name resolves to.
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ, **environ, _MARK: mark}
    log = folder / "output.txt"
    # To a file: a pipe would be held open by any process that is left over.
    with log.open("wb") as output:
        job = subprocess.Popen(
            [sys.executable, "-c", _DIE_WITH_PARENT, sys.executable, *arguments],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        timed_out = False
        try:
            job.wait(timeout_s)
            _let_end(mark)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            left = _kill_all(mark)
            job.wait()
    said = log.read_text(errors="replace")
    assert not timed_out, f"{list(arguments)} did not end within {timeout_s} s; it said:\n{said}"
    assert not left, f"{list(arguments)} ended and left processes {left} behind; it said:\n{said}"
    return Ran(job.returncode, said, folder)


def _let_end(mark: str) -> None:
    """Give what a job's end leaves to its own end, such as multiprocessing's trackers, a moment to come to it."""
    deadline = time.monotonic() + 5.0
    while _marked(mark) and time.monotonic() < deadline:
        time.sleep(0.01)


def _kill_all(mark: str) -> list[int]:
    """End every process of a job, and return those that there were.

    torchrun gives each rank a session of its own, so its process group would not hold them; the environment does.
    """
    found: list[int] = []
    deadline = time.monotonic() + 10.0
    while alive := _marked(mark):
        assert time.monotonic() < deadline, f"processes {alive} do not end"
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        found += [pid for pid in alive if pid not in found]
        time.sleep(0.01)
    return found


def _marked(mark: str) -> list[int]:
    wanted = f"{_MARK}={mark}".encode()
    pids = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended, or is not ours
                # A zombie has no environment any more; its parent has only to ask for it.
                if wanted in (process / "environ").read_bytes().split(b"\0"):
                    pids.append(int(process.name))
    return pids
