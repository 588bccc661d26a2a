"""The promises of agreement, equivalence and lateness over many random schedules, against an oracle."""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from logsync.coordinator.lease import Cadence
from support.lockstep import Lockstep, settings
from support.schedules import Schedule, check_schedule, random_schedule

EXAMPLES = 1000
DECISIONS = int(os.environ.get("LOGSYNC_DECISIONS", "10000000"))


@given(st.randoms(use_true_random=False))
@hypothesis_settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_answers_agree_and_equal_a_manager_asked_at_every_call(rng: random.Random) -> None:
    check_schedule(random_schedule(rng, calls=60))  # hypothesis shrinks what fails; the volume is below


def test_thousands_of_schedules_agree_with_the_oracle(capsys: pytest.CaptureFixture[str]) -> None:
    facts = _search(range(EXAMPLES))

    with capsys.disabled():
        print(f"\n{_told(facts)}")
    assert facts["leased"] >= facts["decisions"] / 2
    assert facts["exact rounds"] >= facts["rounds"] / 2
    for exercised in ("logs", "writes", "rises over 1", "updates in a lease", "settings in a lease", "late calls"):
        assert facts[exercised] > 100, exercised


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_millions_of_decisions_agree_with_the_oracle(capsys: pytest.CaptureFixture[str]) -> None:
    facts: Counter[str] = Counter()
    seed = EXAMPLES
    while facts["decisions"] < DECISIONS:
        facts += _search(range(seed, seed + 1000))
        seed += 1000

    with capsys.disabled():
        print(f"\n{_told(facts)}")


def test_the_search_would_notice_a_lease_that_is_one_call_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Cadence.lease
    monkeypatch.setattr(Cadence, "lease", lambda *args: min(right(*args) + 1, args[3]))

    with pytest.raises(AssertionError, match="late without an excuse"):
        _search(range(200))


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("mode", ["exact", "on_update"])
@pytest.mark.parametrize("every", [1, 2, 7, 50])
def test_constant_increments_cost_one_round_per_log_and_one_more(world_size: int, mode: str, every: int) -> None:
    world = Lockstep(world_size, settings(every, mode=mode))

    logs = 0
    for step in range(1000):
        world.ranks[step % world_size].model_updated(step)
        logs += world.call([step] * world_size)[0]

    assert logs == 1 + 999 // every
    assert world.rounds == logs + (every > 1)  # at every=1 each call logs, so the second one is no extra


@pytest.mark.parametrize("micro", [1, 2, 4, 16])
def test_micro_batches_cost_as_many_more_rounds_in_the_first_interval_as_a_step_has_calls(micro: int) -> None:
    world = Lockstep(2, settings(50))

    logs = sum(world.call([call // micro] * 2)[0] for call in range(1000 * micro))

    assert logs == 20
    assert world.rounds == logs + micro


def test_epochs_over_loaders_of_100_and_101_batches_cost_one_round_per_log_and_one_more() -> None:
    world = Lockstep(2, settings(0.1, frequency_type="epoch"))

    answers = [world.call([call / 100, call / 101]) for call in range(1000)]

    assert [call for call, (logged, _) in enumerate(answers) if logged] == list(range(0, 1000, 10))
    assert world.rounds == 100 + 1


def test_beyond_the_longest_lease_rounds_come_every_cap_plus_one_calls() -> None:
    world = Lockstep(2, settings(None, max_lease=99))

    for step in range(1000):
        assert not world.call([step, step])[0]

    assert world.rounds == 10


def test_a_changed_frequency_counts_from_the_next_round() -> None:
    world = Lockstep(3, settings(50))
    logged = []
    for step in range(200):
        if step == 60:
            world.ranks[2].set_frequency(10)
        if world.call([step] * 3)[0]:
            logged.append(step)

    assert logged == [0, 50, *range(100, 200, 10)]


def _search(seeds: range) -> Counter[str]:
    facts: Counter[str] = Counter()
    for seed in seeds:
        facts["examples"] += 1
        facts += check_schedule(_schedule(seed))
    return facts


def _schedule(seed: int) -> Schedule:
    return random_schedule(random.Random(seed))


def _told(facts: Counter[str]) -> str:
    leased = facts["leased"] / facts["decisions"]
    counts = ", ".join(f"{facts[name]} {name}" for name in sorted(facts) if name != "leased")
    return f"agreement: {leased:.0%} of calls leased; {counts}"
