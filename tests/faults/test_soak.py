"""Ranks that stall, change settings and report updates at random, with a sink that fails, for as long as one likes.

LOGSYNC_SOAK_S: how many seconds the slow test takes (600); LOGSYNC_FAULT_SEED: the seed of what happens.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from faults.soaking import PERIOD, value_of, weight_of
from numpy.typing import NDArray

from support.fault_world import drawn
from support.torchrun import Ran, entries, torchrun

SCRIPT = Path(__file__).with_name("soaking.py")
RANKS = 4
SOAK_S = float(os.environ.get("LOGSYNC_SOAK_S", "600"))
FLAT_MB = 3.0
HEAD = {"seq", "step", "time", "attempt", "waits"}


def soaked(folder: Path, seconds: float) -> Ran:
    seed = drawn("soak").randrange(10**9)
    ran = torchrun(SCRIPT, seconds, seed, nproc=RANKS, folder=folder, timeout_s=seconds + 60)
    assert ran.returncode == 0, ran.output
    return ran


def assert_all_ranks_had_the_same_answers(ran: Ran) -> None:
    """Assert that a log was ready at the same calls on every rank, and that each time it was written."""
    answers = [(ran.folder / f"ready.rank{rank}.txt").read_text() for rank in range(RANKS)]
    calls = [ran.result(rank, "summary")["calls"] for rank in range(RANKS)]
    assert answers == answers[:1] * RANKS
    assert calls == calls[:1] * RANKS

    logged = entries(ran.folder / "run")
    told = [str(e["step"]) if "rate" in e else f"{e['step']} {e['seq']}" for e in logged]
    assert told == answers[0].splitlines()


def assert_every_entry_is_right(ran: Ran) -> None:
    """Assert that no entry is missing, and that each has the values of all calls of all ranks since the last one."""
    logged = entries(ran.folder / "run")
    assert [entry["seq"] for entry in logged] == list(range(len(logged)))
    steps = logged[-1]["step"] + 1
    values = np.stack([np.resize([value_of(r, step) for step in range(PERIOD)], steps) for r in range(RANKS)])
    weights = np.array([[weight_of(rank)] for rank in range(RANKS)])
    sums, weighted = running(values.sum(axis=0)), running((values * weights).sum(axis=0))
    begin = 0
    for entry in logged:
        end = entry["step"] + 1
        expected: dict[str, float] = {}
        if end > begin:
            own = values[:, begin:end].max(axis=1)
            expected |= {
                "mean": int(weighted[end] - weighted[begin]) / int(weights.sum() * (end - begin)),
                "sum": int(sums[end] - sums[begin]),
                "max": int(own.max()),
                "max/min": int(own.min()),
                "max/max": int(own.max()),
                "max/argmax_rank": int(own.argmax()),
            }
            assert math.isclose(entry.pop("max/std"), own.std(), rel_tol=1e-12), entry
        expected |= {"rate": 0.5} if "rate" in entry else {"written": (RANKS - 1) / 2}
        assert {key: value for key, value in entry.items() if key not in HEAD} == expected, entry
        begin = end
    assert begin == logged[-1]["step"] + 1


def running(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the sums of the first 0, 1, 2, ... numbers."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(numbers)])


def report(ran: Ran) -> list[float]:
    """Print what happened in the job; returns by how many MB each rank's memory grew after the first quarter."""
    summaries = [ran.result(rank, "summary") for rank in range(RANKS)]
    one = summaries[0]
    print(f"{one['calls']} calls, {one['rounds']} rounds, {len(entries(ran.folder / 'run'))} entries")
    print(f"rank 0's sink took {one['taken']} entries and failed {one['failed']} times")
    for what in ("writes", "stalls", "long_stalls", "changes", "updates"):
        print(f"{what}: {[summary.get(what, 0) for summary in summaries]}")
    growth = []
    for rank, rss in enumerate(summary["rss"] for summary in summaries):
        quarters = [float(np.median(quarter)) for quarter in np.array_split(rss, 4)]
        growth.append(quarters[3] - quarters[1])
        print(f"rank {rank}: {len(rss)} samples, median MB by quarter {[round(mb, 2) for mb in quarters]}")
    return growth


def assert_the_sinks_losses_were_told(ran: Ran) -> None:
    one = ran.result(0, "summary")
    logged = len(entries(ran.folder / "run"))
    assert one["taken"] + one["failed"] == logged
    assert ran.output.count("sink FlakySink raised ConnectionError: the server said 1;") == 1
    assert f"sink FlakySink lost {one['failed']} of {logged} entries" in ran.output


@pytest.mark.timeout(100)
def test_ranks_that_stall_and_change_their_minds_agree_on_every_call_and_every_value(tmp_path: Path) -> None:
    ran = soaked(tmp_path, 5.0)

    report(ran)
    assert_all_ranks_had_the_same_answers(ran)
    assert_every_entry_is_right(ran)


@pytest.mark.slow
@pytest.mark.timeout(SOAK_S + 200)
def test_they_do_so_for_a_long_time_and_their_memory_does_not_grow(tmp_path: Path) -> None:
    ran = soaked(tmp_path, SOAK_S)

    growth = report(ran)
    assert_all_ranks_had_the_same_answers(ran)
    assert_every_entry_is_right(ran)
    assert_the_sinks_losses_were_told(ran)
    assert re.search(r"round \d+ has waited 1 s for rank", ran.output), "no stall was longer than warn_after"
    assert max(growth) < FLAT_MB, growth
