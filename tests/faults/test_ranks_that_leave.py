from __future__ import annotations

import signal

import pytest

from support.fault_world import JobMaker, drawn

pytestmark = pytest.mark.timeout(100)


def test_an_exception_in_the_with_block_is_told_to_all_others_at_once_with_its_call_step_and_first_line(
    job: JobMaker,
) -> None:
    dice = drawn("leaves")
    jobs = {
        victim: (job(frequency=4, timeout=20), dice.randint(3, 30)) for victim in (0, 1)
    }  # it may fall into a lease
    for victim, (this, moment) in jobs.items():
        this.deed(victim, "throw", moment)
        this.start()

    for victim, (this, moment) in jobs.items():
        for text in this.assert_others_say("PeerFailed", victim, at_once=True):
            assert f"at call {moment}, step {moment - 1}, because" in text  # the last it came to
            assert "ValueError: the loss of batch 17 is not finite" in text
            assert "second line" not in text
        assert this.wait(victim, "raised")["text"].startswith("the loss of batch 17")
        assert this.release() == {0: 0, 1: 0, 2: 0}
        steps = [entry["step"] for entry in this.entries() if not entry.get("partial")]
        assert steps == list(range(0, moment, 4))


def test_sigterm_to_a_rank_that_waits_in_a_round_runs_its_handler_and_it_leaves_by_its_exception(
    job: JobMaker,
) -> None:
    jobs = {victim: job(timeout=30) for victim in (0, 1)}
    for this in jobs.values():
        this.deed(2, "wait", 5)
        this.start()

    for victim, this in jobs.items():
        # It names rank 2 alone, so rank 1 waits in the round as well.
        this.wait_for_warning(0, "for rank 2:")
        sent_at = this.signal(victim, signal.SIGTERM)
        assert this.wait(victim, "handler")["at"] - sent_at < 2
        assert this.wait(victim, "ended")["code"] == 7, "SystemExit did not end it, or something crashed on the way"
        this.allow(2)
        for failure in this.failures({0, 1, 2} - {victim}, sent_at).values():
            assert (failure["type"], failure["ranks"]) == ("PeerFailed", [victim])
            assert "at call 6, step 5, because its code raised SystemExit: 7" in failure["text"]
        assert this.release() == {0: 0, 1: 0, 2: 0, victim: 7}
        this.assert_logged_every_step()


def test_on_a_tree_of_nodes_an_exception_on_any_rank_is_told_to_the_ranks_of_all_nodes(job: JobMaker) -> None:
    jobs = {
        victim: job(size=5, timeout=20, nodes=[2, 2, 1]) for victim in (0, 2, 3)
    }  # root, a node's first, behind one
    for victim, this in jobs.items():
        this.deed(victim, "throw", 7)
        this.start()

    for victim, this in jobs.items():
        this.assert_others_say("PeerFailed", victim, at_once=True)
        assert this.release() == dict.fromkeys(range(5), 0)
