from __future__ import annotations

from pathlib import Path

import pytest

from support.torchrun import Ran, entries, torchrun

TIMEOUT_S = 20


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    script = Path(__file__).parent / "scripts" / "raises.py"
    folder = tmp_path_factory.mktemp("raises")
    return torchrun(script, folder, nproc=2, folder=folder, timeout_s=90)


def test_an_exception_in_the_with_block_makes_torchrun_fail_and_is_shown(job: Ran) -> None:
    assert job.returncode != 0
    assert "MistakeError: rank 0 divides by zero" in job.output


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_users_exception_comes_out_of_the_with_block_unchanged_and_at_once(job: Ran, culprit: int) -> None:
    outcome = job.result(culprit, f"rank{culprit}_raises")

    assert outcome["error"] == "MistakeError"
    assert outcome["text"] == f"rank {culprit} divides by zero"
    assert outcome["seconds"] < TIMEOUT_S / 2, "it waited for the other rank"


@pytest.mark.parametrize("culprit", [0, 1])
def test_when_one_rank_raises_the_others_next_round_fails_without_waiting_for_the_timeout(
    job: Ran, culprit: int
) -> None:
    outcome = job.result(1 - culprit, f"rank{culprit}_raises")

    assert outcome["transport_error"], outcome
    assert outcome["step"] == 29, "the error comes from the next round, at step 30"
    assert outcome["seconds"] < TIMEOUT_S / 2


@pytest.mark.parametrize("culprit", [0, 1])
def test_the_other_ranks_error_says_who_raised_what_at_which_call_and_step(job: Ran, culprit: int) -> None:
    outcome = job.result(1 - culprit, f"rank{culprit}_raises")

    assert outcome["error"] == "PeerFailed"
    assert outcome["text"].startswith(f"rank {culprit} on ")
    assert f"MistakeError: rank {culprit} divides by zero" in outcome["text"]
    assert "at call 25, step 24," in outcome["text"]  # its last one; it raised before the call of step 25


@pytest.mark.parametrize(("culprit", "last_step"), [(0, 24), (1, 30)])
def test_after_an_exception_the_file_parses_and_ends_with_rank_0s_window_marked_partial(
    job: Ran, culprit: int, last_step: int
) -> None:
    logged = entries(job.folder / f"rank{culprit}_raises")

    assert [(entry["seq"], entry["step"]) for entry in logged[:-1]] == [(0, 0), (1, 10), (2, 20)]
    assert not any("partial" in entry for entry in logged[:-1])
    assert logged[-1]["partial"] is True
    assert logged[-1]["step"] == last_step
    assert logged[-1]["ranks"] == {"loss": 1}
    assert logged[-1]["loss"] == {0: 23.0, 1: 25.5}[culprit]
