"""The callback and the logger against the real Lightning, on two ranks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from support.torchrun import Ran, entries, plain_python, torchrun

EXAMPLE = Path(__file__).parents[2] / "scripts" / "examples" / "lightning_digits.py"
JOB = Path(__file__).parent / "scripts" / "lightning_job.py"
OLDER_NAME = Path(__file__).parent / "scripts" / "pytorch_lightning_alone.py"

pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("lightning")
    return torchrun(JOB, EXAMPLE, folder, nproc=2, folder=folder, timeout_s=120)


def points(logged: list[dict[str, Any]], names: set[str]) -> set[tuple[int, str, float]]:
    return {(entry["step"], name, round(entry[name], 6)) for entry in logged for name in names & set(entry)}


def test_the_example_logs_at_lightnings_steps_each_epoch_each_evaluation_and_the_test_after_it(job: Ran) -> None:
    job.assert_clean()
    run_dir = job.folder / "example" / "log"

    logged = entries(run_dir)
    of_metric = {
        name: [entry["step"] for entry in logged if name in entry]
        for name in ("train/loss", "val/accuracy", "test/accuracy")
    }
    assert of_metric == {"train/loss": [4, 9, 14, 19], "val/accuracy": [11, 23], "test/accuracy": [24]}
    assert [entry["seq"] for entry in logged] == list(range(9))
    assert not any("ranks" in entry for entry in logged)
    assert json.loads((run_dir / "hyperparams.json").read_text()) == {"lr": 3e-3}
    assert [path.suffix for path in (run_dir / "checkpoints").iterdir()] == [".ckpt"]


def test_it_has_the_points_of_lightnings_csv_logger(job: Ran) -> None:
    before = [json.loads(line) for line in job.result(0)["before"].splitlines()]
    with (job.folder / "beside" / "csv" / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    of_csv = [{**row, "step": int(row["step"])} for row in rows]
    names = {"twin", "of_epoch", "val", "only_zero"}

    assert points(before, names) == points(of_csv, names)
    assert {step for step, _, _ in points(before, {"twin"})} == {2, 5}
    assert {step for step, _, _ in points(before, {"of_epoch"})} == {3, 7}


def test_what_ranks_log_without_sync_dist_is_merged_as_sync_dist_would(job: Ran) -> None:
    with_both = [entry for entry in entries(job.folder / "beside" / "log") if "twin" in entry]

    assert len(with_both) == 2
    for entry in with_both:
        assert entry["own"] == pytest.approx(entry["twin"], rel=1e-6)
        assert entry["ranks"]["only_zero"] == 1


def test_what_one_rank_gives_to_the_logger_itself_is_in_an_entry_and_cannot_hang(job: Ran) -> None:
    job.assert_clean()
    direct = [entry for entry in entries(job.folder / "beside" / "log") if "direct" in entry]

    assert [entry["direct"] for entry in direct] == [1.0, 1.0]
    assert all(entry["ranks"]["direct"] == 1 for entry in direct)


def test_a_fit_from_a_checkpoint_continues_the_run_and_doubles_nothing(job: Ran) -> None:
    before = [json.loads(line) for line in job.result(0)["before"].splitlines()]
    after = entries(job.folder / "beside" / "log")

    first = [entry for entry in after if entry["attempt"] == 0]
    assert first == before[: len(first)]
    assert first[-1]["step"] == 3
    assert [entry["seq"] for entry in after] == list(range(len(after)))
    assert [entry["step"] for entry in after if entry["attempt"] == 1] == [
        entry["step"] for entry in before if entry["step"] > 3
    ]
    names = {"twin", "of_epoch", "val"}
    assert points(after[len(first) :], names) == points([entry for entry in before if entry["step"] > 3], names)


def test_where_logsync_decides_what_was_recorded_is_merged_at_its_steps(job: Ran) -> None:
    logged = entries(job.folder / "agreed")

    # A first log at once, then each third step; the ends of epochs and the validations are entries, too.
    # Then the same Trainer trains for a third epoch.
    assert [entry["step"] for entry in logged] == [0, 3, 3, 3, 6, 7, 7, 10, 11, 11]
    assert [entry["attempt"] for entry in logged] == [0] * 7 + [1] * 3
    assert sum(entry.get("images", 0) for entry in logged) == 3 * 2 * 8 * 4
    assert logged[0]["images"] == 2 * 4
    assert [job.result(rank)["open"] for rank in range(2)] == [False, False]


def test_the_logger_by_itself_writes_rank_0s_values_each_by_its_own_step(job: Ran) -> None:
    logged = entries(job.folder / "alone")

    assert [(entry["step"], sorted(set(entry) & {"own", "direct", "val", "of_epoch"})) for entry in logged] == [
        (0, ["direct"]),
        (2, ["own"]),
        (3, ["val"]),
        (3, ["of_epoch"]),
    ]


@pytest.mark.slow
def test_it_is_pytorch_lightnings_where_that_was_imported_and_an_exception_closes_the_log(tmp_path: Path) -> None:
    ran = plain_python(OLDER_NAME, tmp_path, folder=tmp_path)

    ran.assert_clean()
    assert "left by a bad batch, the log is closed" in ran.output
    assert [(entry["step"], "loss" in entry) for entry in entries(tmp_path / "log")] == [
        (1, True),
        (3, True),
        (5, True),
    ]
