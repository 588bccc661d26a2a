"""The log as a training script sees it: alone, and with ranks that are threads."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from logsync.coordinator.errors import (
    AgreedError,
    BadType,
    BadValue,
    LogClosed,
    ReductionMismatch,
    RoundInterrupted,
    RoundMismatch,
    TransportError,
)
from logsync.coordinator.messages import LogEntry
from logsync.workers import TrainingLog, connect
from logsync.workers.transports.local import LocalTransport
from logsync.workers.transports.threads import ThreadWorld


class Alone:
    """A log of one process, and what its sink got."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[LogEntry] = []

    def connect(self, log_frequency: Any = 10, **options: Any) -> TrainingLog:
        given = {"transport": "local", "sinks": [self.entries.append], "run_dir": self.folder, **options}
        log: TrainingLog = connect(log_frequency, **given)
        return log

    @property
    def metrics(self) -> list[dict[str, float]]:
        return [entry.metrics for entry in self.entries]


@pytest.fixture
def alone(tmp_path: Path) -> Alone:
    return Alone(tmp_path)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def on_threads(world_size: int, script: Callable[[int, Any], Any], timeout_s: float = 20.0) -> list[Any]:
    """Run `script(rank, transport)` in a thread for each rank; return what each returned or raised."""
    world = ThreadWorld(world_size, timeout_s=timeout_s)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        try:
            results[rank] = script(rank, world.transports[rank])
        except Exception as error:  # noqa: BLE001 - the test looks at it
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s + 10)
        assert not thread.is_alive(), "a rank hangs"
    return results


def returned(results: list[Any]) -> list[Any]:
    """The results, if no rank raised."""
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


# A training loop


def test_a_loop_logs_at_every_interval_what_was_recorded_in_it(tmp_path: Path) -> None:
    with connect(10, transport="local", sinks=["jsonl"], run_dir=tmp_path) as log:
        for step in range(25):
            log.record({"train/loss": torch.tensor(float(step))}, weight=1 + step % 2)
            log.record({"train/tokens": 100}, reduce="sum")
            if log.log_ready(step):
                log.annotate({"train/lr": 0.5 / (step + 1)})

    written = lines(tmp_path)
    assert [(line["seq"], line["step"], line["train/tokens"]) for line in written] == [
        (0, 0, 100),
        (1, 10, 1000),
        (2, 20, 1000),
        (3, 24, 400),
    ]
    assert written[1]["train/loss"] == sum(s * (1 + s % 2) for s in range(1, 11)) / 15
    assert [line.get("train/lr") for line in written] == [0.5, 0.5 / 11, 0.5 / 21, None]
    assert all(isinstance(line["time"], float) and line["attempt"] == 0 for line in written)


def test_a_log_that_is_ready_is_marked_and_the_entry_is_there(alone: Alone) -> None:
    with alone.connect(max_lease=0) as log:
        log.record(loss=3.0)
        assert log.log_ready(4)

        assert log.last_log_step == 4
        assert log.last_entry is not None
        assert (log.last_entry.step, log.last_entry.metrics, log.last_entry.world_size) == (4, {"loss": 3.0}, 1)
        assert [log.log_ready(step) for step in (5, 13, 14)] == [False, False, True]


def test_the_surface_of_the_frequency_manager_mirrors_the_last_reply(alone: Alone) -> None:
    with alone.connect(mode="on_update") as log:
        log.log_ready(0)
        log.model_updated(3)
        heard_of = log.last_model_update_step
        answers = [log.log_ready(step) for step in range(1, 25)]

        assert [step for step, ready in enumerate(answers, start=1) if ready] == [10]
        assert heard_of is None  # no round in between
        assert (log.last_log_step, log.last_model_update_step) == (10, 3)


def test_a_new_frequency_is_in_force_from_the_next_round(alone: Alone) -> None:
    with alone.connect(10, max_lease=0) as log:
        log.log_ready(0)
        log.log_frequency = 3
        assert log.log_frequency == 10
        assert [log.log_ready(step) for step in (1, 2, 3)] == [False, False, True]
        assert log.log_frequency == 3
        with pytest.raises(ValueError, match="greater than 0, given 0"):
            log.log_frequency = 0
        with pytest.raises(TypeError):
            log.log_frequency = "5"  # type: ignore[assignment]
        log.log_ready(4)
        assert log.log_frequency == 3


def test_check_model_update_is_asked_for_at_a_call(alone: Alone) -> None:
    with alone.connect(10, max_lease=0) as log:
        log.model_updated(0)
        log.log_ready(0)
        log.model_updated(5)

        assert [log.log_ready(step, check_model_update=True) for step in (10, 14, 15)] == [False, False, True]


def test_stats_say_what_the_log_has_cost(alone: Alone) -> None:
    with alone.connect(50) as log:
        for step in range(1000):
            log.record(loss=1.0)
            log.log_ready(step)

        assert log.stats.calls == 1000
        assert log.stats.rounds == 20 + 1  # one per log, and one more in the first interval
        assert 21 * 20 < log.stats.bytes_sent < 21 * 500
        assert log.stats.wait_s > 0


def test_a_step_that_went_back_is_warned_of(alone: Alone, caplog: pytest.LogCaptureFixture) -> None:
    with alone.connect() as log:
        for step in (0, 30, 3):
            log.log_ready(step)

    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "behind the last log at step 30" in record.message


# write


def test_write_merges_and_writes_at_once_and_marks_its_step(alone: Alone) -> None:
    with alone.connect(max_lease=0) as log:
        log.log_ready(0)
        log.record(loss=1.0)
        log.log_ready(5)

        entry = log.write(7, {"eval/acc": 0.5})

        assert entry is log.last_entry
        assert (entry.seq, entry.step, entry.calls, entry.metrics) == (1, 7, 1, {"loss": 1.0, "eval/acc": 0.5})
        assert [log.log_ready(step) for step in (8, 16, 17)] == [False, False, True]
        assert log.write(None).step is None
    assert [entry.step for entry in alone.entries] == [0, 7, 17, None]


def test_write_works_without_a_frequency_and_before_any_call(alone: Alone) -> None:
    with alone.connect(None) as log:
        assert log.write(0, {"a": 1.0}).calls == 0
        assert not any(log.log_ready(step) for step in range(100))
        assert log.write(99).calls == 100


@pytest.mark.parametrize(
    ("step", "values", "error"),
    [
        ("x", None, BadType),
        (-1, None, BadValue),
        (5, {"a": "x"}, BadType),
        (5, {"a": torch.ones(2)}, BadValue),
        (5, {"": 1.0}, BadValue),
        (5, 3, BadType),
    ],
)
def test_a_bad_write_writes_nothing_and_keeps_the_window(
    alone: Alone, step: Any, values: Any, error: type[AgreedError]
) -> None:
    with alone.connect() as log:
        log.record(loss=1.0)
        with pytest.raises(error, match=r"^rank 0, call 0: "):
            log.write(step, values)
        assert log.last_entry is None

        assert log.write(5).metrics == {"loss": 1.0}


# Explicit writes


def test_with_explicit_writes_the_body_computes_only_when_a_log_is_due(alone: Alone) -> None:
    computed = []
    with alone.connect(10, write="explicit") as log:
        for step in range(25):
            log.record(loss=float(step))
            if log.log_ready(step):
                computed.append(step)
                log.write(step, {"expensive": step * 2.0})

    assert computed == [0, 10, 20]
    assert [(e.step, e.metrics) for e in alone.entries] == [
        (0, {"loss": 0.0, "expensive": 0.0}),
        (10, {"loss": 5.5, "expensive": 20.0}),
        (20, {"loss": 15.5, "expensive": 40.0}),
        (24, {"loss": 22.5}),
    ]


def test_with_explicit_writes_a_step_stays_ready_until_written_or_marked(alone: Alone) -> None:
    with alone.connect(10, write="explicit", sinks=[], max_lease=0) as log:
        assert [log.log_ready(step) for step in (0, 1, 2)] == [True] * 3
        log.log_written(2)  # the source's own pair
        assert [log.log_ready(step) for step in (3, 11, 12, 13)] == [False, False, True, True]
        assert log.last_entry is None


# annotate


def test_annotations_are_on_the_entry_that_was_just_made_and_not_in_last_entry(alone: Alone) -> None:
    with alone.connect() as log:
        log.log_ready(0)
        log.annotate({"lr": torch.tensor(0.5), "mfu": 1})
        assert log.last_entry is not None
        assert log.last_entry.metrics == {}
        log.write(3)
        log.annotate({"lr": 0.25})

    assert alone.metrics == [{"lr": 0.5, "mfu": 1.0}, {"lr": 0.25}]


def test_an_annotation_may_come_until_the_next_call_and_costs_no_round(alone: Alone) -> None:
    with alone.connect() as log:
        for step in range(12):
            log.log_ready(step)
            if step == 10:
                rounds = log.stats.rounds
                log.record(later=1.0)
                log.model_updated(10)
                log.annotate({"lr": 1.0})
        assert log.stats.rounds == rounds
    assert alone.metrics == [{}, {"lr": 1.0}, {"later": 1.0}]


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"loss": 5.0}, ValueError),
        ({"lr": 5.0}, ValueError),
        ({"new": "x"}, TypeError),
        ({"new": True}, TypeError),
        ({"new": torch.ones(2)}, ValueError),
        ({"": 1.0}, ValueError),
        ({"seq": 1.0}, ValueError),
        ({3: 1.0}, TypeError),
    ],
)
def test_a_bad_annotation_is_refused_whole(alone: Alone, values: Any, error: type[Exception]) -> None:
    with alone.connect() as log:
        log.record(loss=1.0)
        log.log_ready(0)
        log.annotate({"lr": 0.1})
        with pytest.raises(error):
            log.annotate({"fine": 1.0, **values})

    assert alone.metrics == [{"loss": 1.0, "lr": 0.1}]


def test_an_annotation_without_an_entry_is_dropped_with_a_warning(
    alone: Alone, caplog: pytest.LogCaptureFixture
) -> None:
    with alone.connect() as log:
        for step in range(3):
            log.log_ready(step)
        log.annotate({"lr": 0.1})

    assert alone.metrics == [{}]
    assert "annotate(lr) came when no entry was open" in caplog.text


def test_elsewhere_annotate_does_nothing(tmp_path: Path) -> None:
    entries: list[LogEntry] = []

    def script(rank: int, transport: Any) -> None:
        with connect(10, transport=transport, sinks=[entries.append], run_dir=tmp_path) as log:
            log.log_ready(0)
            log.annotate({"lr": 0.1} if rank == 0 else {"lr": "junk", "more": 1.0})

    returned(on_threads(3, script))
    assert [entry.metrics for entry in entries] == [{"lr": 0.1}]


# Bad input


def test_a_bad_step_is_an_error_and_the_next_call_works(alone: Alone) -> None:
    with alone.connect() as log:
        log.record(loss=1.0)
        with pytest.raises(BadType, match="rank 0, call 1: log step must be an int"):
            log.log_ready("zero")  # type: ignore[arg-type]
        assert log.log_ready(0)

    assert alone.metrics == [{"loss": 1.0}]


def test_a_bad_step_under_the_last_lease_does_not_cost_the_last_window(alone: Alone) -> None:
    log = alone.connect()
    for step in (0, 1, "two"):
        log.record(loss=1.0)
        log.log_ready(step)  # type: ignore[arg-type]
    with pytest.raises(BadType, match="rank 0, call 3"):
        log.close()

    assert alone.metrics == [{"loss": 1.0}, {"loss": 1.0}]


def test_a_bad_step_before_all_close_is_every_ranks_error_and_the_last_entry_is_whole(tmp_path: Path) -> None:
    entries: list[LogEntry] = []

    def script(rank: int, transport: Any) -> None:
        log = connect(10, transport=transport, sinks=[entries.append], run_dir=tmp_path)
        for step in range(6):
            log.record(loss=float(rank))
            log.log_ready("three" if (rank, step) == (1, 3) else step)  # type: ignore[arg-type]
        log.close()

    for error in on_threads(3, script):
        assert isinstance(error, BadType)
        assert (error.ranks, error.call) == ((1,), 4)
    assert [(e.step, e.metrics, e.ranks, e.partial) for e in entries] == [
        (0, {"loss": 1.0}, {}, False),
        (5, {"loss": 1.0}, {}, False),
    ]


def test_last_windows_that_cannot_be_merged_are_every_ranks_error_and_rank_0s_is_written(tmp_path: Path) -> None:
    entries: list[LogEntry] = []

    def script(rank: int, transport: Any) -> None:
        with connect(10, transport=transport, sinks=[entries.append], run_dir=tmp_path) as log:
            log.log_ready(0)
            log.record({"n": 5.0}, reduce="sum" if rank else "max")

    for error in on_threads(2, script):
        assert isinstance(error, ReductionMismatch)
    assert [(e.metrics, e.partial) for e in entries] == [({}, False), ({"n": 5.0}, True)]


def test_a_window_is_kept_until_a_round_has_accepted_it(tmp_path: Path) -> None:
    def script(rank: int, transport: Any) -> Any:
        with connect(10, transport=transport, sinks=[], run_dir=tmp_path, max_lease=0) as log:
            log.log_ready(0)
            log.record(loss=float(rank))
            with pytest.raises(RoundMismatch):
                log.log_ready(10 + rank)
            log.record(loss=4.0 + rank)
            assert log.log_ready(11 + rank)
            return log.last_entry

    entries = returned(on_threads(2, script))
    assert entries[0] == entries[1]
    assert entries[0].metrics == {"loss": 2.5}


def test_two_reductions_of_one_key_are_every_ranks_error(tmp_path: Path) -> None:
    def script(rank: int, transport: Any) -> None:
        with connect(10, transport=transport, sinks=[], run_dir=tmp_path) as log:
            log.record({"n": 1.0}, reduce="sum" if rank else "max")
            log.log_ready(0)

    for error in on_threads(3, script):
        assert isinstance(error, ReductionMismatch)
        assert error.ranks == (0, 1)


# close


def test_close_writes_what_is_open_and_a_second_close_does_nothing(alone: Alone) -> None:
    log = alone.connect()
    log.log_ready(0)
    log.record(loss=2.0)
    log.log_ready(1)

    log.close()
    log.close()

    assert [(e.step, e.metrics, e.partial) for e in alone.entries] == [(0, {}, False), (1, {"loss": 2.0}, False)]


def test_a_log_in_which_nothing_happened_writes_nothing(alone: Alone) -> None:
    alone.connect().close()
    with alone.connect():
        pass

    assert alone.entries == []


def test_after_close_calls_are_refused_and_what_was_is_still_there(alone: Alone) -> None:
    with alone.connect() as log:
        record = log.record
        record(loss=1.0)
        log.log_ready(5)
        state = log.state_dict()

    for call in (lambda: log.log_ready(6), lambda: log.write(6), lambda: log.record(loss=1.0)):
        with pytest.raises(LogClosed, match="closed"):
            call()
    assert log.state_dict() == state
    assert log.last_entry is not None
    assert (log.last_log_step, log.stats.calls) == (5, 1)
    assert len(alone.entries) == 1


def test_a_rank_that_closed_goes_on_answering_until_all_have_closed(tmp_path: Path) -> None:
    for early in (0, 1):
        entries: list[LogEntry] = []

        def script(rank: int, transport: Any, early: int = early, entries: list[LogEntry] = entries) -> Any:
            with connect(10, transport=transport, sinks=[entries.append], run_dir=tmp_path) as log:
                for step in range(45 if rank != early else 12):
                    log.record(loss=float(rank))
                    log.log_ready(step)
            return log.last_entry

        last = returned(on_threads(2, script))

        assert last[0] == last[1] == entries[-1]
        assert [entry.step for entry in entries] == [0, 10, 20, 30, 40, 44]
        assert [entry.calls for entry in entries] == [1, 10, 10, 10, 10, 4]
        assert [entry.ranks for entry in entries] == [{}] * 3 + [{"loss": 1}] * 3
        assert [entry.metrics["loss"] for entry in entries[3:]] == [1 - early] * 3


# Leaving by an exception


class UsersError(Exception):
    """Raised in the training loop."""


def test_an_exception_in_the_block_passes_and_what_was_recorded_is_written_as_partial(alone: Alone) -> None:
    def script() -> None:
        with alone.connect() as log:
            for step in range(14):
                log.record(loss=float(step))
                log.log_ready(step)
            raise UsersError

    with pytest.raises(UsersError):
        script()

    assert [(e.seq, e.step, e.metrics, e.calls, e.partial) for e in alone.entries] == [
        (0, 0, {"loss": 0.0}, 1, False),
        (1, 10, {"loss": 5.5}, 10, False),
        (2, 13, {"loss": 12.0}, 3, True),
    ]


def test_an_exception_after_a_log_writes_no_empty_entry(alone: Alone) -> None:
    def script() -> None:
        with alone.connect() as log:
            log.log_ready(0)
            log.annotate({"lr": 1.0})
            raise UsersError

    with pytest.raises(UsersError):
        script()

    assert alone.metrics == [{"lr": 1.0}]


def test_a_rank_that_leaves_by_an_exception_ends_the_others_and_rank_0_writes_what_it_has(tmp_path: Path) -> None:
    entries: list[LogEntry] = []

    def script(rank: int, transport: Any) -> None:
        with connect(10, transport=transport, sinks=[entries.append], run_dir=tmp_path) as log:
            for step in range(30):
                if (rank, step) == (1, 15):
                    raise UsersError
                log.record(loss=float(rank))
                log.log_ready(step)

    results = on_threads(2, script)

    assert isinstance(results[0], TransportError)
    assert "rank 1" in str(results[0])
    assert isinstance(results[1], UsersError)
    assert [(e.step, e.partial, e.metrics, e.ranks) for e in entries] == [
        (0, False, {"loss": 0.5}, {}),
        (10, False, {"loss": 0.5}, {}),
        (20, True, {"loss": 0.0}, {"loss": 1}),
    ]


class Interrupted(LocalTransport):
    """Gets Ctrl-C in the middle of the round that a test says, before or after the root has decided."""

    when = ""

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        if self.when == "before":
            signal.raise_signal(signal.SIGINT)
        reply = super().exchange(frame, patient=patient)
        if self.when == "after":
            signal.raise_signal(signal.SIGINT)
        return reply


@pytest.mark.parametrize("when", ["before", "after"])
def test_after_ctrl_c_in_mid_round_no_round_is_made_and_nothing_is_lost_or_written_twice(
    alone: Alone, when: str
) -> None:
    transport = Interrupted()
    log = alone.connect(transport=transport)
    log.log_ready(0)
    log.record(loss=4.0)
    transport.when = when
    # A job that a shell has started in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            log.log_ready(10)
    finally:
        signal.signal(signal.SIGINT, before)
    transport.when = ""

    for call in (lambda: log.log_ready(11), lambda: log.write(11), log.close):
        with pytest.raises(RoundInterrupted, match="round 2 was left half done by KeyboardInterrupt"):
            call()

    assert [metrics for metrics in alone.metrics if metrics] == [{"loss": 4.0}]


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


def test_a_log_that_was_not_closed_is_written_and_warned_of_at_exit(tmp_path: Path) -> None:
    ran = python(
        """
        import sys
        from logsync.workers import connect
        log = connect(10, transport="local", sinks=["jsonl"], run_dir=sys.argv[1], name="forgotten")
        for step in range(13):
            log.record(loss=float(step))
            log.log_ready(step)
        """,
        tmp_path,
    )

    assert [(line["step"], line["loss"], line.get("partial")) for line in lines(tmp_path)] == [
        (0, 0.0, None),
        (10, 5.5, None),
        (12, 11.5, True),
    ]
    assert "log 'forgotten' was not closed" in ran.stderr


@pytest.mark.parametrize("end", ["sys.exit(0)", "raise KeyError"])
def test_a_forked_child_may_not_log_and_its_end_writes_nothing(tmp_path: Path, end: str) -> None:
    ran = python(
        f"""
        import os, sys
        from logsync.workers import connect
        with connect(2, transport="local", sinks=["jsonl"], run_dir=sys.argv[1]) as log:
            log.record(loss=1.0)
            log.log_ready(0)
            log.record(loss=2.0)
            child = os.fork()
            if child == 0:
                for call in (lambda: log.log_ready(1), lambda: log.write(1), lambda: log.write(2)):
                    try:
                        call()
                    except Exception as error:
                        print(type(error).__name__, str(os.getpid()) in str(error))
                sys.stdout.flush()
                {end}
            os.waitpid(child, 0)
            log.log_ready(1)
        """,
        tmp_path,
    )

    assert ran.stdout.splitlines() == ["ForkedProcess True"] * 3
    assert [(line["seq"], line["loss"]) for line in lines(tmp_path)] == [(0, 1.0), (1, 2.0)]
    assert "was not closed" not in ran.stderr


def test_a_forked_child_may_not_close_its_parents_log(tmp_path: Path) -> None:
    ran = python(
        """
        import os, sys
        from logsync.workers import connect
        log = connect(2, transport="local", sinks=["jsonl"], run_dir=sys.argv[1])
        log.record(loss=1.0)
        child = os.fork()
        if child == 0:
            try:
                log.close()
            except Exception as error:
                print(type(error).__name__)
            sys.exit(0)
        os.waitpid(child, 0)
        log.close()
        """,
        tmp_path,
    )

    assert ran.stdout.split() == ["ForkedProcess"]
    assert [line["loss"] for line in lines(tmp_path)] == [1.0]


# Checkpoints


def train(log: TrainingLog, steps: range, *, save_at: int | None = None) -> Any:
    state = None
    for step in steps:
        log.record(loss=float(step))
        if log.log_ready(step) and step == save_at:
            state = log.state_dict()
    return state


def through_torch(state: Any, folder: Path) -> Any:
    torch.save({"log": state}, folder / "checkpoint.pt")
    return torch.load(folder / "checkpoint.pt", weights_only=True)["log"]


def test_a_resumed_run_has_the_log_of_an_uninterrupted_one(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    with connect(10, transport="local", sinks=["jsonl"], run_dir=straight) as log:
        train(log, range(60))

    with connect(10, transport="local", sinks=["jsonl"], run_dir=resumed) as log:
        state = train(log, range(45), save_at=20)  # a crash at 45
    with connect(10, transport="local", sinks=["jsonl"], run_dir=resumed) as log:
        log.load_state_dict(through_torch(state, tmp_path))
        assert (log.last_log_step, log.log_frequency) == (20, 10)
        train(log, range(21, 60))

    def plain(line: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in line.items() if key not in ("time", "attempt")}

    assert [plain(line) for line in lines(resumed)] == [plain(line) for line in lines(straight)]
    assert [line["attempt"] for line in lines(resumed)] == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_state_survives_torchs_distributed_checkpoint(tmp_path: Path) -> None:
    with connect(10, transport="local", sinks=[], run_dir=tmp_path / "a") as log:
        train(log, range(33))
        state = log.state_dict()
        save({"log": log}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)

    with connect(10, transport="local", sinks=[], run_dir=tmp_path / "b") as log:
        load({"log": log}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
        assert log.state_dict() == state
        log.record(loss=1.0)
        assert not log.log_ready(33)
        assert log.log_ready(40)
        assert log.last_entry is not None
        assert (log.last_entry.seq, log.last_entry.partial, log.last_entry.calls) == (4, True, 2)


def test_a_write_right_after_a_load_doubles_no_seq(tmp_path: Path) -> None:
    with connect(10, transport="local", sinks=["jsonl"], run_dir=tmp_path) as log:
        state = train(log, range(45), save_at=20)
    with connect(10, transport="local", sinks=["jsonl"], run_dir=tmp_path) as log:
        log.load_state_dict(state)
        log.write(20, {"eval/acc": 0.5})

    assert [(line["seq"], line["step"], "eval/acc" in line) for line in lines(tmp_path)] == [
        (0, 0, False),
        (1, 10, False),
        (2, 20, False),
        (3, 20, True),
    ]


def test_after_a_load_the_files_go_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with connect(10, transport="local", sinks=["jsonl"]) as log:
        folder = Path(log.run_dir)
        state = train(log, range(45), save_at=20)

    with connect(10, transport="local", sinks=["jsonl"]) as log:
        log.load_state_dict(state)
        train(log, range(21, 35))
        assert log.run_dir == str(folder)

    assert [line["seq"] for line in lines(folder)] == [0, 1, 2, 3, 4]
    assert list((tmp_path / "runs").iterdir()) == [folder]


def test_a_load_drops_what_was_recorded_and_not_logged(alone: Alone) -> None:
    with alone.connect() as log:
        state = log.state_dict()
        log.record(loss=99.0)
        log.log_ready(0)
        log.record({"loss": 99.0, "gone": torch.tensor(1.0)})
        log.load_state_dict(state)
        log.record(loss=1.0)
        assert log.write(5).metrics == {"loss": 1.0}


def test_a_load_in_the_body_of_a_ready_log_makes_the_next_call_a_round_on_every_rank(tmp_path: Path) -> None:
    def script(rank: int, transport: Any) -> Any:
        with connect(10, transport=transport, sinks=[], run_dir=tmp_path) as log:
            for step in range(31):
                if log.log_ready(step) and step == 20:
                    log.load_state_dict(log.state_dict())
                    rounds = log.stats.rounds
                if step == 21:
                    assert log.stats.rounds == rounds + 1, rank
            return log.last_log_step

    assert returned(on_threads(2, script)) == [30, 30]


def test_a_state_is_the_same_bytes_on_all_ranks_and_loads_at_any_world_size(tmp_path: Path) -> None:
    def before(_: int, transport: Any) -> Any:
        with connect(10, transport=transport, sinks=["jsonl"], run_dir=tmp_path) as log:
            return train(log, range(45), save_at=20)

    states = returned(on_threads(3, before))
    assert len({state["state"] for state in states}) == 1

    def after(rank: int, transport: Any) -> Any:
        with connect(10, transport=transport, sinks=["jsonl"], run_dir=tmp_path) as log:
            log.load_state_dict(states[rank])
            train(log, range(21, 45))
            return log.last_log_step

    assert returned(on_threads(2, after)) == [40, 40]
    assert [(line["seq"], line["step"]) for line in lines(tmp_path)] == [
        (0, 0),
        (1, 10),
        (2, 20),
        (3, 30),
        (4, 40),
        (5, 44),
    ]


def test_what_is_no_state_is_refused_and_the_log_goes_on(alone: Alone) -> None:
    with alone.connect() as log:
        log.record(loss=1.0)
        for junk in ({}, {"state": b"junk"}, None):
            with pytest.raises(ValueError, match="state"):
                log.load_state_dict(junk)  # type: ignore[arg-type]
        assert log.log_ready(0)

    assert alone.metrics == [{"loss": 1.0}]


# Several logs


def test_several_logs_live_in_one_job(tmp_path: Path) -> None:
    def script(rank: int, train_world: Any, val_world: ThreadWorld) -> Any:
        with (
            connect(10, transport=train_world, sinks=[], run_dir=tmp_path / "train") as log,
            connect(3, transport=val_world.transports[rank], sinks=[], run_dir=tmp_path / "val", name="val") as val,
        ):
            logged = [(log.log_ready(step), val.log_ready(step)) for step in range(7)]
            return [list(answers) for answers in zip(*logged, strict=True)]

    val_world = ThreadWorld(2, timeout_s=20)
    results = returned(on_threads(2, lambda rank, transport: script(rank, transport, val_world)))

    assert results[0] == results[1] == [[True] + [False] * 6, [True, False, False, True, False, False, True]]


def test_the_log_writes_to_its_own_logger_only(alone: Alone, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with alone.connect(sinks=["jsonl"]) as log:
        for step in (0, 30, 3):
            log.log_ready(step)

    assert {record.name.partition(".")[0] for record in caplog.records} == {"logsync"}


# -- detached ---------------------------------------------------------------------------------------------------


def lose_the_other_rank(
    train: Callable[[TrainingLog], object], folder: Path, rank: int, **options: Any
) -> tuple[object, list[LogEntry]]:
    """Train on one of two ranks, the other of which leaves after its call of step 4, and return the outcome."""
    world = ThreadWorld(2)
    entries: list[LogEntry] = []

    def connected(which: int) -> TrainingLog:
        options.setdefault("log_frequency", 5)
        return connect(
            **options, transport=world.transports[which], run_dir=folder, sinks=[entries.append], on_failure="detach"
        )

    def other() -> None:
        log = connected(1 - rank)
        for step in range(5):
            log.record(x=100.0)
            log.log_ready(step)
        log._leave("it had to go")

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    log = connected(rank)
    outcome = train(log)
    thread.join(10)
    return outcome, entries


def test_detached_rank_0_logs_its_own_values_at_the_cadence_and_answers_false(tmp_path: Path) -> None:
    def train(log: TrainingLog) -> list[int]:
        answers = []
        with log:
            for step in range(23):
                log.record(x=float(step))
                if log.log_ready(step):
                    answers.append(step)
            assert log.detached
            assert log.log_frequency == 5
        return answers

    ready, entries = lose_the_other_rank(train, tmp_path, 0)

    assert ready == [0]
    assert [(entry.seq, entry.step, entry.partial) for entry in entries] == [
        (0, 0, False),
        (1, 5, True),
        (2, 10, True),
        (3, 15, True),
        (4, 20, True),
        (5, 22, True),
    ]
    assert [entry.metrics["x"] for entry in entries[1:]] == [3.0, 8.0, 13.0, 18.0, 21.5]
    assert all(entry.ranks == {"x": 1} and entry.world_size == 2 for entry in entries[1:])


def test_a_detached_rank_gets_its_own_values_from_write_and_its_settings_count(tmp_path: Path) -> None:
    def train(log: TrainingLog) -> tuple[LogEntry, LogEntry]:
        for step in range(7):
            log.log_ready(step)
        first = log.write(7, {"accuracy": 0.25})
        log.log_frequency = 50
        log.model_updated(7)
        second = log.write(8, {"accuracy": 0.75})
        assert (log.log_frequency, log.last_log_step) == (50, 8)
        assert log.log_ready(9) is False
        log.close()
        return first, second

    written, entries = lose_the_other_rank(train, tmp_path, 1)
    assert isinstance(written, tuple)
    first, second = written

    assert (first.metrics, second.metrics) == ({"accuracy": 0.25}, {"accuracy": 0.75})
    assert (first.partial, second.partial, second.seq) == (True, True, first.seq + 1)
    assert [entry.step for entry in entries] == [0, 4], "only rank 0, which left, has sinks"


@pytest.mark.parametrize("rank", [0, 1])
def test_detaching_while_closing_ends_the_log_without_an_error(tmp_path: Path, rank: int) -> None:
    def train(log: TrainingLog) -> None:
        for step in range(5):
            log.record(x=1.0)
            log.log_ready(step)
        log.close()
        with pytest.raises(LogClosed):
            log.log_ready(5)

    _, entries = lose_the_other_rank(train, tmp_path, rank)

    assert [entry.step for entry in entries] == [0, 4]


def test_with_explicit_writes_a_detached_rank_0_logs_what_was_recorded_and_nothing_empty(tmp_path: Path) -> None:
    def train(log: TrainingLog) -> None:
        for step in range(20):
            if 5 <= step < 12:
                log.record(x=float(step))
            if log.log_ready(step):
                assert step < 5
        log.close()

    _, entries = lose_the_other_rank(train, tmp_path, 0, write="explicit", log_frequency=4)

    assert [(entry.step, entry.metrics, entry.partial) for entry in entries if "x" in entry.metrics] == [
        (9, {"x": 7.0}, True),
        (13, {"x": 10.5}, True),
    ]
    assert len(entries) == 2


def test_a_window_that_the_root_had_merged_when_the_reply_was_lost_is_not_logged_again(tmp_path: Path) -> None:
    entries: list[LogEntry] = []

    class LosesReplies(LocalTransport):
        rounds = 0

        def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
            reply = super().exchange(frame, patient=patient)
            self.rounds += 1
            if self.rounds == 3:  # the hello, step 0, and the one of step 5
                msg = "the reply was lost"
                raise TransportError(msg)
            return reply

    for on_failure in ("raise", "detach"):
        entries.clear()
        log = connect(
            5,
            transport=LosesReplies(),
            sinks=[entries.append],
            run_dir=tmp_path / on_failure,
            on_failure=on_failure,
        )
        log.record(x=1.0)
        log.log_ready(0)
        log.record(x=2.0)
        try:
            log.log_ready(5)
        except TransportError:
            assert on_failure == "raise"
        log.record(x=4.0)
        try:
            log.close()
        except TransportError:
            assert on_failure == "raise"
        assert [(entry.seq, entry.step, entry.metrics["x"]) for entry in entries] == [
            (0, 0, 1.0),
            (1, 5, 2.0),
            (2, 5, 4.0),
        ]
