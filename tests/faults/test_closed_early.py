"""A rank that closed early waits without a timeout of its own; it does not wait for the dead."""

from __future__ import annotations

import signal

import pytest

from support.fault_world import JobMaker, drawn

SLOW = pytest.mark.slow

pytestmark = pytest.mark.timeout(100)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            [(2, 1, "kill_soon", "PeerLost"), (0, 1, "kill_soon", "PeerLost"), (2, 1, "stop", "RoundTimeout")],
            id="some",
        ),
        pytest.param(
            [
                (0, 1, "stop", "RoundTimeout"),
                (2, 0, "kill_soon", "CoordinatorLost"),
                (2, 0, "stop", "CoordinatorLost"),
            ],
            id="more",
            marks=SLOW,
        ),
    ],
)
def test_a_rank_that_closed_early_fails_with_the_others_when_one_is_lost(
    job: JobMaker, cases: list[tuple[int, int, str, str]]
) -> None:
    dice = drawn("closed")
    jobs = [job() for _ in cases]
    for this, (closed, victim, deed, _) in zip(jobs, cases, strict=True):
        this.deed(closed, "close", 5)
        this.deed(victim, deed, dice.randint(20, 40), seconds=dice.uniform(0, 0.02))
        this.start()

    for this, (_, victim, deed, error) in zip(jobs, cases, strict=True):
        this.assert_others_say(error, victim)
        if deed == "stop":
            this.signal(victim, signal.SIGCONT)
        this.release()
        this.assert_logged_every_step()


@pytest.mark.parametrize("deed", ["stop", pytest.param("kill", marks=SLOW)])
def test_a_rank_that_closed_early_does_not_wait_for_a_lost_one_while_the_next_round_is_far_away(
    job: JobMaker, deed: str
) -> None:
    this = job()
    this.deed(2, "close", 5)
    this.deed(0, "wait", 10)  # a long step: nobody is in a round but the rank that closed
    this.deed(1, deed, 10)
    this.start()

    this.assert_others_say("RoundTimeout", 1, ranks=[2])
    this.allow(0)
    assert this.failures([0], this.wait(2, "failed")["at"])[0]["ranks"] == [1]
    if deed == "stop":
        this.signal(1, signal.SIGCONT)
    this.release()
    this.assert_logged_every_step()
