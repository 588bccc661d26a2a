"""A trial of what ranks do together: a process group, a log, and some rounds, within a deadline."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from logsync.coordinator.errors import printable
from logsync.workers import connect
from logsync.workers.launch import Launched

__all__ = ["RoundTrip", "TrialError", "try_round_trip"]

_ROUNDS = 20
_IMPORT_S = 60.0
_GRACE_S = 5.0  # the deadline's own errors say more than ours, and come a little after it
_V4, _V6 = ("tcp", socket.AF_INET, "<I", 8), ("tcp6", socket.AF_INET6, "<4I", 32)


class TrialError(Exception):
    """The ranks did not come together; the text names the error and where it was."""


class RoundTrip(NamedTuple):
    """How the trial went on this rank.

    Attributes:
        transport: what `connect` chose.
        setup_s: seconds to build the process group and the log's own.
        median_s, longest_s: seconds of a round.
        address: this rank's, on which it talks to the others; empty where the system does not tell.
        peers: the others' addresses, as far as this rank is connected to them.
    """

    transport: str
    setup_s: float
    rounds: int
    median_s: float
    longest_s: float
    address: str
    peers: list[str]


def try_round_trip(found: Launched, timeout_s: float) -> RoundTrip:
    """Join the job's other ranks with gloo, make some rounds, and leave. Every rank calls it.

    Raises:
        TrialError: it did not work, or not within `timeout_s` and a few seconds.
    """
    outcomes: queue.SimpleQueue[RoundTrip | TrialError] = queue.SimpleQueue()
    where = ["importing torch"]
    imported = threading.Event()

    def now(what: str) -> None:
        where.append(what)
        imported.set()

    def serve() -> None:
        try:
            outcomes.put(_trial(found, timeout_s, now))
        except Exception as error:  # noqa: BLE001 - whatever torch or a socket raises is the finding
            text = printable((str(error).strip().splitlines() or [""])[0], 1000)
            outcomes.put(TrialError(f"{type(error).__name__} while {where[-1]}, with gloo on {_choice()}: {text}"))
        finally:
            imported.set()

    # Another thread's, since this one would not hear Ctrl-C inside gloo; a daemon, since gloo cannot be cancelled.
    threading.Thread(target=serve, name="logsync-doctor", daemon=True).start()
    imported.wait(_IMPORT_S)
    try:
        outcome = outcomes.get(timeout=timeout_s + _GRACE_S)
    except queue.Empty:
        msg = f"no end within {timeout_s:g} s, while {where[-1]}; look for ranks that did not start, or a firewall"
        raise TrialError(msg) from None
    if isinstance(outcome, TrialError):
        raise outcome
    return outcome


def _trial(found: Launched, timeout_s: float, now: Callable[[str], None]) -> RoundTrip:
    # What torch would print of a failure, stack and all, is told by the error.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    import torch.distributed as dist  # noqa: PLC0415 - an extra, and only this trial needs it

    half_s = timeout_s / 2  # for the job's group, and for the log's own; the same on all ranks
    store = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    before = _connections()
    started = time.monotonic()
    now(f"joining the job's process group at {store} (MASTER_ADDR, MASTER_PORT)")
    dist.init_process_group("gloo", timeout=timedelta(seconds=half_s), rank=found.rank, world_size=found.world_size)
    try:
        now("building the log's own gloo group")
        with connect(None, name="doctor", sinks=[], timeout=half_s, warn_after=half_s) as log:
            setup_s = time.monotonic() - started
            address, peers = _addresses(_connections() - before)
            now("making a round")
            took = [_timed(lambda at=at: log.write(at)) for at in range(_ROUNDS)]  # type: ignore[misc]
            transport = log.transport
            now("closing the log")
    finally:
        dist.destroy_process_group()
    return RoundTrip(transport, setup_s, _ROUNDS, statistics.median(took), max(took), address, peers)


def _timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _choice() -> str:
    """Return what gloo was to use, in words."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    if interface:
        return f"interface {printable(interface)} (GLOO_SOCKET_IFNAME)"
    host = socket.gethostname()
    try:
        return f"host name {printable(host)}, which is {socket.gethostbyname(host)}"
    except OSError:
        return f"host name {printable(host)}, which has no address; set GLOO_SOCKET_IFNAME to an interface"


class _Connection(NamedTuple):
    local: str
    local_port: int
    remote: str
    remote_port: int


def _addresses(connections: set[_Connection]) -> tuple[str, list[str]]:
    """Return this rank's address and its peers', of connections that are not to the job's store."""
    port = os.environ.get("MASTER_PORT")
    gloo = [each for each in connections if port not in (str(each.local_port), str(each.remote_port))]
    return ", ".join(sorted({each.local for each in gloo})), sorted({each.remote for each in gloo})


def _connections() -> set[_Connection]:
    """Return this process's established TCP connections, none where /proc does not tell (it is Linux's)."""
    found: set[_Connection] = set()
    with contextlib.suppress(OSError, ValueError, IndexError):
        own = set()
        for link in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                own.add(str(link.readlink()))
        for name, family, form, size in (_V4, _V6):
            for line in Path(f"/proc/self/net/{name}").read_text().splitlines()[1:]:
                _, local, remote, state, *rest = line.split()
                if state == "01" and f"socket:[{rest[5]}]" in own:
                    ends = [_end(text, family, form, size) for text in (local, remote)]
                    found.add(_Connection(*ends[0], *ends[1]))
    return found


def _end(text: str, family: int, form: str, size: int) -> tuple[str, int]:
    address, port = text.split(":")
    words = [int(address[at : at + 8], 16) for at in range(0, size, 8)]
    shown = socket.inet_ntop(family, struct.pack(form, *words))
    return shown.removeprefix("::ffff:"), int(port, 16)
