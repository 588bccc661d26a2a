from __future__ import annotations

import re
import signal

import pytest

from support.fault_world import JobMaker, drawn

SLOW = pytest.mark.slow

pytestmark = pytest.mark.timeout(100)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            [(2, False, "RoundTimeout"), (0, False, "CoordinatorLost"), (0, True, "CoordinatorLost")], id="some"
        ),
        pytest.param([(1, False, "RoundTimeout"), (1, True, "RoundTimeout")], id="more", marks=SLOW),
    ],
)
def test_a_stopped_rank_is_named_by_all_others_and_fails_as_well_once_it_goes_on(
    job: JobMaker, cases: list[tuple[int, bool, str]]
) -> None:
    dice = drawn("stopped")
    jobs = [job(store_on_rank_0=on_rank_0) for _, on_rank_0, _ in cases]
    for this, (victim, _, _) in zip(jobs, cases, strict=True):
        this.deed(victim, "stop", dice.randint(3, 30))
        this.start()

    for this, (victim, _, error) in zip(jobs, cases, strict=True):
        this.assert_others_say(error, victim)
        goes_on_at = this.signal(victim, signal.SIGCONT)
        failure = this.failures([victim], goes_on_at)[victim]
        assert failure["type"] in {"RoundTimeout", "PeerLost", "CoordinatorLost"}
        assert set(failure["ranks"]) <= {victim}, f"it blames another rank: {failure}"
        assert this.release() == {0: 0, 1: 0, 2: 0}
        this.assert_logged_every_step()


@pytest.mark.slow
def test_a_root_that_is_starved_for_10_s_is_waited_for_within_the_timeout_and_lost_beyond_it(job: JobMaker) -> None:
    starved_s, dice = 10, drawn("starved")
    waited_for = {"starve": job(timeout=40, steps=60), "stop": job(timeout=40, steps=60)}
    given_up = job()
    for deed, this in [*waited_for.items(), ("starve", given_up)]:
        this.deed(0, deed, dice.randint(3, 50), seconds=starved_s)
        this.start()

    given_up.assert_others_say("CoordinatorLost", 0)
    at = waited_for["stop"].fault_at(0)
    waited_for["stop"].wait_until(at + starved_s)
    waited_for["stop"].signal(0, signal.SIGCONT)
    for this in waited_for.values():
        for rank in range(3):
            assert this.wait(rank, "done", "failed")["event"] == "done"
        moment = this.deed_of(0)["moment"]
        known = rf"took part in round {moment}, the last one|was last heard of at call {moment}, step {moment - 1}"
        place = rf"round \d+ has waited \d+ s for rank 0: rank 0 on \S+ \(pid \d+\) ({known}).*"
        warnings = [event["text"] for event in this.events(1, "warning")]
        # The first may come before rank 2 has said that it waits as well.
        assert len([text for text in warnings if re.fullmatch(place, text)]) >= starved_s - 3, warnings
        assert len(this.events(2, "warning")) <= 1  # as above, where rank 1 has not said it yet
        assert this.release() == {0: 0, 1: 0, 2: 0}
        assert [(entry["seq"], entry["step"]) for entry in this.entries()] == [(step, step) for step in range(60)]
    failure = given_up.failures([0], given_up.fault_at(0) + starved_s)[0]
    assert set(failure["ranks"]) <= {0}, f"it blames another rank: {failure}"
    assert given_up.release() == {0: 0, 1: 0, 2: 0}
    given_up.assert_logged_every_step()


@pytest.mark.parametrize("late_s", [0.7, pytest.param(1.4, marks=SLOW), pytest.param(2.5, marks=SLOW)])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_comes_after_the_timeout_is_named_by_all_itself_included(
    job: JobMaker, victim: int, late_s: float
) -> None:
    this = job()
    this.deed(victim, "sleep", drawn("late").randint(3, 30), seconds=this.timeout + late_s)
    this.start()

    this.assert_others_say("RoundTimeout", victim, ranks=range(3))
    assert this.release() == {0: 0, 1: 0, 2: 0}
    this.assert_logged_every_step()


def test_a_rank_slower_than_warn_after_is_named_by_the_lowest_waiting_rank_and_the_round_completes(
    job: JobMaker,
) -> None:
    jobs = {0: job(steps=10, timeout=7), 2: job(steps=10, timeout=7)}
    for slow, this in jobs.items():
        this.deed(slow, "wait", 5)
        this.start()

    for slow, this in jobs.items():
        lowest, quiet = [rank for rank in range(3) if rank != slow]
        warning = this.wait_for_warning(lowest, f"for rank {slow}:")
        again = this.wait_for_warning(lowest, f"waited 2 s for rank {slow}:")
        this.allow(slow)
        for rank in range(3):
            assert this.wait(rank, "done", "failed")["event"] == "done"

        pid = this.wait(slow, "here")["pid"]
        place = rf"rank {slow} on \S+ \(pid {pid}\) was last heard of at call 5, step 4"
        for text in (warning, again):
            assert re.fullmatch(rf"round 6 has waited [12] s for rank {slow}: {place}", text), text
        assert this.events(quiet, "warning") == []
        assert this.release() == {0: 0, 1: 0, 2: 0}
        assert [entry["step"] for entry in this.entries()] == list(range(10))


def test_on_a_tree_of_nodes_a_stopped_rank_is_named_by_those_of_other_nodes_too_and_fails_as_well(
    job: JobMaker,
) -> None:
    victims = {2: job(size=5, nodes=[2, 2, 1]), 3: job(size=5, nodes=[2, 2, 1])}  # first on its node, and behind one
    for victim, this in victims.items():
        this.deed(victim, "stop", 10)
        this.start()

    for victim, this in victims.items():
        this.assert_others_say("RoundTimeout", victim)
        failure = this.failures([victim], this.signal(victim, signal.SIGCONT))[victim]
        assert set(failure["ranks"]) <= {victim}, f"it blames another rank: {failure}"
        assert this.release() == dict.fromkeys(range(5), 0)
        this.assert_logged_every_step()
