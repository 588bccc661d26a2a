"""Jobs of real processes that something happens to; what they do is tests/faults/rank.py."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from support.worlds import free_port, places

__all__ = ["FaultJob", "JobMaker", "Nursery", "drawn"]

_RANK = Path(__file__).parents[1] / "faults" / "rank.py"
_GRACE_S = 5.0  # after the timeout
_AT_ONCE_S = 2.5
_END_S = 20.0  # many ranks may end at once, on few cores


class Nursery:
    """A process that has imported everything, from which ranks are forked."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(_RANK)],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )

    def fork(self, plan: Mapping[str, Any]) -> None:
        """Start a rank."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(plan) + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End it, and with it every rank that is left."""
        self._process.kill()
        self._process.wait(_END_S)


class FaultJob:
    """A job of `size` ranks, each of which does its deed, if it has one, at its moment.

    Args:
        folder: where the ranks tell what happens, and the log's files are.
        timeout: as for `connect`.
        store_on_rank_0: the job's store is in rank 0's process, and ends with it; otherwise it is here.
        steps: how many a rank trains.
        on_failure: as for `connect`.
        lengths: by rank, how many batches each of its epochs has; the steps of epoch e begin at 100 e. Instead of
            `steps`.
        forgets: the epoch whose end a rank does not tell, by rank.
        network: the address of this process that ranks can reach, and each rank's network namespace and interface.
        nodes: how many ranks are on each node, for frames that go through the nodes' first ranks.
    """

    def __init__(
        self,
        nursery: Nursery,
        folder: Path,
        size: int = 3,
        *,
        timeout: float = 3.0,
        frequency: int = 1,
        store_on_rank_0: bool = False,
        steps: int = 100_000,
        run_dir: Path | None = None,
        on_failure: str = "raise",
        lengths: list[list[int]] | None = None,
        forgets: Mapping[int, int] | None = None,
        network: tuple[str, list[tuple[str, str]]] | None = None,
        nodes: Sequence[int] = (),
    ) -> None:
        self.folder = folder
        self.size = size
        self.timeout = timeout
        self.run_dir = run_dir or folder / "run"
        self._nursery = nursery
        self._deeds: dict[int, dict[str, Any]] = {}
        self._network = network
        self._places = places(nodes) if nodes else [{"LOCAL_RANK": str(rank)} for rank in range(size)]
        host = network[0] if network else "127.0.0.1"
        self._environ = {"WORLD_SIZE": str(size), "MASTER_ADDR": host}
        self._store: Any = None
        if store_on_rank_0:
            self._environ["MASTER_PORT"] = str(free_port())
        else:
            # As under torchrun: rank 0 does not start the store but finds it.
            tcp_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch does not list it
            self._store = tcp_store(host, 0, is_master=True, wait_for_workers=False)
            self._environ |= {"MASTER_PORT": str(self._store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self._plan = {
            "folder": str(folder),
            "frequency": frequency,
            "run_dir": str(self.run_dir),
            "steps": steps,
            "lengths": lengths,
            "forgets": {str(rank): epoch for rank, epoch in (forgets or {}).items()},
            "connect": {"timeout": timeout, "warn_after": 1.0, "sinks": ["jsonl"], "on_failure": on_failure}
            | ({"transport": "collective:tree"} if nodes else {}),
        }

    def deed(self, rank: int, deed: str, moment: int, **more: Any) -> None:
        """Have `rank` do a deed of rank.py before its call of step `moment`."""
        self._deeds[rank] = {"deed": deed, "moment": moment, **more}

    def start(self) -> None:
        """Start all ranks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for rank in range(self.size):
            namespace, interface = self._network[1][rank] if self._network else ("", "lo")
            environ = {**self._environ, "RANK": str(rank), **self._places[rank], "GLOO_SOCKET_IFNAME": interface}
            idle = {"deed": "", "moment": -1}
            self._nursery.fork(
                {**self._plan, "rank": rank, "environ": environ, "netns": namespace, **self._deeds.get(rank, idle)}
            )

    def events(self, rank: int, *kinds: str) -> list[dict[str, Any]]:
        """Return what `rank` has told so far."""
        path = self.folder / f"rank{rank}.events"
        # A line that is being written has no end yet.
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        told = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in told if not kinds or event["event"] in kinds]

    def wait(self, rank: int, *kinds: str, within_s: float = 30.0) -> dict[str, Any]:
        """Return the first event of these kinds that `rank` tells."""
        complaint = f"rank {rank} does not come to {' or '.join(kinds)}"
        return self._until(lambda: self.events(rank, *kinds), within_s, complaint)[0]  # type: ignore[no-any-return]

    def fault_at(self, rank: int) -> float:
        """Return when `rank` did its deed, on the monotonic clock."""
        return float(self.wait(rank, "fault")["at"])

    def deed_of(self, rank: int) -> dict[str, Any]:
        """Return what `rank` was told to do."""
        return self._deeds[rank]

    def wait_until(self, moment: float) -> None:
        """Wait for a moment on the monotonic clock, where the fault is that so much time passes."""
        time.sleep(max(0.0, moment - time.monotonic()))

    def wait_for_warning(self, rank: int, text: str) -> str:
        """Return the first warning of `rank` that has `text`."""

        def found() -> list[str]:
            return [event["text"] for event in self.events(rank, "warning") if text in event["text"]]

        return str(self._until(found, 20.0, f"rank {rank} does not warn of {text!r}")[0])

    def signal(self, rank: int, signum: signal.Signals) -> float:
        """Send a signal to `rank`; returns when."""
        now = time.monotonic()
        os.kill(self.wait(rank, "here")["pid"], signum)
        return now

    def allow(self, rank: int) -> None:
        """Let the step end that `rank` waits in."""
        (self.folder / f"on{rank}").touch()

    def failures(self, ranks: Iterable[int], fault_at: float, *, at_once: bool = False) -> dict[int, dict[str, Any]]:
        """Return how these ranks failed, each soon enough, and check what holds for every failure.

        Args:
            fault_at: when the fault happened, on the monotonic clock.
            at_once: long before the timeout, which has to be long enough to tell.
        """
        limit_s = self.timeout / 2 if at_once else self.timeout + _GRACE_S
        found = {rank: self.wait(rank, "failed", within_s=limit_s + 15) for rank in ranks}
        for rank, failure in found.items():
            error = {key: failure[key] for key in ("type", "text", "ranks", "round")}
            after_s = failure["at"] - failure["close_s"] - failure["leave_s"] - fault_at
            assert after_s <= limit_s, self._says(f"rank {rank} failed {after_s:.1f} s after the fault")
            assert failure["again"], failure
            assert all(again == error for again in failure["again"]), self._says(f"rank {rank}: another error later")
            assert failure["leave_s"] < _AT_ONCE_S, failure
            assert failure["close"] is None, failure
            assert failure["close_s"] < _AT_ONCE_S, failure
            assert failure["text"].isprintable(), failure
        return found

    def assert_others_say(
        self, error: str, culprit: int, *, ranks: Iterable[int] | None = None, at_once: bool = False
    ) -> list[str]:
        """Assert that all others, or these ranks, fail by this error, naming the culprit, soon enough.

        Returns:
            The texts of the errors.
        """
        others = set(range(self.size)) - {culprit} if ranks is None else ranks
        failures = self.failures(others, self.fault_at(culprit), at_once=at_once)
        said = {rank: (failure["type"], failure["ranks"]) for rank, failure in failures.items()}
        assert said == dict.fromkeys(said, (error, [culprit])), self._says(f"not {error} of rank {culprit}: {said}")
        for failure in failures.values():
            assert f"rank {culprit}" in failure["text"], failure
        return [failure["text"] for failure in failures.values()]

    def let_go(self) -> None:
        """Let all ranks end, without waiting for it."""
        (self.folder / "go").touch()

    def release(self) -> dict[int, int]:
        """Let all ranks end, and return how each did: 0, an exit status, or minus a signal."""
        self.let_go()
        codes = {rank: self.wait(rank, "ended", within_s=_END_S)["code"] for rank in range(self.size)}
        self._until(lambda: not self._alive(), _END_S, "processes are left")
        return codes

    def close(self) -> None:
        """End whatever is left."""
        for pid in self._alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._until(lambda: not self._alive(), _END_S, "killed processes do not end")
        self._store = None

    def entries(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; the file must be whole."""
        text = (self.run_dir / "metrics.jsonl").read_text()
        assert text.endswith("\n")
        return [json.loads(line) for line in text.splitlines()]

    def assert_logged_every_step(self) -> None:
        """Assert that metrics.jsonl has the entries of all steps up to some step, in order."""
        logged = [(entry["seq"], entry["step"]) for entry in self.entries() if not entry.get("partial")]
        assert logged, "nothing was logged before the fault"
        assert logged == [(step, step) for step in range(len(logged))]

    def _until(self, condition: Callable[[], Any], within_s: float, complaint: str) -> Any:
        """Return what `condition` returns once that is true."""
        deadline = time.monotonic() + within_s
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(self._says(f"{complaint} within {within_s:g} s"))
            time.sleep(0.01)
        return value

    def _alive(self) -> list[int]:
        """Return the processes of the ranks' sessions: themselves and what they forked."""
        sessions = {event["pid"] for rank in range(self.size) for event in self.events(rank, "here")}
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in pids if _session(pid) in sessions]

    def _says(self, what: str) -> str:
        """Return a complaint with everything that the ranks have told, and where they are."""
        for pid in self._alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)  # writes its stacks
        time.sleep(0.2)
        parts = [what]
        for path in sorted(self.folder.glob("rank*")):
            parts += [f"-- {path.name}", path.read_text(errors="replace")]
        return "\n".join(parts)


class JobMaker(Protocol):
    """Makes a FaultJob from its options, and ends it after the test."""

    def __call__(self, **options: Any) -> FaultJob:
        """Make a job; start() starts it."""


def _session(pid: int) -> int | None:
    """Return the session of a process, None of one that has ended."""
    try:
        state, _, _, number = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:4]
    except (OSError, ValueError):
        return None
    return None if state in (b"Z", b"X") else int(number)


def drawn(name: str) -> random.Random:
    """Return the dice of a test, thrown by a seed that is printed, or given as LOGSYNC_FAULT_SEED."""
    seed = os.environ.get("LOGSYNC_FAULT_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"LOGSYNC_FAULT_SEED={seed}")
    return random.Random(f"{seed} {name}")
