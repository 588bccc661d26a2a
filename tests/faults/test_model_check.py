"""All interleavings of a few calls, uneven epochs, a lost rank, a doubled message and an early close; and mutants."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace

from logsync.coordinator.core import Coordinator
from logsync.coordinator.messages import Decision, NewEpoch, Report
from support.explorer import Violation, explore
from support.lockstep import SimRank
from support.model import Desk, Model, Root
from support.simulation import Op


def calls(*steps: int) -> tuple[Op, ...]:
    return tuple(Op("call", step) for step in steps)


def uneven(*lengths: int, at: int) -> tuple[Op, ...]:
    """Return the calls of an epoch that is so long on each rank, and its end."""
    ops = []
    for call in range(max(lengths)):
        made_by = sum(1 << rank for rank, length in enumerate(lengths) if length > call)
        ops.append(Op("call", at + call, ranks=made_by))
    return (*ops, Op("end"))


class World(NamedTuple):
    """What is explored, and how many states there are at least."""

    world_size: int
    acts: tuple[Op, ...]
    options: dict[str, Any]
    states: int


MIXED = (Op("call", 0), Op("frequency", 1, 1), Op("call", 1), Op("write", 1), Op("call", 2))
UPDATES = (Op("call", 0), Op("call", 1), Op("update", 1, 1), Op("call", 2), Op("update", 3, 0), Op("call", 3))
BAD = (Op("call", 0), Op("call", 1), Op("call", 2, rank=1), Op("call", 3))
SAID = (*uneven(3, 1, at=0), Op("update", 2, 1), Op("frequency", 1, 1), *calls(3, 4))
REFUSED = (*calls(0, 1), Op("call", 2, rank=1, ranks=0b10), Op("end"), *calls(3), Op("end"))
SMALL = {
    "leases": World(2, calls(0, 1, 2, 3, 4), {}, 53_075),
    "every call a round": World(2, calls(0, 1, 2), {"log_frequency": 1}, 22_471),
    "settings and write": World(2, MIXED, {"log_frequency": 3, "absences": 0}, 6_196),
    "explicit": World(2, MIXED, {"write": "explicit", "copies": 0}, 3_819),
    "on_update": World(2, UPDATES, {"mode": "on_update", "log_frequency": 1, "copies": 0}, 4_348),
    "on_change": World(2, UPDATES, {"mode": "on_change", "log_frequency": 1, "copies": 0}, 4_344),
    "a bad step": World(2, BAD, {}, 37_988),
    "a rollback": World(2, calls(5, 6, 7, 2, 3), {"copies": 0}, 3_672),
    "both ranks leave early": World(2, calls(0, 1, 2, 3), {"absences": 2, "deaths": 0}, 5_885),
    "two copies": World(2, calls(0, 1), {"copies": 2, "deaths": 0}, 7_931),
    "uneven epochs": World(2, (*uneven(4, 1, at=0), *calls(4, 5)), {"copies": 0}, 4_400),
    "uneven epochs, a copy": World(2, (*uneven(1, 3, at=0), *calls(3, 4)), {"deaths": 0}, 11_061),
    "either order of ending": World(2, (*uneven(2, 1, at=0), *uneven(1, 2, at=2), *calls(4)), {"copies": 0}, 5_941),
    "said while away": World(2, SAID, {"copies": 0}, 21_658),
    "a refused end": World(2, REFUSED, {"copies": 0, "log_frequency": 4}, 4_333),
    "three uneven ranks": World(3, (*uneven(2, 1, 0, at=0), *calls(2)), {"copies": 0, "absences": 0}, 6_035),
    "three ranks, a death": World(3, calls(0, 1, 2), {"copies": 0}, 36_105),
    "three ranks, a copy": World(3, calls(0, 1), {"deaths": 0}, 10_405),
}
LARGE = {
    "two ranks, everything twice": World(2, calls(0, 1, 2, 3), {"copies": 2, "deaths": 2, "absences": 2}, 360_332),
    "two ranks, a long script": World(2, calls(*range(12)), {"log_frequency": 3, "absences": 2}, 360_211),
    "two ranks, a rollback": World(2, calls(5, 6, 7, 8, 2, 3, 4), {}, 134_325),
    "two ranks, explicit": World(2, MIXED, {"write": "explicit"}, 50_534),
    "uneven epochs, everything": World(2, (*uneven(3, 1, at=0), *uneven(0, 2, at=3), *calls(5)), {}, 136_732),
    "said while away, a copy": World(2, SAID, {}, 438_292),
    "a refused end, a copy": World(2, REFUSED, {"log_frequency": 4}, 64_534),
    "three uneven ranks, twice": World(3, (*uneven(2, 1, 0, at=0), *uneven(0, 1, 2, at=2)), {"copies": 0}, 71_676),
    "three ranks, everything": World(3, calls(0, 1), {}, 228_627),
    "three ranks, a write": World(3, (Op("call", 0), Op("write", 0), Op("call", 1)), {"absences": 0}, 66_687),
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


class EndsTheEpochWithTheFirst(Coordinator):
    """One rank's end is the end of the epoch on all."""

    def _decide(self, number: int, reports: list[Report], now: float) -> Decision:
        decision = super()._decide(number, reports, now)
        ended = any(r.kind == "ended" for r in reports)
        return replace(decision, new_epoch=NewEpoch(max(r.call for r in reports), 0)) if ended else decision


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


class KeepsItsLease(SimRank):
    """A rank that has ended its epoch takes the leases of the others' rounds."""

    def _enter(self, epoch: NewEpoch | None) -> None:
        super()._enter(epoch)
        self._lease = self._left = 1


LEASES = calls(0, 1, 2, 3, 4)
UNEVEN = (*uneven(2, 1, at=0), *calls(2, 3))


@pytest.mark.parametrize(
    ("mutant", "acts", "found"),
    [
        ({"desk": DecidesAgain()}, LEASES, r"act \d has two answers|stand at"),
        ({"coordinator": EndsWithTheFirst}, LEASES, r"waits for round \d for ever"),
        ({"coordinator": NumbersFromTheRound}, LEASES, r"entry \d is the \d\. that was made"),
        ({"member": ComesTooEarly}, LEASES, "stand at"),
        ({"coordinator": EndsTheEpochWithTheFirst}, UNEVEN, r"act \d has two answers|stand at|for ever"),
        ({"member": KeepsItsLease}, UNEVEN, r"comes back with a lease"),
    ],
    ids=[
        "decides again",
        "ends with the first",
        "numbers from the round",
        "comes too early",
        "ends the epoch with the first",
        "keeps its lease",
    ],
)
def test_a_mutant_is_caught_and_the_way_to_it_is_told(mutant: dict[str, Any], acts: tuple[Op, ...], found: str) -> None:
    with pytest.raises(Violation, match=rf"(?s)({found}).*rank \d goes on\n.*arrives"):
        explore(Model(2, acts, log_frequency=4, **mutant))


def _explore(name: str, world: World, capsys: pytest.CaptureFixture[str]) -> None:
    facts = explore(Model(world.world_size, world.acts, **world.options))

    with capsys.disabled():
        print(f"\n{name}: {facts['states']} states, {facts['transitions']} transitions, {facts['ends']} ends")
    assert facts["states"] >= world.states
    assert facts["transitions"] > facts["states"]
    assert facts["ends"] > 1
