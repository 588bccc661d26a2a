"""A world of real worker processes of Ray for the transport contract, and a Ray to run it on."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from logsync.coordinator.followers import Followed
from logsync.coordinator.messages import LogEntry
from logsync.workers.hosting import Hosted, Hosting, HostPlan, Plan, Recovered, Standing
from logsync.workers.testing import Member, play
from logsync.workers.training_log import TrainingLog
from logsync.workers.transports.base import Root, Transport
from logsync.workers.transports.ray_actor import RayTransport

__all__ = ["RankProcess", "RayWorld", "run_on_this_ray", "running_ray"]

DEADLINE_S = 60.0


@contextlib.contextmanager
def running_ray(**options: Any) -> Iterator[Path]:
    """Start a Ray of this process's own; yields its folder, and takes both away at the end."""
    # Short: the paths of sockets are limited to 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="ls", dir="/tmp"))
    tests = str(Path(__file__).parents[1])
    surroundings = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"}
    try:
        with mock.patch.dict(os.environ, surroundings):
            ray.init(
                num_cpus=4,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                object_store_memory=80 * 2**20,
                _temp_dir=str(folder),
                _node_ip_address="127.0.0.1",
                **options,
            )
        yield folder
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def run_on_this_ray(arguments: list[str], timeout_s: float = 90) -> subprocess.CompletedProcess[str]:
    """Run Python as another job of the Ray of these tests."""
    surroundings = {
        **os.environ,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_AUTH_MODE": "token",  # a Ray of ray.init() asks for its token
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout_s, env=surroundings)


class Home:
    """What lives in rank 0's process while the coordinator is an actor: a bare root, and the list of entries."""

    def __init__(self, entries: list[LogEntry]) -> None:
        self._entries = entries
        self._roots: list[Root] = []
        self._listener = Listener(family="AF_UNIX")
        self.address = str(self._listener.address)
        threading.Thread(target=self._accept, daemon=True).start()

    def add(self, root: Root) -> int:
        self._roots.append(root)
        return len(self._roots) - 1

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept(),), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, value = connection.recv()
                if number is None:
                    self._entries.append(value)
                    connection.send(None)
                else:
                    connection.send(self._roots[number](value))


class Remote:
    """The way from the coordinator's actor to a `Home`; a sink, too."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._connection: Connection | None = None

    def __call__(self, entry: LogEntry) -> None:
        self.ask(None, entry)

    def ask(self, number: int | None, value: object) -> Any:
        if self._connection is None:
            self._connection = Client(self._address)
        self._connection.send((number, value))
        return self._connection.recv()


class BareRootPlan:
    """A plan for a root that is a function in rank 0's process."""

    def __init__(self, address: str, number: int) -> None:
        self._address = address
        self._number = number

    def open(self, recovered: Recovered | None) -> Hosted:
        assert recovered is None
        return BareRoot(Remote(self._address), self._number)


class BareRoot:
    def __init__(self, home: Remote, number: int) -> None:
        self._home = home
        self._number = number

    def handle(self, frames: Sequence[bytes]) -> bytes:
        reply: bytes = self._home.ask(self._number, list(frames))
        return reply

    def follow(self, windows: Sequence[Followed]) -> None:
        raise NotImplementedError

    def standing(self) -> Standing:
        return Standing()

    def readmit(self, rank: int, hello: bytes) -> bytes:
        raise NotImplementedError

    def release(self, notes: Mapping[str, float]) -> None:
        pass

    def hyperparams(self, values: bytes) -> None:
        pass

    def loaded(self, *_: object) -> None:
        pass

    def leave(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


class BreakablePlan:
    """A plan whose coordinator fails to make entries while a file is there."""

    def __init__(self, plan: HostPlan, switch: Path) -> None:
        self._plan = plan
        self._switch = switch

    def open(self, recovered: Recovered | None) -> Hosted:
        hosted = self._plan.open(recovered)
        coordinator = hosted._host.coordinator  # type: ignore[attr-defined]
        make_entry, switch = coordinator._entry, self._switch

        def entry(*arguments: Any) -> LogEntry:
            if switch.exists():
                msg = "the disk of the root"
                raise OSError(msg)
            made: LogEntry = make_entry(*arguments)
            return made

        coordinator._entry = entry
        return hosted


class TestedTransport(RayTransport):
    """A RayTransport whose coordinator can be broken."""

    def __init__(self, rank: int, world_size: int, switch: Path, taken: set[int]) -> None:
        # Logs that are open at the same time have names of their own. Those that come one after the other share one,
        # and the process of an actor.
        self._number = next(number for number in itertools.count() if number not in taken)
        super().__init__(rank, world_size, name=f"{world_size}-{self._number}")
        self._switch = switch
        self._taken = taken
        taken.add(self._number)

    def close(self, reason: str | None = None) -> None:
        super().close(reason)
        self._taken.discard(self._number)

    def place(self, name: str, *, timeout_s: float, warn_after_s: float, plan: Plan | None) -> Hosting | None:
        host = super().place(name, timeout_s=timeout_s, warn_after_s=warn_after_s, plan=plan)
        if isinstance(plan, HostPlan):
            assert self._session is not None
            self._session._plan = BreakablePlan(plan, self._switch)
        return host


class RayMember(Member):
    """A rank in a worker process of Ray."""

    def __init__(self, rank: int, world_size: int, taken: set[int]) -> None:
        self._switch = Path(tempfile.gettempdir(), f"logsync-broken-{uuid.uuid4().hex}")
        super().__init__(rank, world_size, lambda _: TestedTransport(rank, world_size, self._switch, taken))
        self._home = Home(self.entries)

    def connect(self, log_frequency: float | None = 1, **options: Any) -> TrainingLog:
        return super().connect(log_frequency, **{"sinks": [Remote(self._home.address)], **options})

    def start(self, root: Root, timeout_s: float = DEADLINE_S) -> Transport:
        transport = self.make_transport(timeout_s)
        assert isinstance(transport, RayTransport)
        plan = BareRootPlan(self._home.address, self._home.add(root)) if self.rank == 0 else None
        transport.place("bare", timeout_s=timeout_s, warn_after_s=60.0, plan=plan)
        transport.start(None)
        return transport

    @contextlib.contextmanager
    def failing_root(self, log: TrainingLog) -> Iterator[None]:
        if log.rank == 0:
            self._switch.touch()
        yield
        self._switch.unlink(missing_ok=True)


class _RankProcess:
    def __init__(self, rank: int, world_size: int) -> None:
        self._rank = rank
        self._world_size = world_size
        self._taken: set[int] = set()

    def play(self, name: str) -> Any:
        return play(name, RayMember(self._rank, self._world_size, self._taken))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self._rank, self._world_size, *arguments)

    def call_as(self, rank: int, world_size: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Have this process be another rank than its own."""
        return function(rank, world_size, *arguments)

    def pid(self) -> int:
        return os.getpid()


RankProcess: Any = ray.remote(num_cpus=0)(_RankProcess)
"""A worker process that is one rank."""


class RayWorld:
    """Ranks as actors of Ray, each in a process of its own."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.ranks = [RankProcess.remote(rank, world_size) for rank in range(world_size)]

    def run(self, name: str) -> list[Any]:
        try:
            found: list[Any] = ray.get([rank.play.remote(name) for rank in self.ranks], timeout=DEADLINE_S)
        except Exception:
            self.close()  # ranks may be at different places now
            self.ranks = [RankProcess.remote(rank, self.world_size) for rank in range(self.world_size)]
            raise
        return found

    def close(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
