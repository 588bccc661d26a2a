"""`connect`: what it refuses, what it chooses, and what it leaves on the disk."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logsync.coordinator.errors import CollectiveSetupError, ConfigError, ConfigMismatch, LaunchError, LogsyncError
from logsync.coordinator.messages import LogEntry
from logsync.workers import TrainingLog, connect
from logsync.workers.transports.local import LocalTransport
from logsync.workers.transports.threads import ThreadWorld


@pytest.fixture(autouse=True)
def _alone_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name in ("RANK", "WORLD_SIZE") or name.startswith(("SLURM_", "OMPI_", "TORCHELASTIC_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"log_frequency": 0}, ValueError, "log frequency must be greater than 0, given 0"),
        ({"log_frequency": -1}, ValueError, "greater than 0, given -1"),
        ({"log_frequency": 2.5}, TypeError, "must be an int or None for frequency type 'step', given 2.5"),
        ({"log_frequency": True}, TypeError, "must be an int or None"),
        ({"log_frequency": "10"}, TypeError, "must be an int or None .* given '10'"),
        ({"log_frequency": math.nan, "frequency_type": "epoch"}, ValueError, "must be finite, given nan"),
        ({"log_frequency": 2**63}, ConfigError, r"at most 2\*\*63 - 1, given an int of 64 bits"),
        ({"mode": "sometimes"}, ValueError, "mode must be one of .* given 'sometimes'"),
        ({"mode": None}, TypeError, "mode must be one of"),
        ({"frequency_type": "steps"}, ValueError, "frequency_type must be one of .* given 'steps'"),
        ({"transport": "carrier pigeon"}, ConfigError, "transport must be 'auto', 'local', 'collective'"),
        ({"sinks": "jsonl"}, TypeError, "sinks is a list"),
        ({"sinks": ["jsnol"]}, ValueError, "no sink named 'jsnol'"),
        ({"sinks": [3]}, TypeError, "a sink is a name"),
        ({"sinks": ["jsonl", "jsonl"]}, ValueError, "twice"),
        ({"run_dir": 5}, TypeError, "PathLike"),
        ({"name": ""}, ConfigError, "name must be 1 to 64 letters"),
        ({"name": "a/b"}, ConfigError, "name must be"),
        ({"name": ".."}, ConfigError, "name must be"),
        ({"name": "x" * 65}, ConfigError, "name must be"),
        ({"name": "a\n"}, ConfigError, "name must be"),
        ({"name": 3}, ConfigError, "name must be .* given 3"),
        ({"lockstep": False}, ConfigError, "lockstep=False needs transport='ray', given 'auto'"),
        ({"lockstep": False, "transport": "local"}, ConfigError, "lockstep=False needs transport='ray'"),
        ({"lockstep": False, "transport": "ray", "rank": 0}, ConfigError, "rank=0 was given together with lockstep"),
        ({"lockstep": False, "transport": "ray", "label": "a b"}, ConfigError, "label must be 1 to 64 letters"),
        ({"label": "rollout"}, ConfigError, "label='rollout' was given to a rank"),
        ({"write": "Auto"}, ConfigError, "write must be 'auto' or 'explicit', given 'Auto'"),
        ({"write": True}, ConfigError, "write must be"),
        ({"timeout": 0}, ConfigError, "timeout must be greater than 0 .* given 0"),
        ({"timeout": -1.5}, ConfigError, "timeout must be greater than 0"),
        ({"timeout": math.nan}, ConfigError, "timeout must be .* given nan"),
        ({"timeout": math.inf}, ConfigError, "timeout must be .* given inf"),
        ({"timeout": "60"}, TypeError, "timeout must be a number of seconds, given '60'"),
        ({"timeout": True}, TypeError, "timeout must be a number of seconds, given True"),
        ({"timeout": None}, TypeError, "timeout must be"),
        ({"warn_after": 0}, ConfigError, "warn_after must be greater than 0"),
        ({"warn_after": "soon"}, TypeError, "warn_after must be a number of seconds"),
        ({"max_lease": -1}, ConfigError, "max_lease must be from 0 to 1000000 calls, given -1"),
        ({"max_lease": 10**7}, ConfigError, "max_lease must be"),
        ({"max_lease": 2.0}, TypeError, "max_lease must be an int, given 2.0"),
        ({"max_lease": True}, TypeError, "max_lease must be an int, given True"),
        ({"rank": 1}, ConfigError, "rank=1 was given, but this process has rank 0"),
        ({"world_size": 8}, ConfigError, "world_size=8 was given, but this process has world_size 1"),
        ({"process_group": object(), "transport": "local"}, ConfigError, "process_group"),
        ({"process_group": object()}, LaunchError, "init_process_group"),
        ({"transport": "collective"}, LaunchError, "init_process_group"),
    ],
    ids=lambda v: " ".join(f"{k}={x!r:.20}" for k, x in v.items()) if isinstance(v, dict) else "",
)  # fmt: skip
def test_an_argument_that_makes_no_sense_is_refused_and_nothing_is_left_behind(
    arguments: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        connect(**{"log_frequency": 10, **arguments})

    assert list(tmp_path.iterdir()) == []


def test_a_lonely_rank_of_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(LaunchError, match="torchrun started this process as rank 1 of 2"):
        connect(10)
    connect(10, transport="local").close()


@pytest.mark.parametrize(
    "arguments",
    [
        {"log_frequency": None},
        {"log_frequency": np.int64(10)},
        {"log_frequency": 2**63 - 1},
        {"log_frequency": 0.5, "frequency_type": " Epoch "},
        {"mode": "ON_UPDATE"},
        {"name": "val-2.b_C"},
        {"timeout": 1, "warn_after": 0.5},
        {"max_lease": 0},
        {"max_lease": 1_000_000},
        {"rank": 0, "world_size": 1},
        {"sinks": []},
        {"sinks": ()},
    ],
    ids=repr,
)
def test_what_makes_sense_is_taken(arguments: dict[str, Any]) -> None:
    with connect(**{"log_frequency": 10, **arguments}) as log:
        assert log.log_frequency == arguments.get("log_frequency", 10)
        assert log.log_ready(0) is (log.log_frequency is not None)


def test_a_log_knows_what_it_was_given() -> None:
    with connect(7, mode="on_update", frequency_type="batch", sinks=[], name="val") as log:
        assert isinstance(log, TrainingLog)
        assert (log.log_frequency, log.mode, log.frequency_type, log.name) == (7, "on_update", "batch", "val")
        assert (log.rank, log.world_size, log.is_coordinator, log.transport) == (0, 1, True, "local")
        assert (log.is_epoch_frequency_manager, log.is_optim_frequency_manager) == (False, False)
        assert (log.last_log_step, log.last_model_update_step, log.last_entry) == (None, None, None)
        assert log.stats[:3] == (0, 0, 0)


# Where files go


def test_every_run_has_a_folder_of_its_own_made_at_once(tmp_path: Path) -> None:
    logs = [connect(10, name=name) for name in ("val", "val", None)]
    folders = [Path(log.run_dir) for log in logs]

    assert len(set(folders)) == 3
    for folder, name in zip(folders, ("val", "val", "train"), strict=True):
        assert folder.is_dir()
        assert folder.parent == tmp_path / "runs"
        assert re.fullmatch(rf"\d{{8}}-\d{{6}}-{name}(-2)?", folder.name)
    for log in logs:
        log.log_ready(0)
        log.close()
    assert all((folder / "metrics.jsonl").is_file() for folder in folders)


def test_a_folder_that_nothing_was_put_into_is_removed(tmp_path: Path) -> None:
    connect(10, sinks=["jsonl"]).close()

    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("sinks", [[], ["console"], [lambda _: None]], ids=["none", "console", "a function"])
def test_sinks_without_files_make_no_folder(tmp_path: Path, sinks: list[Any]) -> None:
    with connect(10, sinks=sinks) as log:
        log.log_ready(0)

    assert list(tmp_path.iterdir()) == []


def test_the_users_folder_is_neither_made_nor_removed_without_need(tmp_path: Path) -> None:
    connect(10, run_dir="mine").close()
    assert not (tmp_path / "mine").exists()

    (tmp_path / "there").mkdir()
    connect(10, run_dir=tmp_path / "there").close()
    assert (tmp_path / "there").is_dir()


def test_the_users_folder_is_the_one_that_was_meant_when_connect_was_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    with connect(10, run_dir="mine") as log:
        monkeypatch.chdir(tmp_path / "elsewhere")
        log.log_ready(0)

    assert (tmp_path / "mine" / "metrics.jsonl").is_file()


def test_two_open_logs_cannot_share_a_folder(tmp_path: Path) -> None:
    with (
        connect(10, run_dir="mine", name="train"),
        pytest.raises(ConfigError, match="is in use by the open log 'train'; give every log a folder"),
    ):
        connect(10, run_dir=tmp_path / "mine", name="val")
    connect(10, run_dir="mine").close()


def test_where_no_folder_can_be_made_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "runs").write_text("not a folder")
    entries: list[LogEntry] = []

    with connect(10, sinks=["jsonl", entries.append]) as log:
        assert log.log_ready(0)

    assert len(entries) == 1
    assert "cannot make the folder" in caplog.text


# When connecting fails


class Broken(LocalTransport):
    """Cannot be started, and remembers that it was closed."""

    closed = False

    def start(self, *_: object) -> None:
        msg = "no group today"
        raise CollectiveSetupError(msg)

    def close(self, reason: str | None = None) -> None:
        del reason
        self.closed = True


def test_a_transport_that_does_not_start_is_closed_and_no_folder_is_left(tmp_path: Path) -> None:
    transport = Broken()

    with pytest.raises(CollectiveSetupError, match="no group today"):
        connect(10, transport=transport)

    assert transport.closed
    assert list((tmp_path / "runs").iterdir()) == []


def connected(world_size: int, settle: Callable[[int], TrainingLog]) -> dict[int, LogsyncError]:
    """What `settle` raises on each rank; the logs that it returns are closed."""
    raised: dict[int, LogsyncError] = {}

    def run(rank: int) -> None:
        try:
            settle(rank).close()
        except LogsyncError as error:
            raised[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return raised


def test_ranks_with_different_settings_all_raise_the_same(tmp_path: Path) -> None:
    world = ThreadWorld(3, timeout_s=20)

    raised = connected(3, lambda rank: connect(10 + rank // 2, transport=world.transports[rank]))

    assert [type(raised[rank]) for rank in range(3)] == [ConfigMismatch] * 3
    assert len({str(error) for error in raised.values()}) == 1
    assert raised[0].ranks == (2,)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_package_that_rank_0_lacks_is_an_error_on_all_ranks_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    world = ThreadWorld(3, timeout_s=20)

    raised = connected(3, lambda rank: connect(10, transport=world.transports[rank], sinks=["jsonl", "tensorboard"]))

    assert [type(raised[rank]) for rank in range(3)] == [ConfigError] * 3
    (said,) = {str(error) for error in raised.values()}
    assert said.startswith("rank 0 cannot log: the sink 'tensorboard' needs the package tensorboard, which is not inst")
    assert said.endswith("pip install 'logsync[tensorboard]'")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_package_that_other_ranks_lack_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: find(name) if threading.current_thread().name == "rank 0" else None
    )
    world = ThreadWorld(3, timeout_s=20)

    def log_once(rank: int) -> TrainingLog:
        log = connect(10, transport=world.transports[rank], sinks=["tensorboard"], run_dir=tmp_path / "run")
        log.write(5, {"loss": 1.0})
        return log

    assert connected(3, log_once) == {}
    assert list((tmp_path / "run" / "tb").iterdir()) != []


def test_connect_alone_loads_neither_torch_nor_numpy(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from logsync.workers import connect\n"
        "with connect(10) as log:\n"
        "    for step in range(30):\n"
        "        log.record(loss=1.0 / (step + 1))\n"
        "        log.log_ready(step)\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & {'numpy', 'torch', 'ray'}, file=sys.stderr)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )

    assert ran.stderr.strip() == ""
    assert len(ran.stdout.splitlines()) >= 3
