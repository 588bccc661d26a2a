"""log.timer: seconds of sections, as a metric with spread."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from logsync.coordinator.errors import LogClosed
from logsync.coordinator.messages import LogEntry
from logsync.workers import TrainingLog, connect, timer
from logsync.workers.transports.threads import ThreadWorld


class Clock:
    """A clock that tests set; every thread has its own."""

    def __init__(self) -> None:
        self._own = threading.local()

    def __call__(self) -> float:
        return float(getattr(self._own, "now", 1000.0))

    def pass_s(self, seconds: float) -> None:
        self._own.now = self() + seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timer, "perf_counter", clock)
    return clock


def open_log(folder: Path, **options: Any) -> TrainingLog:
    log: TrainingLog = connect(None, **{"transport": "local", "sinks": [], "run_dir": folder, **options})
    return log


def metrics(log: TrainingLog) -> dict[str, float]:
    return log.write(1).metrics


def test_a_metric_is_the_mean_of_its_sections_seconds_with_spread(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path) as log:
        for seconds in (1.0, 2.0, 6.0):
            with log.timer("data"):
                clock.pass_s(seconds)
            clock.pass_s(100.0)

        assert metrics(log) == {
            "time_s/data": 3.0,
            "time_s/data/min": 3.0,
            "time_s/data/max": 3.0,
            "time_s/data/std": 0.0,
            "time_s/data/argmax_rank": 0.0,
        }


def test_each_entry_has_the_sections_since_the_one_before_and_none_where_there_were_none(
    tmp_path: Path, clock: Clock
) -> None:
    with open_log(tmp_path) as log:
        timed = log.timer("data")
        found = []
        for seconds in ([1.0], [], [4.0, 6.0]):
            for one in seconds:
                with timed:
                    clock.pass_s(one)
            found.append(metrics(log).get("time_s/data"))

    assert found == [1.0, None, 5.0]


def test_the_rank_of_the_longest_mean_is_named(tmp_path: Path, clock: Clock) -> None:
    world = ThreadWorld(3, timeout_s=20.0)
    entries: list[LogEntry] = []

    def run(rank: int) -> None:
        with open_log(tmp_path, transport=world.transports[rank]) as log:
            for _ in range(1 + rank):  # the mean of all sections is not the mean of the ranks' means
                with log.timer("data"):
                    clock.pass_s((2.0, 8.0, 3.0)[rank])
            entries.append(log.write(1))

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert len(entries) == 3
    for entry in entries:
        assert entry.metrics["time_s/data"] == pytest.approx((2.0 + 2 * 8.0 + 3 * 3.0) / 6)
        assert entry.metrics["time_s/data/min"] == pytest.approx(2.0)
        assert entry.metrics["time_s/data/max"] == pytest.approx(8.0)
        assert entry.metrics["time_s/data/argmax_rank"] == 1


def test_sections_may_be_nested_under_other_names_and_inside_themselves(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path) as log:
        with log.timer("outer"):
            clock.pass_s(1.0)
            with log.timer("inner"):
                clock.pass_s(2.0)
            with log.timer("outer"):
                clock.pass_s(4.0)
        values = metrics(log)

    assert values["time_s/inner"] == 2.0
    assert values["time_s/outer"] == (7.0 + 4.0) / 2


def test_a_function_may_be_decorated_and_may_call_itself(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path) as log:

        @log.timer("work")
        def work(depth: int) -> int:
            clock.pass_s(1.0)
            return work(depth - 1) + 1 if depth else 0

        assert work(2) == 2
        assert work.__name__ == "work"
        assert metrics(log)["time_s/work"] == (3.0 + 2.0 + 1.0) / 3


def test_a_section_that_raises_counts_and_its_exception_goes_on(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path) as log:

        @log.timer("data")
        def raising() -> None:
            clock.pass_s(2.0)
            raise KeyError

        with pytest.raises(KeyError):
            raising()
        with log.timer("data"):
            clock.pass_s(4.0)

        assert metrics(log)["time_s/data"] == 3.0


def test_a_section_across_a_log_belongs_to_the_entry_in_which_it_ends(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path) as log:
        with log.timer("data"):
            clock.pass_s(2.0)
            before = metrics(log)
            clock.pass_s(3.0)
        assert before == {}
        assert metrics(log)["time_s/data"] == 5.0


def test_a_loaded_state_drops_what_was_timed_and_timers_go_on(tmp_path: Path, clock: Clock) -> None:
    with open_log(tmp_path) as log:
        timed = log.timer("data")
        with timed:
            clock.pass_s(9.0)
        log.load_state_dict(log.state_dict())
        with timed:
            clock.pass_s(2.0)

        assert metrics(log)["time_s/data"] == 2.0


def test_the_same_name_is_the_same_timer(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        assert log.timer("data") is log.timer("data")
        assert log.timer("data") is not log.timer("other")


def test_a_name_that_is_taken_or_no_name_is_refused_at_the_call(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.record({"time_s/taken": 1.0, "time_s/mine/max": 2.0})
        for name in ("", "taken", "mine", "x" * 250, "a\nb"):
            with pytest.raises(ValueError, match=r"time_s|a metric's name"):
                log.timer(name)
        no_names: list[Any] = [None, 3, ["data"]]
        for no_name in no_names:
            with pytest.raises(TypeError):
                log.timer(no_name)

        assert metrics(log) == {"time_s/taken": 1.0, "time_s/mine/max": 2.0}


def test_a_section_that_ends_after_close_disturbs_nobody_and_no_new_one_begins(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with log.timer("data"):
        log.close()

    for name in ("data", "other"):
        with pytest.raises(LogClosed, match="timer"):
            log.timer(name)


def test_time_does_not_go_back_with_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_log(tmp_path) as log:
        with log.timer("data"):
            monkeypatch.setattr("time.time", lambda: 0.0)
        monkeypatch.undo()

        assert 0.0 <= metrics(log)["time_s/data"] < 60.0
