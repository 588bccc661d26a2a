from __future__ import annotations

from pathlib import Path

import pytest

from support.torchrun import entries, plain_python, torchrun

SCRIPTS = Path(__file__).parent / "scripts"


def test_a_forgotten_close_ends_cleanly_and_writes_what_rank_0_had(tmp_path: Path) -> None:
    job = torchrun(SCRIPTS / "forgets_close.py", tmp_path, nproc=2, folder=tmp_path)
    job.assert_clean()

    assert [job.result(rank) for rank in range(2)] == [True, True]
    assert "was not closed" in job.output
    logged = entries(tmp_path)
    assert [(entry["step"], entry["loss"]) for entry in logged[:-1]] == [(0, 0.5), (10, 6.0), (20, 16.0)]
    assert (logged[-1]["step"], logged[-1]["loss"], logged[-1]["partial"]) == (24, 22.5, True)
    assert logged[-1]["ranks"] == {"loss": 1}


def test_plain_python_logs_alone_without_torch_and_says_why(tmp_path: Path) -> None:
    job = plain_python(SCRIPTS / "alone.py", tmp_path, folder=tmp_path)
    job.assert_clean()

    assert job.result(0) == {"transport": "local", "torch": False}
    assert job.output.count("single-node fallback") == 1
    assert [entry["step"] for entry in entries(tmp_path)] == [0, 10, 20, 24]


def test_a_launch_by_torchrun_without_a_process_group_is_an_error_with_both_ways_out(tmp_path: Path) -> None:
    job = plain_python(SCRIPTS / "alone.py", tmp_path, folder=tmp_path, environ={"RANK": "1", "WORLD_SIZE": "2"})

    assert job.returncode == 1
    assert "LaunchError: torchrun started this process as rank 1 of 2" in job.output
    assert "torch.distributed.init_process_group()" in job.output
    assert "transport='local'" in job.output
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(("there", "missing"), [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_a_launchers_environment_is_an_error_that_names_the_other_half(
    tmp_path: Path, there: str, missing: str
) -> None:
    job = plain_python(SCRIPTS / "alone.py", tmp_path, folder=tmp_path, environ={there: "1"})

    assert job.returncode == 1
    assert f"LaunchError: {there}=1 is set, but {missing} is missing" in job.output


def test_a_world_of_one_needs_no_process_group(tmp_path: Path) -> None:
    job = plain_python(SCRIPTS / "alone.py", tmp_path, folder=tmp_path, environ={"RANK": "0", "WORLD_SIZE": "1"})
    job.assert_clean()

    assert job.result(0)["transport"] == "local"
