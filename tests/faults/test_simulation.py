"""Whole jobs with uneven epochs, lost ranks, lost messages and restarts, simulated."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace

import pytest

from logsync.coordinator.core import Coordinator
from logsync.coordinator.messages import Decision, Report
from support.simulation import (
    REAL,
    Broken,
    Fault,
    Life,
    Noise,
    Op,
    Parts,
    Scenario,
    draw,
    fails,
    shrink,
    simulate,
)

SEEDS = 1000
SIMULATIONS = int(os.environ.get("LOGSYNC_SIMULATIONS", "100000"))
OFTEN = (
    "agreed errors",
    "clean ends",
    "dies",
    "dies while away",
    "doubled messages",
    "early closes",
    "empty epochs",
    "ends refused",
    "ends with a closed rank",
    "ends with different call numbers",
    "entries",
    "killed",
    "leased calls",
    "lost messages",
    "raises",
    "raises while away",
    "requests again",
    "resumed",
    "resumed inexactly",
    "rollbacks",
    "rounds with ranks away",
    "said while away",
    "saved while away",
    "slow messages",
    "stalls",
)


def test_jobs_keep_their_promises_whatever_goes_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    facts = _search(range(SEEDS))

    with capsys.disabled():
        print(f"\n{_told(facts)}")
    for exercised in OFTEN:
        assert facts[exercised] >= 25, exercised


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_jobs_keep_their_promises_whatever_goes_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    facts = _search(range(SEEDS, SEEDS + SIMULATIONS))

    with capsys.disabled():
        print(f"\n{_told(facts)}")
    assert facts["runs"] == SIMULATIONS


def test_a_seed_gives_the_same_scenario_and_the_same_run() -> None:
    for seed in range(20):
        assert draw(seed) == draw(seed)
        assert simulate(draw(seed)) == simulate(draw(seed))


def test_a_job_without_faults_ends_cleanly_with_every_value() -> None:
    ops = tuple(Op("call", step, records=0b111) for step in range(20))

    facts = simulate(Scenario(ops, (Life(3),), log_frequency=5, jitter=1))

    assert (facts["clean ends"], facts["values"], facts["lost values"]) == (1, 60, 0)
    assert facts["entries"] == 5  # steps 0, 5, 10, 15 and what was left


def test_what_a_dead_rank_takes_along_is_no_more_than_its_last_window() -> None:
    ops = tuple(Op("call", step, records=0b11) for step in range(10))

    facts = simulate(Scenario(ops, (Life(2, faults=(Fault("dies", 1, 8),)),), log_frequency=5))

    # Entries at 0 and 5; of the steps 6 to 9 rank 0 has its own values, and rank 1 has lost those of 6 and 7.
    assert (facts["dies"], facts["values"], facts["lost values"]) == (1, 6 + 6 + 4, 2)


def test_a_lost_reply_is_sent_again_and_not_decided_again() -> None:
    ops = tuple(Op("call", step) for step in range(6))

    facts = simulate(Scenario(ops, (Life(2, noise=(Noise("lost", up=False, rank=1, round=1),)),), log_frequency=1))

    assert facts["requests again"] >= 1
    assert facts["rounds"] == 1 + 6 + 1


def uneven(*lengths: int, at: int = 0, records: int = 0) -> tuple[Op, ...]:
    """Return the calls of an epoch that is so long on each rank."""
    ops = []
    for call in range(max(lengths)):
        made_by = sum(1 << rank for rank, length in enumerate(lengths) if length > call)
        ops.append(Op("call", at + call, ranks=made_by, records=records))
    return tuple(ops)


def test_after_uneven_epochs_everybody_has_the_same_numbers_and_every_value_is_logged() -> None:
    end = Op("end")
    ops = (*uneven(7, 3, 0, records=7), end, *uneven(0, 0, 5, at=10, records=7), end, *uneven(4, 4, 4, at=20), end)

    facts = simulate(Scenario(ops, (Life(3),), log_frequency=5, jitter=1))

    assert (facts["clean ends"], facts["values"], facts["lost values"]) == (1, 7 + 3 + 5, 0)
    assert (facts["epochs ended"], facts["ends with different call numbers"], facts["empty epochs"]) == (3, 2, 3)
    assert facts["entries"] == 4  # steps 0, 5, 10 and 20, the last one with what was left of the epochs before


def test_a_rank_may_end_its_epoch_and_be_told_at_its_next_call_what_all_refused() -> None:
    bad = replace(uneven(0, 1, at=2)[0], rank=1)  # under the lease that the call before it brings
    ops = (*uneven(1, 2, at=0), bad, Op("end"), *uneven(3, 3, at=10))

    facts = simulate(Scenario(ops, (Life(2),), log_frequency=5))

    assert (facts["ends refused"], facts["clean ends"]) == (1, 1)


def test_what_is_recorded_by_a_rank_that_dies_while_it_is_away_is_in_an_entry_if_one_was_made() -> None:
    ops = (*uneven(8, 2, records=3), Op("end"), *uneven(2, 2, at=20))
    away = Fault("dies", rank=1, op=9, delay=100)

    facts = simulate(Scenario(ops, (Life(2, faults=(away,)),), log_frequency=3, jitter=1))

    assert (facts["dies while away"], facts["lost values"]) == (1, 0)


class SkipsANumber(Coordinator):
    """Entries are numbered 1, 3, 5 ..."""

    def _decide(self, number: int, reports: list[Report], now: float) -> Decision:
        self.next_seq += 1
        return super()._decide(number, reports, now)


def test_a_failure_names_its_seed_and_the_shrunk_scenario() -> None:
    with pytest.raises(AssertionError, match=r"(?s)seed \d+: seq: .*shrunk, .*life 0: 1 ranks"):
        _search(range(20), Parts(coordinator=SkipsANumber))


def _search(seeds: range, parts: Parts = REAL) -> Counter[str]:
    facts: Counter[str] = Counter()
    for seed in seeds:
        scenario = draw(seed)
        try:
            facts.update(simulate(scenario, parts))
        except Exception as error:
            small = shrink(scenario, parts)
            told = f"{error}" if isinstance(error, Broken) else f"{type(error).__name__}: {error}"
            msg = f"seed {seed}: {told}\nshrunk, it says: {fails(small, parts)}\n{small}"
            raise AssertionError(msg) from error
    return facts


def _told(facts: Counter[str]) -> str:
    return "simulated: " + ", ".join(f"{facts[name]} {name}" for name in sorted(facts))
