from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.torchrun import Ran, entries, plain_python, torchrun

SCRIPT = Path(__file__).parent / "scripts" / "healthy.py"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("healthy")
    return torchrun(SCRIPT, folder, nproc=2, folder=folder, timeout_s=100)


def both(job: Ran, name: str) -> list[Any]:
    return [job.result(rank, name) for rank in range(2)]


def test_every_scenario_comes_to_its_end_and_the_job_leaves_with_0(job: Ran) -> None:
    job.assert_clean()


def test_loaders_of_100_and_101_batches_agree_for_1000_calls_with_one_round_per_log(job: Ran) -> None:
    ours, theirs = both(job, "uneven_epochs")
    due = [call % 10 == 0 for call in range(1000)]

    assert ours == theirs
    assert ours["answers"] == due
    assert ours["calls"] == 1000
    assert ours["rounds"] == sum(due) + 1


def test_entries_of_uneven_loaders_carry_the_epochs_of_rank_0(job: Ran) -> None:
    logged = entries(job.folder / "uneven_epochs")

    assert [entry["step"] for entry in logged[:-1]] == [call / 100 for call in range(0, 1000, 10)]
    assert logged[-1]["step"] == 9.99
    assert [entry["batch"] for entry in logged[1:-1]] == [call - 4.5 for call in range(10, 1000, 10)]


def test_a_body_that_works_on_rank_0_only_holds_nobody_up(job: Ran) -> None:
    steps = [0, 10, 20, 30, 40, 50]
    folder = job.folder / "rank_0_only_body"

    assert [result["ready"] for result in both(job, "rank_0_only_body")] == [steps, steps]
    assert sorted(path.name for path in folder.glob("*.txt")) == sorted(f"step{step}.txt" for step in steps)
    assert (folder / "step20.txt").read_text() == "15.5"
    assert all("norm" in entry for entry in entries(folder)[:-1])


def test_torchrun_and_plain_python_log_at_the_same_steps(job: Ran, tmp_path: Path) -> None:
    alone = plain_python(SCRIPT, tmp_path, "schedules", folder=tmp_path)
    alone.assert_clean()
    ours, theirs = both(job, "schedules")

    assert ours == theirs == alone.result(0, "schedules")
    assert ours["step"] == [0, 7, 14, 21, 28, 35, 42, 49, 57, 64, 71, 78, 85, 92, 99]  # write() at 50 counts
    assert ours["no_lease"] == ours["step"]
    assert ours["on_update"] == [0, 25, 50, 75, 100]
    for name in ours:
        together, single = entries(job.folder / "schedules" / name), entries(tmp_path / "schedules" / name)
        assert [(e["seq"], e["step"], e.get("call")) for e in together] == [
            (e["seq"], e["step"], e.get("call")) for e in single
        ]


def test_a_log_between_the_collectives_of_ddp_changes_nothing_in_the_training(job: Ran) -> None:
    for result in both(job, "ddp"):
        assert result["weights"] == result["without"]


def test_under_ddp_every_rank_gets_the_weighted_mean_of_all_losses(job: Ran) -> None:
    results = both(job, "ddp")
    logged = entries(job.folder / "ddp")

    assert [result["logged"] for result in results] == [[0, 20, 40], [0, 20, 40]]
    assert [entry["step"] for entry in logged] == [0, 20, 40, 59]
    assert results[0]["last_entry"] == results[1]["last_entry"]
    assert results[0]["last_entry"]["loss"] == logged[2]["loss"]
    weights = [result["weight"] for result in results]
    for entry, window in zip(logged, [slice(0, 1), slice(1, 21), slice(21, 41), slice(41, 60)], strict=True):
        means = [np.mean(result["losses"][window]) for result in results]
        assert entry["loss"] == pytest.approx(np.average(means, weights=weights))


def test_forked_loader_workers_beside_a_log_disturb_nothing(job: Ran) -> None:
    logged = entries(job.folder / "loader_workers")
    steps_of_windows = np.diff([entry["step"] for entry in logged], prepend=-1)

    assert [entry["step"] for entry in logged] == [0, 5, 10, 15, 20, 23]
    for result in both(job, "loader_workers"):
        assert result["steps"] == 24
        assert sum(2 * steps_of_windows * [entry["mean"] for entry in logged]) == pytest.approx(result["seen"])


def test_metrics_jsonl_holds_what_numpy_makes_of_all_ranks_data(job: Ran) -> None:
    dumps = [np.load(job.folder / "merged" / f"dump{rank}.npz") for rank in range(2)]
    values = np.stack([dump["values"] for dump in dumps])  # ranks, steps, columns
    weights = np.stack([dump["weights"] for dump in dumps])
    logged = entries(job.folder / "merged")

    assert [entry["step"] for entry in logged] == [0, 10, 20, 30, 40, 50, 60, 63]
    assert [entry["seq"] for entry in logged] == list(range(8))
    begin = 0
    for entry in logged:
        window = slice(begin, entry["step"] + 1)
        begin = entry["step"] + 1
        a, b, c, d, e, f = (values[:, window, column] for column in range(6))
        w = weights[:, window]
        speeds = [np.average(c[rank], weights=w[rank]) for rank in range(2)]
        of_ranks = f.mean(axis=1)
        expected = {
            "loss": np.average(a, weights=w),
            "bare": np.average(a, weights=w),
            "tokens": b.sum(),
            "speed": math.fsum(speeds),
            "lowest": d.min(),
            "highest": d.max(),
            "newest": e[0, -1],
            "spread": of_ranks.mean(),
            "spread/min": of_ranks.min(),
            "spread/max": of_ranks.max(),
            "spread/std": of_ranks.std(),
            "spread/argmax_rank": of_ranks.argmax(),
            "spread/rank0": of_ranks[0],
            "spread/rank1": of_ranks[1],
            "some/ranks": a[1].mean(),
        }
        assert {key: entry[key] for key in expected} == pytest.approx(expected, rel=1e-12, abs=1e-13)
        assert set(entry) - {"waits"} == {*expected, "seq", "step", "time", "attempt", "ranks"}
        assert entry["ranks"] == {"some/ranks": 1}


def test_process_groups_destroyed_before_close_cost_no_entry(job: Ran) -> None:
    assert both(job, "group_destroyed_first") == [{}, {}]
    logged = entries(job.folder / "group_destroyed_first")

    assert [(entry["step"], entry["loss"]) for entry in logged] == [(0, 0.5), (10, 6.0), (20, 16.0), (24, 23.0)]
    assert not any("partial" in entry for entry in logged)
