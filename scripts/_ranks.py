"""Start the ranks of a benchmark with torchrun, on the loopback interface."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["end_with_parent", "run_ranks"]


def run_ranks(script: str, world_size: int, arguments: Sequence[object], timeout_s: float) -> Any:
    """Run `world_size` ranks of `script` and return what rank 0 wrote, as JSON, to the file of --ranks-write-to."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command += ["--nproc-per-node", str(world_size), script, "--ranks-write-to", str(result)]
        command += [str(argument) for argument in arguments]
        job = subprocess.Popen(  # noqa: S603 - our own command
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            cwd=folder,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - this process has one thread
        )
        try:
            if job.wait(timeout_s):
                sys.exit(f"the ranks ended with {job.returncode}")
        finally:
            if job.poll() is None:
                job.terminate()  # it passes that on to its ranks
                with contextlib.suppress(subprocess.TimeoutExpired):
                    job.wait(40)
                job.kill()  # the ranks end with their parent
        return json.loads(result.read_text())


def end_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when its parent is gone, however that came."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
