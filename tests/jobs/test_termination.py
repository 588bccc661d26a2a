"""SIGTERM, as launchers and schedulers send it: what was merged is not lost, and the process ends as it would have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.torchrun import entries, wait_for

SCRIPT = Path(__file__).parent / "scripts" / "terminated.py"
ENTRIES = 5

pytestmark = pytest.mark.timeout(90)


class Started:
    def __init__(self, scenario: str, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), scenario, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def terminated(self) -> tuple[int, str]:
        """Send SIGTERM once the script is ready; return its status and output."""
        wait_for(self.folder / "ready")
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output

    @property
    def written(self) -> tuple[list[int], list[int]]:
        """The entries in the file, and those that came to the slow destination."""
        slow = (self.folder / "slow.txt").read_text().split()
        return [entry["seq"] for entry in entries(self.folder)], [int(seq) for seq in slow]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Started]]:
    folder = tmp_path_factory.mktemp("terminated")
    scenarios = (
        "training",
        "stuck",
        "closing",
        "several",
        "closed_meanwhile",
        "own_handler_before",
        "own_handler_after",
        "forked_child",
    )
    all_started = {scenario: Started(scenario, folder / scenario) for scenario in scenarios}
    yield all_started
    for one in all_started.values():
        one.process.kill()
        one.process.wait()


@pytest.mark.parametrize("scenario", ["training", "stuck", "closing", "several"])
def test_everything_that_was_merged_is_flushed_and_the_process_ends_by_the_signal(
    started: dict[str, Started], scenario: str
) -> None:
    status, output = started[scenario].terminated()

    assert status == -signal.SIGTERM, output
    assert started[scenario].written == (list(range(ENTRIES)), list(range(ENTRIES)))
    if scenario == "several":
        assert [entry["seq"] for entry in entries(started[scenario].folder / "other")] == [0]


def test_a_signal_that_comes_while_the_default_action_is_put_back_still_ends_the_process(
    started: dict[str, Started],
) -> None:
    one = started["closed_meanwhile"]
    output, _ = one.process.communicate(timeout=60)

    assert one.process.returncode == -signal.SIGTERM, output
    assert one.written == (list(range(ENTRIES)), list(range(ENTRIES)))


def test_a_program_that_handles_sigterm_itself_is_left_alone_and_its_exit_flushes(started: dict[str, Started]) -> None:
    status, output = started["own_handler_before"].terminated()

    assert status == 7, output
    assert started["own_handler_before"].written == (list(range(ENTRIES)), list(range(ENTRIES)))


def test_a_handler_that_is_set_later_decides_what_follows_and_may_call_the_one_before(
    started: dict[str, Started],
) -> None:
    status, output = started["own_handler_after"].terminated()

    assert status == 0, output
    assert started["own_handler_after"].written == (list(range(ENTRIES + 1)), list(range(ENTRIES + 1)))


def test_a_forked_childs_sigterm_ends_the_child_alone_and_after_close_all_is_as_before(
    started: dict[str, Started],
) -> None:
    status, output = started["forked_child"].terminated()

    assert status == -signal.SIGTERM, output
    assert started["forked_child"].written == (list(range(ENTRIES + 1)), list(range(ENTRIES + 1)))


@pytest.mark.slow
def test_a_destination_that_never_returns_holds_the_end_up_for_a_bounded_time(tmp_path: Path) -> None:
    job = Started("blocked_sink", tmp_path / "blocked")

    began = time.monotonic()
    status, output = job.terminated()

    assert status == -signal.SIGTERM, output
    assert "sink Slow did not end within 10 s: 5 entries were not written to it" in output
    assert time.monotonic() - began < 30
    assert [entry["seq"] for entry in entries(job.folder)] == list(range(ENTRIES))
