from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.fault_world import FaultJob, JobMaker, Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with pytest.MonkeyPatch.context() as patch:
        # Every client of the job's store looks up the name of its address: 5 s, where the name server loses a question.
        patch.setenv("RES_OPTIONS", "timeout:1 attempts:1")
        made = Nursery()
        yield made
        made.close()


@pytest.fixture
def job(nursery: Nursery, tmp_path: Path) -> Iterator[JobMaker]:
    made: list[FaultJob] = []

    def make(**options: Any) -> FaultJob:
        made.append(FaultJob(nursery, tmp_path / f"job{len(made)}", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
