"""log_step: the same logs as by record and log_ready, with the round beside the training."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import msgspec
import pytest
import torch

from logsync.coordinator.errors import (
    BadType,
    ConfigError,
    LogClosed,
    PeerFailed,
    RoundMismatch,
    RoundTimeout,
)
from logsync.coordinator.host import Host
from logsync.coordinator.messages import LogEntry
from logsync.workers import TrainingLog, connect
from logsync.workers.transports.local import LocalTransport
from support.thread_job import Job

pytestmark = pytest.mark.timeout(60)

Call = Callable[[TrainingLog, int, float], None]


CALLS = 90


def at_once(log: TrainingLog, step: int, loss: float) -> None:
    log.record({"loss": loss}, weight=2)
    log.log_ready(step)


def overlapped(log: TrainingLog, step: int, loss: float) -> None:
    log.log_step(step, {"loss": loss}, weight=2)


def plain(entries: list[LogEntry]) -> list[LogEntry]:
    """What must not depend on when a rank came."""
    return [msgspec.structs.replace(entry, time=0.0, waits=None) for entry in entries]


class Plan:
    """What is said, changed and written at which call."""

    def __init__(self, world_size: int, seed: int) -> None:
        dice = random.Random(f"{world_size} {seed}")
        self.world_size = world_size
        self.frequency = dice.choice([1, 3, 7, 20])
        self.mode = dice.choice(["exact", "exact", "on_update"])
        self.micro = dice.choice([1, 1, 3])
        self.updates = {(rank, call) for rank in range(world_size) for call in range(CALLS) if dice.random() < 0.2}
        self.changes = {dice.randrange(CALLS): dice.choice([2, 5, 11])} if dice.random() < 0.5 else {}
        self.evaluations = {dice.randrange(CALLS) for _ in range(dice.randrange(3))}
        self.mixture = [dice.choice([at_once, overlapped]) for _ in range(CALLS)]

    def played(self, ways: Sequence[Call]) -> tuple[list[LogEntry], list[Any]]:
        """Return the entries, and what every rank saw at the end."""
        job = Job(self.world_size, self.frequency, mode=self.mode)

        def train(log: TrainingLog) -> Any:
            for call, way in enumerate(ways):
                step = call // self.micro
                if (log.rank, call) in self.updates:
                    log.model_updated(step)
                if call in self.changes and log.rank == self.world_size - 1:
                    log.log_frequency = self.changes[call]
                way(log, step, float(call + log.rank))
                if call in self.evaluations:
                    log.write(step, {"eval": float(call)})
            last = log.last_entry
            return last and last.seq, log.last_log_step, log.stats.rounds, log.calls

        seen = job.play(train)
        return plain(job.entries), seen


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_entries_and_the_rounds_are_those_of_log_ready_over_random_schedules_and_mixtures(world_size: int) -> None:
    for seed in range(12):
        plan = Plan(world_size, seed)
        expected = plan.played([at_once] * CALLS)

        assert plan.played([overlapped] * CALLS) == expected, f"seed {seed}"
        assert plan.played(plan.mixture) == expected, f"seed {seed}"
        assert len(expected[0]) > 2


class Slow(LocalTransport):
    """A round that takes until the test lets it go on."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.hold = False

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        if self.hold:
            self.entered.set()
            assert self.go_on.wait(20)
        return super().exchange(frame, patient=patient)


def test_the_round_does_not_hold_up_the_call_and_the_next_one_takes_what_came_of_it() -> None:
    entries: list[LogEntry] = []
    transport = Slow()
    with connect(2, transport=transport, sinks=[entries.append]) as log:
        transport.hold = True
        log.log_step(0, loss=1.0)  # comes back although the round does not
        assert transport.entered.wait(20)
        log.record(loss=5.0)  # into the next window
        assert log.stats.rounds == 0
        transport.go_on.set()
        log.log_step(1, loss=7.0)
        assert log.stats.rounds >= 1
        log.log_step(2)
        assert log.last_entry is not None
        assert log.last_entry.metrics == {"loss": 6.0}
    assert [entry.metrics for entry in entries] == [{"loss": 1.0}, {"loss": 6.0}]


def test_properties_and_states_wait_for_the_round_that_is_under_way() -> None:
    def train(log: TrainingLog) -> Any:
        said = []
        for step in range(12):
            if log.rank == 1:
                time.sleep(0.001)
            log.log_step(step, loss=1.0)
            said.append((log.last_log_step, log.last_entry and log.last_entry.seq, log.state_dict()))
        return said

    first, second = Job(2, 3).play(train)

    assert not isinstance(first, Exception), first
    assert first == second
    assert [step for step, _, _ in first] == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9]


def test_annotations_go_to_the_entry_that_the_step_before_made() -> None:
    job = Job(2, 5)

    def train(log: TrainingLog) -> None:
        for step in range(6):
            log.log_step(step, loss=1.0)
            if step % 5 == 0:
                log.annotate({"lr": float(step)})

    assert job.play(train) == [None, None]
    assert [entry.metrics.get("lr") for entry in job.entries] == [0.0, 5.0]


def test_an_agreed_error_comes_at_the_next_call_on_every_rank_and_nothing_recorded_is_lost() -> None:
    job = Job(2, 1)

    def train(log: TrainingLog) -> list[str]:
        said = []
        for step in range(5):
            bad = "two" if step == 2 and log.rank == 1 else step
            try:
                log.log_step(bad, {"n": 1.0}, weight=1)  # type: ignore[arg-type]
            except BadType as error:
                said.append(f"{step}: rank {error.ranks}")
            if log.rank == 0:
                assert log.last_entry is None or log.last_entry.seq >= 0  # reading it takes nobody's error
        log.write(5, {"n": 1.0})
        return said

    assert job.play(train) == [["3: rank (1,)"]] * 2
    # Step 2's own round was refused and step 3's call was spent on the error; their values are in step 4's entry.
    assert [(entry.step, entry.calls) for entry in job.entries] == [(0, 1), (1, 1), (4, 2), (5, 0)]


def test_a_value_that_cannot_be_recorded_is_an_error_at_once_and_the_call_counts() -> None:
    job = Job(2, 2)

    def train(log: TrainingLog) -> int:
        for step in range(7):
            if log.rank == 1 and step in (2, 3):
                with pytest.raises(TypeError):
                    log.log_step(step, loss="bad")
            else:
                log.log_step(step, loss=1.0)
        return log.calls

    assert job.play(train) == [7, 7]
    assert [entry.step for entry in job.entries] == [0, 2, 4, 6]


def test_an_error_of_the_last_step_comes_at_close_and_everything_is_written() -> None:
    job = Job(2, 1)

    def train(log: TrainingLog) -> None:
        log.log_step(0, loss=1.0)
        log.log_step(None if log.rank == 0 else True, loss=3.0)
        log.close()

    first, second = job.play(train)

    assert isinstance(first, BadType)
    assert isinstance(second, BadType)
    assert [entry.metrics["loss"] for entry in job.entries] == [1.0, 3.0]


def test_a_rank_that_calls_once_more_is_named_at_the_next_call() -> None:
    def train(log: TrainingLog) -> None:
        for step in range(10):
            log.log_step(step if log.rank == 0 or step < 4 else step + 1)

    for error in Job(2, 1).play(train):
        assert isinstance(error, RoundMismatch), error


def test_a_lost_rank_is_an_error_at_the_next_call_of_all_others_and_at_every_later_one() -> None:
    def train(log: TrainingLog) -> Any:
        for step in range(3):
            log.log_step(step, loss=1.0)
        assert log.last_log_step == 2
        if log.rank == 1:
            msg = "out of memory"
            raise MemoryError(msg)
        log.log_step(3, loss=1.0)
        with pytest.raises(PeerFailed, match=r"rank 1 .*MemoryError: out of memory"):
            log.log_step(4, loss=1.0)
        with pytest.raises(PeerFailed):
            log.write(5)
        assert log.last_entry is not None
        return log.last_entry.step

    job = Job(3, 1)
    results = job.play(train)

    assert all(isinstance(results[rank], PeerFailed) for rank in (0, 2)), results  # from close()
    assert [(entry.step, entry.calls, entry.partial) for entry in job.entries] == [
        (0, 1, False),
        (1, 1, False),
        (2, 1, False),
        (3, 1, True),
    ]


def test_a_rank_that_does_not_come_ends_the_others_wait_at_the_timeout() -> None:
    def train(log: TrainingLog) -> str:
        log.log_step(0)
        log.log_step(1)
        if log.rank == 1:
            stopped.wait(20)
            return "stopped"
        log.log_step(2)
        try:
            log.log_step(3)
        finally:
            stopped.set()
        return "no error"

    stopped = threading.Event()
    first, _ = Job(2, 1, timeout=0.5).play(train)

    assert isinstance(first, RoundTimeout), first
    assert first.ranks == (1,)


def test_detached_the_job_steps_on_and_rank_0_logs_its_own() -> None:
    job = Job(2, 1, timeout=5, on_failure="detach")

    def train(log: TrainingLog) -> Any:
        for step in range(6):
            assert step == 0 or log.detached or log.last_log_step == step - 1
            if log.rank == 1 and step == 3:
                msg = "gone"
                raise ArithmeticError(msg)
            log.log_step(step, loss=float(log.rank))
        return log.detached

    assert job.play(train)[0] is True
    assert [(entry.step, entry.partial) for entry in job.entries][:3] == [(0, False), (1, False), (2, False)]
    assert all(entry.partial and entry.metrics == {"loss": 0.0} for entry in job.entries[3:])
    assert [entry.step for entry in job.entries[3:]] == [3, 4, 5]


def test_a_signal_that_interrupts_the_wait_loses_nothing() -> None:
    class Told(Exception):
        pass

    def tell(_signum: int, _frame: FrameType | None) -> None:
        raise Told

    entries: list[LogEntry] = []
    transport = Slow()
    before = signal.signal(signal.SIGALRM, tell)
    try:
        with connect(1, transport=transport, sinks=[entries.append]) as log:
            transport.hold = True
            log.log_step(0, loss=1.0)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(Told):
                log.log_step(1, loss=2.0)
            transport.go_on.set()
            log.log_step(1, loss=2.0)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert [(entry.step, entry.metrics["loss"]) for entry in entries] == [(0, 1.0), (1, 2.0)]


@pytest.mark.parametrize("decided", [False, True])
def test_leaving_by_an_exception_writes_what_a_round_under_way_had_taken_exactly_once(*, decided: bool) -> None:
    entries: list[LogEntry] = []
    transport = Slow()

    def train() -> None:
        with connect(1, transport=transport, sinks=[entries.append]) as log:
            log.log_step(0, n=1.0)
            assert log.last_log_step == 0
            transport.hold = not decided
            log.log_step(1, n=2.0)
            if decided:
                assert isinstance(log._host, Host)
                while log._host.coordinator.next_seq < 2:
                    time.sleep(0.001)
            else:
                assert transport.entered.wait(20)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        train()
    transport.go_on.set()

    assert [entry.metrics["n"] for entry in entries] == [1.0, 2.0]


def test_a_forked_child_reads_what_its_parent_knew_and_does_not_wait() -> None:
    transport = Slow()
    with connect(1, transport=transport, sinks=[]) as log:
        log.log_step(0, loss=1.0)
        assert log.last_log_step == 0
        transport.hold = True
        log.log_step(1, loss=1.0)
        child = os.fork()
        if child == 0:
            os._exit(7 if log.last_log_step == 0 else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        transport.go_on.set()


def test_epochs_of_different_lengths_end_with_steps_under_way() -> None:
    job = Job(2, 4)

    def train(log: TrainingLog) -> int:
        for epoch in range(3):
            for batch in range(10 + 3 * log.rank):
                log.log_step(100 * epoch + batch, n=1.0)
            log.end_epoch()
        return log.world_size

    assert job.play(train) == [2, 2]
    assert [entry.seq for entry in job.entries] == list(range(len(job.entries)))
    assert all(entry.metrics["n"] == 1.0 for entry in job.entries)


def test_a_resumed_run_goes_on_by_log_step() -> None:
    def train(log: TrainingLog) -> Any:
        for step in range(7):
            log.log_step(step, n=1.0)
        return log.state_dict()

    state, _ = Job(2, 3).play(train)
    job = Job(2, 3)

    def resume(log: TrainingLog) -> None:
        log.load_state_dict(state)
        for step in range(7, 13):
            log.log_step(step, n=1.0)

    assert job.play(resume) == [None, None]
    assert [(entry.seq, entry.step) for entry in job.entries] == [(3, 9), (4, 12)]


def test_values_on_a_device_are_read_on_the_logs_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    read_by: list[str] = []
    tolist = torch.Tensor.tolist

    def told(tensor: torch.Tensor) -> Any:
        read_by.append(threading.current_thread().name)
        return tolist(tensor)

    monkeypatch.setattr("logsync.workers.window.is_device_value", lambda _: True)
    monkeypatch.setattr(torch.Tensor, "tolist", told)
    entries: list[LogEntry] = []
    with connect(4, sinks=[entries.append]) as log:
        for step in range(9):
            log.log_step(step, {"loss": torch.tensor(float(step)), "norm": torch.tensor(2.0)}, weight=3)

    assert [entry.metrics for entry in entries] == [
        {"loss": 0.0, "norm": 2.0},
        {"loss": 2.5, "norm": 2.0},
        {"loss": 6.5, "norm": 2.0},
    ]
    assert set(read_by) == {"logsync-overlap"}


def test_what_cannot_be_is_refused_at_the_call() -> None:
    with connect(10, sinks=[], write="explicit") as log, pytest.raises(ConfigError, match="call log_ready"):
        log.log_step(0)
    with connect(10, sinks=[]) as log:
        with pytest.raises(TypeError, match="mapping"):
            log.log_step(0, 3.0)  # type: ignore[arg-type]
        assert log.calls == 1
    with pytest.raises(LogClosed):
        log.log_step(1)


def test_named_values_count_beside_an_empty_mapping_and_what_is_none_is_refused() -> None:
    entries: list[LogEntry] = []
    with connect(1, sinks=[entries.append]) as log:
        log.log_step(0, {}, loss=3.0)
        with pytest.raises(TypeError, match="mapping"):
            log.log_step(1, 0)  # type: ignore[arg-type]

    assert entries[0].metrics == {"loss": 3.0}


def test_where_no_thread_can_be_started_the_round_is_made_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "logsync-overlap":
            msg = "can't start new thread"
            raise RuntimeError(msg)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    entries: list[LogEntry] = []
    with connect(2, sinks=[entries.append]) as log:
        for step in range(5):
            log.log_step(step, n=1.0)

    assert [entry.step for entry in entries] == [0, 2, 4]
