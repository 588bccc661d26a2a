"""The coordinator's actor without Ray: on a thread of this process, with lines to it that break when a test says so."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Callable
from typing import Any

from logsync.workers import TrainingLog, connect
from logsync.workers.follower import FollowerLog
from logsync.workers.hosting import Hosting, HostPlan, Plan
from logsync.workers.transports.ray_actor import RayTransport, _RemoteHost
from logsync.workers.transports.ray_follow import FollowSession
from logsync.workers.transports.ray_member import LineBroken, RankSession
from logsync.workers.transports.ray_root import RootServer
from logsync.workers.transports.ray_wire import Ask, decode_ask

__all__ = ["Actor", "Cluster", "RigLine", "RigTransport", "side_by_side"]

_ANSWER_S = 20.0


class Actor:
    """One life of the actor."""

    def __init__(self, *, succeeds: bool = False) -> None:
        self.is_dead = False
        self.has_ended = threading.Event()  # by itself
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

        async def made() -> RootServer:
            return RootServer("job", succeeds=succeeds, stays=False, end=self.has_ended.set)

        self.server = self.run(made())

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_ANSWER_S)

    def ask(self, data: bytes) -> concurrent.futures.Future[bytes]:
        if self.is_dead:
            msg = "the actor is dead"
            raise LineBroken(msg)
        return asyncio.run_coroutine_threadsafe(self.server.ask(data), self._loop)

    def kill(self) -> None:
        self.is_dead = True
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self._loop):  # a killed process does not finish them
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        self._loop.stop()


class Cluster:
    """What keeps the actor alive."""

    def __init__(self) -> None:
        self.actor = Actor()

    def restart(self) -> None:
        self.actor.kill()
        self.actor = Actor(succeeds=True)

    def follower(self, label: str) -> FollowerLog:
        return FollowerLog(FollowSession(RigLine(self)), "t", label)


class RigLine:
    """A way to the cluster's actor; see `Line`.

    Attributes:
        is_cut: nothing of this process reaches the actor.
        loses: says of a question whether its answer is lost on the way back.
    """

    job = "job"
    node = "node"

    def __init__(self, cluster: Cluster) -> None:
        self.is_cut = False
        self.loses: Callable[[Ask], bool] = lambda _: False
        self.asked = 0
        self._cluster = cluster
        self.actor = cluster.actor

    def connect(self, *, succeeds: bool) -> None:  # noqa: ARG002 - the cluster knows
        self._check(self._cluster.actor)
        self.actor = self._cluster.actor

    def find(self) -> None:
        self.connect(succeeds=False)

    def ask(self, data: bytes) -> Callable[[float], bytes]:
        actor = self.actor
        self._check(actor)
        self.asked += 1
        future = actor.ask(data)

        def wait(seconds: float) -> bytes:
            until = time.monotonic() + seconds
            while True:
                self._check(actor)
                try:
                    answer = future.result(min(0.02, max(0.0, until - time.monotonic())))
                except concurrent.futures.TimeoutError:
                    if time.monotonic() >= until:
                        raise TimeoutError from None
                    continue
                if self.loses(decode_ask(data)):
                    msg = "the answer was lost"
                    raise LineBroken(msg)
                return answer

        return wait

    def place(self, session: str, plan: Plan) -> Callable[[float], object]:
        self._check(self.actor)
        self.actor.server.place(session, plan)
        return lambda _: None

    def replace(self) -> None:
        self._cluster.restart()

    def _check(self, actor: Actor) -> None:
        if self.is_cut or actor.is_dead:
            msg = "the network is cut" if self.is_cut else "the actor is dead"
            raise LineBroken(msg)


class RigTransport(RayTransport):
    """A rank's transport to a cluster of the rig."""

    def __init__(self, cluster: Cluster, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.line = RigLine(cluster)
        self.session: RankSession
        self._is_open = False

    def place(self, name: str, *, timeout_s: float, warn_after_s: float, plan: Plan | None) -> Hosting | None:  # noqa: ARG002 - there is one log
        self.session = self._session = RankSession(
            self.line, self.rank, self.world_size, timeout_s=timeout_s, warn_after_s=warn_after_s, plan=plan
        )
        return _RemoteHost(self.session, plan) if isinstance(plan, HostPlan) else None

    def log(self, log_frequency: int = 1, **options: Any) -> TrainingLog:
        """Connect by this transport."""
        return connect(log_frequency, transport=self, name="t", **{"sinks": [], "timeout": 20.0, **options})


def side_by_side(*ranks: Callable[[], object], within_s: float = 40.0) -> list[object]:
    """Run what each rank does on a thread of its own; return what they return, or the exceptions that they raise."""
    found: list[object] = ["still running"] * len(ranks)

    def run(rank: int) -> None:
        try:
            found[rank] = ranks[rank]()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(len(ranks))]
    until = time.monotonic() + within_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    return found
