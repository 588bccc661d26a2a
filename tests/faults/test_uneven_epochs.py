"""Real ranks whose epochs are of different lengths: in any order, with long steps, and with ranks that go wrong."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pytest

from logsync.coordinator.frequency import FrequencyManager
from support.fault_world import FaultJob, JobMaker, drawn

SLOW = pytest.mark.slow

pytestmark = pytest.mark.timeout(100)

AFTER_FIRST_EPOCH = -2  # the moment between a rank's first end_epoch() and its next call


def expected(lengths: list[list[int]], frequency: int) -> list[int]:
    """Return the steps at which one manager that the lowest rank still in asks says that a log is due."""
    manager, due = FrequencyManager(frequency), []
    for epoch, of_ranks in enumerate(itertools.zip_longest(*lengths, fillvalue=0)):
        for step in range(100 * epoch, 100 * epoch + max(of_ranks)):
            if manager.log_ready(step):
                manager.log_written(step)
                due.append(step)
    return due


class Trains(NamedTuple):
    """A job, and what it trains."""

    job: FaultJob
    lengths: list[list[int]]
    frequency: int = 1


def assert_trained_to_the_end(jobs: Iterable[Trains]) -> None:
    for job, lengths, frequency in jobs:
        due = expected(lengths, frequency)
        for rank, of_rank in enumerate(lengths):
            done = job.wait(rank, "done", "failed")
            assert done["event"] == "done", job.events(rank)
            own = [step for step in due if step // 100 < len(of_rank) and step % 100 < of_rank[step // 100]]
            assert done["due"] == own, f"rank {rank} of {lengths}, frequency {frequency}"
        job.let_go()
    for job, lengths, frequency in jobs:
        assert_all_was_logged(job, lengths)
        due = expected(lengths, frequency)
        assert [entry["step"] for entry in job.entries()][: len(due)] == due


def assert_all_was_logged(job: FaultJob, lengths: list[list[int]]) -> None:
    assert job.release() == dict.fromkeys(range(job.size), 0)
    entries = job.entries()
    assert [entry["seq"] for entry in entries] == list(range(len(entries)))
    assert not [entry for entry in entries if entry.get("partial")]
    for rank, of_rank in enumerate(lengths):
        assert sum(entry.get(f"seen/rank{rank}", 0) for entry in entries) == sum(of_rank)


def every_pair(count: int) -> list[int]:
    """Return a row of numbers below `count` in which each is once next to each, itself included."""
    row = [place for a in range(count) for b in range(a, count) for place in ([a] if a == b else [a, b])]
    return [*row, row[0]]


def test_ranks_may_end_their_epochs_in_any_order_after_any_other_order(job: JobMaker) -> None:
    dice, jobs = drawn("orders"), []
    orders: dict[int, list[tuple[int, ...]]] = {size: list(itertools.permutations(range(size))) for size in (3, 4)}
    rows = {3: [orders[3][place] for place in every_pair(6)], 4: dice.sample(orders[4], 24)}
    assert set(itertools.pairwise(rows[3])) == set(itertools.product(orders[3], repeat=2))
    for size, row in rows.items():
        # Two ranks may end together, and a rank may have no batch at all.
        lengths = [[3 * order[rank] + dice.randrange(4) for order in row] for rank in range(size)]
        frequency = dice.choice([1, 3, 7])
        jobs.append(Trains(job(size=size, lengths=lengths, frequency=frequency, timeout=20), lengths, frequency))
        jobs[-1].job.start()

    assert_trained_to_the_end(jobs)


@pytest.mark.parametrize("ranks", [[0], pytest.param([1, 2], marks=SLOW)])
def test_a_step_longer_than_the_timeout_harms_nobody_where_all_others_have_ended(
    job: JobMaker, ranks: list[int]
) -> None:
    jobs = []
    for slow in ranks:
        lengths = [[20, 5] if rank == slow else [4, 5] for rank in range(3)]
        this = job(lengths=lengths, timeout=2)
        this.deed(slow, "sleep", 10, seconds=3.5)
        this.deed((slow + 1) % 3, "rest", AFTER_FIRST_EPOCH)  # the third one waits in its next call
        this.start()
        jobs.append(Trains(this, lengths))

    assert_trained_to_the_end(jobs)


@pytest.mark.parametrize("stays", [[1], pytest.param([0, 2, 3], marks=SLOW)])
def test_ranks_may_close_early_while_others_have_ended_or_train_on(job: JobMaker, stays: list[int]) -> None:
    dice, jobs = drawn("closes"), []
    for longest in stays:
        epochs = [4 if rank == longest else dice.randint(1, 3) for rank in range(4)]
        lengths = [[dice.randrange(15) for _ in range(count)] for count in epochs]
        frequency = dice.choice([1, 4])
        # Some leave the end of their last epoch to close().
        forgets = {rank: epochs[rank] - 1 for rank in range(4) if dice.random() < 0.5}
        this = job(size=4, lengths=lengths, frequency=frequency, forgets=forgets, timeout=20)
        this.start()
        jobs.append(Trains(this, lengths, frequency))

    assert_trained_to_the_end(jobs)


# -- a rank goes wrong -----------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What a rank does, when it trains on alone or has ended its epoch, and where the others are.

    Attributes:
        ended: the victim has ended its epoch and is in its own code; otherwise it is the only one that has not.
        others: "wait" in their next calls, "rest" in their own code, "train" on; or one trains and one rests.
    """

    victim: int
    deed: str
    ended: bool
    others: Sequence[str]

    @property
    def error(self) -> str:
        if self.deed == "throw":
            return "PeerFailed"
        if self.victim == 0:
            return "CoordinatorLost"
        return "PeerLost" if self.deed == "kill" else "RoundTimeout"


DEEDS = ("kill", "stop", "throw")
SOME = [
    Case(0, "kill", ended=False, others=("wait", "rest")),
    Case(1, "kill", ended=True, others=("rest", "train")),
    Case(2, "stop", ended=False, others=("wait", "rest")),
    Case(1, "throw", ended=False, others=("rest", "wait")),
]
ALL = [
    Case(victim, deed, ended, others)
    for ended, states in ((False, ("wait", "rest")), (True, ("train", "rest")))
    for others in itertools.product(states, repeat=2)
    for victim, deed in itertools.product(range(3), DEEDS)
    if "train" in others or not ended
]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(SOME, id="some"),
        *[
            pytest.param(list(cases), id=f"{deed}-{victim}{'-ended' if ended else ''}", marks=SLOW)
            for (victim, deed, ended), cases in itertools.groupby(sorted(ALL), lambda case: case[:3])
        ],
    ],
)
def test_a_rank_that_goes_wrong_while_some_have_ended_is_named_by_all_others(job: JobMaker, cases: list[Case]) -> None:
    dice, jobs = drawn("wrong"), []
    for case in cases:
        others = dict(zip(sorted({0, 1, 2} - {case.victim}), case.others, strict=True))
        trains = {rank for rank, does in others.items() if does == "train"} or {case.victim}
        this = job(lengths=[[90 if rank in trains else dice.randrange(6), 5] for rank in range(3)])
        this.deed(case.victim, case.deed, AFTER_FIRST_EPOCH if case.ended else dice.randint(10, 40))
        for rank, does in others.items():
            if does == "rest":
                this.deed(rank, "rest", AFTER_FIRST_EPOCH)
        this.start()
        jobs.append((this, case))

    for this, case in jobs:
        this.assert_others_say(case.error, case.victim)
        if case.deed == "stop":
            this.signal(case.victim, signal.SIGCONT)
    for this, case in jobs:
        if case.deed == "stop":
            this.wait(case.victim, "failed", "done")
        this.let_go()
    for this, case in jobs:
        assert this.release() == {0: 0, 1: 0, 2: 0, **({case.victim: -9} if case.deed == "kill" else {})}
        assert [entry["seq"] for entry in this.entries()] == list(range(len(this.entries())))


@pytest.mark.parametrize(
    "numbers", [(signal.SIGTERM, signal.SIGINT), pytest.param((signal.SIGINT, signal.SIGTERM), marks=SLOW)]
)
def test_a_signal_ends_the_wait_for_the_end_of_an_epoch_and_the_others_are_told(
    job: JobMaker, numbers: tuple[signal.Signals, signal.Signals]
) -> None:
    jobs = []
    for victim, number in enumerate(numbers):
        this = job(lengths=[[5, 5], [5, 5], [90, 5]], timeout=30)
        this.deed(2, "wait", 20)
        if victim == 1:
            this.deed(0, "rest", AFTER_FIRST_EPOCH)  # one that does not wait for the end itself
        this.start()
        jobs.append((this, victim, number, {"SIGTERM": 7, "SIGINT": -2}[number.name]))

    sent_at = {}
    for this, victim, number, _ in jobs:
        if victim == 0:
            this.wait_for_warning(0, "has ended its epoch and waits")
        this.wait(2, "fault")
        sent_at[victim] = this.signal(victim, number)
    for this, victim, _, code in jobs:
        assert this.wait(victim, "ended")["code"] == code
        this.allow(2)  # the other has ended before, and had not waited for this one
    for this, victim, _, code in jobs:
        for failure in this.failures({0, 1, 2} - {victim}, sent_at[victim]).values():
            assert (failure["type"], failure["ranks"]) == ("PeerFailed", [victim]), failure
            assert {7: "SystemExit: 7", -2: "KeyboardInterrupt"}[code] in failure["text"]
        this.let_go()
    for this, victim, _, code in jobs:
        assert this.release() == {0: 0, 1: 0, 2: 0, victim: code}


@pytest.mark.parametrize("cases", [[(0, 50), (1, 1)], pytest.param([(0, 1), (1, 50), (2, 50)], marks=SLOW)])
def test_a_rank_that_forgets_end_epoch_is_warned_of_by_the_lowest_that_waits(
    job: JobMaker, cases: list[tuple[int, int]]
) -> None:
    lengths = [[9, 6], [9, 7], [9, 8]]
    jobs = []
    for forgetful, frequency in cases:
        this = job(lengths=lengths, frequency=frequency, forgets={forgetful: 0}, timeout=20)
        this.deed(forgetful, "wait", 103)  # as in a collective of the training, which the others do not come to
        this.start()
        jobs.append((this, forgetful, frequency))

    for this, forgetful, frequency in jobs:
        lowest, other = [rank for rank in range(3) if rank != forgetful]
        text = this.wait_for_warning(lowest, "has ended its epoch and waits")
        assert "every rank calls end_epoch() as often as the others" in text
        if frequency == 1:
            assert f"for rank {forgetful} and maybe others" in text
            assert this.events(other, "warning") == []
        else:  # it is under a lease, and no round has told who still calls
            assert "for others to end theirs" in text
        this.allow(forgetful)
        for rank in range(3):
            assert this.wait(rank, "done", "failed")["event"] == "done", this.events(rank)
        this.let_go()
    for this, _, _ in jobs:
        assert_all_was_logged(this, lengths)
