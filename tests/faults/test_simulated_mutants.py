"""Mistakes in the coordinator, the network or a rank, which the simulator has to find and to tell in a few lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from logsync.coordinator.core import Coordinator
from logsync.coordinator.messages import Decision, NewEpoch, Report, Window, decode_decision, encode
from logsync.workers.window import Taken
from support.simulation import Member, Parts, Root, draw, fails, shrink
from support.simulation.parts import Refused


class DecidesAgain(Root):
    """A request of a decided round is decided again."""

    def again(self, rank: int) -> list[tuple[int, bytes]]:
        self.reply = self.host.handle(self.frames)
        return [(rank, self.reply)]


class NeverAnswersAgain(Root):
    """A reply that is lost is lost for ever."""

    def again(self, rank: int) -> list[tuple[int, bytes]]:  # noqa: ARG002 - as the base has it
        return []


class ForksTheReply(Root):
    """The last rank gets a reply of its own."""

    def take(self, rank: int, number: int, frame: bytes) -> list[tuple[int, bytes]]:
        replies = super().take(rank, number, frame)
        if len(replies) > 1:
            receiver, reply = replies[-1]
            replies[-1] = (receiver, self.forked(reply))
        return replies

    def forked(self, reply: bytes) -> bytes:
        raise NotImplementedError


class FlipsOneAnswer(ForksTheReply):
    """One rank is told the opposite."""

    def forked(self, reply: bytes) -> bytes:
        decision = decode_decision(reply)
        if decision.failure is not None or decision.round == 0:
            return reply
        return encode(replace(decision, log_ready=not decision.log_ready))


class LeasesOneRankLess(ForksTheReply):
    """One rank comes to the next round a call too early."""

    def forked(self, reply: bytes) -> bytes:
        decision = decode_decision(reply)
        return encode(replace(decision, lease=max(0, decision.lease - 1)))


class ForgetsTheSeq(Coordinator):
    """After a load entries are numbered from 0."""

    def _restore(self, active: list[Report], counting: Report) -> None:
        super()._restore(active, counting)
        if any(r.restore for r in active):
            self.next_seq = 0


class ForgetsWhatIsMissing(Coordinator):
    """The first entry after a load is never marked partial."""

    def _restore(self, active: list[Report], counting: Report) -> None:
        super()._restore(active, counting)
        self._missed = False


class IgnoresRollbacks(Coordinator):
    """Steps that went back are not told."""

    def _decision(self, *args: Any, notices: Sequence[str] = (), **named: Any) -> Any:  # noqa: ARG002 - they are dropped
        return super()._decision(*args, **named)


class DropsWhatTheAbsentRecorded(Coordinator):
    """Only ranks that still call have values."""

    def _decide(self, number: int, reports: list[Report], now: float) -> Any:
        ended = all(r.kind == "closed" for r in reports)
        kept = [r if r.kind != "closed" or ended else replace(r, window=Window()) for r in reports]
        return super()._decide(number, kept, now)


class ForgetsWhatTheEndedRecorded(Coordinator):
    """A rank that has ended its epoch has no values."""

    def _decide(self, number: int, reports: list[Report], now: float) -> Decision:
        kept = [r if r.kind != "ended" else replace(r, window=Window()) for r in reports]
        return super()._decide(number, kept, now)


class EndsTheEpochWithTheFirst(Coordinator):
    """One rank's end is the end of the epoch on all."""

    def _decide(self, number: int, reports: list[Report], now: float) -> Decision:
        decision = super()._decide(number, reports, now)
        if not any(r.kind == "ended" for r in reports):
            return decision
        return replace(decision, new_epoch=NewEpoch(max(r.call for r in reports), 0))


class WaitsForTheClosedToEnd(Coordinator):
    """An epoch does not end once a rank has closed."""

    def _decide(self, number: int, reports: list[Report], now: float) -> Decision:
        decision = super()._decide(number, reports, now)
        return replace(decision, new_epoch=None) if any(r.kind == "closed" for r in reports) else decision


class KeepsNothingThatWasRefused(Member):
    """A refused frame's values are gone."""

    def refuse(self) -> None:
        pass


class GivesBackWhatTheRootHasTaken(Member):
    """The root's own rank lost its reply, and writes the values of the entry once more."""

    def in_an_entry(self) -> bool:
        return False


class TakesALoadForAnEntry(Member):
    """The root's own rank counts entries by their numbers, which a load changes, too."""

    def entries_made(self) -> int:
        return self.host.coordinator.next_seq if self.host is not None else 0


class CheckpointsBeforeTheFileHasTheEntry(Member):
    """The state counts an entry that is still held for annotate(), and a kill loses."""

    brings_its_loaded_entry = False


class LeavesBeforeItsStateCounts(Member):
    """What is left after a load and before a round goes to a new file."""

    tells_its_host_of_a_loaded_state = False


class DoesNotAlignItsCalls(Member):
    """After an uneven epoch every rank goes on with its own number."""

    def _enter(self, epoch: NewEpoch | None) -> None:
        pass


class TakesALeaseWhileAway(Member):
    """The lease of a round that it only answered is this rank's when it comes back."""

    taken_lease = 0

    def _accept(self, reply: bytes, *, ended: bool = False) -> Decision:
        decision = super()._accept(reply, ended=ended)
        if ended:
            self.taken_lease = self.taken_lease or decision.lease
            if self._epoch_over:
                self._lease = self._left = self.taken_lease
                self.taken_lease = 0
        return decision


class RestoresTwice(Member):
    """A state that was loaded before an empty epoch is sent again after it."""

    def _accept(self, reply: bytes, *, ended: bool = False) -> Decision:
        restore = self._restore
        decision = super()._accept(reply, ended=ended)
        if ended:
            self._restore = restore
        return decision


class WritesTwiceWhatWasLoggedWhileItWasAway(Member):
    """What an entry of the others has taken is in the next one again."""

    def hear_absent(self, reply: bytes) -> Decision | Refused:
        taken = self.taken
        outcome = super().hear_absent(reply)
        self.taken = taken
        return outcome


class LosesWhatWasNotLoggedWhileItWasAway(Member):
    """What no entry of the others has taken is gone."""

    def come_back(self) -> Refused | None:
        self.taken = Taken.nothing()
        return super().come_back()


class EndsNothingAfterARefusal(Member):
    """An end that raises the error of the one before is none."""

    ends_though_it_was_refused = False


class LeavesAfterARefusal(Member):
    """A close that raises the error of an epoch's end does not wait for the others."""

    closes_though_it_was_refused = False


@pytest.mark.parametrize(
    ("parts", "rules", "seeds"),
    [
        (Parts(root=DecidesAgain), {"agreement", "errors", "termination"}, range(50)),
        (Parts(root=NeverAnswersAgain), {"termination"}, range(100)),
        (Parts(root=FlipsOneAnswer), {"agreement"}, range(20)),
        (Parts(root=LeasesOneRankLess), {"agreement"}, range(20)),
        (Parts(coordinator=ForgetsTheSeq), {"seq", "values"}, range(100)),
        (Parts(coordinator=ForgetsWhatIsMissing), {"partial"}, range(200)),
        (Parts(coordinator=IgnoresRollbacks), {"steps"}, range(300)),
        (Parts(coordinator=DropsWhatTheAbsentRecorded), {"values"}, range(100)),
        (Parts(coordinator=ForgetsWhatTheEndedRecorded), {"values"}, range(100)),
        (Parts(coordinator=EndsTheEpochWithTheFirst), {"state", "call numbers"}, range(100)),
        (Parts(coordinator=WaitsForTheClosedToEnd), {"ends"}, range(300)),
        (Parts(member=KeepsNothingThatWasRefused), {"values"}, range(200)),
        (Parts(member=GivesBackWhatTheRootHasTaken), {"values"}, range(800, 1500)),
        (Parts(member=TakesALoadForAnEntry), {"values"}, range(1500)),
        (Parts(member=CheckpointsBeforeTheFileHasTheEntry), {"seq", "values"}, range(1300, 2100)),
        (Parts(member=LeavesBeforeItsStateCounts), {"seq", "values"}, range(300, 1500)),
        (Parts(member=DoesNotAlignItsCalls), {"state", "call numbers"}, range(100)),
        (Parts(member=TakesALeaseWhileAway), {"lease"}, range(100)),
        (Parts(member=RestoresTwice), {"errors", "seq"}, range(1500)),
        (Parts(member=WritesTwiceWhatWasLoggedWhileItWasAway), {"values"}, range(100)),
        (Parts(member=LosesWhatWasNotLoggedWhileItWasAway), {"values"}, range(100)),
        (Parts(member=EndsNothingAfterARefusal), {"errors", "call numbers", "agreement"}, range(1500)),
        (Parts(member=LeavesAfterARefusal), {"termination", "values"}, range(1500)),
    ],
    ids=lambda value: (
        "-".join(c.__name__ for c in vars(value).values() if c.__module__ == __name__)
        if isinstance(value, Parts)
        else ""
    ),
)
def test_the_simulator_finds_a_mutant_and_shrinks_what_it_found(parts: Parts, rules: set[str], seeds: range) -> None:
    seed, broken = next((seed, broken) for seed in seeds if (broken := fails(draw(seed), parts)) is not None)

    small = shrink(draw(seed), parts)

    assert broken.rule in rules
    found = fails(small, parts)
    assert found is not None
    assert found.rule == broken.rule
    assert fails(small) is None  # it is the mutant's fault
    assert small.size <= 14, f"seed {seed}: {found}\n{small}"
