"""Ranks as threads whose epochs are of different lengths: who counts, what is logged, and that all go on."""

from __future__ import annotations

import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

from logsync.coordinator.errors import AgreedError, BadType, BadValue, PeerFailed, RoundTimeout
from logsync.coordinator.frequency import FrequencyManager
from logsync.coordinator.messages import LogEntry, decode_state
from logsync.workers import TrainingLog
from support.thread_job import Job

pytestmark = pytest.mark.timeout(60)

T = TypeVar("T")
EPOCH = 100  # steps from one epoch's first step to the next one's
DEADLINE_S = 20.0
GONE = ArithmeticError("the loss is gone")


def said_by(log: TrainingLog, step: int) -> str:
    try:
        log.log_ready(step)
    except AgreedError as error:
        return type(error).__name__
    return "nothing"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# -- who counts, and what is logged ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_uneven_epochs_log_as_one_manager_that_the_lowest_rank_still_in_asks(seed: int) -> None:
    dice = random.Random(seed)
    ranks, frequency = dice.randint(1, 4), dice.choice([1, 2, 3, 7, 20])
    lengths = [
        [dice.choice([0, 1, 5, 12, dice.randint(0, 30)]) for _ in range(ranks)] for _ in range(dice.randint(1, 4))
    ]
    last_to_end = dice.random() < 0.5  # whether the end of the last epoch is left to close()

    def train(log: TrainingLog) -> list[tuple[int, bool]]:
        answers = []
        for epoch, length in enumerate(lengths):
            for batch in range(length[log.rank]):
                step = epoch * EPOCH + batch
                log.record({"values": 4.0**log.rank}, reduce="sum")
                answers.append((step, log.log_ready(step)))
            if epoch < len(lengths) - 1 or last_to_end:
                log.end_epoch()
        assert log.stats.calls == len(answers)
        return answers

    manager = FrequencyManager(frequency)
    expected: dict[int, bool] = {}
    for epoch, length in enumerate(lengths):
        for step in range(epoch * EPOCH, epoch * EPOCH + max(length)):
            expected[step] = manager.log_ready(step)
            if expected[step]:
                manager.log_written(step)

    job = Job(ranks, frequency)
    answers = job.play(train)

    for rank, got in enumerate(answers):
        steps = [e * EPOCH + batch for e, length in enumerate(lengths) for batch in range(length[rank])]
        assert got == [(step, expected[step]) for step in steps], f"rank {rank} of {lengths}, frequency {frequency}"
    assert [entry.seq for entry in job.entries] == list(range(len(job.entries)))
    logged = [step for step in expected if expected[step]]
    assert [entry.step for entry in job.entries][: len(logged)] == logged
    assert job.total("values") == sum(4.0**rank * sum(length[rank] for length in lengths) for rank in range(ranks))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_every_rank_may_end_first_and_values_of_those_that_ended_are_in_the_next_entry(order: tuple[int, ...]) -> None:
    lengths = {rank: 3 + 4 * place for place, rank in enumerate(order)}
    job = Job(3, 2)

    def train(log: TrainingLog) -> None:
        for step in range(lengths[log.rank]):
            log.record({"seen": 1.0}, reduce="sum", per_rank=True)
            log.log_ready(step)
        log.end_epoch()

    job.play(train)

    assert [entry.step for entry in job.entries] == [0, 2, 4, 6, 8, 10]
    for rank, length in lengths.items():
        assert job.total(f"seen/rank{rank}") == length
        last = [entry.step for entry in job.entries if f"seen/rank{rank}" in entry.metrics][-1]
        assert last == (length if length % 2 == 0 else length - 1)


def test_what_is_recorded_after_the_end_belongs_to_the_next_epoch() -> None:
    job = Job(2, 3)
    ended = threading.Event()

    def train(log: TrainingLog) -> None:
        if log.rank == 1:
            log.end_epoch()
            log.record({"late": 1.0}, reduce="sum")
            ended.set()
        else:
            ended.wait()
            for step in range(4):
                log.record({"early": 1.0}, reduce="sum")
                log.log_ready(step)
            log.end_epoch()
        log.log_ready(10)

    job.play(train)

    assert [sorted(entry.metrics) for entry in job.entries] == [["early"], ["early"], ["late"]]
    assert [entry.step for entry in job.entries] == [0, 3, 10]


def test_updates_marks_and_frequencies_that_are_said_after_the_end_arrive() -> None:
    job = Job(2, 5, mode="on_update")
    said = threading.Event()

    def train(log: TrainingLog) -> tuple[object, object, object]:
        if log.rank == 1:
            log.end_epoch()
            log.log_frequency = 2
            log.model_updated(1)
            log.log_written(2)
            said.set()
        else:
            said.wait()
            # The absent rank's first frame may have been on its way before it said so; the second round has it.
            for step in (3, 3, 3):
                log.log_ready(step)
        log.end_epoch()
        log.log_ready(3)
        return log.log_frequency, log.last_model_update_step, log.last_log_step

    assert job.play(train) == [(2, 1, 2)] * 2


def test_a_write_after_the_end_waits_for_all_and_has_everything() -> None:
    job = Job(3, None)

    def train(log: TrainingLog) -> LogEntry:
        for step in range(2 + 3 * log.rank):
            log.record({"seen": 1.0}, reduce="sum")
            log.log_ready(step)
        log.end_epoch()
        return log.write(50, {"score": float(log.rank)})

    entries = job.play(train)

    assert entries[0] == entries[1] == entries[2]
    assert entries[0].metrics == {"seen": 2 + 5 + 8, "score": 1.0}
    assert entries[0].step == 50


def test_states_agree_again_after_an_epoch_of_different_lengths_and_know_what_is_missed() -> None:
    job = Job(3, 10)

    def train(log: TrainingLog) -> tuple[dict[str, bytes], int]:
        for step in range(12 + log.rank):
            log.record(x=1.0)
            log.log_ready(step)
        log.end_epoch()
        log.log_ready(20)
        log.log_ready(21)
        return log.state_dict(), log.stats.calls

    results = job.play(train)

    assert results[0][0] == results[1][0] == results[2][0]
    assert [calls for _, calls in results] == [14, 15, 16]


def test_a_state_saved_while_others_still_train_says_that_calls_are_missed() -> None:
    job = Job(2, 1)
    saved = threading.Event()

    def train(log: TrainingLog) -> int:
        log.log_ready(0)
        if log.rank == 0:
            log.end_epoch()
            state = decode_state(log.state_dict()["state"])
            saved.set()
            log.write(10)
            return state.missed
        saved.wait()
        log.end_epoch()
        log.write(10)
        return decode_state(log.state_dict()["state"]).missed

    assert job.play(train) == [1, 0]


def test_a_state_that_was_loaded_before_an_empty_epoch_is_taken_over_once() -> None:
    first = Job(1, 2)
    with first.connect(0) as log:
        log.log_ready(0)
        state = log.state_dict()
    job = Job(2, 2)

    def train(log: TrainingLog) -> list[bool]:
        log.load_state_dict(state)
        answers = [log.log_ready(step) for step in range(1, 6)] if log.rank == 0 else []
        log.end_epoch()
        return [*answers, log.log_ready(6)]

    assert job.play(train) == [[False, True, False, True, False, True], [True]]
    assert [(entry.seq, entry.step, entry.attempt) for entry in job.entries] == [(1, 2, 1), (2, 4, 1), (3, 6, 1)]


def test_an_annotation_after_the_end_is_dropped_and_said(caplog: pytest.LogCaptureFixture) -> None:
    job = Job(1, 1)
    with job.connect(0) as log:
        assert log.log_ready(0)
        log.end_epoch()
        log.annotate({"lr": 0.1})

    assert "annotate(lr) came" in caplog.text
    assert all("lr" not in entry.metrics for entry in job.entries)


# -- closing, failing, leaving ---------------------------------------------------------------------------------


def test_ranks_may_close_while_others_have_only_ended() -> None:
    job = Job(3, 2)

    def train(log: TrainingLog) -> None:
        for epoch in range(1 + log.rank):
            for step in range(epoch * EPOCH, epoch * EPOCH + 3):
                log.record({"seen": 1.0}, reduce="sum")
                log.log_ready(step)
            log.end_epoch()

    job.play(train)

    assert job.total("seen") == 3 + 6 + 9
    assert [entry.step for entry in job.entries][:6] == [0, 2, 100, 102, 200, 202]


def test_a_mistake_of_those_that_still_call_is_theirs_alone() -> None:
    job = Job(3, 2)

    def train(log: TrainingLog) -> str:
        said = "nothing"
        if log.rank:
            log.log_ready(0)
            try:
                log.log_ready(-1 if log.rank == 1 else 1)
                log.log_ready(2)
            except BadValue as error:
                said = f"ranks {error.ranks}"
        else:
            log.log_ready(0)
        log.end_epoch()
        log.log_ready(10)
        return said

    assert job.play(train) == ["nothing", "ranks (1,)", "ranks (1,)"]


def test_what_does_not_fit_together_at_the_end_of_an_epoch_is_raised_on_all_at_their_next_call() -> None:
    job = Job(2, 50)

    def train(log: TrainingLog) -> list[str]:
        log.log_ready(0)
        if log.rank == 1:
            log.log_ready(1)
            log.log_ready("two")  # type: ignore[arg-type]
        log.end_epoch()
        return [said_by(log, step) for step in (10, 11)]

    # The first call is a round, the second and third are not: their steps are looked at at the end of the epoch.
    assert job.play(train) == [["BadType", "nothing"]] * 2


def end_an_epoch_that_is_refused(log: TrainingLog) -> None:
    log.record({"seen": 1.0}, reduce="sum", per_rank=True)
    log.log_ready(0)
    log.record({"seen": 1.0}, reduce="sum", per_rank=True)
    if log.rank == 1:
        log.log_ready(1)
        log.log_ready("two")  # type: ignore[arg-type]  # under a lease: it is looked at when all have ended
    log.end_epoch()


@pytest.mark.parametrize("closing", [1, 2])
def test_a_refused_end_of_an_epoch_does_not_keep_ranks_from_closing(closing: int) -> None:
    job = Job(2, 50)

    def train(log: TrainingLog) -> list[str]:
        end_an_epoch_that_is_refused(log)
        return [] if log.rank < closing else [said_by(log, step) for step in (10, 11, 12)]

    results: list[object] = [*job.play(train)]

    assert all(isinstance(result, BadType) for result in results[:closing])
    assert results[closing:] == [["BadType", "nothing", "nothing"]] * (2 - closing)
    assert [entry.metrics for entry in job.entries] == [{"seen": 2, "seen/rank0": 1, "seen/rank1": 1}] * 2
    assert not any(entry.partial for entry in job.entries)


def test_an_end_of_an_epoch_that_raises_what_an_earlier_end_refused_counts_as_an_end() -> None:
    job = Job(2, 3)

    def train(log: TrainingLog) -> list[str]:
        end_an_epoch_that_is_refused(log)
        said = [said_by(log, step) for step in range(10, 13)] if log.rank == 0 else []
        try:
            log.end_epoch()
        except BadType:
            said.append("an end")
        log.record(epoch=2.0)
        return [*said, *(said_by(log, step) for step in (20, 21))]

    assert job.play(train) == [["BadType", *["nothing"] * 4], ["an end", "nothing", "nothing"]]
    assert [entry.step for entry in job.entries] == [0, 11, 20]
    assert ["epoch" in entry.metrics for entry in job.entries] == [False, False, True]


def test_a_rank_that_raises_while_another_is_absent_fails_that_one_at_its_next_call() -> None:
    job = Job(2, 1)

    def train(log: TrainingLog) -> None:
        log.record(x=1.0)
        log.log_ready(0)
        if log.rank == 1:
            raise GONE
        log.record(y=1.0)
        log.end_epoch()
        log.log_ready(1)

    results = job.play(train)

    assert isinstance(results[0], PeerFailed)
    assert "ArithmeticError: the loss is gone" in str(results[0])
    assert [(sorted(entry.metrics), entry.partial) for entry in job.entries] == [(["x"], False), (["y"], True)]


def test_values_of_a_root_that_leaves_while_it_is_absent_are_written_once() -> None:
    for seed in range(20):
        job = Job(2, 3)
        dice = random.Random(seed)
        batches = dice.randint(1, 12)

        def train(log: TrainingLog, batches: int = batches) -> None:
            log.record({"seen": 1.0}, reduce="sum")
            log.log_ready(0)
            if log.rank == 0:
                log.record({"seen": 100.0}, reduce="sum")
                log.end_epoch()
                raise GONE
            for step in range(1, batches):
                log.record({"seen": 1.0}, reduce="sum")
                log.log_ready(step)
            log.end_epoch()

        job.play(train)

        assert job.total("seen") // 100 == 1, seed
        assert [entry.seq for entry in job.entries] == list(range(len(job.entries)))


def test_an_epoch_may_take_longer_than_the_timeout_for_those_that_have_ended_it() -> None:
    job = Job(2, 1, timeout=0.3)
    come_back = threading.Event()

    def train(log: TrainingLog) -> str:
        if log.rank == 0:
            log.end_epoch()
            come_back.set()
            return str(log.log_ready(1))
        come_back.wait()
        time.sleep(0.9)  # three times the timeout
        log.end_epoch()
        return str(log.log_ready(1))

    assert job.play(train) == ["True", "True"]


def test_those_that_still_call_do_not_wait_longer_than_the_timeout_for_a_rank_that_is_stuck() -> None:
    job = Job(2, 1, timeout=0.3)
    stuck = threading.Event()

    def train(log: TrainingLog) -> None:
        log.log_ready(0)
        if log.rank == 0:
            stuck.wait(10)
            return
        try:
            log.log_ready(1)
        finally:
            stuck.set()

    results: list[object] = [*job.play(train)]
    assert [type(result) for result in results] == [RoundTimeout, RoundTimeout]


def test_detached_ranks_end_their_epochs_alone() -> None:
    job = Job(2, 1, on_failure="detach")

    def train(log: TrainingLog) -> list[bool]:
        log.log_ready(0)
        if log.rank == 1:
            raise ArithmeticError
        answers = []
        for step in (1, 2):
            log.record(x=1.0)
            log.end_epoch()
            answers.append(log.log_ready(step))
        return answers

    results = job.play(train)

    assert results[0] == [False, False]
    assert [(entry.metrics, entry.partial) for entry in job.entries] == [({}, False), *[({"x": 1.0}, True)] * 2]


def test_the_lowest_rank_that_waits_warns_of_those_that_have_not_ended(caplog: pytest.LogCaptureFixture) -> None:
    job = Job(3, 1, warn_after=0.05)

    def warnings() -> list[str]:
        # Before the round has told them who still calls, both that have ended may warn.
        return [r.getMessage() for r in caplog.records if "others to end theirs" not in r.getMessage()]

    def train(log: TrainingLog) -> None:
        log.log_ready(0)
        if log.rank == 1:
            log.log_ready(1)
            wait_for(lambda: len(warnings()) >= 2)
        log.end_epoch()
        log.log_ready(2)

    job.play(train)

    for text in warnings():
        assert text.startswith("rank 0 has ended its epoch and waits since 0 s for rank 1 and maybe others"), text


@pytest.mark.parametrize("forgetful", [0, 2])
def test_a_rank_whose_end_is_waited_for_is_warned_of_also_where_no_round_has_told_who_it_is(
    forgetful: int, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(3, 100, warn_after=0.05)

    def train(log: TrainingLog) -> None:
        for step in range(5):  # two rounds and then a lease
            log.log_ready(step)
        if log.rank == forgetful:
            wait_for(lambda: "waits since" in caplog.text)
        log.end_epoch()
        log.log_ready(200)

    job.play(train)

    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert not [text for text in said if f"rank {forgetful} " in text]
    assert all("for others to end theirs: every rank calls end_epoch()" in text for text in said)


def test_ctrl_c_ends_the_wait_for_the_others_and_a_later_call_can_go_on() -> None:
    job = Job(2, 1)
    ended = threading.Event()

    def other() -> None:
        with job.connect(1) as log:
            ended.wait()
            log.end_epoch()

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    log = job.connect(0)
    log.end_epoch()
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        assert log._absence is not None
        patch.setattr(log._absence._thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log.log_ready(1)
    ended.set()
    assert log.log_ready(1)
    log.close()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
