"""The tracker and watch_optimizer against the real Accelerate, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from support.torchrun import Ran, entries, torchrun

EXAMPLE = Path(__file__).parents[2] / "scripts" / "examples" / "accelerate_digits.py"
JOB = Path(__file__).parent / "scripts" / "accelerate_job.py"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("accelerate")
    return torchrun(JOB, EXAMPLE, folder, nproc=2, folder=folder, timeout_s=90)


def test_the_example_merges_all_ranks_values_and_the_trackers_join_the_entry_of_their_step(job: Ran) -> None:
    job.assert_clean()
    run_dir = job.folder / "example"

    logged = entries(run_dir)
    assert [entry["step"] for entry in logged] == [1, 11, 21, 28]  # the last one by close()
    assert logged[0]["train/loss"] > logged[-1]["train/loss"] > 0
    # Accelerate steps the schedule once for each process.
    assert [entry["train/lr"] for entry in logged[:3]] == [pytest.approx(3e-3 * 0.99**n) for n in (2, 22, 42)]
    assert [sorted(entry.get("ranks", {})) for entry in logged] == [[]] * 4
    assert json.loads((run_dir / "hyperparams.json").read_text()) == {"lr": 3e-3, "batch_size": 32}
    saved = torch.load(run_dir / "checkpoint" / "custom_checkpoint_0.pkl", weights_only=True)
    assert set(saved) == {"state"}
    assert [job.result(rank)["group_left"] for rank in range(2)] == [False, False]


def test_a_tracker_by_itself_writes_an_entry_per_log_and_resumes_without_doubling(job: Ran) -> None:
    logged = entries(job.folder / "alone")

    assert [(entry["step"], entry.get("loss"), entry.get("only_here")) for entry in logged] == [
        (0, 1.0, None),
        (1, 2.0, None),
        (2, 3.0, None),
        (3, None, 7.0),
        (4, 10.0, None),
    ]
    assert json.loads((job.folder / "alone" / "hyperparams.json").read_text()) == {"lr": 0.1}
    assert job.output.count("'note' must be a number") == 1
    assert [job.result(rank)["left"] for rank in range(2)] == [[], []]
    assert job.result(0)["world_size"] == 2


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_steps_that_accelerates_scaler_skips_are_no_updates(job: Ran, kind: str) -> None:
    for rank in range(2):
        changed, skipped, updates = zip(*job.result(rank)[kind], strict=True)

        assert changed == (False, True, False, False, True, True)
        assert updates == (None, 1, 1, 1, 4, 5)
        if kind == "plain":  # of a fused optimizer's steps, which only its device skips, Accelerate does not know
            assert skipped == tuple(not one for one in changed)
