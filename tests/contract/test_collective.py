from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from support.torchrun import Ran, torchrun


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("collective")
    tests = Path(__file__).parents[1]
    return torchrun(
        Path(__file__).with_name("collective_job.py"),
        folder,
        nproc=3,
        folder=folder,
        timeout_s=100,
        environ={"PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}"},
    )


def results(job: Ran, name: str) -> list[Any]:
    return [job.result(rank)[name] for rank in range(3)]


def test_the_job_ends_cleanly(job: Ran) -> None:
    job.assert_clean()


def test_the_reply_goes_by_one_broadcast_a_round_on_our_own_group_and_nothing_on_the_default_one(job: Ran) -> None:
    for result in results(job, "broadcasts"):
        # Logs at 0, 10, 20 and 30, and one round more in the first interval.
        assert result == {"rounds": 5, "broadcasts": [[False, "logsync", "torch.uint8", 0]] * 5}


def test_a_process_group_gives_a_log_to_some_ranks(job: Ran) -> None:
    assert results(job, "some_ranks") == [None, [0, 2, True, {"who": 3.0}], [1, 2, False, {"who": 3.0}]]


def test_file_descriptors_do_not_grow_with_rounds_or_with_closed_logs(job: Ran) -> None:
    for counts in results(job, "files"):
        assert len(set(counts[1:])) == 1, counts


def test_a_forked_child_is_refused_and_its_parent_goes_on(job: Ran) -> None:
    assert results(job, "fork") == [[7, True]] * 3


def test_signal_handlers_run_while_a_rank_waits_in_a_round(job: Ran) -> None:
    assert results(job, "signal") == [[True, True]] * 3


def test_a_process_group_destroyed_before_close_still_gives_a_whole_last_entry(job: Ran) -> None:
    root, *others = results(job, "destroyed")

    assert root == [[0, {"x": 3.0}, False], [10, {"x": 30.0}, False], [14, {"x": 12.0}, False]]
    assert others == [[], []]
