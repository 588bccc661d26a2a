from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from support.torchrun import Ran, torchrun


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("tree")
    tests = Path(__file__).parents[1]
    environ = {"PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}", "RES_OPTIONS": "timeout:1 attempts:1"}
    script = Path(__file__).with_name("tree_job.py")
    return torchrun(script, folder, nproc=5, folder=folder, timeout_s=100, environ=environ)


def results(job: Ran, name: str) -> list[Any]:
    return [job.result(rank)[name] for rank in range(5)]


def test_the_job_ends_cleanly(job: Ran) -> None:
    job.assert_clean()


def test_frames_of_any_sizes_are_merged_and_logs_that_have_closed_leave_nothing_open(job: Ran) -> None:
    for counts, wrong in results(job, "sizes"):
        assert not wrong
        assert len(set(counts)) == 1, counts


def test_a_process_group_of_ranks_on_several_nodes_has_a_log_of_its_own(job: Ran) -> None:
    merged = {"who": 8.0}
    assert results(job, "some") == [None, [0, 3, merged], None, [1, 3, merged], [2, 3, merged]]


def test_ranks_that_end_their_epochs_earlier_answer_the_others_and_every_batch_is_counted_once(job: Ran) -> None:
    assert results(job, "epochs")[0] == 2 * sum(4 + rank for rank in range(5))


def test_a_process_group_destroyed_before_close_still_gives_a_whole_last_entry(job: Ran) -> None:
    assert results(job, "destroyed")[0] == [[0, {"x": 5.0}, False], [3, {"x": 15.0}, False], [4, {"x": 5.0}, False]]
