from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.ray_world import RayWorld, running_ray


@pytest.fixture(scope="session")
def worlds() -> Iterator[dict[int, RayWorld]]:
    """Worlds of some sizes on a Ray that runs for all tests of this process."""
    with running_ray():
        yield {size: RayWorld(size) for size in (1, 2, 3)}


@pytest.fixture
def world(worlds: dict[int, RayWorld]) -> RayWorld:
    """Two ranks."""
    return worlds[2]
