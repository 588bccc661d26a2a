from __future__ import annotations

import itertools
import signal
from typing import Any

import pytest

from logsync.coordinator.frequency import FrequencyManager
from support.fault_world import FaultJob, JobMaker, drawn

SLOW = pytest.mark.slow

pytestmark = pytest.mark.timeout(100)

AFTER_FIRST_EPOCH = -2  # the moment between a rank's first end_epoch() and its next call


def expected(lengths: list[list[int]], frequency: int) -> list[int]:
    """Return the steps at which one manager that the lowest rank still in asks says that a log is due."""
    manager, due = FrequencyManager(frequency), []
    for epoch in range(len(lengths[0])):
        for step in range(100 * epoch, 100 * epoch + max(of_rank[epoch] for of_rank in lengths)):
            if manager.log_ready(step):
                manager.log_written(step)
                due.append(step)
    return due


def assert_trained_to_the_end(job: FaultJob, lengths: list[list[int]], frequency: int = 1) -> None:
    for rank in range(job.size):
        assert job.wait(rank, "done", "failed")["event"] == "done", job.events(rank)
    assert job.release() == dict.fromkeys(range(job.size), 0)
    entries = job.entries()
    due = expected(lengths, frequency)
    assert [entry["step"] for entry in entries][: len(due)] == due
    assert [entry["seq"] for entry in entries] == list(range(len(entries)))
    for rank, of_rank in enumerate(lengths):
        assert sum(entry.get(f"seen/rank{rank}", 0) for entry in entries) == sum(of_rank)


@pytest.mark.parametrize(
    "orders",
    [
        pytest.param([(0, 1, 2), (2, 1, 0)], id="some"),
        pytest.param(list(itertools.permutations(range(3)))[1:5], id="others", marks=SLOW),
    ],
)
def test_ranks_may_end_their_epochs_in_any_order(job: JobMaker, orders: list[tuple[int, ...]]) -> None:
    dice, jobs = drawn("orders"), []
    for order in orders:
        frequency = dice.choice([1, 3, 7])
        lengths = [[5 + 9 * order[rank] + dice.randrange(9), dice.randrange(30)] for rank in range(3)]
        jobs.append((job(lengths=lengths, frequency=frequency), lengths, frequency))
        jobs[-1][0].start()

    for this, lengths, frequency in jobs:
        assert_trained_to_the_end(this, lengths, frequency)


@pytest.mark.parametrize("slow", [0, pytest.param(2, marks=SLOW)])
def test_a_step_longer_than_the_timeout_harms_nobody_where_all_others_have_ended(job: JobMaker, slow: int) -> None:
    lengths = [[20, 5] if rank == slow else [4, 5] for rank in range(3)]
    this = job(lengths=lengths, timeout=2)
    this.deed(slow, "sleep", 10, seconds=5)
    this.start()

    assert_trained_to_the_end(this, lengths)


LONG: list[list[int]] = [[5, 5], [5, 5], [5, 5]]
WHO_DIES: list[Any] = [
    # the victim trains on, the others have ended and wait in their next call
    (0, "kill", 20, "CoordinatorLost"),
    (2, "kill", 20, "PeerLost"),
    pytest.param((2, "stop", 20, "RoundTimeout"), marks=SLOW),
    pytest.param((1, "throw", 20, "PeerFailed"), marks=SLOW),
    pytest.param((0, "throw", 20, "PeerFailed"), marks=SLOW),
    # the victim has ended and is in its own code, the others train on
    (1, "kill", AFTER_FIRST_EPOCH, "PeerLost"),
    pytest.param((0, "kill", AFTER_FIRST_EPOCH, "CoordinatorLost"), marks=SLOW),
    pytest.param((2, "throw", AFTER_FIRST_EPOCH, "PeerFailed"), marks=SLOW),
]


@pytest.mark.parametrize("case", WHO_DIES, ids=lambda case: f"{case[1]}-{case[0]}-{case[2]}")
def test_a_rank_that_goes_wrong_while_some_have_ended_is_named_by_all_others(
    job: JobMaker, case: tuple[int, str, int, str]
) -> None:
    victim, deed, moment, error = case
    trains_on = moment >= 0
    lengths = [[90 if (rank == victim) == trains_on else 5, 5] for rank in range(3)]
    this = job(lengths=lengths)
    this.deed(victim, deed, moment)
    this.start()

    this.assert_others_say(error, victim)
    if deed == "stop":
        this.signal(victim, signal.SIGCONT)
        this.wait(victim, "failed", "done")
    codes = this.release()
    assert {rank: code for rank, code in codes.items() if rank != victim} == {r: 0 for r in range(3) if r != victim}
    assert [entry["seq"] for entry in this.entries()] == list(range(len(this.entries())))


def test_a_rank_that_has_ended_and_waits_ends_at_sigterm_and_the_others_name_it(job: JobMaker) -> None:
    lengths = [[90, 5], [5, 5], [5, 5]]
    this = job(lengths=lengths)
    this.deed(0, "wait", 20)
    this.start()
    this.wait(0, "fault")
    at = this.signal(1, signal.SIGTERM)
    assert this.wait(1, "handler")["at"] - at < 2
    assert this.wait(1, "ended")["code"] == 7
    this.allow(0)

    failures = this.failures([0, 2], this.wait(0, "fault")["at"] + 5)
    assert {failure["type"] for failure in failures.values()} == {"PeerFailed"}
    assert all(failure["ranks"] == [1] for failure in failures.values())
    assert this.release() == {0: 0, 1: 7, 2: 0}


def test_a_rank_that_forgets_end_epoch_is_waited_for_with_a_warning_that_says_so(job: JobMaker) -> None:
    lengths = [[5, 5], [90, 5], [5, 5]]
    this = job(lengths=lengths)
    this.deed(1, "wait", 20)
    this.start()

    text = this.wait_for_warning(0, "has ended its epoch")
    assert "every rank calls end_epoch() as often as the others" in text
    assert "for rank 1 and maybe others" in text
    this.allow(1)
    assert_trained_to_the_end(this, lengths)
