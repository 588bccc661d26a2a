"""What fuzzing found, each by the shortest bytes that showed it."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import LogsyncError, ProtocolError, StateMismatch, UnreadableReply
from logsync.coordinator.messages import (
    INT64_MAX,
    MAX_CALL,
    Hello,
    KeySpec,
    State,
    Window,
    decode_decision,
    decode_report,
    decode_state,
    encode,
    encode_hello,
    pack_values,
)
from logsync.coordinator.sinks.jsonl import _line
from logsync.workers.door import connect
from logsync.workers.launch import restart_count
from logsync.workers.transports.local import LocalTransport
from logsync.workers.transports.notes import Note, _decoded
from support.lockstep import Lockstep, settings

STATE = State(10, 10, "step", 3, None, False, 1, "runs/x", 0)  # noqa: FBT003


def loaded(**changes: Any) -> Lockstep:
    world = Lockstep(2, settings(10))
    for rank in world.ranks:
        rank.load_state_dict({"state": encode(msgspec.structs.replace(STATE, **changes))})
    return world


def call(world: Lockstep, step: int) -> None:
    """Make a call on every rank, which may be refused by any error that the ranks agree on."""
    with contextlib.suppress(StateMismatch):
        world.call([step] * len(world.ranks))


# -- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counter", ["next_seq", "attempt"])
def test_after_a_load_of_the_largest_counters_replies_can_be_read(counter: str) -> None:
    with pytest.raises(ValueError, match="not a state of logsync"):
        loaded(last_log_step=None, **{counter: INT64_MAX})

    world = loaded(last_log_step=None, **{counter: MAX_CALL - 1000})
    call(world, 20)
    call(world, 40)


def test_a_state_that_was_loaded_can_be_saved_and_loaded_again() -> None:
    with pytest.raises(ValueError, match="not a state of logsync"):
        loaded(missed=INT64_MAX)

    world = loaded(missed=MAX_CALL - 1000)
    call(world, 4)
    decode_state(world.ranks[0].state_dict()["state"])


def test_a_state_that_no_frame_can_carry_is_refused_at_the_load() -> None:
    rank = Lockstep(1, settings(10)).ranks[0]
    longest = encode([*(getattr(STATE, field) for field in STATE.__struct_fields__), "x" * 20_000])

    with contextlib.suppress(ValueError):
        rank.load_state_dict({"state": longest})
    decode_report(rank._frame("decision", 1), 0)


@pytest.mark.parametrize("changes", [{"log_frequency": 0}, {"log_frequency": 1.5}, {"last_log_step": 0.5}])
def test_a_state_that_does_not_fit_the_frequency_type_is_refused_as_one(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="what no log could have"):
        loaded(**changes)

    world = Lockstep(2, settings(10))
    for rank in world.ranks:
        rank._restore = encode(msgspec.structs.replace(STATE, **changes))
    with pytest.raises(StateMismatch):
        world.call([4, 4])


# -- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 2, 4])
def test_too_few_or_too_many_hellos_are_refused(count: int) -> None:
    root = Coordinator(settings(10), 3, run="run", run_dir="runs/x")

    failure = decode_decision(root.handle([encode_hello(Hello(r, 3, "1", settings(10))) for r in range(count)])[0])

    assert failure.failure is not None
    assert failure.failure.kind == "protocol"


def test_a_round_that_was_refused_for_its_window_is_no_norm_for_the_next() -> None:
    world = Lockstep(2, settings(10))
    frames = [rank._frame("decision", 1 + 1000 * r, window=Window(b"\xc1", b"")) for r, rank in enumerate(world.ranks)]
    reply, _ = world.coordinator.handle(frames)
    for rank in world.ranks:
        with pytest.raises(ProtocolError):
            rank._accept(reply)

    world.call([2, 2])


@pytest.mark.parametrize("name", ["seq", "time", "nan_ranks"])
def test_a_metric_of_a_frame_cannot_overwrite_what_the_file_says_itself(name: str) -> None:
    world = Lockstep(1, settings(1))
    frame = world.ranks[0]._frame("decision", 1, window=Window(encode([KeySpec(name)]), pack_values([7.5, 1.0])))

    _, entries = world.coordinator.handle([frame], now=3.0)

    assert all(b"7.5" not in _line(entry) for entry in entries)


# -- replies ---------------------------------------------------------------------------------------------------------


class Garbling(LocalTransport):
    """A transport that loses what one reply says."""

    def __init__(self, garbled: bytes | None, at: int) -> None:
        super().__init__()
        self._garbled = garbled
        self._at = at
        self.rounds = 0

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        assert self.rounds < 20, "rounds without an end"
        reply = super().exchange(frame, patient=patient)
        self.rounds += 1
        if self.rounds - 1 != self._at:
            return reply
        return self._garbled or encode(msgspec.structs.replace(decode_decision(reply), entry=None))


def test_after_a_reply_that_cannot_be_read_no_round_is_made() -> None:
    transport = Garbling(b"\xc1", 1)
    log = connect(10, sinks=[], transport=transport)
    for step in range(3):
        with pytest.raises(UnreadableReply, match="not a message"):
            log.log_ready(step)

    assert transport.rounds == 2


def test_close_ends_after_a_reply_that_could_not_be_read() -> None:
    log = connect(10, sinks=[], transport=Garbling(b"\xc1", 1))
    with pytest.raises(UnreadableReply):
        log.log_ready(0)

    with contextlib.suppress(LogsyncError):
        log.close()


def test_a_reply_to_write_that_lacks_the_entry_is_an_error_of_the_tree() -> None:
    log = connect(10, sinks=[], transport=Garbling(None, 1))
    for _ in range(2):
        with pytest.raises(UnreadableReply, match="has no entry"):
            log.write(0)


# -- the store, the surroundings -------------------------------------------------------------------------------------


def test_a_note_with_deep_nesting_after_its_last_field_is_no_note() -> None:
    assert _decoded(b'["idle",1,1,1,1,"h",1,"",[],"",' + b"[" * 100_000, Note) is None


@pytest.mark.parametrize("digits", [19, 5000])
def test_a_restart_count_that_no_reply_can_carry_is_not_taken(digits: int) -> None:
    assert restart_count({"TORCHELASTIC_RESTART_COUNT": "9" * digits}) <= INT64_MAX
