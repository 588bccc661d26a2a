"""Jobs that are killed and go on from their checkpoint leave the file of a job that was never stopped.

LOGSYNC_KILLS: how many kills the slow test makes (30); LOGSYNC_FAULT_SEED: the seed they are drawn from.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
from faults.resuming import BATCH, FREQUENCY, STEPS, loss_of, trained

from support.fault_world import drawn
from support.torchrun import Ran, entries, torchrun

SCRIPT = Path(__file__).with_name("resuming.py")
KILLS_PER_JOB = 5
KILLS = int(os.environ.get("LOGSYNC_KILLS", "30"))

# Without it torch's restarted ranks find the addresses of their dead predecessors in the store that torchrun shares
# with them (pytorch#135712), see the last test here
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def uninterrupted() -> list[dict[str, Any]]:
    """What a job that is never stopped writes, times and attempts left out."""
    expected: list[dict[str, Any]] = []
    model = begin = 0
    for seq, step in enumerate([*range(0, STEPS, FREQUENCY), STEPS - 1]):
        losses = []
        for s in range(begin, step + 1):
            model = trained(model, s)
            losses += [loss_of(item) for item in range(s, s + BATCH)]
        metrics = {"loss": sum(losses) / len(losses), "items": len(losses), "model": model}
        expected.append({"seq": seq, "step": step, **metrics})
        begin = step + 1
    return expected


class Job:
    """A job in `folder`, whose starts share checkpoint and log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_dir = folder / "run"

    def run(self, *, nproc: int = 2, max_restarts: int = 0, own_store: bool = True, **plan: Any) -> Ran:
        """Start it under torchrun; what is left out of the plan (see the script) does not happen."""
        paths = {"run_dir": str(self.run_dir), "checkpoint": str(self.folder / "checkpoint.pt")}
        nothing = {"kills": [], "savers": [], "dies_at": [], "checkpoint_every": 1, "joins_within_s": 20}
        self.folder.mkdir(exist_ok=True)
        (self.folder / "plan.json").write_text(json.dumps({**paths, **nothing, **plan}))
        return torchrun(
            SCRIPT,
            self.folder / "plan.json",
            nproc=nproc,
            folder=self.folder,
            timeout_s=45 + 20 * max_restarts,
            environ=OWN_STORE if own_store else {},
            options=["--max-restarts", str(max_restarts)],
        )

    def assert_as_if_never_stopped(self) -> None:
        """Assert that the log is whole, has every entry once, and none of them shows that there were restarts."""
        assert (self.run_dir / "metrics.jsonl").read_text().endswith("\n")
        logged = entries(self.run_dir)
        assert [entry["seq"] for entry in logged] == list(range(len(logged))), self.told()
        content = [{key: value for key, value in e.items() if key not in ("time", "attempt", "waits")} for e in logged]
        assert content == uninterrupted(), self.told()
        attempts = [entry["attempt"] for entry in logged]
        assert all(a <= b for a, b in itertools.pairwise(attempts)), attempts

    def told(self) -> str:
        """Return when ranks were killed."""
        kills = self.folder / "kills.txt"
        return kills.read_text() if kills.exists() else "nobody was killed at a drawn moment"


def drawn_kills(dice: random.Random, count: int) -> list[list[dict[str, Any]]]:
    """Return one kill for each of `count` attempts, anywhere from the first step to the end of the log's block."""
    # The first is never so late that the job might end before it.
    steps = sorted([dice.randrange(STEPS - 20), *(dice.randint(0, STEPS) for _ in range(count - 1))])
    return [[{"rank": dice.randrange(2), "step": step, "after_s": dice.uniform(1e-4, 8e-3)}] for step in steps]


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(2, id="some", marks=pytest.mark.timeout(110)),
        pytest.param(KILLS, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(120 + 30 * KILLS)]),
    ],
)
def test_a_job_killed_at_any_moments_and_restarted_logs_as_if_it_had_never_stopped(tmp_path: Path, count: int) -> None:
    dice = drawn("resume")
    for number, done in enumerate(range(0, count, KILLS_PER_JOB)):
        kills = drawn_kills(dice, min(KILLS_PER_JOB, count - done))
        job = Job(tmp_path / f"job{number}")

        ran = job.run(kills=kills, max_restarts=len(kills), checkpoint_every=dice.randint(1, 3))

        assert ran.returncode == 0, ran.output
        restarts = [ran.result(rank, "ended")["restarts"] for rank in range(2)]
        print(f"job {number}, {restarts[0]} restarts:\n{job.told()}")
        assert restarts[0] == restarts[1] > 0
        job.assert_as_if_never_stopped()


@pytest.mark.timeout(100)
def test_the_entry_at_which_a_checkpoint_was_taken_is_not_lost_to_a_kill_right_after_it(tmp_path: Path) -> None:
    job = Job(tmp_path)

    # Once with the coordinator's own checkpoint, and once with another rank's: their states are the same bytes.
    ran = job.run(max_restarts=2, savers=[0, 1], dies_at=[100, 200])

    assert ran.returncode == 0, ran.output
    assert ran.result(0, "ended")["restarts"] == 2
    job.assert_as_if_never_stopped()


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_job_killed_as_a_whole_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    dice = drawn("fewer")
    job = Job(tmp_path)
    step = dice.randrange(20, STEPS - 20)

    kills = [{"rank": rank, "step": step, "after_s": dice.uniform(1e-4, 8e-3)} for rank in range(3)]

    killed = job.run(nproc=3, kills=[kills])
    ran = job.run(nproc=2)

    assert killed.returncode != 0, killed.output

    ran.assert_clean()
    job.assert_as_if_never_stopped()
    assert {entry["attempt"] for entry in entries(job.run_dir)} == {0, 1}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_restart_that_finds_its_predecessors_addresses_fails_and_connect_says_that_nobody_is_there(
    tmp_path: Path,
) -> None:
    # Which group meets them first, the job's in init_process_group or ours in connect, is a race.
    for number in range(8):
        job = Job(tmp_path / f"job{number}")
        kills = drawn_kills(drawn(f"addresses {number}"), 1)
        # gloo's own tries to join take up to five times as long, now and then.
        ran = job.run(own_store=False, max_restarts=1, kills=kills, joins_within_s=4)
        if ran.returncode != 0 and "CollectiveSetupError" in ran.output:
            break
    assert re.search(
        r"CollectiveSetupError: could not build the gloo group within 20 s, .*Connection refused.*"
        r"Every rank must call connect\(\).*unless it is started with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ran.output,
    ), ran.output
