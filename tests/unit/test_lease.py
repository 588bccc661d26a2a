"""How many calls cannot be due: the formula, by hand and against counting the calls out."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logsync.coordinator.frequency import FrequencyManager
from logsync.coordinator.lease import Cadence, due_step
from logsync.coordinator.messages import INT64_MAX, Rhythm

Step = int | float | None


def cadence(*rounds: tuple[Step, int | None, int]) -> Cadence:
    """The cadence after rounds of (largest increment, fewest calls between changes, calls since the last change)."""
    made = Cadence()
    for rise, gap, since in rounds:
        made.observe(Rhythm(rise=rise, gap=gap, since=since))
    return made


@pytest.mark.parametrize(
    ("rounds", "current", "due", "lease"),
    [
        # i = 1, g = 1: the 50th call from now is at the due step, so 49 cannot be
        ([(1, 1, 0)], 0, 50, 49),
        ([(1, 1, 0)], 49, 50, 0),
        ([(1, 1, 0)], 50, 50, 0),
        ([(1, 1, 0)], 99, 50, 0),
        ([(1, None, 0)], 0, 50, 49),  # nothing is known of gaps: one call
        # larger steps: k = ceil(50 / i)
        ([(2, 1, 0)], 0, 50, 24),
        ([(3, 1, 0)], 0, 50, 16),
        ([(60, 1, 0)], 0, 50, 0),
        # micro-batches: max(1, g - p) + (k - 1) * g - 1
        ([(1, 4, 0)], 0, 50, 4 + 49 * 4 - 1),
        ([(1, 4, 1)], 0, 50, 3 + 49 * 4 - 1),
        ([(1, 4, 3)], 0, 50, 1 + 49 * 4 - 1),
        ([(1, 4, 9)], 0, 50, 1 + 49 * 4 - 1),
        ([(1, 4, 0)], 0, 1, 3),
        ([(1, 4, 3)], 0, 1, 0),
        ([(2, 4, 0)], 0, 5, 4 + 2 * 4 - 1),
        # several rounds: the largest increment, the smallest gap, the last round's p
        ([(1, 4, 3), (3, 2, 0)], 0, 9, 2 + 2 * 2 - 1),
        ([(3, 2, 0), (1, 4, 3)], 0, 9, 1 + 2 * 2 - 1),
        ([(3, 2, 1), (None, None, 5)], 0, 9, 1 + 2 * 2 - 1),
        # fractions: 50 increments of 1/100 reach 0.5, in spite of rounding
        ([(0.01, 1, 0)], 0.0, 0.5, 49),
        ([(0.1 + 0.2, 1, 0)], 0.0, 0.9, 2),
        ([(1 / 3, 1, 0)], 0, 1, 2),
        # far away
        ([(1, 1, 0)], 0, 10**6, 1000),
        ([(1, 1000, 0)], 0, 2, 1000),
        ([(5e-324, 1, 0)], 0.0, 1.0, 1000),
        ([(1, 1, 0)], 0, INT64_MAX, 1000),
        ([(1, 1, 0)], 0, math.inf, 1000),  # never
        ([], 0, math.inf, 1000),
        # nothing known
        ([], 0, 50, 0),
        ([(None, 2, 0)], 0, 50, 0),
        ([(0, 2, 0)], 0, 50, 0),
        ([(1, 1, 0)], None, 50, 0),
        ([(1, 1, 0)], 0, None, 0),  # at once
    ],
)
def test_the_lease_is_what_the_formula_gives(rounds: list[Any], current: Step, due: Step, lease: int) -> None:
    assert cadence(*rounds).lease(current, due, cap=1000) == lease


@pytest.mark.parametrize("cap", [0, 1, 48, 49, 50])
def test_no_lease_is_longer_than_the_cap(cap: int) -> None:
    assert cadence((1, 1, 0)).lease(0, 50, cap) == min(cap, 49)
    assert cadence((1, 1, 0)).lease(0, math.inf, cap) == cap


def test_at_a_constant_pace_the_lease_ends_at_the_call_before_the_due_one() -> None:
    for rise, gap, due in itertools.product(range(1, 5), range(1, 5), range(1, 25)):
        for since in range(gap):
            # The step stays for gap - since - 1 more calls, then rises every `gap` calls.
            calls_to_come = ((n + since) // gap * rise for n in itertools.count(1))
            before_due = next(calls for calls, step in enumerate(calls_to_come) if step >= due)

            assert cadence((rise, gap, since)).lease(0, due, cap=10**6) == before_due, (rise, gap, since, due)


paces = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), min_size=1, max_size=40)


@given(paces, st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(1, 60))
def test_no_call_under_a_lease_is_due_while_the_pace_is_kept(
    pace: list[tuple[int, int]], largest: int, smallest: int, since: int, due: int
) -> None:
    lease = cadence((largest, smallest, since)).lease(0, due, cap=10**6)

    step, steps, first = 0, [], max(0, smallest - since - 1)
    for rise, gap in itertools.islice(itertools.cycle(pace), 200):
        steps += [step] * (first if not step else max(gap, smallest) - 1)
        step += min(rise, largest)
        steps.append(step)
    assert all(step < due for step in steps[:lease])


def test_a_change_of_pace_is_forgotten_after_eight_rounds() -> None:
    made = cadence((10, 1, 0))
    leases = []
    for _ in range(9):
        made.observe(Rhythm(rise=1, gap=3, since=0))
        leases.append(made.lease(0, 20, cap=1000))

    assert leases == [1] * 7 + [3 + 19 * 3 - 1] * 2


def test_what_was_cleared_is_unknown_and_a_snapshot_brings_it_back() -> None:
    made = cadence((10, 1, 0), (1, 2, 1))
    known, lease = made.snapshot(), made.lease(0, 20, cap=1000)

    made.clear()
    assert made.lease(0, 20, cap=1000) == 0
    made.restore(known)
    assert made.lease(0, 20, cap=1000) == lease == 1
    for _ in range(7):
        made.observe(Rhythm(rise=1, gap=2))
    assert made.lease(0, 20, cap=1000) == 2 + 19 * 2 - 1  # still eight rounds, not more


@pytest.mark.parametrize(
    ("mode", "frequency", "last", "updated", "least", "due"),
    [
        ("exact", None, 20, None, 20, math.inf),
        ("exact", 10, None, None, 20, None),
        ("exact", 10, 20, None, 25, 30),
        ("exact", 10, 20, 29, 25, 30),  # updates do not matter
        ("on_update", 10, 20, None, 25, 30),  # one may come
        ("on_update", 10, 20, 25, 25, 30),
        ("on_change", 10, None, 5, 25, None),
        ("on_change", 10, 20, None, 25, 30),
        ("on_change", 10, 20, 20, 25, 30),
        ("on_change", 10, 20, 25, 25, 35),  # the later of last + f and u + f
        ("on_change", 10, 20, 15, 25, 35),  # an older update: max(last, m) + f
        ("on_change", 10, 20, 15, 12, 30),
        ("on_change", 10, 20, 15, None, 30),
    ],
)
def test_the_due_step_is_the_earliest_that_updates_to_come_can_make_ready(
    mode: Any, frequency: Step, *, last: Step, updated: Step, least: Step, due: Step
) -> None:
    manager = FrequencyManager(frequency, mode, "step")
    manager.log_written(last)
    manager.model_updated(updated)

    assert due_step(manager, least) == due


@pytest.mark.parametrize(("last", "frequency"), [(0.1, 0.2), (1.0, 1 / 3), (7, 0.0001), (0.3, 1 / 16384)])
def test_the_due_step_of_fractions_is_less_by_the_tolerance_and_not_more(last: float, frequency: float) -> None:
    manager = FrequencyManager(frequency)
    manager.log_written(last)
    due = due_step(manager, None)

    assert due is not None
    assert last + frequency * (1 - 2e-6) < due < last + frequency
    assert not manager.log_ready(due - frequency * 1e-6)
