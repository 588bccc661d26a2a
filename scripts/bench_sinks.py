"""How long a log holds up the training thread, by what is wrong with a destination.

    python scripts/bench_sinks.py                  1,000 logs of 5 ms steps for each case, in turns

Every case has the JSON lines besides; the first one nothing else, and the others are compared with it. The MLflow
server is one of its own, stopped with SIGSTOP after the first turn; where `mlflow` is not installed, there is none.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import SinkSpec
from logsync.workers import TrainingLog, connect

AIM_MS = 1.0  # of the 99th percentile
START_S = 180.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what a failing destination costs the training thread.")
    parser.add_argument("--logs", type=int, default=1000, help="logs of each case (%(default)d)")
    parser.add_argument("--step-ms", type=float, default=5.0, help="milliseconds between two logs (%(default)g)")
    parser.add_argument("--turns", type=int, default=5, help="how often cases take turns (%(default)d)")
    given = parser.parse_args()
    logging.disable()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as deaf:
        cases: dict[str, list[SinkSpec]] = {
            "jsonl alone": [],
            "a sink that sleeps 1 s per write": [sleeps],
            "a sink that always raises": [raises],
            "a full disk": ["jsonl:/dev/full"] if Path("/dev/full").exists() else [raises],
            "a server that never answers": [asks(deaf.getsockname()[1])],
        }
        with mlflow_server(Path(folder)) as (uri, stop):
            if uri:
                cases["an MLflow server that is stopped"] = [f"mlflow:{uri}"]
            else:
                print("skipped, not installed: mlflow")
            measure(cases, given.logs, given.step_ms / 1000, given.turns, stop)


def measure(
    cases: dict[str, list[SinkSpec]], logs: int, step_s: float, turns: int, after_first_turn: Callable[[], None]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        opened = {
            name: connect(1, sinks=["jsonl", *sinks], run_dir=Path(folder, str(number)), name=f"case{number}")
            for number, (name, sinks) in enumerate(cases.items())
        }
        stalls: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(turns):
            for name, log in opened.items():
                stalls[name] += stalled(log, range(turn * logs // turns, (turn + 1) * logs // turns), step_s)
            if turn == 0:
                after_first_turn()
        lines, closed_s = {}, {}
        for number, (name, log) in enumerate(opened.items()):
            began = time.perf_counter()
            log.close()
            closed_s[name] = time.perf_counter() - began
            lines[name] = len(Path(folder, str(number), "metrics.jsonl").read_text().splitlines())
    show(stalls, lines, closed_s)


def stalled(log: TrainingLog, steps: Sequence[int], step_s: float) -> list[float]:
    """Return how long each call of `log_ready` took, in milliseconds."""
    taken = []
    for step in steps:
        log.record(loss=1.0, grad_norm=2.0)
        began = time.perf_counter()
        log.log_ready(step)
        taken.append(1000 * (time.perf_counter() - began))
        time.sleep(step_s)
    return taken


def show(stalls: dict[str, list[float]], lines: dict[str, int], closed_s: dict[str, float]) -> None:
    base = percentile(stalls["jsonl alone"], 99)
    print(f"Python {sys.version.split()[0]}; milliseconds that a log held up the training thread")
    print(f"{'':<34}{'median':>9}{'99th':>9}{'most':>9}{'ratio':>8}{'JSON lines':>12}{'close, s':>10}")
    for name, taken in stalls.items():
        high = percentile(taken, 99)
        met = "" if high < AIM_MS else "  MISSED the aim of 1 ms"
        print(
            f"{name:<34}{statistics.median(taken):>9.3f}{high:>9.3f}{max(taken):>9.3f}{high / base:>8.2f}"
            f"{lines[name]:>8}/{len(taken)}{closed_s[name]:>9.1f}{met}"
        )


def percentile(values: list[float], which: int) -> float:
    return statistics.quantiles(values, n=100)[which - 1]


def sleeps(_: LogEntry) -> None:
    time.sleep(1)


def raises(_: LogEntry) -> None:
    msg = "always"
    raise ValueError(msg)


def asks(port: int) -> Callable[[LogEntry], None]:
    def ask(_: LogEntry) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.recv(1)

    return ask


@contextlib.contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Run one with SQLite on loopback; yields its address, empty if there can be none, and what stops it."""
    if not all(map(importlib.util.find_spec, ("mlflow", "flask"))):  # mlflow-skinny has no server
        yield "", lambda: None
        return
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--default-artifact-root", str(folder)]
    uri = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("wb") as said:
        server = subprocess.Popen(  # noqa: S603 - our own command
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
    try:
        wait_for(f"{uri}/health", server)
        yield uri, lambda: os.killpg(server.pid, signal.SIGSTOP)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):  # noqa: S310 - our server
                return
        except OSError:  # noqa: PERF203 - it waits anyway
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("the MLflow server does not come up")
            time.sleep(0.1)


if __name__ == "__main__":
    main()
