"""Notes that ranks leave for each other in the job's store, to find out who is missing when something goes wrong.

Nothing here is on the path of a healthy round. Store clients have no deadlines of their own (a get with a timeout of
5 s was seen to take over 60 s under a partition), so every access runs on a thread that is given up after a while.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

__all__ = ["Note", "Notes", "Verdict", "pid_space", "within"]

_logger = logging.getLogger(__name__)

T = TypeVar("T")
_Text = Annotated[str, Meta(max_length=2000)]
_Int = Annotated[int, Meta(ge=-(2**63) + 1, le=2**63 - 1)]
_Step = _Int | Annotated[float, Meta(ge=-1.7976931348623157e308)] | None


class Note(msgspec.Struct, frozen=True, array_like=True):
    """Where one rank stands.

    Attributes:
        doing: "idle" between rounds, "waiting" in `round`, "failed" in `round`, or "left" by an exception.
        beat: grows while the process lives.
        call, step: of the rank's last call.
        host, pid, pid_space: its process; a pid means something to ranks with the same host and pid_space only.
        dead: ranks on its own host whose processes are gone.
        text: the first line of the exception it left by.
    """

    doing: Literal["idle", "waiting", "failed", "left"]
    round: _Int
    beat: _Int
    call: _Int
    step: _Step
    host: _Text
    pid: _Int
    pid_space: _Text
    dead: Annotated[tuple[_Int, ...], Meta(max_length=4096)] = ()
    text: _Text = ""


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What the root found out about a failed round: the kind of error for all ranks, and its text."""

    round: _Int
    kind: Literal["timeout", "lost", "failed"]
    ranks: Annotated[tuple[_Int, ...], Meta(max_length=4096)]
    text: _Text


class Notes:
    """The notes of one log, in the job's store.

    Args:
        store: the job's; cloned twice, since one client serialises what threads do with it, and never used itself.
        prefix: tells this log's notes from those of others and of earlier attempts.
    """

    def __init__(self, store: Any, prefix: str, rank: int, world_size: int) -> None:
        before = _connections()
        self._writer = store.clone()
        self._reader = store.clone()
        self._connections = _twins(dict(_connections().items() - before.items()))
        self._prefix = f"logsync/{prefix}"
        self._rank = rank
        self._world_size = world_size

    def leave(self, note: Note) -> None:
        """Replace this rank's note."""
        self._writer.set(f"{self._prefix}/{self._rank}", msgspec.json.encode(note).decode())

    def read(self) -> dict[int, Note]:
        """Return all ranks' notes, without those that are missing or cannot be read."""
        keys = {f"{self._prefix}/{rank}": rank for rank in range(self._world_size)}
        there = list(keys) if self._reader.check(list(keys)) else [key for key in keys if self._reader.check([key])]
        found = {}
        for key, data in zip(there, self._reader.multi_get(there) if there else [], strict=True):
            note = _decoded(data, Note)
            if note is not None:
                found[keys[key]] = note
        return found

    def give_up(self) -> None:
        """Note that the store did not answer: a thread may be waiting for it until this process ends."""
        if (os.getpid(), self) not in _given_up:
            _given_up.append((os.getpid(), self))

    def cut(self) -> None:
        """Break the clients' connections, so that whoever waits for an answer gets an error."""
        there = _connections()
        for descriptor, connection in self._connections.items():
            if there.get(descriptor) == connection:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as end:
                    end.shutdown(socket.SHUT_RDWR)

    def judge(self, verdict: Verdict) -> None:
        """Leave the root's verdict for the others."""
        self._writer.set(f"{self._prefix}/verdict", msgspec.json.encode(verdict).decode())

    def verdict(self) -> Verdict | None:
        """Return the root's verdict, if it has left one."""
        key = f"{self._prefix}/verdict"
        return _decoded(self._reader.get(key), Verdict) if self._reader.check([key]) else None


def _decoded(data: bytes, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


_given_up: list[tuple[int, Notes]] = []
_waiting: list[threading.Thread] = []


@atexit.register
def _end_what_waits() -> None:
    # A thread that comes back from the store's C++ while the interpreter is being torn down aborts the process.
    here = [notes for pid, notes in _given_up if pid == os.getpid()]
    for notes in here:
        notes.cut()
    for thread in _waiting if here else ():
        thread.join(1.0)


def _connections() -> dict[int, tuple[str, str]]:
    """Return the descriptors of this process's TCP connections, with their inodes and the addresses at the other end.

    Nothing is found where there is no /proc. No socket object is made of them: that can change their mode.
    """
    ends = {}
    found = {}
    with contextlib.suppress(OSError):
        for table in ("tcp", "tcp6"):
            with contextlib.suppress(OSError):
                for line in Path("/proc/self/net", table).read_text().splitlines()[1:]:
                    fields = line.split()
                    ends[fields[9]] = fields[2]
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                kind, _, inode = str(entry.readlink()).partition(":")
                if kind == "socket" and inode[1:-1] in ends:
                    found[int(entry.name)] = (inode[1:-1], ends[inode[1:-1]])
    return found


def _twins(connections: dict[int, tuple[str, str]]) -> dict[int, tuple[str, str]]:
    """Return those that share their other end: the two clients', and not what others have opened meanwhile."""
    ends = [end for _, end in connections.values()]
    return {descriptor: (inode, end) for descriptor, (inode, end) in connections.items() if ends.count(end) > 1}


def within(seconds: float, work: Callable[[], T]) -> tuple[T] | threading.Thread | None:
    """Return what `work` returns, in a tuple, None if it raises, or its thread, which goes on, if it takes longer."""
    results: list[T] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 - notes are a help, never a reason to fail
            _logger.debug("the job's store did not answer: %s", error)

    thread = threading.Thread(target=run, name="logsync-notes", daemon=True)
    thread.start()
    thread.join(seconds)
    late = thread.is_alive()  # asked first: it may end now
    if results:
        return (results[0],)
    if not late:
        return None
    _waiting[:] = [thread, *(other for other in _waiting if other.is_alive())]
    return thread


def pid_space() -> str:
    """Return what this process's pid is relative to, empty if that is not known.

    Containers have pids of their own, and machines may share their host name: two namespaces that are called alike
    are the same only where the machine's last boot is.
    """
    try:
        if str(Path("/proc/self").readlink()) != str(os.getpid()):
            return ""  # /proc shows another namespace's processes
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{Path('/proc/self/ns/pid').readlink()} {boot}"
    except OSError:
        return ""


def dead_neighbours(notes: dict[int, Note]) -> tuple[int, ...]:
    """Return the ranks of this host whose processes have ended."""
    here = (socket.gethostname(), pid_space())
    neighbours = {rank: note for rank, note in notes.items() if here[1] and (note.host, note.pid_space) == here}
    return tuple(rank for rank, note in neighbours.items() if _ended(note.pid))


def _ended(pid: int) -> bool:
    try:
        # A killed process that its launcher has not reaped yet is a zombie: it ended, too.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:1] in ([b"Z"], [b"X"])
    except FileNotFoundError:
        return Path("/proc/self").exists()
    except OSError:
        return False


def ranks_text(ranks: Iterable[int] | Sequence[int]) -> str:
    """Return "rank 3" or "ranks 1, 2, 5 and 12 more"."""
    listed = sorted(ranks)
    shown = ", ".join(map(str, listed[:16]))
    more = f" and {len(listed) - 16} more" if len(listed) > 16 else ""  # noqa: PLR2004 - fits a line
    return f"{'rank' if len(listed) == 1 else 'ranks'} {shown}{more}"
