"""One round over gloo groups: what is on the wire, and what is not allowed to go wrong there."""

from __future__ import annotations

import contextlib
import struct
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from logsync.coordinator.errors import FrameTooLarge, LogsyncError, ProtocolError, printable
from logsync.coordinator.messages import MAX_FRAME
from logsync.workers.transports.base import Root
from logsync.workers.transports.nodes import Nodes, Stage, slots

__all__ = ["Broken", "Way", "Wire"]

# Every slot starts with a header, of a frame: status, length; of a reply: status, size of the next slots, length.
_FRAME_HEAD = struct.Struct("<Q8s")
_REPLY_HEAD = struct.Struct("<II8s")
_CULPRIT = struct.Struct("<I")  # before the text of a refusal
_HEAD = 16
_FIRST_SLOT = 1024  # frozen for ever: the hello must fit between any two versions

_FITS, _AGAIN, _REFUSED = 0, 1, 2
_PATIENCE = timedelta(days=30)
_SHRINK_AFTER = 8
_ROOT_MEMORY = 2**30  # bytes that the root spends on the largest slots of all ranks


class Broken(NamedTuple):
    """The group is lost: the first line of what gloo said, and how long the round had waited."""

    detail: str
    waited_s: float


class Way:
    """One stage of the way to the root: its group, and on its first rank what the others have brought.

    Args:
        group: None for a rank that is alone.
    """

    def __init__(self, stage: Stage, rank: int, group: Any, timeout_s: float) -> None:
        self._stage = stage
        self._leads = stage.members[0] == rank
        self._group = group
        self._timeout = timedelta(seconds=timeout_s)
        # The rank that torch.distributed.broadcast wants; it knows nothing of groups that new_group has not made.
        self._source = dist.get_global_rank(group, 0) if isinstance(group, dist.ProcessGroup) else None

    def resize(self, slot: int) -> memoryview:
        """Make room for frames of `slot` bytes, and return it."""
        each = slot * self._stage.width if self._leads else 0
        inbox = memoryview(bytearray(each * self._stage.places))
        self._inbox = _tensor(inbox)
        self._boxes = (
            list(self._inbox.view(self._stage.places, each).unbind()[: len(self._stage.members)]) if each else []
        )
        return inbox

    def gather(self, brought: Any, patience: timedelta) -> Any:
        """Bring this rank's part; return all that the stage's first rank has got."""
        if self._group is None:
            self._boxes[0].copy_(brought)
            return self._inbox
        options = dist.GatherOptions()
        options.rootRank = 0
        options.timeout = patience
        self._group.gather([self._boxes] if self._leads else [], [brought], options).wait()
        return self._inbox

    def broadcast(self, tensor: Any, patience: timedelta) -> None:
        """Give the first rank's bytes to the others."""
        if self._group is None:
            return
        if self._source is not None and patience == self._timeout:
            # Raises ValueError, before it sends anything, when the user has destroyed the process groups.
            with contextlib.suppress(ValueError):
                dist.broadcast(tensor, src=self._source, group=self._group)
                return
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = patience
        self._group.broadcast([tensor], options).wait()

    def drop(self) -> None:
        """Let go of the group: every reference has to go, or the others wait for their whole timeout."""
        group, self._group = self._group, None
        if self._source is not None:
            # Not registered any more where the user has destroyed the process groups first.
            with contextlib.suppress(Exception):
                dist.destroy_process_group(group)


class Wire:
    """The groups, their buffers, and one round over them; used by one thread.

    gloo aborts a process that receives more than it expects, so all ranks agree on the size of a slot before every
    operation: the last reply has set it.
    """

    def __init__(self, ways: list[Way], nodes: Nodes, timeout_s: float, root: Root | None) -> None:
        self._ways = ways
        self._slots = slots(nodes)
        self._timeout_s = timeout_s
        self._root = root
        self._limit = min(MAX_FRAME, max(2**16, _ROOT_MEMORY // (max(self._slots) + 1)))
        self._spare_rounds = 0
        self._resize(_FIRST_SLOT)

    def _resize(self, slot: int) -> None:
        self._slot = slot
        self._out = bytearray(slot)
        self._out_tensor = _tensor(self._out)
        self._reply = bytearray(slot)
        self._reply_tensor = _tensor(self._reply)
        for way in self._ways:
            self._inbox = way.resize(slot)  # the last one's is what the root reads

    def drop(self) -> None:
        """Let go of the groups, of all of them: the others' operations on any end with it."""
        for way in self._ways:
            way.drop()

    def exchange(self, frame: bytes, patient: bool) -> bytes | LogsyncError | Broken:  # noqa: FBT001 - a job's two halves
        """Return the reply, or the error that took its place."""
        started = time.monotonic()
        patience = _PATIENCE if patient else timedelta(seconds=self._timeout_s)
        try:
            while True:
                status, reply = self._round(frame, patience)
                if status == _FITS:
                    return reply
                if status == _REFUSED:
                    (culprit,) = _CULPRIT.unpack_from(reply)
                    return FrameTooLarge(printable(reply[_CULPRIT.size :].decode(errors="replace")), ranks=(culprit,))
        except Exception as error:  # noqa: BLE001 - gloo raises RuntimeError, torch several kinds
            # Only its text: the error's traceback holds references to the group.
            return Broken(printable(str(error).strip().split("\n")[0], 300), time.monotonic() - started)

    def _round(self, frame: bytes, patience: timedelta) -> tuple[int, bytes]:
        self._pack(frame)
        brought = self._out_tensor
        for way in self._ways:
            brought = way.gather(brought, patience)
        if self._root is not None:
            self._decide(self._root)
        self._broadcast(self._reply_tensor, patience)
        status, slot, length = self._reply_head()
        body = bytes(self._reply[_HEAD : _HEAD + length])
        if length > len(body):
            rest = self._rest if self._root is not None else bytearray(length - len(body))
            self._broadcast(_tensor(rest), patience)
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

    def _broadcast(self, tensor: Any, patience: timedelta) -> None:
        for way in reversed(self._ways):
            way.broadcast(tensor, patience)

    def _decide(self, root: Root) -> None:
        """On the root: turn what is in the inbox into a reply, or into a request for larger slots."""
        slot = self._slot
        starts = [at * slot for at in self._slots]
        heads = [_FRAME_HEAD.unpack_from(self._inbox, start) for start in starts]
        longest = max(length for length, _ in heads)
        if longest > self._limit:
            rank = next(rank for rank, (length, _) in enumerate(heads) if length == longest)
            text = (
                f"the frame of rank {rank} has {longest} bytes, {self._limit} are the most in a world of "
                f"{len(starts)}; record fewer metrics per log"
            )
            self._answer(_REFUSED, _CULPRIT.pack(rank) + text.encode(), slot)
        elif longest > slot - _HEAD:
            self._answer(_AGAIN, b"", _slot_for(longest))
        else:
            frames = [
                self._inbox[start + _HEAD : start + _HEAD + length]
                for start, (length, _) in zip(starts, heads, strict=True)
            ]
            reply = root(frames)
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


def _slot_for(length: int) -> int:
    """Return the size of slots that carry `length` bytes with a quarter to spare: a power of two."""
    return max(_FIRST_SLOT, 1 << (length + length // 4 + _HEAD - 1).bit_length())


def _tensor(buffer: bytearray | memoryview) -> Any:
    """Return a uint8 tensor that shares `buffer`'s memory."""
    return torch.frombuffer(buffer, dtype=torch.uint8) if len(buffer) else torch.empty(0, dtype=torch.uint8)
