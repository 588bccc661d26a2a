from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.torchrun import Ran, entries, plain_python, torchrun

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_digits.py"


def accuracy(job: Ran) -> float:
    found = re.findall(r"^held-out accuracy ([\d.]+)%", job.output, re.MULTILINE)
    assert len(found) == 1, job.output
    return float(found[0])


def test_digits_log_at_the_same_steps_on_two_ranks_and_alone_with_a_resume_between(tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    two_ranks = torchrun(SCRIPT, "--epochs", 2, "--run-dir", together, nproc=2, folder=tmp_path)
    two_ranks.assert_clean()
    options = ("--run-dir", alone, "--checkpoint", tmp_path / "digits.pt")
    plain_python(SCRIPT, "--epochs", 1, *options, folder=tmp_path).assert_clean()
    resumed = plain_python(SCRIPT, "--epochs", 2, *options, folder=tmp_path)
    resumed.assert_clean()

    steps = [1, 11, 21, 22, 32, 42, 44]  # every 10, and at the end of each epoch of 22
    for run_dir in (together, alone):
        assert [(entry["seq"], entry["step"]) for entry in entries(run_dir)] == list(enumerate(steps))
    for entry, other in zip(entries(together), entries(alone), strict=True):
        # The same batches, but sums in another order.
        assert entry["train/loss"] == pytest.approx(other["train/loss"], rel=0.02)
    assert accuracy(two_ranks) == pytest.approx(accuracy(resumed), abs=2.0)
    assert accuracy(resumed) > 85
    for job, run_dir in ((two_ranks, together), (resumed, alone)):
        assert accuracy(job) == pytest.approx(100 * entries(run_dir)[-1]["eval/accuracy"], abs=0.051)


EXAMPLES = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_of_the_readme_run_as_they_stand(tmp_path: Path, number: int) -> None:
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[number])
    job = plain_python(script, folder=tmp_path)
    job.assert_clean()

    if number == 0:
        (run_dir,) = (tmp_path / "runs").iterdir()
        assert [entry["step"] for entry in entries(run_dir)] == [0, 50, 100, 150, 199]
    if "runs/timer-example" in EXAMPLES[number]:
        assert all(entry["time_s/data"] >= 0.001 for entry in entries(tmp_path / "runs" / "timer-example"))
