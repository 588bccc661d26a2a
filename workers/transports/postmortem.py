"""Why did a round fail: from what ranks have noted to one error that says only what is known. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from logsync.coordinator.errors import (
    CoordinatorLost,
    PeerFailed,
    PeerLost,
    RoundTimeout,
    Step,
    TransportError,
    printable,
)
from logsync.workers.transports.notes import Note, Verdict, ranks_text

__all__ = [
    "GAVE_UP",
    "LastRound",
    "error_of_verdict",
    "failed_in",
    "has_timed_out",
    "heard_of",
    "judge",
    "last_known",
    "leavers",
    "missed_by",
]

GAVE_UP = "waited for its whole timeout"
"""The text of a note of a rank whose round failed by its timeout."""


class LastRound(NamedTuple):
    """The last round that completed, which every rank took part in, and where `rank`, who tells it, was then."""

    rank: int
    number: int
    call: int
    step: Step


_LOOK = "Look at the end of its output, and for the kernel's out-of-memory killer"

_CLASSES: dict[str, type[TransportError]] = {"timeout": RoundTimeout, "lost": PeerLost, "failed": PeerFailed}


def has_timed_out(waited_s: float, timeout_s: float) -> bool:
    """Say whether a round ended by its timeout; a connection that broke is seen at once."""
    return waited_s >= 0.9 * timeout_s


def heard_of(notes: dict[int, Note], round_number: int) -> set[int]:
    """Return the ranks that are known to have come to the round, or to have left a reason."""
    return {
        rank
        for rank, note in notes.items()
        if note.doing == "left" or (note.doing in ("waiting", "failed") and note.round >= round_number)
    }


def missed_by(rank: int, notes: dict[int, Note], round_number: int, world_size: int) -> set[int]:
    """Return the ranks that `rank`, who came to the round, misses there, as far as the notes tell.

    Where the root is one of them, ranks that are still in the round before are none: what they wait for is the reply
    that the root has got through to `rank` only.
    """
    missing = set(range(world_size)) - heard_of(notes, round_number) - {rank}
    if rank and 0 in missing:
        missing -= heard_of(notes, round_number - 1) - {0}
    return missing


def failed_in(notes: dict[int, Note], round_number: int) -> set[int]:
    """Return the ranks that have lost the group in this round or left it, so that no round can be made any more."""
    return {r for r, n in notes.items() if n.doing == "left" or (n.doing == "failed" and n.round >= round_number)}


def leavers(notes: dict[int, Note]) -> dict[int, Note]:
    """Return the ranks that left by an exception of their own."""
    return {rank: note for rank, note in notes.items() if note.doing == "left"}


def judge(
    notes: dict[int, Note],
    *,
    rank: int,
    world_size: int,
    round_number: int,
    waited_s: float,
    timeout_s: float,
    detail: str,
    before: dict[int, Note] | None = None,
    last: LastRound | None = None,
) -> Verdict:
    """Return what can be said about the failed round.

    Args:
        notes: as far as they could be read.
        rank: who judges; it came to the round.
        waited_s: how long it had waited when the round failed.
        detail: the first line of gloo's own error; empty where the round was given up without one.
        before: the notes when the round failed, which tell who came late; `notes` may have been read since.
        last: the last round that completed.
    """
    gone = leavers(notes)
    if gone:
        return Verdict(round_number, "failed", tuple(sorted(gone)), _left_text(gone))
    world = set(range(world_size))
    dead = {r for note in notes.values() for r in note.dead} & world - {rank}
    # No notes at all: the job's store does not answer either, which the root's side keeps.
    missing = missed_by(rank, notes, round_number, world_size) if notes or rank == 0 else {0}
    timed_out = has_timed_out(waited_s, timeout_s)
    before = notes if before is None else before
    gave_up = _gave_up(before)
    # One that came after the end of the wait is to blame, although it has come.
    overdue = world - heard_of(before, round_number) - _gave_up(notes) - {rank} if timed_out else set()
    culprits = dead or missing or overdue
    if not culprits and gave_up and not timed_out:
        culprits = {rank}
        who = f"it came when {ranks_text(gave_up)} had given the round up"
    elif not culprits:
        who = "no rank is known to be missing; the network may have broken"
    elif dead:
        who = f"{ranks_text(dead)} ended: {last_known(dead, notes, last)}. {_LOOK}"
    elif missing:
        verb = "did not come" if timed_out else "not heard of in this round"
        who = f"{ranks_text(missing)} {verb}: {last_known(missing, notes, last)}"
    else:
        who = f"{ranks_text(overdue)} came too late: {last_known(overdue, notes, last)}"
    how = f"{'lost its connection after' if detail and not timed_out else 'waited'} {waited_s:.1f} s"
    how += f" of {timeout_s:g} s" if timed_out else ""
    text = f"round {round_number} failed: rank {rank} {how}; {who}" + (f". gloo says: {detail}" if detail else "")
    # Without the root's word, a root that did not come counts as lost.
    late = (timed_out and not dead and (rank == 0 or 0 not in missing)) or culprits == {rank}
    kind = "timeout" if late else "lost"
    return Verdict(round_number, kind, tuple(sorted(culprits))[:4096], text[:2000])  # type: ignore[arg-type]


def _gave_up(notes: dict[int, Note]) -> set[int]:
    return {rank for rank, note in notes.items() if note.doing == "failed" and note.text == GAVE_UP}


def error_of_verdict(verdict: Verdict) -> TransportError:
    """Return the error that a verdict stands for; the coordinator's own end has a class of its own."""
    error = CoordinatorLost if 0 in verdict.ranks and verdict.kind == "lost" else _CLASSES[verdict.kind]
    return error(printable(verdict.text, 2000), ranks=verdict.ranks, round=verdict.round)


def last_known(ranks: Iterable[int], notes: dict[int, Note], last: LastRound | None = None) -> str:
    """Say of each rank where it was last, for at most 8 ranks."""
    return "; ".join(_place(rank, notes.get(rank), last) for rank in sorted(ranks)[:8])


def _place(rank: int, note: Note | None, last: LastRound | None) -> str:
    who = f"rank {rank}" if note is None else f"rank {rank} on {printable(note.host, 80)} (pid {note.pid})"
    if last is not None and last.number and (note is None or note.round <= last.number):
        # Its note, if there is one, is older than that round.
        where = f"call {last.call}, step {last.step} on rank {last.rank}"
        return f"{who} took part in round {last.number}, the last one ({where})"
    if note is None:
        return f"no word of rank {rank} is to be found in the job's store"
    return f"{who} was last heard of at call {note.call}, step {note.step}"


def _left_text(gone: dict[int, Note]) -> str:
    rank = min(gone)
    note = gone[rank]
    more = f" ({ranks_text(gone)} left)" if len(gone) > 1 else ""
    return (
        f"rank {rank} on {printable(note.host, 80)} left the log at call {note.call}, step {note.step}, because its "
        f"code raised {printable(note.text, 500)}{more}"
    )
