"""Every guarantee on every transport; the scenarios and their checks are logsync.workers.testing's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from logsync.workers.testing import SCENARIOS, World, check_transport
from support.worlds import GlooWorld, LocalWorld, ThreadsWorld

WORLDS = {
    "local": (LocalWorld, [1]),
    "threads": (ThreadsWorld, [1, 2, 3]),
    "gloo": (GlooWorld, [2, 3]),
}
CASES = [
    pytest.param(transport, size, name, id=f"{transport}-{size}-{name}")
    for transport, (_, sizes) in WORLDS.items()
    for size in sizes
    for name, scenario in SCENARIOS.items()
    if size >= scenario.least_ranks
]


@pytest.fixture(scope="session")
def worlds() -> Iterator[dict[tuple[str, int], World]]:
    made: dict[tuple[str, int], World] = {("local", 1): LocalWorld()}
    made |= {("threads", size): ThreadsWorld(size) for size in (1, 2, 3)}
    gloo = [GlooWorld(size) for size in (2, 3)]
    made |= {("gloo", world.world_size): world for world in gloo}
    yield made
    for world in gloo:
        world.close()


@pytest.mark.parametrize(("transport", "size", "name"), CASES)
def test_the_transport_keeps_its_promise(
    worlds: dict[tuple[str, int], World], transport: str, size: int, name: str
) -> None:
    SCENARIOS[name].check(worlds[transport, size].run(name))


def test_check_transport_passes_a_world_that_keeps_the_promises() -> None:
    check_transport(ThreadsWorld, sizes=(2,))


def test_check_transport_names_the_scenario_that_a_broken_world_fails() -> None:
    class Forgetful(ThreadsWorld):
        """Its last rank always hears something else."""

        def run(self, name: str) -> list[object]:
            results = super().run(name)
            return [*results[:-1], None]

    with pytest.raises(AssertionError, match="with 2 ranks"):
        check_transport(Forgetful, sizes=(2,))


def test_a_transport_that_reorders_frames_is_found_out() -> None:
    class Reordering(ThreadsWorld):
        def run(self, name: str) -> list[object]:
            return list(reversed(super().run(name)))

    scenario = SCENARIOS["every_rank_gets_the_same_bytes_and_the_root_runs_once_a_round"]

    with pytest.raises((AssertionError, TypeError)):
        scenario.check(Reordering(2).run(scenario.name))
