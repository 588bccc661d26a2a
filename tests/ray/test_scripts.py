"""Scripts that need Ray: the demo on two workers of Ray Train, and the benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.ray_jobs import lines
from support.ray_world import run_on_this_ray

pytestmark = pytest.mark.slow


@pytest.mark.timeout(240)
@pytest.mark.usefixtures("worlds")
def test_two_workers_of_ray_train_learn_the_digits_and_keep_one_log(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "train_digits.py"
    run_dir = tmp_path / "digits"
    ran = run_on_this_ray([str(script), "--ray", "2", "--epochs", "4", "--run-dir", str(run_dir)], timeout_s=200)

    assert ran.returncode == 0, ran.stdout + ran.stderr
    entries = lines(run_dir)
    assert [entry["seq"] for entry in entries] == list(range(len(entries)))
    accuracies = [entry["eval/accuracy"] for entry in entries if "eval/accuracy" in entry]
    assert len(accuracies) == 4
    assert accuracies[-1] > 0.85
    assert all("ranks" not in entry for entry in entries), "an entry lacks a worker's values"
    assert not any(entry.get("partial") for entry in entries)


@pytest.mark.timeout(150)
@pytest.mark.usefixtures("worlds")
def test_the_benchmark_prints_a_line_for_each_thing_and_size() -> None:
    script = Path(__file__).parents[2] / "scripts" / "bench_ray.py"
    few = ["--sizes", "1", "2", "--repeats", "2", "--calls", "3", "--reports", "1"]
    ran = run_on_this_ray([str(script), *few], timeout_s=140)

    assert ran.returncode == 0, ran.stdout + ran.stderr
    lines_of_ours = [line for line in ran.stdout.splitlines() if "(raylet)" not in line]
    found = [(line[:22].strip(), line[22:30].strip()) for line in lines_of_ours[1:-1]]
    each = ["a bare actor call", "a bare round", "our round", "a leased call"]
    assert found == [(what, size) for size in "12" for what in each] + [("ray.train.report", "2")]
    assert lines_of_ours[-1].startswith("a round is at most ")
