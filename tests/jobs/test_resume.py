from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.torchrun import entries, plain_python, torchrun

SCRIPT = Path(__file__).parent / "scripts" / "resumable.py"
BATCH = 12


def uninterrupted() -> list[dict[str, Any]]:
    """What a job that is never stopped writes, times and attempts left out."""
    expected: list[dict[str, Any]] = []
    begin = 0
    for seq, step in enumerate([*range(0, 100, 10), 99]):
        items = np.concatenate([np.arange(s, s + BATCH) for s in range(begin, step + 1)])
        expected.append({"seq": seq, "step": step, "mean": np.mean(items**2), "items": len(items)})
        begin = step + 1
    return expected


def content(logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key not in ("time", "attempt", "waits")} for entry in logged]


def test_a_run_that_goes_on_at_other_world_sizes_leaves_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"

    # The first start logs two entries beyond its checkpoint, at step 50 and on its way out, which are replaced.
    first = torchrun(SCRIPT, tmp_path, checkpoint, 57, nproc=2, folder=tmp_path)
    first.assert_clean()
    stopped = first.result(0, "stopped")
    run_dir = Path(stopped["run_dir"])
    assert first.result(1, "stopped") == stopped
    assert stopped["logged"] == [0, 10, 20, 30, 40, 50]
    assert [entry["step"] for entry in entries(run_dir)] == [0, 10, 20, 30, 40, 50, 57]
    assert entries(run_dir)[-1]["partial"] is True

    # The second comes to step 73 alone, and saves nothing.
    second = plain_python(SCRIPT, tmp_path, checkpoint, 73, folder=tmp_path)
    second.assert_clean()
    assert second.result(0, "stopped") == {"run_dir": str(run_dir), "logged": [50, 60, 70]}

    third = torchrun(SCRIPT, tmp_path, checkpoint, 0, nproc=3, folder=tmp_path)
    third.assert_clean()
    for rank in range(3):
        assert third.result(rank, "ended") == {"run_dir": str(run_dir), "logged": [50, 60, 70, 80, 90]}

    logged = entries(run_dir)
    assert content(logged) == [pytest.approx(entry, rel=1e-12) for entry in uninterrupted()]
    assert [entry["attempt"] for entry in logged] == [0] * 5 + [1] * 6
    assert [path.name for path in run_dir.parent.iterdir()] == [run_dir.name], "a folder of the later starts is left"
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]
