"""With on_failure="detach" a lost group is told once, and every rank trains on."""

from __future__ import annotations

import signal

import pytest

from support.fault_world import FaultJob, JobMaker, drawn

pytestmark = pytest.mark.timeout(100)

STEPS = 1200


def test_all_others_train_on_when_a_rank_is_killed_stopped_or_leaves_and_rank_0_logs_its_own(job: JobMaker) -> None:
    moment = drawn("detached").randint(3, 30)
    jobs = {deed: job(on_failure="detach", steps=STEPS) for deed in ("kill", "stop", "throw")}
    for deed, this in jobs.items():
        this.deed(1, deed, moment)
        this.start()

    for deed, this in jobs.items():
        for rank in (0, 2):
            assert_trained_on(this, rank, culprit=1)
        if deed == "stop":
            this.signal(1, signal.SIGCONT)
            assert_trained_on(this, 1, culprit=0)
        this.release()
        logged = this.entries()
        assert [(entry["seq"], entry["step"]) for entry in logged] == [(step, step) for step in range(STEPS)]
        assert [entry.get("partial", False) for entry in logged] == [step >= moment for step in range(STEPS)]
        assert all(entry["ranks"] == {"x": 1} for entry in logged[moment:])
        assert [entry["x"] for entry in logged] == [float(step) for step in range(STEPS)]


def test_the_others_train_on_when_rank_0_is_killed(job: JobMaker) -> None:
    this = job(on_failure="detach", steps=STEPS)
    this.deed(0, "kill", 20)
    this.start()

    for rank in (1, 2):
        assert_trained_on(this, rank, culprit=0)
    this.release()
    this.assert_logged_every_step()


def assert_trained_on(this: FaultJob, rank: int, *, culprit: int) -> None:
    done = this.wait(rank, "done", "failed", "raised")
    assert (done["event"], done["step"]) == ("done", STEPS - 1)
    told = [event["text"] for event in this.events(rank, "warning") if event["level"] == "ERROR"]
    assert len(told) == 1, told
    assert f"rank {rank} has lost the others and trains on" in told[0]
    assert f"rank {culprit}" in told[0].partition("The reason:")[2]
