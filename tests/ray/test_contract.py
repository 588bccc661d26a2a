"""The transport contract on real worker processes of a real Ray."""

from __future__ import annotations

import pytest

from logsync.workers.testing import SCENARIOS
from support.ray_world import RayWorld
from support.worlds import ThreadsWorld

SAME_EVERYWHERE = [
    "merged_values_are_those_of_all_ranks_together",
    "with_explicit_write_a_ready_step_stays_ready_until_it_is_written",
    "a_state_is_the_same_bytes_everywhere_and_continues_the_log",
]


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_transport_keeps_its_promise(worlds: dict[int, RayWorld], name: str) -> None:
    SCENARIOS[name].check(worlds[3].run(name))


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.least_ranks == 1])
def test_the_transport_keeps_its_promise_for_one_rank(worlds: dict[int, RayWorld], name: str) -> None:
    SCENARIOS[name].check(worlds[1].run(name))


@pytest.mark.parametrize("name", SAME_EVERYWHERE)
def test_a_schedule_has_the_same_outcome_to_the_bit_as_among_threads(worlds: dict[int, RayWorld], name: str) -> None:
    assert worlds[3].run(name) == ThreadsWorld(3).run(name)
