"""Frames over torch.distributed: a gather to the root and a broadcast from it, on a gloo group of our own."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import queue
import socket
import struct
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from logsync.coordinator.errors import (
    CollectiveSetupError,
    FrameTooLarge,
    LogsyncError,
    PeerLost,
    ProtocolError,
    TransportError,
    printable,
)
from logsync.coordinator.messages import MAX_FRAME
from logsync.workers.transports.base import Position, Root
from logsync.workers.transports.watch import Watch

__all__ = ["CollectiveTransport"]

# Every slot starts with a header, of a frame: status, length; of a reply: status, size of the next slots, length.
_FRAME_HEAD = struct.Struct("<Q8s")
_REPLY_HEAD = struct.Struct("<II8s")
_CULPRIT = struct.Struct("<I")  # before the text of a refusal
_HEAD = 16
_FIRST_SLOT = 1024  # frozen for ever: the hello must fit between any two versions

_FITS, _AGAIN, _REFUSED = 0, 1, 2
_PATIENCE = timedelta(days=30)
_SHRINK_AFTER = 8
_SETUP_MARGIN_S = 2.0
_ROOT_MEMORY = 2**30  # bytes that the root spends on the largest slots of all ranks


class CollectiveTransport:
    """The ranks of a torch.distributed process group; see `Transport` for the promises.

    The group that carries frames is gloo's, made by `new_group` for this log alone: on the training's group a frame
    could be matched with somebody's gradients. One daemon thread makes all its calls, while the caller waits in
    Python, so that signal handlers run and a stuck collective does not hold up the exit.

    Args:
        timeout_s: how long a round waits for the slowest rank.
        warn_after_s: how often the wait is told to the log, with the ranks that are missing.
        process_group: its ranks take part; all ranks if None.
    """

    name = "collective"

    def __init__(self, *, timeout_s: float, warn_after_s: float = 60.0, process_group: Any = None) -> None:
        self.rank = dist.get_rank(process_group)
        self.world_size = dist.get_world_size(process_group)
        if self.rank < 0:
            msg = "this process is not in the process_group; only its members call connect()"
            raise CollectiveSetupError(msg)
        self._timeout_s = timeout_s
        # Named by their ranks, so that no reference to the user's group is kept.
        self._members = None if process_group is None else dist.get_process_group_ranks(process_group)
        self._jobs: queue.SimpleQueue[tuple[bytes, bool] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[bytes | LogsyncError | _Broken | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lost: TransportError | None = None  # the thread has ended: nobody would answer
        self._watch = Watch(
            _default_store(), self.rank, self.world_size, timeout_s=timeout_s, warn_after_s=warn_after_s
        )

    def start(self, root: Root | None, position: Position | None = None) -> None:
        """Build the group; collective over its ranks."""
        if position is not None:
            self._watch.position = position
        self._thread = threading.Thread(target=self._serve, args=(root,), name="logsync", daemon=True)
        self._thread.start()
        try:
            # gloo tries an address that answers nothing several times, each for as long as the timeout.
            self._outcome(patient=False, within_s=self._timeout_s + _SETUP_MARGIN_S)
        except CollectiveSetupError:
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
                    raise _setup_error(error, self._timeout_s) from None
                try:
                    pause = min(self._watch.waiting(waited_s, patient=patient), max(0.05, within_s - waited_s))
                except TransportError as error:
                    self._lost = error  # the thread is stuck in the collective
                    raise
                continue
            if isinstance(outcome, _Broken):
                # A patient wait has no timeout of its own: what ended it was a broken connection.
                self._lost = self._watch.explain(outcome.detail, 0.0 if patient else outcome.waited_s)
                raise self._lost
            if isinstance(outcome, LogsyncError):
                raise outcome
            return outcome

    # -- the thread --------------------------------------------------------------------------------------------

    def _serve(self, root: Root | None) -> None:
        try:
            wire = _Wire(self._new_group(), self.rank, self.world_size, self._timeout_s, root)
        except Exception as error:  # noqa: BLE001 - whatever torch raises goes to the caller, who is waiting
            self._outcomes.put(_setup_error(error, self._timeout_s))
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
            if isinstance(outcome, _Broken):
                # Before the caller hears of it: dropping the group frees the other ranks at once.
                wire.drop()
                self._outcomes.put(outcome)
                return
            self._outcomes.put(outcome)
            del job, outcome
        wire.drop()

    def _new_group(self) -> Any:
        timeout = timedelta(seconds=self._timeout_s)
        if self._members is None:
            return dist.new_group(timeout=timeout, backend="gloo", group_desc="logsync")
        return dist.new_group(
            self._members, timeout=timeout, backend="gloo", use_local_synchronization=True, group_desc="logsync"
        )


class _Broken(NamedTuple):
    """The group is lost: the first line of what gloo said, and how long the round had waited."""

    detail: str
    waited_s: float


class _Wire:
    """The group, its buffers, and one round over them; used by one thread.

    gloo aborts a process that receives more than it expects, so all ranks agree on the size of a slot before every
    operation: the last reply has set it.
    """

    def __init__(self, group: Any, rank: int, world_size: int, timeout_s: float, root: Root | None) -> None:
        self._group = group
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._root = root
        self._root_rank = dist.get_global_rank(group, 0)
        self._limit = min(MAX_FRAME, max(2**16, _ROOT_MEMORY // world_size))
        self._spare_rounds = 0
        self._resize(_FIRST_SLOT)

    def _resize(self, slot: int) -> None:
        self._slot = slot
        self._out = bytearray(slot)
        self._out_tensor = _tensor(self._out)
        self._reply = bytearray(slot)
        self._reply_tensor = _tensor(self._reply)
        self._inbox = memoryview(bytearray(slot * self._world_size if self._rank == 0 else 0))
        self._inbox_tensors = (
            list(_tensor(self._inbox).view(self._world_size, slot).unbind()) if self._rank == 0 else []
        )

    def drop(self) -> None:
        """Let go of the group: every reference has to go, or the others wait for their whole timeout."""
        group, self._group = self._group, None
        # Not registered any more where the user has destroyed the process groups first.
        with contextlib.suppress(Exception):
            dist.destroy_process_group(group)

    def exchange(self, frame: bytes, patient: bool) -> bytes | LogsyncError | _Broken:  # noqa: FBT001 - a job's two halves
        """Return the reply, or the error that took its place."""
        started = time.monotonic()
        patience = _PATIENCE if patient else timedelta(seconds=self._timeout_s)
        try:
            while True:
                status, reply = self._round(frame, patience, patient=patient)
                if status == _FITS:
                    return reply
                if status == _REFUSED:
                    (culprit,) = _CULPRIT.unpack_from(reply)
                    return FrameTooLarge(printable(reply[_CULPRIT.size :].decode(errors="replace")), ranks=(culprit,))
        except Exception as error:  # noqa: BLE001 - gloo raises RuntimeError, torch several kinds
            # Only its text: the error's traceback holds references to the group.
            return _Broken(printable(str(error).strip().split("\n")[0], 300), time.monotonic() - started)

    def _round(self, frame: bytes, patience: timedelta, *, patient: bool) -> tuple[int, bytes]:
        self._pack(frame)
        options = dist.GatherOptions()
        options.rootRank = 0
        options.timeout = patience
        gathered = [self._inbox_tensors] if self._rank == 0 else []
        self._group.gather(gathered, [self._out_tensor], options).wait()
        if self._rank == 0:
            self._decide()
        self._broadcast(self._reply_tensor, patience, patient=patient)
        status, slot, length = self._reply_head()
        body = bytes(self._reply[_HEAD : _HEAD + length])
        if length > len(body):
            rest = self._rest if self._rank == 0 else bytearray(length - len(body))
            self._broadcast(_tensor(rest), patience, patient=patient)
            body += rest
        if slot != self._slot:
            self._resize(slot)
        return status, body

    def _reply_head(self) -> tuple[int, int, int]:
        """Return a reply's status, the size of the next slots, and its length.

        Raises:
            ProtocolError: one of them is what no root sends. Nothing is allocated for it; the group is lost, since
                this rank cannot know what size the others take next.
        """
        status, slot, size = _REPLY_HEAD.unpack_from(self._reply)
        length = int.from_bytes(size, "little")
        shortest = _CULPRIT.size if status == _REFUSED else 0
        if (
            status not in (_FITS, _AGAIN, _REFUSED)
            or not _FIRST_SLOT <= slot <= _slot_for(self._limit)
            or slot & (slot - 1)
            or not shortest <= length <= MAX_FRAME
        ):
            msg = f"the header of the reply is corrupt: status {status}, next slot {slot}, length {length}"
            raise ProtocolError(msg)
        return status, slot, length

    def _pack(self, frame: bytes) -> None:
        if len(frame) <= self._slot - _HEAD:
            _FRAME_HEAD.pack_into(self._out, 0, len(frame), b"fits")
            self._out[_HEAD : _HEAD + len(frame)] = frame
        else:  # only its length goes, and the root asks for it again
            _FRAME_HEAD.pack_into(self._out, 0, len(frame), b"outgrown")

    def _decide(self) -> None:
        """On the root: turn what is in the inbox into a reply, or into a request for larger slots."""
        slot = self._slot
        heads = [_FRAME_HEAD.unpack_from(self._inbox, rank * slot) for rank in range(self._world_size)]
        longest = max(length for length, _ in heads)
        if longest > self._limit:
            rank = next(rank for rank, (length, _) in enumerate(heads) if length == longest)
            text = (
                f"the frame of rank {rank} has {longest} bytes, {self._limit} are the most in a world of "
                f"{self._world_size}; record fewer metrics per log"
            )
            self._answer(_REFUSED, _CULPRIT.pack(rank) + text.encode(), slot)
        elif longest > slot - _HEAD:
            self._answer(_AGAIN, b"", _slot_for(longest))
        elif self._root is not None:
            frames = [
                self._inbox[rank * slot + _HEAD : rank * slot + _HEAD + length]
                for rank, (length, _) in enumerate(heads)
            ]
            reply = self._root(frames)
            self._answer(_FITS, reply, self._next_slot(max(longest, len(reply))))

    def _next_slot(self, longest: int) -> int:
        """Grow at once, shrink after some rounds in which a quarter would have done."""
        wanted = min(_slot_for(longest), _slot_for(self._limit))
        if wanted > self._slot:
            self._spare_rounds = 0
            return wanted
        self._spare_rounds = self._spare_rounds + 1 if wanted * 4 <= self._slot else 0
        if self._spare_rounds < _SHRINK_AFTER:
            return self._slot
        self._spare_rounds = 0
        return wanted

    def _answer(self, status: int, reply: bytes, next_slot: int) -> None:
        head = self._slot - _HEAD
        _REPLY_HEAD.pack_into(self._reply, 0, status, next_slot, len(reply).to_bytes(8, "little"))
        self._reply[_HEAD : _HEAD + min(len(reply), head)] = reply[:head]
        self._rest = bytearray(reply[head:])

    def _broadcast(self, tensor: Any, patience: timedelta, *, patient: bool) -> None:
        if not patient:
            # Raises ValueError, before it sends anything, when the user has destroyed the process groups.
            with contextlib.suppress(ValueError):
                dist.broadcast(tensor, src=self._root_rank, group=self._group)
                return
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = patience
        self._group.broadcast([tensor], options).wait()


def _slot_for(length: int) -> int:
    """Return the size of slots that carry `length` bytes with a quarter to spare: a power of two."""
    return max(_FIRST_SLOT, 1 << (length + length // 4 + _HEAD - 1).bit_length())


def _tensor(buffer: bytearray | memoryview) -> Any:
    """Return a uint8 tensor that shares `buffer`'s memory."""
    return torch.frombuffer(buffer, dtype=torch.uint8) if len(buffer) else torch.empty(0, dtype=torch.uint8)


def _default_store() -> Any:
    """Return the job's store, None where torch does not show one."""
    try:
        return dist.distributed_c10d._get_default_store()  # noqa: SLF001 - there is no public way to it
    except (AttributeError, ValueError, RuntimeError):
        return None


_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_STALE = (
    ". torchrun has restarted this job: its ranks find the addresses of their dead predecessors in the store that it "
    f"shares with them (pytorch issue 135712), unless it is started with {_OWN_STORE}=1"
)


def _setup_error(error: Exception, timeout_s: float) -> CollectiveSetupError:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = "no address"
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in {"", "0"}
    stale = "" if not restarted or os.environ.get(_OWN_STORE) == "1" else _STALE
    where = f"interface {interface} (GLOO_SOCKET_IFNAME)" if interface else f"host name {host}, which is {address}"
    msg = (
        f"could not build the gloo group within {timeout_s:g} s, using {where}: "
        f"{printable(str(error).strip(), 400)}. Every rank must call connect(), in the same order; if the address is "
        "not one that the other nodes reach, set GLOO_SOCKET_IFNAME to the interface that is"
        f"{stale}"
    )
    return CollectiveSetupError(msg)
