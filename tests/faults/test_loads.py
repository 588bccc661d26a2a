"""What becomes of a run's files, and of what was recorded, when a checkpoint is loaded wrongly or into trouble."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import BadValue, LogClosed, PeerLost, StateMismatch
from logsync.coordinator.messages import (
    INT64_MAX,
    MAX_CALL,
    Hello,
    Report,
    Rhythm,
    decode_decision,
    encode,
    encode_hello,
)
from logsync.workers import TrainingLog, connect
from logsync.workers.transports.local import LocalTransport
from support.lockstep import settings
from support.thread_job import Job

SINKS = ["jsonl", "csv"]


def seqs(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["seq"] for line in (folder / name).read_text().splitlines()]


def alone(folder: Path, **options: Any) -> TrainingLog:
    transport = options.pop("transport", "local")
    log: TrainingLog = connect(1, transport=transport, sinks=SINKS, run_dir=folder, **options)
    return log


def train(log: TrainingLog, steps: range) -> list[dict[str, bytes]]:
    """Log at every step; return the state after each."""
    states = []
    for step in steps:
        log.record(x=step)
        log.log_ready(step)
        states.append(log.state_dict())
    return states


@pytest.mark.parametrize("loaded", [(4, 14), (14, 4), (4, None), (None, 4)])
def test_ranks_that_load_different_states_leave_the_files_as_they_were(
    tmp_path: Path, loaded: tuple[int | None, int | None]
) -> None:
    states = Job(2, 1, sinks=SINKS, run_dir=tmp_path).play(lambda log: train(log, range(20)))[0]
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def resume(log: TrainingLog) -> None:
        at = loaded[log.rank]
        if at is not None:
            log.load_state_dict(states[at])
        log.record(x=1000)
        log.log_ready(15)

    results = Job(2, 1, sinks=SINKS, run_dir=tmp_path).play(resume)

    assert [isinstance(result, StateMismatch) for result in results] == [True, True]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def resume_rightly(log: TrainingLog) -> None:
        log.load_state_dict(states[14])
        train(log, range(15, 17))

    Job(2, 1, sinks=SINKS, run_dir=tmp_path).play(resume_rightly)
    assert seqs(tmp_path) == list(range(17))


def test_ranks_that_loaded_different_states_may_load_the_same_and_go_on(tmp_path: Path) -> None:
    states = Job(2, 1, sinks=SINKS, run_dir=tmp_path).play(lambda log: train(log, range(10)))[0]

    def resume(log: TrainingLog) -> None:
        log.load_state_dict(states[4 + log.rank])
        with pytest.raises(StateMismatch):
            log.log_ready(6)
        log.load_state_dict(states[6])
        log.record(x=7)
        assert log.log_ready(7)

    assert Job(2, 1, sinks=SINKS, run_dir=tmp_path).play(resume) == [None, None]
    assert seqs(tmp_path) == list(range(8))


def test_a_run_that_goes_on_from_before_its_first_entry_sets_aside_what_may_be_anothers(tmp_path: Path) -> None:
    with alone(tmp_path) as log:
        log.log_hyperparams({"lr": 1})
        train(log, range(10))
    killed = alone(tmp_path)
    first = killed.state_dict()
    killed._leave()
    assert seqs(tmp_path) == list(range(10))

    with alone(tmp_path) as log:
        log.load_state_dict(first)
        log.log_hyperparams({"lr": 2})
        train(log, range(2))

    assert seqs(tmp_path) == [0, 1]
    assert seqs(tmp_path, "metrics.jsonl.1") == list(range(10))
    assert json.loads((tmp_path / "hyperparams.json").read_text()) == {"lr": 2}
    assert json.loads((tmp_path / "hyperparams.json.1").read_text()) == {"lr": 1}


def test_a_state_from_before_the_first_entry_takes_this_processs_own_entries_back(tmp_path: Path) -> None:
    with alone(tmp_path) as log:
        first = log.state_dict()
        train(log, range(3))
        log.load_state_dict(first)
        train(log, range(2))

    assert seqs(tmp_path) == [0, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "metrics.csv"}


def test_a_checkpoint_does_not_cut_back_the_file_of_another_run_in_its_folder(tmp_path: Path) -> None:
    with alone(tmp_path) as log:
        state = train(log, range(4))[2]
    (tmp_path / "metrics.jsonl").rename(tmp_path / "kept.jsonl")
    (tmp_path / "metrics.csv").unlink()
    with alone(tmp_path) as log:
        train(log, range(10))

    with alone(tmp_path) as log:
        log.load_state_dict(state)
        train(log, range(3, 5))

    assert seqs(tmp_path, "metrics.jsonl.1") == list(range(10))
    assert len((tmp_path / "metrics.csv.1").read_text().splitlines()) == 11
    assert seqs(tmp_path)[-2:] == [3, 4]


def test_two_runs_in_one_folder_keep_their_hyperparameters_apart(tmp_path: Path) -> None:
    for lr in (1, 2, 3):
        with alone(tmp_path) as log:
            log.log_hyperparams({"lr": lr})
            train(log, range(lr))

    for name, lr in (("", 3), (".2", 2), (".1", 1)):
        assert json.loads((tmp_path / f"hyperparams.json{name}").read_text()) == {"lr": lr}
        assert len(seqs(tmp_path, f"metrics.jsonl{name}")) == lr


class _Breaking(LocalTransport):
    broken = False

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        if self.broken:
            msg = "rank 1 is gone"
            raise PeerLost(msg)
        return super().exchange(frame, patient=patient)


def test_a_log_that_makes_no_further_rounds_refuses_a_load_and_keeps_what_it_had(tmp_path: Path) -> None:
    transport = _Breaking()
    log = alone(tmp_path, transport=transport)
    state = train(log, range(5))[1]
    transport.broken = True
    log.record(x=999)
    with pytest.raises(PeerLost):
        log.log_ready(5)

    with pytest.raises(PeerLost):
        log.load_state_dict(state)
    log._leave()

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["x"] for line in lines] == [0, 1, 2, 3, 4, 999]


def test_a_closed_log_refuses_a_load(tmp_path: Path) -> None:
    with alone(tmp_path) as log:
        state = train(log, range(2))[1]

    with pytest.raises(LogClosed):
        log.load_state_dict(state)


def test_a_run_whose_ranks_load_at_different_places_keeps_what_it_had_logged(tmp_path: Path) -> None:
    def load_on_one(log: TrainingLog) -> None:
        states = train(log, range(3))
        if log.rank == 1:
            log.load_state_dict(states[0])
        log.record(x=3)
        log.log_ready(3)

    Job(2, 1, sinks=SINKS, run_dir=tmp_path).play(load_on_one)

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["x"] for line in lines] == [0, 1, 2, 3]
    assert lines[3]["partial"]


def test_the_entry_after_a_load_counts_the_calls_since_it_also_where_the_first_was_refused(tmp_path: Path) -> None:
    with alone(tmp_path) as log:
        state = train(log, range(1))[0]
        log.load_state_dict(state)
        with pytest.raises(BadValue):
            log.log_ready(-1)
        log.record(x=3)
        entry = log.write(2)

    assert (entry.calls, entry.partial) == (1, False)


def test_a_load_shows_the_frequency_that_will_be_in_force() -> None:
    with connect(10, transport="local", sinks=[]) as log:
        state = log.state_dict()
        log.log_frequency = 20
        log.log_ready(0)
        changed = log.state_dict()

    for given, loaded, shown in ((5, state, 5), (5, changed, 5), (10, changed, 20)):
        with connect(given, transport="local", sinks=[]) as log:
            log.load_state_dict(loaded)
            assert log.log_frequency == shown
            log.log_ready(1)
            assert log.log_frequency == shown


def _ended(rank: int, call: int) -> bytes:
    return encode(Report(1, "run", 1, rank, 2, "ended", call, 5, False, Rhythm()))  # noqa: FBT003


def test_the_end_of_an_epoch_can_be_told_whatever_calls_a_frame_claims() -> None:
    for call, accepted in ((MAX_CALL, True), (MAX_CALL + 1, False), (INT64_MAX, False)):
        root = Coordinator(settings(10), 2, run="run", run_dir="runs/x")
        root.handle([encode_hello(Hello(rank, 2, "1", settings(10))) for rank in range(2)])

        decision = decode_decision(root.handle([_ended(0, 5), _ended(1, call)])[0])

        assert (decision.failure is None) is accepted
        if accepted:
            assert decision.new_epoch is not None
            assert decision.new_epoch.call == call


@pytest.mark.parametrize("name", ["next_seq", "attempt", "missed"])
def test_a_state_at_the_end_of_the_numbers_is_refused_at_the_load(name: str) -> None:
    with connect(10, transport="local", sinks=[]) as log:
        state = log.state_dict()["state"]
        fields = {"next_seq": 6, "attempt": 8, "missed": 9}
        values = msgspec.msgpack.decode(state)
        values[fields[name]] = MAX_CALL + 1
        with pytest.raises(ValueError, match="a count that no log could have"):
            log.load_state_dict({"state": encode(values)})
