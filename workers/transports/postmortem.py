"""Why did a round fail: from what ranks have noted to one error that says only what is known. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from logsync.coordinator.errors import CoordinatorLost, PeerFailed, PeerLost, RoundTimeout, TransportError, printable
from logsync.workers.transports.notes import Note, Verdict, ranks_text

__all__ = ["GAVE_UP", "error_of_verdict", "has_timed_out", "heard_of", "judge", "last_known", "leavers"]

GAVE_UP = "waited for its whole timeout"
"""The text of a note of a rank whose round failed by its timeout."""

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
) -> Verdict:
    """Return what can be said about the failed round.

    Args:
        notes: as far as they could be read.
        rank: who judges; it came to the round.
        waited_s: how long it had waited when the round failed.
        detail: the first line of gloo's own error.
    """
    gone = leavers(notes)
    if gone:
        return Verdict(round_number, "failed", tuple(sorted(gone)), _left_text(gone))
    dead = {r for note in notes.values() for r in note.dead} - {rank}
    # No notes at all: the job's store does not answer either, which the root's side keeps.
    expected = set(range(world_size)) if notes or rank == 0 else {0}
    missing = expected - heard_of(notes, round_number) - {rank}
    timed_out = has_timed_out(waited_s, timeout_s)
    gave_up = {r for r, note in notes.items() if note.doing == "failed" and note.text == GAVE_UP}
    culprits = dead or missing
    if not culprits and gave_up and not timed_out:
        culprits = {rank}
        who = f"it came when {ranks_text(gave_up)} had given the round up"
    elif not culprits:
        who = "no rank is known to be missing; the network may have broken"
    elif dead:
        who = f"{ranks_text(dead)} ended: {_ended_text(dead, notes)}"
    else:
        verb = "did not come" if timed_out else "not heard of in this round"
        who = f"{ranks_text(missing)} {verb}: {last_known(missing, notes)}"
    how = f"waited {waited_s:.1f} s of {timeout_s:g} s" if timed_out else f"lost its connection after {waited_s:.1f} s"
    text = f"round {round_number} failed: rank {rank} {how}; {who}. gloo says: {detail}"
    # Without the root's word, a root that did not come counts as lost.
    late = (timed_out and not dead and (rank == 0 or 0 not in missing)) or culprits == {rank}
    kind = "timeout" if late else "lost"
    return Verdict(round_number, kind, tuple(sorted(culprits))[:4096], text[:2000])  # type: ignore[arg-type]


def error_of_verdict(verdict: Verdict) -> TransportError:
    """Return the error that a verdict stands for; the coordinator's own end has a class of its own."""
    error = CoordinatorLost if 0 in verdict.ranks and verdict.kind == "lost" else _CLASSES[verdict.kind]
    return error(printable(verdict.text, 2000), ranks=verdict.ranks, round=verdict.round)


def last_known(ranks: Iterable[int], notes: dict[int, Note]) -> str:
    """Say of each rank where it was last, for at most 8 ranks."""
    return "; ".join(_place(rank, notes.get(rank)) for rank in sorted(ranks)[:8])


def _place(rank: int, note: Note | None) -> str:
    if note is None:
        return f"no word of rank {rank} is to be found in the job's store"
    where = f"rank {rank} on {printable(note.host, 80)} (pid {note.pid})"
    return f"{where} was last heard of at call {note.call}, step {note.step}"


def _ended_text(ranks: Iterable[int], notes: dict[int, Note]) -> str:
    return last_known(ranks, notes) + ". Look at the end of its output, and for the kernel's out-of-memory killer"


def _left_text(gone: dict[int, Note]) -> str:
    rank = min(gone)
    note = gone[rank]
    more = f" ({ranks_text(gone)} left)" if len(gone) > 1 else ""
    return (
        f"rank {rank} on {printable(note.host, 80)} left the log at call {note.call}, step {note.step}, because its "
        f"code raised {printable(note.text, 500)}{more}"
    )
