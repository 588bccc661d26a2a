"""The W&B sink: what offline runs hold on disk, and that nobody is asked or kept waiting where W&B cannot be used."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from support.torchrun import torchrun
from support.wandb_files import OfflineRun, offline_runs

SCRIPT = Path(__file__).parent / "scripts" / "wandb_sink.py"
_DEADLINE_S = 100


class Started:
    """A scenario in a process of its own, with no W&B account anywhere near it."""

    def __init__(self, scenario: str, folder: Path, *, stdin: int = subprocess.DEVNULL, **environ: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        paths = os.pathsep.join(sys.path)
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), scenario, str(folder)],
            stdin=stdin,
            stdout=subprocess.PIPE if stdin == subprocess.DEVNULL else stdin,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env={**clean, "HOME": str(folder), "NETRC": str(folder / "none"), "PYTHONPATH": paths, **environ},
            start_new_session=True,
        )

    def ended(self) -> tuple[int, str]:
        """Return the exit status and what was printed."""
        try:
            output, _ = self._process.communicate(timeout=_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise
        return self._process.returncode, output or ""


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, silent: str) -> dict[str, Started]:
    """All scenarios at once: most of their time is W&B's starting."""
    folder = tmp_path_factory.mktemp("wandb")

    return {
        "offline": Started("offline", folder / "offline", WANDB_MODE="offline"),
        "killed": Started("killed", folder / "killed", WANDB_MODE="offline"),
        "disabled": Started("disabled", folder / "disabled", WANDB_MODE="disabled"),
        "beside_the_users": Started("beside_the_users", folder / "mine", WANDB_MODE="offline"),
        "gaps": Started("gaps", folder / "gaps", WANDB_MODE="offline"),
        "paces": Started("paces", folder / "paces", WANDB_MODE="offline"),
        "fails_to_open": Started("fails_to_open", folder / "fails", WANDB_MODE="offline"),
        "silent_job": Started("silent_job", folder / "silent_job", WANDB_BASE_URL=silent, WANDB_API_KEY="a" * 40),
        "unconfigured": Started("unconfigured", folder / "unconfigured"),
        "silent": Started(
            "unconfigured",
            folder / "silent",
            WANDB_BASE_URL=silent,
            WANDB_API_KEY="a" * 40,
            WANDB_INIT_TIMEOUT="1",
        ),
    }


@pytest.fixture(scope="module")
def attempts(started: dict[str, Started]) -> list[OfflineRun]:
    status, output = started["offline"].ended()
    assert status == 0, output
    return offline_runs(started["offline"].folder / "plain")


def test_a_run_has_the_logs_id_project_and_folder_and_charts_go_over_our_step(attempts: list[OfflineRun]) -> None:
    for attempt in attempts:
        assert (attempt.id, attempt.project, attempt.name) == ("abcd1234", "digits", "plain")
        assert attempt.axes.items() >= {"step": "", "seq": "", "*": "step"}.items()


def test_an_entry_is_one_row_with_its_step(attempts: list[OfflineRun]) -> None:
    first = attempts[0].history

    assert [(row["seq"], row["step"], row["loss"]) for row in first] == [(n, 10 * n, n / 2) for n in range(5)]
    assert all(math.isnan(row["nan"]) for row in first)
    assert all(row["inf"] == math.inf for row in first)


def test_a_resumed_run_logs_nothing_that_the_first_attempt_logged(attempts: list[OfflineRun]) -> None:
    first, second = attempts

    assert [row["step"] for row in first.history + second.history if "loss" in row] == [0, 10, 20, 30, 40, 45]
    assert second.history[-1].items() >= {"seq": 7, "step": 45, "eval": 1.0}.items()


@pytest.mark.usefixtures("attempts")
def test_the_checkpoints_entry_that_a_kill_kept_from_the_run_is_added(started: dict[str, Started]) -> None:
    found = offline_runs(started["offline"].folder / "lacking")

    assert [row["seq"] for attempt in found for row in attempt.history] == [0, 1, 2, 3]


def test_hyperparameters_are_the_runs_config(attempts: list[OfflineRun]) -> None:
    assert {key: attempts[0].config[key] for key in ("lr", "optimizer/name")} == {"lr": 0.1, "optimizer/name": "adam"}
    assert attempts[1].config["lr"] == 0.2


@pytest.mark.usefixtures("attempts")
def test_fractions_stay_and_no_step_stands_where_the_last_one_was(started: dict[str, Started]) -> None:
    (found,) = offline_runs(started["offline"].folder / "fractions")

    assert [row["step"] for row in found.history] == [0.5, 0.5, 2]


def test_a_killed_job_and_its_resume_have_each_entry_once(started: dict[str, Started]) -> None:
    assert started["killed"].ended()[0] == -9
    folder = started["killed"].folder
    (first,) = offline_runs(folder)
    assert len(first.history) > 50  # what W&B's own process had not written is lost

    status, output = Started("resumed", folder, WANDB_MODE="offline").ended()

    assert status == 0, output
    assert [row["seq"] for found in offline_runs(folder) for row in found.history] == list(range(1010))


def test_resumed_twice_at_another_pace_no_step_is_doubled(started: dict[str, Started]) -> None:
    status, output = started["paces"].ended()

    assert status == 0, output
    attempts = offline_runs(started["paces"].folder)
    assert [row["step"] for attempt in attempts for row in attempt.history] == [0, 10, 20, 30, 40, 45, 50]


def test_what_an_attempt_lost_is_logged_by_the_next(started: dict[str, Started]) -> None:
    status, output = started["gaps"].ended()

    assert status == 0, output
    attempts = offline_runs(started["gaps"].folder)
    assert sorted(row["seq"] for attempt in attempts for row in attempt.history) == [0, 1, 2, 3, 4, 5]


def test_an_open_that_fails_leaves_no_run_open(started: dict[str, Started]) -> None:
    status, output = started["fails_to_open"].ended()

    assert status == 0, output
    assert "WARNING" not in output  # of changes to the environment, for one
    attempts = offline_runs(started["fails_to_open"].folder)
    assert [row["seq"] for attempt in attempts for row in attempt.history] == [0]


def test_disabled_is_honoured(started: dict[str, Started]) -> None:
    status, output = started["disabled"].ended()

    assert status == 0, output
    assert not list(started["disabled"].folder.rglob("*.wandb"))


def test_a_run_of_the_scripts_own_is_left_as_it_is(started: dict[str, Started]) -> None:
    status, output = started["beside_the_users"].ended()

    assert status == 0, output
    found = {one.id: one for one in offline_runs(started["beside_the_users"].folder)}
    assert set(found) == {"mine", "ours"}
    assert found["mine"].history == [{"x": 1}]
    assert "*" not in found["mine"].axes


def test_a_job_of_several_ranks_has_one_run(tmp_path: Path) -> None:
    environ = {"WANDB_MODE": "offline", "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    job = torchrun(SCRIPT, "job_of_ranks", tmp_path, nproc=2, folder=tmp_path, environ=environ)

    job.assert_clean()
    (found,) = offline_runs(tmp_path)
    assert [row["seq"] for row in found.history] == [0, 1, 2]


# Not usable


def test_without_a_key_there_is_a_clear_error_and_no_question(started: dict[str, Started]) -> None:
    status, output = started["unconfigured"].ended()

    assert status == 0, output
    assert "RuntimeError: W&B has no API key, and nobody is asked for one here" in output
    assert "WANDB_MODE=offline" in output
    assert "(1)" not in output  # the first of W&B's choices


def test_at_a_terminal_too_nobody_is_asked_and_the_other_sinks_go_on(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    job = Started("job", tmp_path, stdin=theirs, TERM="xterm")
    os.close(theirs)
    shown = b"".join(iter(lambda: read(ours), b"")).decode()
    os.close(ours)

    assert job.ended()[0] == 0, shown
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert "W&B has no API key" in shown
    assert "(1)" not in shown


def test_a_server_that_never_answers_is_an_error_within_a_bound(started: dict[str, Started]) -> None:
    status, output = started["silent"].ended()

    assert status == 0, output
    (seconds,) = re.findall(r"after (\d+) s", output)
    assert int(seconds) < 60
    assert re.search(r"^\w*Error: ", output, re.MULTILINE), output


def test_a_server_that_never_answers_keeps_the_job_no_longer_than_close_may_take(started: dict[str, Started]) -> None:
    status, output = started["silent_job"].ended()

    assert status == 0, output
    assert "sink wandb lost 3 of 3 entries" in output
    (seconds,) = re.findall(r"it went on for (\d+) s", output)
    assert int(seconds) < 15  # W&B itself would be waited for for half a minute


def read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux's way of saying that the other end of a terminal is closed
        return b""
