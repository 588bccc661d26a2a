"""Loaders of different lengths under torchrun, with and without DistributedDataParallel's Join."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from jobs.scripts.uneven import EPOCH, EPOCHS, FREQUENCY, length

from logsync.coordinator.frequency import FrequencyManager
from support.torchrun import entries, torchrun

SCRIPT = Path(__file__).parent / "scripts" / "uneven.py"

pytestmark = pytest.mark.timeout(110)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_have_the_answers_of_the_lowest_that_still_trains_and_every_batch_is_in_its_entry(
    ranks: int, tmp_path: Path
) -> None:
    ran = torchrun(SCRIPT, "join", "alone", nproc=ranks, folder=tmp_path, timeout_s=100)
    ran.assert_clean()

    lengths = [[length(rank, epoch) for rank in range(ranks)] for epoch in range(EPOCHS)]
    assert any(0 in epoch for epoch in lengths)
    assert {epoch.index(max(epoch)) for epoch in lengths} >= {0, 1}  # who trains longest differs
    manager, expected = FrequencyManager(FREQUENCY), {}
    for epoch, of_ranks in enumerate(lengths):
        for step in range(epoch * EPOCH, epoch * EPOCH + max(of_ranks)):
            expected[step] = manager.log_ready(step)
            if expected[step]:
                manager.log_written(step)
    logged = [*(step for step, ready in expected.items() if ready), EPOCHS * EPOCH]

    for mode in ("join", "alone"):
        results = [ran.result(rank, mode) for rank in range(ranks)]
        for rank, result in enumerate(results):
            assert [(step, answer) for step, answer, _ in result["told"]] == [
                (step, expected[step])
                for epoch, of_ranks in enumerate(lengths)
                for step in range(epoch * EPOCH, epoch * EPOCH + of_ranks[rank])
            ]
            assert result["calls"] == len(result["told"])

        recorded = np.array(
            [(step, value, rank + 1) for rank, result in enumerate(results) for step, _, value in result["told"]]
        )
        assert [entry["step"] for entry in entries(tmp_path / mode)] == logged
        before = -1
        for entry in entries(tmp_path / mode):
            # What a rank had recorded when it ended is in the others' next entry, or else in the next epoch's first.
            within = (recorded[:, 0] > before) & (recorded[:, 0] <= entry["step"])
            before = entry["step"]
            assert entry.get("batches", 0) == within.sum()
            if within.any():
                assert entry["loss"] == pytest.approx(
                    np.average(recorded[within, 1], weights=recorded[within, 2]), rel=1e-12
                )


@pytest.mark.slow
def test_an_end_that_is_told_after_the_join_block_comes_too_late_for_the_others_round(tmp_path: Path) -> None:
    ran = torchrun(SCRIPT, "late", nproc=2, folder=tmp_path, timeout_s=100)

    # Rank 0 has no batch in the first epoch, and sits in Join's collectives until rank 1's next step.
    assert (length(0, 0), ran.returncode != 0) == (0, True)
    result = ran.result(1, "late")
    assert (result["error"], result["ranks"]) == ("CoordinatorLost", [0])
    assert len(result["told"]) < length(1, 0)
