"""Loaders of different lengths under torchrun, with and without DistributedDataParallel's Join."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from jobs.scripts.uneven import EPOCH, EPOCHS, FREQUENCY, length

from logsync.coordinator.frequency import FrequencyManager
from support.torchrun import entries, torchrun

SCRIPT = Path(__file__).parent / "scripts" / "uneven.py"


@pytest.mark.timeout(100)
@pytest.mark.parametrize(
    ("how", "ranks"),
    [("join", 2), pytest.param("join", 3, marks=pytest.mark.slow), pytest.param("alone", 3, marks=pytest.mark.slow)],
)
def test_all_ranks_have_the_answers_of_the_lowest_that_still_trains_and_every_batch_is_logged_once(
    how: str, ranks: int, tmp_path: Path
) -> None:
    ran = torchrun(SCRIPT, how, nproc=ranks, folder=tmp_path, timeout_s=80)
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
    results = [ran.result(rank, "uneven") for rank in range(ranks)]
    for rank, result in enumerate(results):
        assert [(step, answer) for step, answer, _ in result["told"]] == [
            (step, expected[step])
            for epoch, of_ranks in enumerate(lengths)
            for step in range(epoch * EPOCH, epoch * EPOCH + of_ranks[rank])
        ]
        assert result["calls"] == len(result["told"])

    logged = entries(tmp_path / "run")
    assert [entry["step"] for entry in logged] == [*(s for s, ready in expected.items() if ready), EPOCHS * EPOCH]
    assert sum(entry.get("batches", 0) for entry in logged) == sum(map(sum, lengths))
    # Every entry's mean times its weight, summed, is the sum over all that was recorded.
    recorded = sum((rank + 1) * value for rank, result in enumerate(results) for _, _, value in result["told"])
    merged = sum(entry["loss"] * entry["weight"] for entry in logged if "weight" in entry)
    assert math.isclose(merged, recorded, rel_tol=1e-12)
