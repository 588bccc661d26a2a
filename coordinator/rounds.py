"""Exactly one frame per rank per round: names the missing, the early, the double, and what does not belong."""

from __future__ import annotations

from collections.abc import Sequence

from logsync.coordinator.errors import ConfigMismatch, ProtocolError, RoundMismatch, printable
from logsync.coordinator.messages import PROTOCOL, Hello, Report, Settings, decode_hello, decode_report

__all__ = ["Round", "check_hello", "check_hellos", "read_hellos", "read_reports", "step_mismatch"]


class Round:
    """The frames of one round as they come in, for transports whose ranks arrive one by one."""

    def __init__(self, number: int, world_size: int) -> None:
        self.number = number
        self._frames: list[bytes | None] = [None] * world_size
        self._missing = world_size

    @property
    def complete(self) -> bool:
        """Whether every rank's frame is in."""
        return not self._missing

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks whose frames are not in, lowest first."""
        return tuple(rank for rank, frame in enumerate(self._frames) if frame is None)

    def add(self, rank: int, frame: bytes) -> None:
        """Take in the frame of `rank`.

        Raises:
            ProtocolError: there is no such rank, or its frame for this round is in already.
        """
        if not 0 <= rank < len(self._frames):
            msg = f"a frame came from rank {rank}, but the world has {len(self._frames)} ranks"
            raise ProtocolError(msg, ranks=(rank,), round=self.number)
        if self._frames[rank] is not None:
            msg = f"rank {rank} sent two frames for round {self.number}; two processes may be using one rank"
            raise ProtocolError(msg, ranks=(rank,), round=self.number)
        self._frames[rank] = frame
        self._missing -= 1

    def frames(self) -> list[bytes]:
        """Return all frames by rank; the round must be complete."""
        if self._missing:
            msg = f"round {self.number} lacks ranks {list(self.missing)}"
            raise RuntimeError(msg)
        return [frame for frame in self._frames if frame is not None]


def read_hellos(frames: Sequence[bytes | bytearray | memoryview], world_size: int) -> list[Hello]:
    """Return the hello of every rank; raise `ProtocolError` for one that cannot be read, is out of place or missing."""
    if len(frames) != world_size:
        msg = f"round 0 has {len(frames)} frames for {world_size} ranks"
        raise ProtocolError(msg, round=0)
    hellos = [decode_hello(frame, rank) for rank, frame in enumerate(frames)]
    for rank, hello in enumerate(hellos):
        if hello.rank != rank:
            msg = f"rank {rank} introduced itself as rank {hello.rank}; two processes may be using one rank"
            raise ProtocolError(msg, ranks=(rank,))
    return hellos


def check_hellos(hellos: Sequence[Hello], world_size: int) -> None:
    """Compare what all ranks gave `connect` with what rank 0 gave.

    Raises:
        ConfigMismatch: naming the first field that differs, the ranks and their values.
    """
    ours = hellos[0]
    for field in ("version", "world_size", *ours.settings.__struct_fields__):
        values = [getattr(h if hasattr(h, field) else h.settings, field) for h in hellos]
        expected = world_size if field == "world_size" else values[0]
        # 50 and 50.0 are different settings: exact and tolerant comparison differ.
        others = {r: v for r, v in enumerate(values) if (type(v), v) != (type(expected), expected)}
        if others:
            shown = ", ".join(f"rank {r}: {v!r}" for r, v in list(others.items())[:8])
            more = f" and {len(others) - 8} more" if len(others) > 8 else ""  # noqa: PLR2004 - as many as fit a line
            alike = "for the same logs, in the same order" if field == "name" else "with the same settings"
            hint = f"every rank must call connect() {alike}"
            msg = f"{field} is {expected!r} on rank 0, but {printable(shown)}{more}; {hint}"
            raise ConfigMismatch(msg, ranks=tuple(others))


def check_hello(hello: Hello, rank: int, world_size: int, settings: Settings) -> None:
    """Compare what one rank that comes later gave `connect` with what the job runs with.

    Raises:
        ProtocolError: it introduces itself as another rank.
        ConfigMismatch: naming the first field that differs, and both values.
    """
    if hello.rank != rank:
        msg = f"rank {rank} introduced itself as rank {hello.rank}; two processes may be using one rank"
        raise ProtocolError(msg, ranks=(rank,))
    pairs = [("world_size", world_size, hello.world_size)]
    pairs += [(field, getattr(settings, field), getattr(hello.settings, field)) for field in settings.__struct_fields__]
    for field, expected, given in pairs:
        if (type(given), given) != (type(expected), expected):
            msg = f"{field} is {expected!r} in the job that runs, but {printable(repr(given))} on rank {rank}"
            raise ConfigMismatch(msg, ranks=(rank,))


def read_reports(
    frames: Sequence[bytes | bytearray | memoryview],
    run: str,
    number: int,
    world_size: int,
    members: Sequence[int] | None = None,
) -> list[Report]:
    """Return every rank's report of round `number`, by rank; `members` are those that take part, all if None.

    Raises:
        ProtocolError: a frame is missing, corrupt, or from another version, run, round, rank or world.
        RoundMismatch: some ranks wrote while others decided.
    """
    members = range(world_size) if members is None else members
    if len(frames) != len(members):
        msg = f"round {number} has {len(frames)} frames for {len(members)} ranks"
        raise ProtocolError(msg, round=number)
    reports = [decode_report(frame, rank) for rank, frame in zip(members, frames, strict=True)]
    expected = (PROTOCOL, run, number, world_size)
    for rank, report in zip(members, reports, strict=True):
        if (report.protocol, report.run, report.round, report.world_size) != expected or report.rank != rank:
            raise _out_of_place(report, rank, expected)
    _check_kinds(reports, number)
    return reports


def _out_of_place(report: Report, rank: int, expected: tuple[int, str, int, int]) -> ProtocolError:
    found = (report.protocol, report.run, report.round, report.world_size, report.rank)
    names = ("protocol", "run", "round", "world size", "rank")
    wrong = [
        f"{name} {value!r} instead of {want!r}"
        for name, value, want in zip(names, found, (*expected, rank), strict=True)
        if value != want
    ]
    msg = f"the frame of rank {rank} in round {expected[2]} is out of place: {printable(', '.join(wrong))}"
    return ProtocolError(msg, ranks=(rank,), round=expected[2])


def _check_kinds(reports: Sequence[Report], number: int) -> None:
    writers = [r for r in reports if r.kind == "write"]
    deciders = [r for r in reports if r.kind == "decision"]
    if not writers or not deciders:
        return
    few, many = sorted((writers, deciders), key=len)
    verb = {"write": "write()", "decision": "log_ready()"}
    ranks = tuple(r.rank for r in few)
    msg = (
        f"rank {few[0].rank} called {verb[few[0].kind]} (after {few[0].call} calls, step {few[0].step}) where rank "
        f"{many[0].rank} called {verb[many[0].kind]} (call {many[0].call}, step {many[0].step}). Every rank must call "
        f"the same method at the same place -- look for a write() or log_ready() under `if rank == ...`"
    )
    raise RoundMismatch(msg, ranks=ranks, call=few[0].call, step=few[0].step, round=number)


def step_mismatch(
    moved: Sequence[int], then: dict[int, int], now: dict[int, int], reports: Sequence[Report]
) -> RoundMismatch:
    """Word the error for ranks whose distance to the counting rank, the first of `reports`, has changed."""
    rank, counting = moved[0], reports[0].rank
    ahead_then = then[rank] - then[counting]
    where = "equal" if ahead_then == 0 else f"{abs(ahead_then)} steps apart"
    more = f" (and {len(moved) - 1} more ranks)" if len(moved) > 1 else ""
    msg = (
        f"rank {rank}{more} is at step {now[rank]} while rank {counting} is at step {now[counting]}; at the last round "
        f"(rank {counting} at step {then[counting]}) the two were {where}. One of them called log_ready() more often "
        "than the other, or counts its steps differently. Every rank must call it equally often -- look for a call "
        "under `if rank == ...`, or a loader that ended early on one rank, which then calls end_epoch()"
    )
    call = next(r.call for r in reports if r.rank == rank)
    return RoundMismatch(msg, ranks=tuple(moved), call=call, step=now[rank])
