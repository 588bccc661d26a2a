"""The Trainer callback against the real transformers: two ranks under torchrun, and one process that goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.torchrun import Ran, entries, plain_python, torchrun

EXAMPLE = Path(__file__).parents[2] / "scripts" / "examples" / "huggingface_digits.py"
JOB = Path(__file__).parent / "scripts" / "huggingface_job.py"
OWN = {"seq", "time", "attempt", "waits", "calls", "partial", "ranks"}  # what entries have beside step and metrics

pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("huggingface")
    return torchrun(JOB, EXAMPLE, folder, nproc=2, folder=folder, timeout_s=100)


def logged(run_dir: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key not in OWN} for entry in entries(run_dir)]


def history(output_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return found


def test_every_record_of_the_trainers_history_is_an_entry_with_its_step_and_values(job: Ran) -> None:
    job.assert_clean()
    example = job.folder / "example"

    assert logged(example / "log") == history(example)

    assert [record["step"] for record in history(example)] == [1, 10, 15, 20, 30, 30, 40, 40, 40]
    assert [sorted(entry.get("ranks", {})) for entry in entries(example / "log")] == [[]] * 9
    assert entries(example / "log")[-1]["waits"]["each_ms"][1] >= 0
    assert json.loads((example / "log" / "hyperparams.json").read_text())["gradient_accumulation_steps"] == 2


def test_a_resume_at_another_world_size_goes_on_with_the_history_and_doubles_nothing(job: Ran, tmp_path: Path) -> None:
    output = tmp_path / "example"
    shutil.copytree(job.folder / "example", output)
    shutil.rmtree(output / "checkpoint-40")  # as if the job had died after step 30; its log had gone on
    before = entries(output / "log")

    resumed = plain_python(EXAMPLE, "--output-dir", output, "--steps", 50, "--resume", folder=tmp_path, timeout_s=60)
    resumed.assert_clean()

    assert logged(output / "log") == history(output)
    after = entries(output / "log")
    assert after[:6] == before[:6]
    assert [(entry["step"], entry["attempt"]) for entry in after[6:]] == [(step, 1) for step in (40, 45, 50, 50, 50)]


def test_a_checkpoint_from_before_logsync_is_gone_on_from_and_the_next_one_has_the_logs_state(job: Ran) -> None:
    older = job.folder / "older"

    assert [entry["step"] for entry in entries(older / "log")] == [20, 20, 20]
    assert "has no state of logsync's log 'train'" in job.output
    state = json.loads((older / "checkpoint-20" / "trainer_state.json").read_text())
    assert len(state["stateful_callbacks"]["LogsyncCallback"]["attributes"]["saved"]) > 100


def test_where_logsync_decides_all_ranks_log_at_its_steps_whatever_other_callbacks_ask(job: Ran) -> None:
    job.assert_clean()
    results = [job.result(rank) for rank in range(2)]

    trained = entries(job.folder / "agreed")[:4]
    assert [entry["step"] for entry in trained] == [1, 8, 15, 20]
    for result in results:
        losses = [(record["step"], record["loss"]) for record in result["history"] if "loss" in record]
        assert losses == [(entry["step"], entry["loss"]) for entry in trained[:3]]


def test_what_is_recorded_or_logged_inside_a_step_is_in_the_next_entry_and_cannot_hang(job: Ran) -> None:
    agreed = entries(job.folder / "agreed")

    assert [entry.get("images", 0) for entry in agreed] == [8, 56, 56, 40, 0]  # 2 ranks, 4 images a step
    assert [entry.get("inside") for entry in agreed] == [0, 7, 14, 19, None]
    assert agreed[1]["ranks"]["inside"] == 1
    assert job.output.count("a logged value is left out") == 1
    assert "'note' must be a number" in job.output


def test_an_evaluation_after_the_training_goes_into_the_same_run(job: Ran) -> None:
    result = job.result(0)
    *_, summary, evaluation = result["history"]

    agreed = entries(job.folder / "agreed")
    assert [entry["seq"] for entry in agreed] == [0, 1, 2, 3, 4]
    assert agreed[3]["train_loss"] == summary["train_loss"]
    assert result["trained"] == len(result["history"]) - 1
    assert agreed[4].items() >= evaluation.items()
