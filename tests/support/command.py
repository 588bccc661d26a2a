"""The command `logsync` as users run it, and files for it to look at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.jsonl import JsonlSink

__all__ = ["COMMAND", "entry", "lines_of", "logsync", "ranks_waits", "surroundings", "write_run"]

COMMAND = [sys.executable, "-m", "logsync.workers.cli"]
_LAUNCHERS = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS")


def surroundings(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment of no launcher, 100 columns and UTF-8, with `environ` over it."""
    clean = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
    return {**clean, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8", **(environ or {})}


def logsync(
    *arguments: object,
    folder: Path | None = None,
    environ: Mapping[str, str] | None = None,
    prefix: Iterable[str] = (),
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run the command in a pipe, as a process of its own."""
    return subprocess.run(
        [*prefix, *COMMAND, *map(str, arguments)],
        capture_output="stdout" not in options,
        text=True,
        encoding="utf-8",
        errors="backslashreplace",
        cwd=folder,
        env=surroundings(environ),
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
        **options,
    )


def entry(seq: int, metrics: Mapping[str, float] | None = None, **fields: Any) -> LogEntry:
    """Return the entry of step 10 * seq, made 2 s after the one before."""
    known: dict[str, Any] = {"step": 10 * seq, "time": 1.7e9 + 2 * seq, "attempt": 0, "calls": 10, "world_size": 2}
    return LogEntry(seq=seq, metrics=dict({"loss": 1.0 / (seq + 1)} if metrics is None else metrics), **known | fields)


def write_run(folder: Path, entries: Iterable[LogEntry], waits: Callable[[LogEntry], object] | None = None) -> Path:
    """Write `folder`/metrics.jsonl with the sink that a run has, and return it.

    Args:
        waits: makes the waits of an entry's line; a line that gets None has none.
    """
    path = folder / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.open(RunInfo(run_dir=folder, name="train", attempt=0, world_size=2, next_seq=0, resumed=False))
    for each in entries:
        sink.write(each)
    sink.close()
    if waits is not None:
        made = lines_of(path)
        for line, each in zip(made, entries, strict=True):
            found = waits(each)
            if found is not None:
                line["waits"] = found
        path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in made))
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file as objects."""
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def ranks_waits(slow: int, wait_ms: int, ranks: int = 4) -> dict[str, object]:
    """Return what a line says where rank `slow` was waited for `wait_ms` milliseconds by the others."""
    each = [1 if rank == slow else 1 + wait_ms for rank in range(ranks)]
    return {
        "slowest": slow,
        "least_s": 0.001,
        "most_s": (1 + wait_ms) / 1000,
        "interval_s": 2.0,
        "host": "node-1",
        "each_ms": each,
    }
