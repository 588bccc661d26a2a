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


KILLED_IN_THE_SECOND_EPOCH = f"""
import os, signal, sys

sys.path.insert(0, {str(SCRIPT.parent)!r})
import train_digits

evaluate = train_digits.evaluate

def evaluate_or_die(log, network, x, y, step):
    if step == 44 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(log, network, x, y, step)

train_digits.evaluate = evaluate_or_die
train_digits.main()
"""


@pytest.mark.slow  # restarts in general are those of tests/faults/test_kill_and_resume.py
def test_digits_go_on_from_their_checkpoint_when_torchrun_restarts_them(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED_IN_THE_SECOND_EPOCH)
    options = ("--run-dir", tmp_path / "run", "--checkpoint", tmp_path / "digits.pt", "--sinks", "jsonl")

    job = torchrun(
        script,
        *("--epochs", 2, *options, "--timeout", 20),
        nproc=2,
        folder=tmp_path,
        timeout_s=100,
        environ={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        options=["--max-restarts", "1"],
    )

    assert job.returncode == 0, job.output
    logged = [(entry["step"], entry["attempt"]) for entry in entries(tmp_path / "run")]
    # The checkpoint was taken at 22; what the first attempt logged after it is replaced.
    assert logged == [(1, 0), (11, 0), (21, 0), (22, 0), (32, 1), (42, 1), (44, 1)]
    assert accuracy(job) > 85


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
