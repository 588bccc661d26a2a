"""The run's settings, from `log_hyperparams` to what a sink keeps."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from logsync.workers import connect
from logsync.workers.transports.threads import ThreadWorld


def test_rank_0s_are_kept_and_the_others_are_not(tmp_path: Path) -> None:
    world = ThreadWorld(2, timeout_s=20)

    def run(rank: int) -> None:
        with connect(1, transport=world.transports[rank], sinks=["jsonl"], run_dir=tmp_path) as log:
            log.log_hyperparams({"rank": rank})
            log.log_ready(0)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert json.loads((tmp_path / "hyperparams.json").read_text()) == {"rank": 0}


def test_what_the_script_changes_in_its_settings_afterwards_is_not_kept(tmp_path: Path) -> None:
    given: dict[str, Any] = {"lr": 0.1, "optimizer": {"name": "adam"}}
    with connect(1, sinks=["jsonl"], run_dir=tmp_path) as log:
        log.log_hyperparams(given)
        given["lr"] = given["optimizer"]["name"] = "changed"
        log.log_ready(0)

    assert json.loads((tmp_path / "hyperparams.json").read_text()) == {"lr": 0.1, "optimizer": {"name": "adam"}}


@pytest.mark.parametrize("given", [None, "lr=0.1", [("lr", 0.1)], {1: 2}])
def test_what_is_no_mapping_of_names_is_refused_at_the_call(given: Any, tmp_path: Path) -> None:
    with connect(1, sinks=["jsonl"], run_dir=tmp_path) as log, pytest.raises(TypeError, match="takes a mapping"):
        log.log_hyperparams(given)


def test_after_close_they_are_dropped_and_that_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = connect(1, sinks=["jsonl"], run_dir=tmp_path)
    log.close()
    log.log_hyperparams({"lr": 0.1})

    assert "hyperparameters (lr) were dropped: the sinks are closed" in caplog.text
