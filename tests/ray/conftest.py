from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.ray_world import RayWorld, running_ray


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[Path]:
    """The folder of a Ray that runs for all tests of this process."""
    with running_ray() as made:
        yield made


@pytest.fixture(scope="session")
def worlds(ray_folder: Path) -> dict[int, RayWorld]:  # noqa: ARG001 - it is Ray's, which runs
    return {size: RayWorld(size) for size in (1, 2, 3)}


@pytest.fixture
def world(worlds: dict[int, RayWorld]) -> RayWorld:
    """Two ranks."""
    return worlds[2]
