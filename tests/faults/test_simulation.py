"""Whole jobs with lost ranks, lost messages and restarts, simulated; and that the simulator would notice."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import PeerLost
from logsync.coordinator.host import Host
from logsync.coordinator.messages import LogEntry, Report, Settings, Window, decode_decision, encode
from logsync.coordinator.sinks.base import RunInfo, SinkSet
from logsync.workers.training_log import TrainingLog
from logsync.workers.transports.base import Position
from logsync.workers.transports.base import Root as RootFunction
from support.lockstep import Lockstep, settings
from support.simulator import (
    Broken,
    Fault,
    Life,
    Member,
    Noise,
    Op,
    Parts,
    Root,
    Scenario,
    draw,
    fails,
    shrink,
    simulate,
)

SEEDS = 2000
SIMULATIONS = int(os.environ.get("LOGSYNC_SIMULATIONS", "100000"))


def test_jobs_keep_their_promises_whatever_goes_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    facts = _search(range(SEEDS))

    with capsys.disabled():
        print(f"\n{_told(facts)}")
    for exercised in (
        "agreed errors",
        "clean ends",
        "dies",
        "doubled messages",
        "early closes",
        "entries",
        "killed",
        "leased calls",
        "lost messages",
        "raises",
        "requests again",
        "resumed",
        "rollbacks",
        "slow messages",
        "stalls",
    ):
        assert facts[exercised] >= 50, exercised


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_jobs_keep_their_promises_whatever_goes_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    facts = _search(range(SEEDS, SEEDS + SIMULATIONS))

    with capsys.disabled():
        print(f"\n{_told(facts)}")
    assert facts["runs"] == SIMULATIONS


def test_a_seed_gives_the_same_scenario_and_the_same_run() -> None:
    for seed in range(20):
        assert draw(seed) == draw(seed)
        assert simulate(draw(seed)) == simulate(draw(seed))


def test_a_job_without_faults_ends_cleanly_with_every_value() -> None:
    ops = tuple(Op("call", step, records=0b111) for step in range(20))

    facts = simulate(Scenario(ops, (Life(3),), log_frequency=5, jitter=1))

    assert (facts["clean ends"], facts["values"], facts["lost values"]) == (1, 60, 0)
    assert facts["entries"] == 5  # steps 0, 5, 10, 15 and what was left


def test_what_a_dead_rank_takes_along_is_no_more_than_its_last_window() -> None:
    ops = tuple(Op("call", step, records=0b11) for step in range(10))

    facts = simulate(Scenario(ops, (Life(2, faults=(Fault("dies", 1, 8),)),), log_frequency=5))

    # Entries at 0 and 5; of the steps 6 to 9 rank 0 has its own values, and rank 1 has lost those of 6 and 7.
    assert (facts["dies"], facts["values"], facts["lost values"]) == (1, 6 + 6 + 4, 2)


def test_a_lost_reply_is_sent_again_and_not_decided_again() -> None:
    ops = tuple(Op("call", step) for step in range(6))

    facts = simulate(Scenario(ops, (Life(2, noise=(Noise("lost", up=False, rank=1, round=1),)),), log_frequency=1))

    assert facts["requests again"] >= 1
    assert facts["rounds"] == 1 + 6 + 1


# -- the simulator would notice ----------------------------------------------------------------------------------------


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


class KeepsNothingThatWasRefused(Member):
    """A refused frame's values are gone."""

    def refuse(self) -> None:
        pass


class GivesBackWhatTheRootHasTaken(Member):
    """The root's own rank lost its reply, and writes the values of the entry once more."""

    def in_an_entry(self) -> bool:
        return False


class CheckpointsBeforeTheFileHasTheEntry(Member):
    """The state counts an entry that is still held for annotate(), and a kill loses."""

    brings_its_loaded_entry = False


class LeavesBeforeItsStateCounts(Member):
    """What is left after a load and before a round goes to a new file."""

    tells_its_host_of_a_loaded_state = False


@pytest.mark.parametrize(
    ("parts", "rules", "seeds"),
    [
        (Parts(root=DecidesAgain), {"agreement", "termination"}, range(50)),
        (Parts(root=NeverAnswersAgain), {"termination"}, range(100)),
        (Parts(root=FlipsOneAnswer), {"agreement"}, range(20)),
        (Parts(root=LeasesOneRankLess), {"agreement"}, range(20)),
        (Parts(coordinator=ForgetsTheSeq), {"seq", "values"}, range(100)),
        (Parts(coordinator=ForgetsWhatIsMissing), {"partial"}, range(200)),
        (Parts(coordinator=IgnoresRollbacks), {"steps"}, range(300)),
        (Parts(coordinator=DropsWhatTheAbsentRecorded), {"values"}, range(100)),
        (Parts(member=KeepsNothingThatWasRefused), {"values"}, range(200)),
        (Parts(member=GivesBackWhatTheRootHasTaken), {"values"}, range(800, 2000)),
        (Parts(member=CheckpointsBeforeTheFileHasTheEntry), {"seq", "values"}, range(1500)),
        (Parts(member=LeavesBeforeItsStateCounts), {"seq", "values"}, range(1500)),
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
    assert small.size <= 12, f"seed {seed}: {found}\n{small}"


def test_a_failure_names_its_seed_and_the_shrunk_scenario() -> None:
    with pytest.raises(AssertionError, match=r"(?s)seed \d+: agreement: .*shrunk, .*life 0: 2 ranks"):
        _search(range(20), Parts(root=FlipsOneAnswer))


# -- what it found in the library --------------------------------------------------------------------------------------


class _Loses:
    """A transport of one rank that can lose the reply after the root has decided."""

    name = "loses"
    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.lost = False
        self.lost_before = False

    def start(self, root: RootFunction | None, position: Position | None = None) -> None:  # noqa: ARG002 - nobody asks
        assert root is not None
        self.root = root

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:  # noqa: ARG002 - nobody to wait for
        reply = b"" if self.lost_before else self.root([frame])
        if self.lost or self.lost_before:
            msg = "rank 1 ended"
            raise PeerLost(msg, ranks=(1,))
        return reply

    def close(self, reason: str | None = None) -> None:
        pass


class _Lines:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.runs: list[RunInfo] = []
        self.entries: list[LogEntry] = []

    def open(self, run: RunInfo) -> None:
        self.runs.append(run)

    def write(self, entry: LogEntry) -> None:
        self.entries.append(entry)

    def close(self) -> None:
        pass


def _log(config: Settings) -> tuple[TrainingLog, _Loses, _Lines]:
    transport, lines = _Loses(), _Lines()
    coordinator = Coordinator(config, 1, run="run", run_dir="runs/x")
    host = Host(coordinator, SinkSet([lines]), name="train", world_size=1)
    log = TrainingLog(transport, config, host)
    log._open("1")
    return log, transport, lines


def test_a_reply_that_is_lost_after_the_decision_does_not_write_the_values_twice() -> None:
    log, transport, lines = _log(settings(2))

    def train() -> None:
        with log:
            for step in range(3):
                transport.lost = step == 2
                log.record({"x": 1.0}, reduce="sum")
                log.log_ready(step)

    with pytest.raises(PeerLost):
        train()

    assert sum(entry.metrics["x"] for entry in lines.entries) == 3.0


def test_an_entry_that_a_checkpoint_counts_comes_back_with_it() -> None:
    killed, _, lines = _log(settings(2))
    killed.record({"x": 1.0})
    assert killed.log_ready(0)
    assert lines.entries == []  # held for annotate() when the job is killed
    state = killed.state_dict()
    killed._host = None
    killed._leave()

    log, _, lines = _log(settings(2))
    log.load_state_dict(state)
    assert log.last_entry == killed.last_entry
    log.log_ready(1)
    log.close()

    assert [run.last_entry for run in lines.runs] == [killed.last_entry]
    assert [run.next_seq for run in lines.runs] == [1]


def test_what_is_left_after_a_load_and_before_a_round_does_not_start_a_new_file() -> None:
    first, _, _ = _log(settings(2))
    with first:
        first.log_ready(0)
        state = first.state_dict()
    log, transport, lines = _log(settings(2))
    log.load_state_dict(state)

    def train() -> None:
        with log:
            log.record({"x": 1.0})
            log.log_ready(1)

    transport.lost_before = True
    with pytest.raises(PeerLost):
        train()

    assert all(run.resumed for run in lines.runs)
    assert all(entry.seq >= 1 for entry in lines.entries)


def test_a_write_behind_the_last_log_is_told_as_a_rollback() -> None:
    world = Lockstep(2, settings(3))
    world.call([18, 18])

    assert any("the step went back" in notice for notice in world.write([13, 13]).notices)


def test_a_write_after_rank_0_has_closed_does_not_put_an_entry_behind_the_last_one() -> None:
    world = Lockstep(2, settings(3, frequency_type="epoch"))
    world.call([23.0, 22.77])
    first = world.ranks[0].last_entry

    second = world._exchange([world.ranks[0]._frame("closed"), world.ranks[1]._frame("write", 22.77)])

    assert first is not None
    assert second.entry is not None
    assert (first.step, second.entry.step) == (23.0, 23.0) or second.notices


def _search(seeds: range, parts: Parts | None = None) -> Counter[str]:
    facts: Counter[str] = Counter()
    parts = parts or Parts()
    for seed in seeds:
        scenario = draw(seed)
        try:
            facts.update(simulate(scenario, parts))
        except Exception as error:
            small = shrink(scenario, parts)
            told = f"{error}" if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
            msg = f"seed {seed}: {told}\nshrunk, it says: {fails(small, parts)}\n{small}"
            raise AssertionError(msg) from error
    return facts


def _told(facts: Counter[str]) -> str:
    return "simulated: " + ", ".join(f"{facts[name]} {name}" for name in sorted(facts))
