"""Run the compose files of docker/ for real, hurt them, and check what they leave; scripts/check_containers starts it.

Only Python's own library is needed. The projects it starts have names and ports of their own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
STEPS_PER_EPOCH = 22  # of train_digits.py
LEARNT = 0.9  # of the digits it was not shown
PROJECT = "logsync-check"
# Its network namespace is a node's, so that it can cut the node off.
IPTABLES = f"{PROJECT}-iptables"
IPTABLES_IMAGE = """
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends iptables
"""


class Failed(Exception):
    """A check found something wrong."""


def fail(text: str) -> NoReturn:
    raise Failed(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="checks to make, or parts of their names (all)")
    parser.add_argument("--list", action="store_true", help="show the checks, and make none")
    parser.add_argument("--no-build", action="store_true", help="take the images that are there")
    given = parser.parse_args()
    Stack.builds = not given.no_build
    chosen = [check for check in CHECKS if not given.names or any(name in check.__name__ for name in given.names)]
    if given.list:
        print("\n".join(check.__name__ for check in chosen))
        return
    if not chosen:
        sys.exit(f"no check is called {' or '.join(given.names)}; see --list")
    # Ended, it cleans up too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    failed = []
    for check in chosen:
        told(f"== {check.__name__}")
        began = time.monotonic()
        try:
            check()
        except Exception as error:  # noqa: BLE001 - the next check is another matter
            failed.append(check.__name__)
            told(f"FAILED: {type(error).__name__}: {error}")
        else:
            told(f"passed, in {time.monotonic() - began:.0f} s")
    told(f"{len(chosen) - len(failed)} passed, {len(failed)} failed")
    sys.exit(f"FAILED: {', '.join(failed)}" if failed else 0)


# -- the checks --------------------------------------------------------------------------------------------------------


def static() -> None:
    """Compose files and Dockerfile are sound."""
    for file in sorted(DOCKER.glob("compose.*.yaml")):
        run("docker", "compose", "-f", file, "config", "-q")
        told(f"docker compose -f {file.relative_to(ROOT)} config -q: nothing to say")
    if shutil.which("hadolint"):
        run("hadolint", DOCKER / "Dockerfile")
        told("hadolint docker/Dockerfile: nothing to say")
    else:
        told("hadolint is not installed; the Dockerfile was not linted")


def torchrun_trains() -> None:
    """Two nodes train to the end; the volume and TensorBoard have the whole log."""
    with torchrun(epochs=10) as stack:
        stack.wait_for_end("node0", "node1", timeout_s=180)
        check_log(stack, epochs=10, attempts=1)
        url = f"http://localhost:{stack.environ['TENSORBOARD_PORT']}/data"
        points = until("TensorBoard has the last step", 60, lambda: tensorboard_points(url, epochs=10))
        told(f"TensorBoard has {points} points of train/loss, up to the last step")


def torchrun_loses_a_node() -> None:
    """The node that holds neither rank 0 nor the rendezvous is killed, and comes back."""
    lose("node1", survivor="node0")


def torchrun_loses_the_first_node() -> None:
    """The node of the rendezvous is killed, and comes back; the other starts again by compose's restart."""
    lose("node0", survivor="node1")


def torchrun_partition() -> None:
    """Nodes that are cut off from each other are named by both sides."""
    nodes = ("node0", "node1")
    command = ["scripts/torchrun_node.sh", "--nnodes=2", "--nproc-per-node=2", "--rdzv-endpoint=node0"]
    command += ["--max-restarts=0", "scripts/train_digits.py", "--epochs=1000", "--run-dir=runs/digits"]
    # Apart: else the training's own collective would notice before the log's round.
    service = {"command": [*command, "--timeout=10", "--apart"], "restart": "no"}
    with torchrun(epochs=1000, override={"services": dict.fromkeys(nodes, service)}) as stack:
        stack.wait_for_lines(20)
        stack.cut_off("node1", "node0")
        began = time.monotonic()
        # Where torchrun itself cannot reach its store it takes minutes to give up; the ranks do not.
        for node in nodes:
            name, text = until(f"{node} raises", 60, partial(stack.errors, node))[0]
            told(f"{node}, after {time.monotonic() - began:.1f} s: {name}: {text}")
            if name not in ("RoundTimeout", "CoordinatorLost", "PeerLost"):
                fail(f"{node} was to raise an error that names the others")


def ray_trains() -> None:
    """A job of the Ray cluster trains to the end; the volume and MLflow have the whole log."""
    with ray(epochs=10) as stack:
        stack.wait_for_end("job", timeout_s=300)
        check_log(stack, epochs=10, attempts=1)
        check_mlflow(stack, epochs=10)


def ray_loses_a_node() -> None:
    """A worker's node is killed, and comes back."""
    with ray(epochs=30) as stack:
        before = stack.wait_for_lines(15)
        stack.compose("kill", "worker1")
        told(f"killed worker1 at step {before[-1]['step']}")
        began = time.monotonic()
        stack.compose("start", "worker1")
        until("it trains on", 300, lambda: stack.lines()[-1]["attempt"] > 0)
        told(f"it trains on {time.monotonic() - began:.1f} s after the kill")
        stack.wait_for_end("job", timeout_s=300)
        check_log(stack, epochs=30, attempts=2)
        check_mlflow(stack, epochs=30)


CHECKS: list[Callable[[], None]] = [
    static,
    torchrun_trains,
    torchrun_loses_a_node,
    torchrun_loses_the_first_node,
    torchrun_partition,
    ray_trains,
    ray_loses_a_node,
]


def lose(node: str, survivor: str) -> None:
    with torchrun(epochs=30) as stack:
        before = stack.wait_for_lines(15)
        stack.compose("kill", node)
        told(f"killed {node} at step {before[-1]['step']}")
        began = time.monotonic()
        # The training's own collective, or the log's round, whichever comes first.
        noticed = until(f"{survivor} notices", 60, lambda: re.findall(r"(\w+(?:Error|Lost): .*)", stack.logs(survivor)))
        told(f"{survivor}, after {time.monotonic() - began:.1f} s: {noticed[0]}")
        stack.compose("start", node)
        until("it trains on", 240, lambda: stack.lines() and stack.lines()[-1]["attempt"] > 0)
        told(f"it trains on {time.monotonic() - began:.1f} s after the kill")
        stack.wait_for_end("node0", "node1", timeout_s=240)
        check_log(stack, epochs=30, attempts=2)


def check_log(stack: Stack, epochs: int, attempts: int) -> None:
    """Fail unless metrics.jsonl is that of a job that was never stopped, but for the attempt it was written by."""
    expected = expected_steps(epochs)
    lines = stack.lines()
    if [(line["seq"], line["step"]) for line in lines] != list(enumerate(expected)):
        fail(f"the log was to have the steps {expected}, and has {[line['step'] for line in lines]}")
    seen = [line["attempt"] for line in lines]
    if len(set(seen)) < attempts or any(b < a for a, b in itertools.pairwise(seen)):
        fail(f"the log was to have {attempts} attempts or more, one after the other, and has {seen}")
    if lines[-1]["eval/accuracy"] < LEARNT:
        fail(f"it was to learn something, and reads {lines[-1]['eval/accuracy']:.1%} of the digits")
    told(
        f"metrics.jsonl is whole: {len(lines)} entries up to step {lines[-1]['step']}, by attempts "
        f"{sorted(set(seen))}; accuracy {lines[-1]['eval/accuracy']:.1%}"
    )


def expected_steps(epochs: int) -> list[int]:
    """Return the steps that a log of every 10 steps and of each epoch's end has."""
    first = [1, 11, 21, 22]
    return first + [STEPS_PER_EPOCH * epoch + step for epoch in range(1, epochs) for step in (10, 20, 22)]


def tensorboard_points(url: str, epochs: int) -> int:
    (name,) = get(f"{url}/runs") or [""]
    query = urllib.parse.urlencode({"tag": "train/loss", "run": name})
    points = get(f"{url}/plugin/scalars/scalars?{query}") if name else []
    return len(points) if points and points[-1][1] == STEPS_PER_EPOCH * epochs else 0


def check_mlflow(stack: Stack, epochs: int) -> None:
    """Fail unless MLflow has one run, with every step that has a loss.

    It cannot take points back, so those stay that a killed attempt logged on its way out.
    """
    url = f"http://localhost:{stack.environ['MLFLOW_PORT']}/api/2.0/mlflow"
    runs = get(f"{url}/runs/search", {"experiment_ids": ["0"]})["runs"]
    if len(runs) != 1:
        fail(f"MLflow was to have one run, and has {len(runs)}")
    (run_id,) = (each["info"]["run_id"] for each in runs)
    query = urllib.parse.urlencode({"run_id": run_id, "metric_key": "train/loss", "max_results": 1000})
    steps = {int(point["step"]) for point in get(f"{url}/metrics/get-history?{query}")["metrics"]}
    expected = set(expected_steps(epochs))
    if missing := expected - steps:
        fail(f"MLflow lacks the steps {sorted(missing)}")
    also = f"; of what was lost it keeps {sorted(steps - expected)}" if steps - expected else ""
    told(f"MLflow has {len(steps)} points of train/loss, up to the last step{also}")


# -- compose -----------------------------------------------------------------------------------------------------------


class Stack:
    """A compose file that is up, as a project of its own."""

    builds = True

    def __init__(self, file: Path, environ: Mapping[str, str], reader: str, override: Path | None) -> None:
        self.environ = environ
        self._project = f"{PROJECT}-{file.stem.partition('.')[2]}"
        self._base = ["docker", "compose", "--project-name", self._project]
        for each in (file, override):
            self._base += ["-f", str(each)] if each else []
        self._reader = reader

    def compose(self, *arguments: str, timeout_s: float = 120, check: bool = True) -> str:
        """Return what `docker compose ARGUMENTS` wrote to stdout."""
        return run(*self._base, *arguments, environ=self.environ, timeout_s=timeout_s, check=check)

    def up(self) -> None:
        """Build what is to be built, and start what is gated by health."""
        if Stack.builds:
            began = time.monotonic()
            self.compose("build", timeout_s=3600)
            told(f"built in {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        self.compose("up", "--detach", timeout_s=900)
        told(f"up in {time.monotonic() - began:.0f} s")

    def down(self) -> None:
        """Remove what there is, and fail if something is left."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "5")
        label = f"label=com.docker.compose.project={self._project}"
        for what in (["ps", "--all"], ["network", "ls"], ["volume", "ls"]):
            if left := run("docker", *what, "--quiet", "--filter", label):
                fail(f"docker {what[0]} still shows {left} after down")

    def logs(self, service: str) -> str:
        """Return what a service has said so far, over all its starts."""
        text = self.compose("logs", "--no-color", "--no-log-prefix", service)
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)

    def errors(self, service: str) -> list[tuple[str, str]]:
        """Return names and texts of logsync's errors that a service's ranks have ended with."""
        return re.findall(r"logsync\.coordinator\.errors\.(\w+): (.*)", self.logs(service))

    def lines(self) -> list[dict[str, Any]]:
        """Return the entries on the volume; of a line that is being written there is only a part."""
        text = self.compose("exec", "-T", self._reader, "cat", "runs/digits/metrics.jsonl", check=False)
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for_lines(self, count: int) -> list[dict[str, Any]]:
        """Return the entries once there are so many."""

        def enough() -> list[dict[str, Any]]:
            lines = self.lines()
            return lines if len(lines) >= count else []

        lines: list[dict[str, Any]] = until(f"metrics.jsonl has {count} lines", 300, enough)
        return lines

    def wait_for_end(self, *services: str, timeout_s: float, status: int = 0) -> None:
        """Wait until the services have exited, and fail unless with `status`."""
        wanted = dict.fromkeys(services, ("exited", status))

        def ended() -> dict[str, tuple[str, int]]:
            states = {service: self._state(service) for service in services}
            return states if all(state == "exited" for state, _ in states.values()) else {}

        try:
            found = until(f"{' and '.join(services)} end", timeout_s, ended)
        except Failed as error:
            last = {service: self.logs(service)[-2000:] for service in services}
            fail(f"{error}; their last words: {last}")
        if found != wanted:
            fail(f"{found}; last words: {[self.logs(service)[-3000:] for service in services]}")

    def cut_off(self, service: str, other: str) -> None:
        """Drop all packets between two services."""
        (network,) = self._inspect(other)["NetworkSettings"]["Networks"].values()
        peer = network["IPAddress"]
        run("docker", "build", "--tag", IPTABLES, "-", stdin=IPTABLES_IMAGE, timeout_s=600)
        inside = f"container:{self._inspect(service)['Id']}"
        rules = f"iptables -A INPUT -s {peer} -j DROP; iptables -A OUTPUT -d {peer} -j DROP"
        run("docker", "run", "--rm", "--network", inside, "--cap-add", "NET_ADMIN", IPTABLES, "sh", "-ec", rules)
        told(f"cut {service} off from {other}")

    def _state(self, service: str) -> tuple[str, int]:
        state = self._inspect(service)["State"]
        return state["Status"], state["ExitCode"]

    def _inspect(self, service: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(
            run("docker", "inspect", self.compose("ps", "--all", "--quiet", service))
        )
        return found[0]


@contextmanager
def torchrun(epochs: int, override: Mapping[str, Any] | None = None) -> Iterator[Stack]:
    """Have docker/compose.torchrun.yaml up; `override` is another compose file, as a mapping."""
    environ = {"EPOCHS": str(epochs), "TENSORBOARD_PORT": str(free_port())}
    with up(DOCKER / "compose.torchrun.yaml", environ, reader="tensorboard", override=override) as stack:
        yield stack


@contextmanager
def ray(epochs: int) -> Iterator[Stack]:
    """Have docker/compose.ray.yaml up."""
    environ = {"EPOCHS": str(epochs), "MLFLOW_PORT": str(free_port())}
    with up(DOCKER / "compose.ray.yaml", environ, reader="head", override=None) as stack:
        yield stack


@contextmanager
def up(file: Path, environ: Mapping[str, str], reader: str, override: Mapping[str, Any] | None) -> Iterator[Stack]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "override.yaml")
        path.write_text(json.dumps(override))  # JSON is YAML
        stack = Stack(file, environ, reader, path if override else None)
        try:
            stack.up()
            yield stack
        finally:
            stack.down()
            run("docker", "image", "rm", "--force", IPTABLES, check=False)


# -- tools -------------------------------------------------------------------------------------------------------------


def run(
    *command: object,
    environ: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout_s: float = 60,
    check: bool = True,
) -> str:
    """Return what a command wrote to stdout; fail with what it wrote to stderr."""
    done = subprocess.run(  # noqa: S603 - what stands here
        list(map(str, command)),
        env={**os.environ, **(environ or {})},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if check and done.returncode:
        fail(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout.strip("\n") if check else done.stdout


def until(what: str, timeout_s: float, found: Callable[[], Any]) -> Any:
    """Return the first thing that `found` returns and that is true; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not (result := found()):
        if time.monotonic() > deadline:
            fail(f"waited {timeout_s:g} s until {what}")
        time.sleep(0.5)
    return result


def get(url: str, body: Mapping[str, Any] | None = None) -> Any:
    """Return what a server answers, to a POST if there is a body; None if it does not answer."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - http
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310 - http
            return json.load(answer)
    except OSError:  # not yet
        return None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def told(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
