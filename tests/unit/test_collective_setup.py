from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from logsync.coordinator.errors import CollectiveSetupError
from logsync.workers import connect


@pytest.fixture
def world_of_one(tmp_path: Path) -> Iterator[None]:
    where = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=where, rank=0, world_size=1, timeout=timedelta(seconds=10))
    yield
    dist.destroy_process_group()


@pytest.mark.timeout(30)
@pytest.mark.usefixtures("world_of_one")
def test_connect_ends_by_its_timeout_although_gloo_goes_on_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = threading.Event()
    monkeypatch.setattr(dist, "new_group", lambda *_args, **_options: given_up.wait(60))
    try:
        with pytest.raises(CollectiveSetupError, match=r"could not build the gloo group within 0.5 s.*answers nothing"):
            connect(10, sinks=[], timeout=0.5)
    finally:
        given_up.set()
