"""All interleavings of a few calls, a lost rank, a doubled message and an early close; and mutants that are caught."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from logsync.coordinator.core import Coordinator
from logsync.coordinator.messages import Decision, Report
from support.explorer import Act, Desk, Model, Root, Violation, explore
from support.lockstep import SimRank


def calls(*steps: int) -> tuple[Act, ...]:
    return tuple(Act("call", step) for step in steps)


class World(NamedTuple):
    """What is explored, and how many states there are at least."""

    world_size: int
    acts: tuple[Act, ...]
    options: dict[str, Any]
    states: int


MIXED = (Act("call", 0), Act("frequency", 1, 1), Act("call", 1), Act("write", 1), Act("call", 2))
UPDATES = (Act("call", 0), Act("call", 1), Act("update", 1, 1), Act("call", 2), Act("update", 3, 0), Act("call", 3))
BAD = (Act("call", 0), Act("call", 1), Act("call", 2, rank=1), Act("call", 3))
SMALL = {
    "leases": World(2, calls(0, 1, 2, 3, 4, 5), {}, 60_087),
    "every call a round": World(2, calls(0, 1, 2), {"log_frequency": 1}, 22_471),
    "settings and write": World(2, MIXED, {"log_frequency": 3}, 50_348),
    "explicit": World(2, MIXED, {"write": "explicit"}, 50_534),
    "on_update": World(2, UPDATES, {"mode": "on_update", "log_frequency": 1, "copies": 0}, 4_348),
    "on_change": World(2, UPDATES, {"mode": "on_change", "log_frequency": 1, "copies": 0}, 4_344),
    "a bad step": World(2, BAD, {}, 37_988),
    "a rollback": World(2, calls(5, 6, 7, 2, 3), {"copies": 0}, 3_672),
    "both ranks leave early": World(2, calls(0, 1, 2, 3), {"absences": 2, "deaths": 0}, 5_885),
    "two copies": World(2, calls(0, 1), {"copies": 2, "deaths": 0}, 7_931),
    "three ranks, a death": World(3, calls(0, 1, 2), {"copies": 0}, 36_105),
    "three ranks, a copy": World(3, calls(0, 1), {"deaths": 0}, 10_405),
}
LARGE = {
    "two ranks, everything twice": World(2, calls(0, 1, 2, 3), {"copies": 2, "deaths": 2, "absences": 2}, 360_332),
    "two ranks, a long script": World(2, calls(*range(12)), {"log_frequency": 3, "absences": 2}, 360_211),
    "two ranks, a rollback": World(2, calls(5, 6, 7, 8, 2, 3, 4), {}, 134_325),
    "three ranks, everything": World(3, calls(0, 1), {}, 228_627),
    "three ranks, a write": World(3, (Act("call", 0), Act("write", 0), Act("call", 1)), {"absences": 0}, 66_687),
    "three ranks, a bad step": World(3, BAD, {"copies": 0, "absences": 2}, 182_531),
}
"""The floors are what there was when this was written, less a tenth."""


@pytest.mark.parametrize("name", SMALL)
def test_every_interleaving_keeps_the_promises(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _explore(name, SMALL[name], capsys)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LARGE)
def test_every_interleaving_of_larger_worlds_keeps_the_promises(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    _explore(name, LARGE[name], capsys)


def test_a_world_of_two_ranks_and_one_call_has_the_states_that_can_be_counted_by_hand() -> None:
    facts = explore(Model(2, calls(0), copies=0, deaths=0, absences=0))

    # A round: each rank is before its request, has it under way, or has it delivered: 3 x 3, of which the last is the
    # decision, with two replies under way. From there a rank's reply is under way, taken, or followed by the next
    # request under way or delivered; both delivered is the next decision. Two rounds: the call and the close. In the
    # second one a rank that has its reply has ended.
    first = 3 * 3 - 1
    between = 4 * 4 - 1
    last = 2 * 2
    assert facts["states"] == first + between + last
    assert facts["ends"] == 1


class DecidesAgain(Desk):
    """A request of a decided round is decided again."""

    def again(self, model: Model, root: Root) -> Root:
        return model.decide(root, list(root.decided))


class EndsWithTheFirst(Coordinator):
    """The log ends when one rank has closed."""

    def _decide(self, number: int, reports: list[Report], now: float) -> Decision:
        decision = super()._decide(number, reports, now)
        return replace(decision, finished=any(r.kind == "closed" for r in reports))


class NumbersFromTheRound(Coordinator):
    """An entry's seq is its round's number."""

    def _decide(self, number: int, reports: list[Report], now: float) -> Decision:
        self.next_seq = max(self.next_seq, number - 1)
        return super()._decide(number, reports, now)


class ComesTooEarly(SimRank):
    """Rank 1 takes each lease for a call shorter than it is."""

    def _accept(self, reply: bytes, *, ended: bool = False) -> Decision:
        decision = super()._accept(reply, ended=ended)
        if self._rank == 1 and self._lease > 1:
            self._lease = self._left = self._lease - 1
        return decision


@pytest.mark.parametrize(
    ("mutant", "found"),
    [
        ({"desk": DecidesAgain()}, r"act \d has two answers|stand at"),
        ({"coordinator": EndsWithTheFirst}, r"waits for round \d for ever"),
        ({"coordinator": NumbersFromTheRound}, r"entry \d is the \d\. that was made"),
        ({"member": ComesTooEarly}, "stand at"),
    ],
    ids=["decides again", "ends with the first", "numbers from the round", "comes too early"],
)
def test_a_mutant_is_caught_and_the_way_to_it_is_told(mutant: dict[str, Any], found: str) -> None:
    with pytest.raises(Violation, match=rf"(?s)({found}).*rank \d goes on\n.*arrives"):
        explore(Model(2, calls(0, 1, 2, 3, 4), log_frequency=4, **mutant))


def _explore(name: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    facts = explore(Model(world.world_size, world.acts, **world.options))

    with capsys.disabled():
        print(f"\n{name}: {facts['states']} states, {facts['transitions']} transitions, {facts['ends']} ends")
    assert facts["states"] >= world.states
    assert facts["transitions"] > facts["states"]
    assert facts["ends"] > 1
