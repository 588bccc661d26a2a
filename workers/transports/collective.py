"""Frames over torch.distributed: gathered to the root and a reply broadcast from it, on gloo groups of our own."""

from __future__ import annotations

import copy
import hashlib
import math
import queue
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from logsync.coordinator.errors import CollectiveSetupError, ConfigMismatch, LogsyncError, PeerLost, TransportError
from logsync.workers.transports.base import Position, Root
from logsync.workers.transports.gloo import Broken, Way, Wire
from logsync.workers.transports.nodes import Nodes, Stage, agree, flat, node_name, stages
from logsync.workers.transports.setup_error import setup_error
from logsync.workers.transports.watch import Watch

__all__ = ["CollectiveTransport"]

_SETUP_MARGIN_S = 2.0


class CollectiveTransport:
    """The ranks of a torch.distributed process group; see `Transport` for the promises.

    The groups that carry frames are gloo's, made for this log alone: on the training's group a frame could be matched
    with somebody's gradients. One daemon thread makes all their calls, while the caller waits in Python, so that signal
    handlers run and a stuck collective does not hold up the exit.

    Args:
        timeout_s: how long a round waits for the slowest rank.
        warn_after_s: how often the wait is told to the log, with the ranks that are missing.
        process_group: its ranks take part; all ranks if None.
        shape: "flat" has one group of all ranks. With "tree" frames go through the first rank of each node, over a
            group per node and one of the nodes' first ranks. "auto" is a tree from `nodes.TREE_FROM` ranks on, where
            they are on several nodes.
    """

    name = "collective"

    def __init__(
        self, *, timeout_s: float, warn_after_s: float = 60.0, process_group: Any = None, shape: str = "auto"
    ) -> None:
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        if self.rank < 0:
            msg = "this process is not in the process_group; only its members call connect()"
            raise CollectiveSetupError(msg)
        self._timeout_s = timeout_s
        self._shape = shape
        # Named by their ranks, so that no reference to the user's group is kept.
        self._members = None if process_group is None else dist.get_process_group_ranks(process_group)
        self._jobs: queue.SimpleQueue[tuple[bytes, bool] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[bytes | LogsyncError | Broken | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lost: TransportError | None = None  # the thread has ended: nobody would answer
        self._watch = Watch(
            _default_store(), self.rank, self.world_size, timeout_s=timeout_s, warn_after_s=warn_after_s
        )

    def start(self, root: Root | None, position: Position | None = None) -> None:
        """Build the groups; collective over the ranks."""
        if position is not None:
            self._watch.position = position
        self._thread = threading.Thread(target=self._serve, args=(root,), name="logsync", daemon=True)
        self._thread.start()
        try:
            # gloo tries an address that answers nothing several times, each for as long as the timeout.
            self._outcome(patient=False, within_s=self._timeout_s + _SETUP_MARGIN_S)
        except (CollectiveSetupError, ConfigMismatch):
            self._thread = None  # it has ended, or hangs in gloo and ends by itself
            raise

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        """Have the thread make a round, and wait for it."""
        if self._lost is not None:
            raise copy.copy(self._lost)
        if self._thread is None:
            msg = "exchange() before start(), or after close()"
            raise RuntimeError(msg)
        self._watch.round_begins()
        self._jobs.put((frame, patient))
        reply = self._outcome(patient=patient)
        if reply is None:
            msg = "the transport answered without a reply"
            raise RuntimeError(msg)
        self._watch.round_done(reply)
        return reply

    def close(self, reason: str | None = None) -> None:
        """Stop the thread and let go of the group, if it is not stuck in a collective."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if reason is not None:
            self._watch.leave(reason)
        self._jobs.put(None)
        # Wakes an exchange that waits on another thread; it looks up at intervals that may be as long as a minute.
        self._outcomes.put(PeerLost("the log was closed while a round of it was open", ranks=(self.rank,)))
        # A live group at the interpreter's end can abort the process, so the thread gets time to drop it.
        thread.join(timeout=2.0)
        self._watch.end()

    def _outcome(self, *, patient: bool, within_s: float = math.inf) -> bytes | None:
        started = time.monotonic()
        pause = self._watch.first_pause_s
        while True:
            try:
                # SimpleQueue.get waits in a way that lets signal handlers run.
                outcome = self._outcomes.get(timeout=pause)
            except queue.Empty:
                waited_s = time.monotonic() - started
                if waited_s >= within_s:
                    error = TimeoutError("no end of it, which is so where an address of another rank answers nothing")
                    raise setup_error(error, self._timeout_s) from None
                try:
                    pause = min(self._watch.waiting(waited_s, patient=patient), max(0.05, within_s - waited_s))
                except TransportError as error:
                    self._lost = error  # the thread is stuck in the collective
                    raise
                continue
            if isinstance(outcome, Broken):
                # A patient wait has no timeout of its own: what ended it was a broken connection.
                self._lost = self._watch.explain(outcome.detail, 0.0 if patient else outcome.waited_s)
                raise self._lost
            if isinstance(outcome, LogsyncError):
                raise outcome
            return outcome

    # -- the thread --------------------------------------------------------------------------------------------

    def _serve(self, root: Root | None) -> None:
        try:
            wire = Wire(*self._ways(), self._timeout_s, root)
        except ConfigMismatch as error:
            self._outcomes.put(error)
            return
        except Exception as error:  # noqa: BLE001 - whatever torch raises goes to the caller, who is waiting
            self._outcomes.put(setup_error(error, self._timeout_s))
            return
        self._outcomes.put(None)
        while True:
            try:
                job = self._jobs.get(timeout=self._watch.beat_s)
            except queue.Empty:
                self._watch.idle()
                continue
            if job is None:
                break
            outcome = wire.exchange(*job)
            if isinstance(outcome, Broken):
                # Before the caller hears of it: dropping the group frees the other ranks at once.
                wire.drop()
                self._outcomes.put(outcome)
                return
            self._outcomes.put(outcome)
            del job, outcome
        wire.drop()

    def _ways(self) -> tuple[list[Way], Nodes]:
        """Agree on the nodes, and build this rank's groups."""
        store, nodes = _default_store(), flat(self.world_size)
        prefix = _unique_prefix(self._members)
        if store is not None and self.world_size > 1:
            nodes = agree(
                store,
                prefix,
                self.rank,
                self.world_size,
                node=node_name(dist.get_rank()),
                shape=self._shape,
                timeout_s=self._timeout_s,
            )
        ways: list[Way] = []
        try:
            for stage in stages(nodes, self.rank):
                group = self._new_group(store, prefix, stage)
                ways.append(Way(stage, self.rank, group, self._timeout_s))
        except BaseException:
            for way in ways:
                way.drop()
            raise
        return ways, nodes

    def _new_group(self, store: Any, prefix: str, stage: Stage) -> Any:
        timeout = timedelta(seconds=self._timeout_s)
        if self._members is None and len(stage.members) == self.world_size:
            return dist.new_group(timeout=timeout, backend="gloo", group_desc=stage.name)
        if len(stage.members) == 1:
            return None
        # Not by new_group: one of some ranks is either made by all of the job, or, with use_local_synchronization,
        # named after how many groups this rank is in, and ranks that are in different numbers never meet.
        keys = dist.PrefixStore(  # type: ignore[attr-defined]  # torch does not list it
            f"{prefix}/{stage.name} {stage.members[0]}", store
        )
        return dist.ProcessGroupGloo(keys, stage.members.index(self.rank), len(stage.members), timeout)


_connected: dict[str, int] = {}


def _unique_prefix(members: list[int] | None) -> str:
    """Return where in the job's store the ranks of a log meet: their numbers, and how often they have done so."""
    ranks = "all" if members is None else hashlib.sha256(repr(members).encode()).hexdigest()[:16]
    _connected[ranks] = _connected.get(ranks, 0) + 1
    return f"logsync/connect/{ranks}/{_connected[ranks]}"


def _default_store() -> Any:
    """Return the job's store, None where torch does not show one."""
    try:
        return dist.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public way to it
    except (AttributeError, ValueError, RuntimeError):
        return None
