"""What a simulated job has to keep, and what is remembered of it to tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

from logsync.coordinator.errors import BadValue
from logsync.coordinator.messages import Decision, LogEntry
from support.simulation.parts import KEY_IDS, REFUSALS, File, Member, Refused

__all__ = ["Broken", "Checkpoint", "Played", "Watch", "breaks", "check_file"]


class Broken(AssertionError):
    """A promise was broken. `rule` says which: what a scenario is shrunk by."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


def breaks(rule: str, text: str) -> NoReturn:
    raise Broken(rule, text)


@dataclass(frozen=True)
class Checkpoint:
    """What a life goes on from. `exact`: it was not taken by a rank that was away, while others still called."""

    life: int
    op: int
    state: bytes
    missed: int
    exact: bool


class Watch:
    """Compare what the ranks of one life are told."""

    def __init__(self, life: int, *, bad_steps: bool) -> None:
        self._life = life
        self._bad_steps = bad_steps
        self._outcomes: dict[int, object] = {}  # by round
        self._standings: dict[tuple[int, str], object] = {}  # by round, and what ranks were in it
        self._answers: dict[int, tuple[object, int, int]] = {}  # by op: answer, number of the call, first rank with it
        self._saves: dict[int, dict[int, bytes]] = {}
        self._exact: dict[int, bytes] = {}

    def answered(self, member: Member, answer: object) -> None:
        """Check that ranks have the same answer at the same place of the script, and the same number for the call."""
        op = member.pc
        member.answers[op] = answer
        first, call, rank = self._answers.setdefault(op, (answer, member.calls, member.rank))
        if first != answer:
            text = f"op {op} of life {self._life} is answered {first} on rank {rank}, {answer} on {member.rank}"
            breaks("agreement", text)
        if call != member.calls:
            text = f"op {op} of life {self._life} is call {call} on rank {rank}, {member.calls} on {member.rank}"
            breaks("call numbers", text)

    def heard(self, member: Member, number: int, outcome: Decision | Refused) -> None:
        """Check that one round leaves all ranks at the same place."""
        where = f"rank {member.rank} of life {self._life}"
        if isinstance(outcome, REFUSALS) and not (self._bad_steps and isinstance(outcome, BadValue)):
            breaks("errors", f"{where} got an error that nobody gave a reason for: {outcome!r}")
        seen: object = (type(outcome), str(outcome)) if isinstance(outcome, REFUSALS) else outcome
        if self._outcomes.setdefault(number, seen) != seen:
            breaks("agreement", f"{where} has another outcome of round {number}")
        entry = member.last_entry.seq if member.last_entry is not None else -1
        self._stands(member, number, "any", (member.state, entry, member._finished, member._epoch_over))
        if member.over and member._left + member.parked:
            breaks("lease", f"{where} comes back to an epoch with a lease of {member._left} calls")
        if member.asked in ("decision", "write") or member.over:
            # Those that still call agree at every round, those that had ended when all have.
            counted = (member.calls, member._entry_call)
            self._stands(member, number, member.asked, (*counted, member._left + member.parked))

    def _stands(self, member: Member, number: int, who: str, standing: object) -> None:
        first = self._standings.setdefault((number, who), standing)
        if first != standing:
            text = f"rank {member.rank} of life {self._life} stands at {standing} after round {number}, not {first}"
            breaks("state", text)

    def saved(self, member: Member, state: bytes, *, exact: bool) -> dict[int, bytes]:
        """Check that ranks save the same at the same place; return what was saved there, by rank."""
        saves = self._saves.setdefault(member.pc, {})
        saves[member.rank] = state
        if exact and self._exact.setdefault(member.pc, state) != state:
            breaks("checkpoint", f"ranks {sorted(saves)} of life {self._life} save different states")
        return saves

    def ended(self, members: Sequence[Member], *, struck: bool) -> None:
        """Check that every call has an answer and a number, and that nobody failed without a reason."""
        for member in members:
            if member.phase == "dead":
                continue
            # A rank that raised in its own code may have left while it waited: then that call has no outcome.
            want = set(member.called)
            if not want - {*member.called[-1:]} <= member.answers.keys() <= want or (
                member.phase == "done" and member.answers.keys() != want
            ):
                text = f"rank {member.rank} called at ops {member.called} and has answers to {sorted(member.answers)}"
                breaks("answers", text)
            counted = member.calls - member._skipped
            if counted != len(want) - member.uncounted:
                breaks("call numbers", f"rank {member.rank} made {len(want)} calls and counts {counted}")
            if member.phase == "failed" and not struck:
                breaks("termination", f"rank {member.rank} of life {self._life} failed without a reason")


@dataclass(frozen=True)
class Played:
    """A life that is over."""

    number: int
    members: Sequence[Member]
    origin: Checkpoint | None

    @property
    def clean(self) -> bool:
        """Whether all ranks have closed."""
        return all(member.phase == "done" for member in self.members)


def check_file(file: File, lives: Sequence[Played], rolled_back: Collection[int]) -> Counter[str]:
    """Check the file that a job of these lives has left, and return what it has.

    Args:
        rolled_back: the seqs from which on an entry may have a lower step than the one before.

    Raises:
        Broken: a promise was broken.
    """
    lines = file.lines
    if file.wrong:
        breaks("partial", "; ".join(file.wrong))
    seqs = [entry.seq for _, entry in lines]
    if seqs != list(range(len(seqs))):
        breaks("seq", f"the file has the entries {seqs}")
    for (_, before), (life, entry) in pairwise(lines):
        # What a rank writes that leaves has its own step: no round could say that it went back. A log at step None
        # forgets the logs before it.
        told = (life, entry.seq) in file.leftovers or any(seq <= entry.seq for seq in rolled_back)
        if not told and before.step is not None and entry.step is not None and entry.step < before.step:
            text = f"entry {entry.seq} is at step {entry.step}, the one before at {before.step}, and nobody said so"
            breaks("steps", text)
    if any(b.attempt < a.attempt for (_, a), (_, b) in pairwise(lines)):
        breaks("attempt", f"attempts go back: {[e.attempt for _, e in lines]}")
    facts = _check_values(file, lives)
    last = lives[-1]
    if last.clean and file.writer != last.number and any(m.recorded for m in last.members):
        breaks("values", f"life {last.number} recorded and closed, and the file was never opened")
    facts["clean ends"] += last.clean
    facts["recovered entries"] += file.recovered
    return facts


def _check_values(file: File, lives: Sequence[Played]) -> Counter[str]:
    """Check that every value is in one entry, or excused."""
    facts: Counter[str] = Counter()
    there = _values_of(file.lines)
    kept = _kept(file, lives)
    for life in lives:
        for member in life.members:
            found = there.pop((life.number, member.rank), {})
            where = f"of rank {member.rank} in life {life.number}"
            twice = [number for number, times in found.items() if times != 1]
            if twice or not found.keys() <= set(range(len(member.recorded))):
                breaks("values", f"values {twice or sorted(found)} {where} are in the file twice or oddly")
            end, exact = kept.get(life.number, (-1, True))
            asked = [number for number, op in enumerate(member.recorded) if op <= end]
            if not found.keys() <= set(asked):
                breaks("values", f"values {sorted(found)} {where} are in the file, but were replaced")
            missing = [number for number in asked if number not in found]
            if missing and missing != asked[-len(missing) :]:
                breaks("values", f"values {missing} {where} are missing, and not the newest ones")
            if missing and member.host is not None and member.phase == "failed" and life.number == file.writer:
                breaks("values", f"values {missing} {where} are missing, though the root wrote what it had and left")
            if missing and life is lives[-1] and life.clean:
                breaks("values", f"values {missing} {where} are missing, though all ranks closed")
            told = exact and any(number not in member.beside for number in missing)
            if told and life.number in kept and life.number != max(kept):
                _check_excused(file, life.number, where)
            facts["values"] += len(found)
            facts["lost values"] += len(missing)
    if there:
        breaks("values", f"the file has values that nobody recorded: {sorted(there)}")
    return facts


def _kept(file: File, lives: Sequence[Played]) -> Mapping[int, tuple[float, bool]]:
    """Return the lives whose values the file is to have: the last op of each that counts, and if that is exact."""
    if file.writer < 0:
        return {}
    kept: dict[int, tuple[float, bool]] = {file.writer: (float("inf"), True)}
    origin = lives[file.writer].origin
    while origin is not None:
        kept[origin.life] = (origin.op, origin.exact)
        origin = lives[origin.life].origin
    return kept


def _check_excused(file: File, number: int, where: str) -> None:
    """Values that a checkpoint did not hold make the first entry after it partial."""
    after = next((entry for life, entry in file.lines if life > number), None)
    if after is not None and not after.partial:
        breaks("partial", f"entry {after.seq} is not marked partial, but values {where} are missing")


def _values_of(lines: Sequence[tuple[int, LogEntry]]) -> dict[tuple[int, int], dict[int, int]]:
    """Return by (life, rank) how often each value is in the file."""
    sums: dict[tuple[str, str], float] = {}
    for _, entry in lines:
        whole: dict[str, float] = {}
        for name, value in entry.metrics.items():
            key, slash, rank = name.partition("/rank")
            if slash:
                sums[key, rank] = sums.get((key, rank), 0.0) + value
                whole[key] = whole.get(key, 0.0) + value
        if any(entry.metrics[key] != value for key, value in whole.items()):
            breaks("values", f"entry {entry.seq} does not add up: {entry.metrics}")
    there: dict[tuple[int, int], dict[int, int]] = {}
    for (key, rank), value in sums.items():
        life, block = map(int, key[1:].split("_"))
        digits, number = int(value), int(block) * KEY_IDS
        values = there.setdefault((life, int(rank)), {})
        while digits:
            if digits & 3:
                values[number] = digits & 3
            digits >>= 2
            number += 1
    return there
