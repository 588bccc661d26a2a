"""What the simulator found in the library, each as the shortest way there."""

from __future__ import annotations

import pytest

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import PeerLost
from logsync.coordinator.host import Host
from logsync.coordinator.messages import LogEntry, Settings
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.isolation import SinkSet
from logsync.workers.training_log import TrainingLog
from logsync.workers.transports.base import Position
from logsync.workers.transports.base import Root as RootFunction
from support.lockstep import Lockstep, settings


class _Loses:
    """A transport of one rank that can lose the reply after the root has decided."""

    name = "loses"
    rank = 0
    world_size = 1

    def __init__(self) -> None:
        self.lost = False
        self.lost_before = False

    def start(self, root: RootFunction | None, position: Position | None = None) -> None:  # noqa: ARG002 - nobody asks
        assert root is not None
        self.root = root

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:  # noqa: ARG002 - nobody to wait for
        reply = b"" if self.lost_before else self.root([frame])
        if self.lost or self.lost_before:
            msg = "rank 1 ended"
            raise PeerLost(msg, ranks=(1,))
        return reply

    def close(self, reason: str | None = None) -> None:
        pass


class _Lines:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.runs: list[RunInfo] = []
        self.entries: list[LogEntry] = []

    def open(self, run: RunInfo) -> None:
        self.runs.append(run)

    def write(self, entry: LogEntry) -> None:
        self.entries.append(entry)

    def close(self) -> None:
        pass


def _log(config: Settings) -> tuple[TrainingLog, _Loses, _Lines]:
    transport, lines = _Loses(), _Lines()
    coordinator = Coordinator(config, 1, run="run", run_dir="runs/x")
    host = Host(coordinator, SinkSet([lines]), name="train", world_size=1)
    log = TrainingLog(transport, config, host)
    log._open("1")
    return log, transport, lines


def test_a_reply_that_is_lost_after_the_decision_does_not_write_the_values_twice() -> None:
    log, transport, lines = _log(settings(2))

    def train() -> None:
        with log:
            for step in range(3):
                transport.lost = step == 2
                log.record({"x": 1.0}, reduce="sum")
                log.log_ready(step)

    with pytest.raises(PeerLost):
        train()

    assert sum(entry.metrics["x"] for entry in lines.entries) == 3.0


def test_an_entry_that_a_checkpoint_counts_comes_back_with_it() -> None:
    killed, _, lines = _log(settings(2))
    killed.record({"x": 1.0})
    assert killed.log_ready(0)
    assert lines.entries == []  # held for annotate() when the job is killed
    state = killed.state_dict()
    killed._host = None
    killed._leave()

    log, _, lines = _log(settings(2))
    log.load_state_dict(state)
    assert log.last_entry == killed.last_entry
    log.log_ready(1)
    log.close()

    assert [run.last_entry for run in lines.runs] == [killed.last_entry]
    assert [run.next_seq for run in lines.runs] == [1]


def test_what_is_left_after_a_load_and_before_a_round_does_not_start_a_new_file() -> None:
    first, _, _ = _log(settings(2))
    with first:
        first.log_ready(0)
        state = first.state_dict()
    log, transport, lines = _log(settings(2))
    log.load_state_dict(state)

    def train() -> None:
        with log:
            log.record({"x": 1.0})
            log.log_ready(1)

    transport.lost_before = True
    with pytest.raises(PeerLost):
        train()

    assert [run.resumed for run in lines.runs] == [True]
    assert [entry.seq for entry in lines.entries] == [1]


def test_a_write_behind_the_last_log_is_told_as_a_rollback() -> None:
    world = Lockstep(2, settings(3))
    world.call([18, 18])

    assert any("the step went back" in notice for notice in world.write([13, 13]).notices)


def test_a_write_after_rank_0_has_closed_does_not_put_an_entry_behind_the_last_one() -> None:
    world = Lockstep(2, settings(3, frequency_type="epoch"))
    world.call([23.0, 22.77])
    first = world.ranks[0].last_entry

    second = world._exchange([world.ranks[0]._frame("closed"), world.ranks[1]._frame("write", 22.77)])

    assert first is not None
    assert second.entry is not None
    assert (first.step, second.entry.step) == (23.0, 23.0) or second.notices


@pytest.mark.parametrize("lost", ["the round", "its reply"])
def test_what_the_first_round_after_a_load_carried_is_written_if_that_is_lost(lost: str) -> None:
    first, _, _ = _log(settings(5))
    with first:
        first.log_ready(0)
        state = first.state_dict()
    log, transport, lines = _log(settings(5))
    log.load_state_dict(state)
    transport.lost, transport.lost_before = lost == "its reply", lost == "the round"

    def train() -> None:
        with log:
            log.record({"x": 1.0}, reduce="sum")
            log.log_ready(1)

    with pytest.raises(PeerLost):
        train()

    assert [(entry.seq, entry.metrics) for entry in lines.entries] == [(1, {"x": 1.0})]
