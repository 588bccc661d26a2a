"""Frames to a Ray actor that holds the round: the coordinator outside the ranks' processes. The only file with ray."""

from __future__ import annotations

import dataclasses
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import ConfigError, LaunchError, Step, printable
from logsync.coordinator.host import Host
from logsync.coordinator.messages import LogEntry, State, Window, decode_decision
from logsync.coordinator.sinks.isolation import SinkSet
from logsync.workers.hosting import Hosting, HostPlan, Plan
from logsync.workers.transports.base import Position, Root
from logsync.workers.transports.ray_follow import FollowSession
from logsync.workers.transports.ray_member import LineBroken, RankSession
from logsync.workers.transports.ray_root import RootServer
from logsync.workers.transports.ray_wire import Leave, Loaded

__all__ = ["RayTransport", "follow", "train_context"]

_logger = logging.getLogger(__name__)

_NAMESPACE = "logsync"
_UNUSED_S = 60.0  # after which an actor ends that nobody has asked anything
_MOST_CALLS = 100_000  # that an actor answers at once: two of every rank


class RayTransport:
    """The processes of a Ray job; see `Transport` for the promises.

    The coordinator is an actor of its own, found by the log's name, and made by whoever comes first. It needs no CPU.
    When it is lost, Ray starts it again, and the ranks tell it where the run stood; see `RootServer` and `RankSession`.

    Args:
        rank, world_size: Ray Train's, if not given.
        node_id: where the actor shall run if it can; the creator's node if not given.
        detached: the actor outlives its job: it is found by the log's name alone, and a later job replaces it.
        name: tells this log's actor from others; the log's name if not given.

    Raises:
        LaunchError: this process belongs to no Ray job, or its rank is not known.
    """

    name = "ray"

    def __init__(
        self,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        node_id: str | None = None,
        detached: bool = False,
        name: str | None = None,
    ) -> None:
        _check_initialized()
        self.rank, self.world_size = _own_rank(rank, world_size)
        self._node_id = node_id
        self._detached = detached
        self._given_name = name
        self._session: RankSession | None = None
        self._is_open = False

    def place(self, name: str, *, timeout_s: float, warn_after_s: float, plan: Plan | None) -> Hosting | None:
        """Prepare for a log of that name, whose root is made by rank 0's plan; return rank 0's way to it."""
        line = _Line(self._given_name or name, self._node_id, detached=self._detached)
        self._session = RankSession(
            line, self.rank, self.world_size, timeout_s=timeout_s, warn_after_s=warn_after_s, plan=plan
        )
        return _RemoteHost(self._session, plan) if isinstance(plan, HostPlan) else None

    def start(self, root: Root | None, position: Position | None = None) -> None:
        """Take the rank at the actor."""
        if self._session is None or root is not None:
            msg = "the root of a RayTransport runs in an actor, which place() prepares"
            raise RuntimeError(msg)
        if position is not None:
            self._session.position = position
        self._is_open = True
        try:
            self._session.start()
        except BaseException:
            self._is_open = False
            raise

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        """Make one call of the actor, and wait for its answer."""
        if self._session is None or not self._is_open:
            msg = "exchange() before start(), or after close()"
            raise RuntimeError(msg)
        return self._session.exchange(frame, patient=patient)

    def close(self, reason: str | None = None) -> None:
        """Tell the actor that this rank leaves."""
        if self._session is not None and self._is_open:
            self._is_open = False
            self._session.close(reason)


def follow(name: str) -> FollowSession:
    """Return a follower's talk with the actor of the log of that name.

    Raises:
        LaunchError: this process belongs to no Ray job.
    """
    _check_initialized()
    return FollowSession(_Line(name, None, detached=False))


def _check_initialized() -> None:
    if not ray.is_initialized():
        msg = "transport='ray' needs a Ray job: call ray.init() first, or connect() inside a Ray task or actor"
        raise LaunchError(msg)


class LogsyncCoordinator:
    """The process of the coordinator; `RootServer` is what it does."""

    def __init__(self, job: str, *, succeeds: bool, stays: bool) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it uses what Ray itself deprecates
            again = bool(ray.get_runtime_context().was_current_actor_reconstructed)

        def end() -> None:
            ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

        self._server = server = RootServer(job, succeeds=succeeds or again, stays=stays, end=end)
        if not stays:
            # The server has a clock from the first question on, which may never come.
            unused = threading.Timer(_UNUSED_S, lambda: None if server.was_asked else end())
            unused.daemon = True
            unused.start()

    async def ask(self, data: bytes) -> bytes:
        return await self._server.ask(data)

    async def place(self, session: str, plan: Plan) -> None:
        self._server.place(session, plan)

    async def node(self) -> str:
        """Return the node that it runs on."""
        return str(ray.get_runtime_context().get_node_id())


class _Line:
    """The way to the actor of one name; see `Line`."""

    def __init__(self, name: str, node_id: str | None, *, detached: bool) -> None:
        context = ray.get_runtime_context()
        self.job = str(context.get_job_id())
        self.node = str(context.get_node_id())
        # By its job, where it does not outlive that: two jobs on one cluster never meet.
        self._name = name if detached else f"{self.job}/{name}"
        self._node_id = node_id
        self._detached = detached
        self._actor: Any = None

    def connect(self, *, succeeds: bool) -> None:
        if not ray.is_initialized():
            msg = "ray.shutdown() was called"
            raise LineBroken(msg)
        # An actor without CPUs ignores a soft wish for another node than its creator's (ray 2.60). A hard one is not
        # kept for long: when that node is lost, the next actor is made anywhere.
        where, self._node_id = self._node_id, None
        try:
            self._actor = (
                ray.remote(LogsyncCoordinator)
                .options(
                    name=self._name,
                    namespace=_NAMESPACE,
                    # Otherwise it would end with the process that happened to come first. It ends by itself.
                    lifetime="detached",
                    get_if_exists=True,
                    max_restarts=-1,
                    max_task_retries=0,
                    num_cpus=0,
                    max_concurrency=_MOST_CALLS,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(where or self.node, soft=where is None),
                )
                .remote(self.job, succeeds=succeeds, stays=self._detached)
            )
        except (ray.exceptions.RayError, ValueError, RuntimeError) as error:
            raise LineBroken(str(error)) from error

    def find(self) -> None:
        """Find the actor if it is there."""
        if not ray.is_initialized():
            msg = "ray.shutdown() was called"
            raise LineBroken(msg)
        # The second is the name of one that outlives its job.
        self._actor = _named(self._name) or _named(self._name.removeprefix(f"{self.job}/"))
        if self._actor is None:
            msg = "there is none yet"
            raise LineBroken(msg)

    def ask(self, data: bytes) -> Callable[[float], bytes]:
        return self._sent(lambda: self._actor.ask.remote(data))

    def place(self, session: str, plan: Plan) -> Callable[[float], object]:
        try:
            return self._sent(lambda: self._actor.place.remote(session, plan))
        except TypeError as error:
            msg = f"a sink cannot be sent to the coordinator's actor: {printable(str(error), 300)}"
            raise ConfigError(msg) from error

    def _sent(self, send: Callable[[], Any]) -> Callable[[float], Any]:
        if not ray.is_initialized():  # a call would start a cluster of its own
            msg = "ray.shutdown() was called"
            raise LineBroken(msg)
        try:
            reference = send()
        except ray.exceptions.RayError as error:
            raise LineBroken(str(error)) from error

        def wait(seconds: float) -> Any:
            try:
                return ray.get(reference, timeout=seconds)
            except ray.exceptions.GetTimeoutError:
                raise TimeoutError from None
            except ray.exceptions.RayTaskError as error:
                # Its code catches everything, so this is an argument that could not be unpacked there.
                msg = f"a sink could not be made in the coordinator's actor: {printable(str(error.cause), 300)}"
                raise ConfigError(msg) from error
            except ray.exceptions.RayError as error:
                msg = f"{type(error).__name__}: {error}"
                raise LineBroken(msg) from error

        return wait

    def replace(self) -> None:
        ray.kill(self._actor, no_restart=True)


def _named(name: str) -> Any:
    """Return the actor of that name, None if there is none."""
    try:
        return ray.get_actor(name, namespace=_NAMESPACE)
    except ValueError:
        return None
    except (ray.exceptions.RayError, RuntimeError) as error:
        raise LineBroken(str(error)) from error


class _RemoteHost:
    """Rank 0's way to its host in the actor; see `Hosting`."""

    handle = None

    def __init__(self, session: RankSession, plan: HostPlan) -> None:
        self._session = session
        self._plan = plan
        self._notes: dict[str, float] = {}
        self._hyperparams: dict[str, object] = {}
        self._released_turn = 0  # the turn after which everything was handed over
        self._here: Host | None = None  # after the group was lost

    @property
    def entries_made(self) -> int:
        return self._session.held.entries_made if self._here is None else self._here.entries_made

    @property
    def holds_entry(self) -> bool:
        return self._seq >= 0 if self._here is None else self._here.holds_entry

    @property
    def _seq(self) -> int:
        session = self._session
        return session.entry_seq if session.held.turn > self._released_turn else -1

    def loaded(self, state: State, last_entry: LogEntry | None, call: int) -> None:
        self._session.loaded = Loaded(state, last_entry, call)

    def annotate(self, values: Mapping[str, float]) -> None:
        if self._here is not None:
            self._here.annotate(values)
            return
        if self._seq < 0:
            _logger.warning(
                "annotate(%s) came when no entry was open, and was dropped; call it right after log_ready() returned "
                "True or after write()",
                ", ".join(values),
            )
            return
        entry = decode_decision(self._session.held.reply).entry
        taken = [name for name in values if entry is not None and name in entry.metrics]
        if taken:
            msg = f"annotate() would overwrite the merged metric {taken[0]!r} of entry {self._seq}; use another name"
            raise ValueError(msg)
        self._notes.update(values)

    def log_hyperparams(self, values: Mapping[str, object]) -> None:
        if self._here is not None:
            self._here.log_hyperparams(values)
            return
        try:
            encoded = msgspec.json.encode({**self._hyperparams, **values}, enc_hook=str)
        except (OverflowError, TypeError, ValueError, RecursionError) as error:
            msg = f"log_hyperparams() cannot send these values to the coordinator's actor: {printable(str(error), 200)}"
            raise TypeError(msg) from error
        self._hyperparams.update(values)
        self._plan = dataclasses.replace(self._plan, hyperparams=encoded)
        self._session.keep_hyperparams(self._plan, encoded)

    def release(self) -> None:
        if self._here is not None:
            self._here.release()
        elif self._seq >= 0:
            notes, self._notes = self._notes, {}
            self._session.release(self._seq, notes)
            self._released_turn = self._session.held.turn

    def go_on_here(self, coordinator: Callable[[], Coordinator], rank: int, number: int) -> tuple[Root, bytes | None]:  # noqa: ARG002 - the actor has not said what it decided
        self._here = self._plan.resume(coordinator(), SinkSet(self._plan.sinks), self._session.recovered)
        return self._here.decide_alone, None

    def leave(self, rank: int, take: Callable[[int], Window], step: Step, call: int) -> None:
        if self._here is not None:
            self._here.leave(rank, take, step, call)
            return
        self.release()
        session = self._session.session
        self._session.last_words = lambda made: Leave(session, take(made), call, step)

    def close(self) -> None:
        if self._here is not None:
            self._here.close()


def _own_rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if rank is None or world_size is None:
        found = train_context()
        if found is not None:
            return found
        msg = "transport='ray' needs rank= and world_size=, unless it is called inside a Ray Train worker"
        raise LaunchError(msg)
    for name, value in (("rank", rank), ("world_size", world_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            msg = f"{name} must be an int, given {value!r} ({type(value).__name__})"
            raise TypeError(msg)
    if not 0 <= rank < world_size:
        msg = f"rank={rank} does not name a rank of a world of world_size={world_size}"
        raise LaunchError(msg)
    return rank, world_size


def train_context() -> tuple[int, int] | None:
    """Return rank and world size of the Ray Train worker that this process is, None if it is none."""
    train = sys.modules.get("ray.train")  # a worker of Ray Train has it
    if train is None:
        return None
    try:
        context = train.get_context()
        found = context.get_world_rank(), context.get_world_size()
    except (RuntimeError, AttributeError):
        return None
    return found if None not in found else None
