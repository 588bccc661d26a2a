"""Every guarantee on every transport; the scenarios and their checks are logsync.workers.testing's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from logsync.workers.testing import SCENARIOS, World
from support.worlds import GlooWorld, LocalWorld, ThreadsWorld

WORLDS = {
    "local": (LocalWorld, [1]),
    "threads": (ThreadsWorld, [1, 2, 3]),
    "gloo": (GlooWorld, [2, 3]),
    "tree": (GlooWorld, [5]),
}
NODES = [2, 1, 2]
CASES = [
    pytest.param(
        transport,
        size,
        name,
        id=f"{transport}-{size}-{name}",
        marks=[pytest.mark.slow] if (transport, size) == ("gloo", 2) and scenario.least_ranks <= 1 else [],
    )
    for transport, (_, sizes) in WORLDS.items()
    for size in sizes
    for name, scenario in SCENARIOS.items()
    if size >= scenario.least_ranks
]

# Scenarios that return merged values, answers and states, and nothing that depends on time.
SAME_EVERYWHERE = [
    "merged_values_are_those_of_all_ranks_together",
    "with_explicit_write_a_ready_step_stays_ready_until_it_is_written",
    "an_update_on_any_rank_makes_a_log_due_in_mode_on_update",
    "a_frequency_set_on_one_rank_is_in_force_on_all_from_the_next_round",
    "ranks_that_close_one_by_one_lose_nothing",
    "a_bad_step_under_a_lease_is_reported_by_the_next_round_with_its_call",
    "a_state_is_the_same_bytes_everywhere_and_continues_the_log",
]


@pytest.fixture(scope="session")
def worlds() -> Iterator[dict[tuple[str, int], World]]:
    made: dict[tuple[str, int], World] = {("local", 1): LocalWorld()}
    made |= {("threads", size): ThreadsWorld(size) for size in (1, 2, 3, 5)}
    gloo = {("gloo", size): GlooWorld(size) for size in (2, 3)} | {("tree", sum(NODES)): GlooWorld(sum(NODES), NODES)}
    made |= gloo
    yield made
    for world in gloo.values():
        world.close()


@pytest.mark.parametrize(("transport", "size", "name"), CASES)
def test_the_transport_keeps_its_promise(
    worlds: dict[tuple[str, int], World], transport: str, size: int, name: str
) -> None:
    SCENARIOS[name].check(worlds[transport, size].run(name))


@pytest.mark.parametrize(
    ("size", "transport", "other"),
    [(1, "local", "threads"), *[(n, "threads", "gloo") for n in (2, 3)], (5, "threads", "tree")],
)
@pytest.mark.parametrize("name", SAME_EVERYWHERE)
def test_a_schedule_has_the_same_outcome_to_the_bit_on_every_transport(
    worlds: dict[tuple[str, int], World], size: int, transport: str, other: str, name: str
) -> None:
    assert worlds[transport, size].run(name) == worlds[other, size].run(name)
