"""One rank's side: what it counts and says between rounds, and what it takes from a reply."""

from __future__ import annotations

import itertools
import math
import re
import tracemalloc
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logsync.coordinator.errors import (
    AgreedError,
    BadType,
    BadValue,
    LogsyncError,
    RoundMismatch,
    UnreadableReply,
)
from logsync.coordinator.messages import (
    INT64_MAX,
    MAX_FALLS,
    Decision,
    Event,
    Report,
    Rhythm,
    decode_report,
    decode_state,
    encode,
)
from logsync.workers.ledger import Ledger, counted_step
from support.lockstep import Lockstep, SimRank, settings

Step = int | float | None


def leased(calls: int = 1000, frequency_type: str = "step") -> SimRank:
    """A rank whose first call was at step 0 and whose lease has `calls` left."""
    world = Lockstep(1, settings(None, max_lease=calls, frequency_type=frequency_type))
    world.call([0])
    return world.ranks[0]


def sent(rank: Ledger, step: object = None, kind: Any = "closed") -> Report:
    """What the rank's next frame says."""
    return decode_report(rank._frame(kind, step), rank._rank)


def log_until(world: Lockstep, last: int) -> None:
    for step in range(last + 1):
        world.call([step] * len(world.ranks))


def outcomes(world: Lockstep, steps: Sequence[object]) -> list[Decision | LogsyncError]:
    """Make a round; return what each rank got, an error included."""
    frames = [rank._frame("decision", step) for rank, step in zip(world.ranks, steps, strict=True)]
    reply, _ = world.coordinator.handle(frames)
    got: list[Decision | LogsyncError] = []
    for rank in world.ranks:
        try:
            got.append(rank._accept(reply))
        except LogsyncError as error:  # noqa: PERF203 - every rank has one of its own
            got.append(error)
    return got


# Calls


def test_a_call_under_a_lease_is_answered_false_and_makes_no_frame() -> None:
    rank = leased(5)

    assert [rank.leased(step) for step in range(1, 8)] == [True] * 5 + [False] * 2
    assert rank.calls == 6


def test_a_call_under_a_lease_looks_at_nothing_and_allocates_nothing() -> None:
    rank = leased()
    steps: list[Any] = [5, "no step", None, math.nan, torch.ones(3), object()] * 100
    log_ready = rank.log_ready
    log_ready(0)

    tracemalloc.start()
    for step in steps:
        log_ready(step)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 1000  # the loop's own
    assert rank.calls == 602


def test_a_rank_knows_where_it_is_also_under_a_lease() -> None:
    rank = SimRank(0, 1, max_lease=5, frequency_type="step")
    assert rank.position() == (0, None)

    rank = leased(3)
    positions = []
    for step in (1, 4, 9):
        positions.append(rank.position())
        rank.log_ready(step)
    sent(rank, 10, "decision")

    assert [*positions, rank.position()] == [(1, 0), (2, 1), (3, 4), (5, 10)]


def test_every_call_counts_once_leased_or_not_refused_or_not() -> None:
    world = Lockstep(2, settings(7, max_lease=3))
    refused = 0
    for calls in range(1, 60):
        step: object = "no step" if calls % 13 == 0 else calls
        if not all([rank.leased(step) for rank in world.ranks]):  # noqa: C419 - each of them calls
            refused += any(isinstance(got, BadType) for got in outcomes(world, [step, step]))
        assert [rank.calls for rank in world.ranks] == [calls, calls]

    assert refused == 4


# Bad steps

BAD_STEPS: list[tuple[Any, type[AgreedError], str]] = [
    ("7", BadType, "given '7'"),
    (True, BadType, "given True"),
    (2.5, BadType, "given 2.5"),
    ([3], BadType, r"given \[3\]"),
    (torch.ones(2), BadType, "given Tensor of shape"),
    (-1, BadValue, "greater than or equal to 0, given -1"),
    (2**63, BadValue, r"at most 2\*\*63 - 1, given an int of 64 bits"),
    (10**5000, BadValue, "given an int of 16610 bits"),
]


@pytest.mark.parametrize(("step", "error", "text"), BAD_STEPS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_bad_step_in_a_due_call_is_every_ranks_error_and_the_next_round_works(
    step: Any, error: type[AgreedError], text: str, culprit: int
) -> None:
    world = Lockstep(3, settings(10))
    log_until(world, 9)

    for got in outcomes(world, [step if rank == culprit else 10 for rank in range(3)]):
        assert type(got) is error
        assert re.search(f"^rank {culprit}, call 11: .*{text}", str(got))
        assert (got.ranks, got.call) == ((culprit,), 11)
    assert world.call([11] * 3) == (True, False)


@pytest.mark.parametrize(("step", "error", "text"), BAD_STEPS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_bad_step_under_a_lease_is_reported_by_the_next_round_with_its_call(
    step: Any, error: type[AgreedError], text: str
) -> None:
    world = Lockstep(2, settings(10))
    log_until(world, 4)
    assert world.call([5, step]) == (False, True)
    for ok in range(6, 10):
        assert world.call([ok, ok]) == (False, True)

    for got in outcomes(world, [10, 10]):
        assert type(got) is error
        assert re.search(f"^rank 1, call 6: .*{text}", str(got))
    assert world.call([11, 11]) == (True, False)


def test_a_fault_is_reported_once_and_the_first_of_several_is() -> None:
    world = Lockstep(1, settings(10))
    log_until(world, 3)
    for step in ("first", -4):
        assert world.call([step]) == (False, True)

    for step in range(6, 10):
        assert world.call([step]) == (False, True)
    with pytest.raises(BadType, match=r"rank 0, call 5: .*'first'"):
        world.call([10])
    assert world.call([11]) == (True, False)


def test_steps_of_numpy_and_torch_count_as_their_numbers() -> None:
    steps: list[Any] = [np.int64(3), torch.tensor(4), np.uint8(5)]
    rank = leased()
    for step in steps:
        rank.log_ready(step)

    report = sent(rank)

    assert report.fault is None
    assert (report.step, type(report.step)) == (5, int)
    assert report.rhythm == Rhythm(3, 1, 0, 5)


def test_the_largest_step_is_that_of_int64() -> None:
    assert counted_step(INT64_MAX, "step") == INT64_MAX
    for too_large in (INT64_MAX + 1, np.uint64(2**64 - 1)):
        with pytest.raises(ValueError, match=r"at most 2\*\*63 - 1, given an int of 64 bits"):
            counted_step(too_large, "step")


# How the step moves


@pytest.mark.parametrize(
    ("steps", "rhythm"),
    [
        # the first call, at step 0 and counted as a change, was in the round before
        ([], Rhythm(None, None, 0, 0)),
        ([1, 2, 3], Rhythm(1, 1, 0, 3)),
        ([1, 4, 6], Rhythm(3, 1, 0, 6)),
        ([0, 0], Rhythm(None, None, 2, 0)),
        ([0, 0, 0, 1, 1, 1, 1, 2, 2], Rhythm(1, 4, 1, 2)),
        ([0, 5, 5, 5, 10], Rhythm(5, 2, 0, 10)),
        ([9, 3, 4], Rhythm(9, 1, 0, 4, ((3, 3),))),  # a step back is a change and no increment
        ([5, 3, 3], Rhythm(5, 1, 1, 3, ((3, 3),))),
        ([9, 3, 4, 4, 2, 8], Rhythm(9, 1, 0, 8, ((3, 3), (6, 2)))),
        ([None, 2], Rhythm(2, 2, 0, 2)),  # a call without a step is a call
        ([2, None], Rhythm(2, 1, 1, None)),
        ([None, None], Rhythm(None, None, 2, None)),
        ([7, 7, "no step", 7], Rhythm(7, 1, 3, 7)),
        ([7, -1, 8], Rhythm(7, 1, 0, 8)),
    ],
)
def test_the_rhythm_is_the_largest_increment_the_smallest_gap_and_the_steps_back(
    steps: Sequence[Any], rhythm: Rhythm
) -> None:
    rank = leased()
    for step in steps:
        assert rank.leased(step)

    report = sent(rank)

    assert report.rhythm == rhythm
    assert (report.call, report.step) == (1 + len(steps), rhythm.current)


def test_fractions_of_epochs_have_a_rhythm_too() -> None:
    rank = leased(frequency_type="epoch")
    for call in range(1, 11):
        rank.log_ready(call // 2 / 8)

    assert sent(rank).rhythm == Rhythm(0.125, 2, 0, 0.625)


def test_the_first_call_of_all_counts_as_a_step_back() -> None:
    rank = SimRank(0, 1, max_lease=5, frequency_type="step")

    assert sent(rank, 7, "decision").rhythm == Rhythm(None, None, 0, 7, ((1, 7),))


def test_of_endless_steps_back_the_furthest_are_kept() -> None:
    rank = leased()
    for call in range(2, 900):
        rank.log_ready(2000 - call if call % 2 else 5000)

    falls = sent(rank).rhythm.falls

    assert len(falls) <= MAX_FALLS
    assert min(step for _, step in falls) == 2000 - 899
    assert all(2000 - call == step for call, step in falls)


def test_the_rhythm_is_that_since_the_last_round_that_was_accepted() -> None:
    world = Lockstep(2, settings(100, max_lease=3))
    log_until(world, 9)  # a round at 0, 1, 5 and 9
    for step in (2, 20, 21):
        world.call([step, step])
    assert all(isinstance(got, RoundMismatch) for got in outcomes(world, [24, 25]))

    assert sent(world.ranks[0], 26, "decision").rhythm == Rhythm(18, 1, 0, 26, ((11, 2),))


# What the user said


def said(rank: Ledger) -> tuple[Event, ...]:
    return sent(rank).events


@pytest.mark.parametrize(
    ("words", "events"),
    [
        # (call that follows, step or None)
        ([(1, 3)], [(1, 3)]),
        ([(1, 3), (1, 5), (1, 4)], [(1, 5)]),  # the largest of a call
        ([(1, 3), (2, 3)], [(2, 3)]),  # a later one that is not smaller makes an earlier one needless
        ([(1, 3), (2, 2), (3, 1)], [(1, 3), (2, 2), (3, 1)]),  # a smaller one may outlive a reset in between
        ([(1, 3), (2, 2), (3, 9)], [(3, 9)]),
        ([(1, 3), (2, None)], [(2, None)]),
        ([(1, None), (1, 4)], [(1, None), (1, 4)]),
        ([(1, 4), (1, None)], [(1, None)]),  # taken back before anybody could hear of it
        ([(1, None), (2, None), (3, None)], [(3, None)]),
    ],
)
def test_updates_are_said_as_briefly_as_their_outcome_allows(
    words: list[tuple[int, Step]], events: list[tuple[int, Step]]
) -> None:
    rank = leased()
    start = rank.calls
    for call, step in words:
        while rank.calls < start + call - 1:
            rank.log_ready(9)
        rank.model_updated(step)

    assert said(rank) == tuple(Event(start + call, "update", step) for call, step in events)


words = st.lists(
    st.sampled_from(["call", "call", "reset"])
    | st.integers(0, 5)
    | st.tuples(st.just("log"), st.none() | st.integers(0, 5)),
    max_size=25,
)


@given(words)
def test_what_is_said_briefly_has_the_outcome_of_everything_that_was_said(words: list[Any]) -> None:
    """Of every call: first its resets, then its updates and marks, in their order."""
    brief = leased()
    everything: list[Event] = []
    for word in words:
        call = brief.calls + 1
        if word == "call":
            brief.log_ready(9)
        elif word == "reset":
            brief.model_updated(None)
            # What this rank said at this very call is taken back: nobody has heard of it.
            everything = [e for e in everything if e.call != call or e.kind != "update"]
            everything.append(Event(call, "update", None))
        elif isinstance(word, tuple):
            brief.log_written(word[1])
            everything.append(Event(call, "written", word[1]))
        else:
            brief.model_updated(word)
            everything.append(Event(call, "update", word))

    told = said(brief)
    assert _outcome(told) == _outcome(everything)
    assert len(told) <= len(everything)


def _outcome(events: Sequence[Event]) -> tuple[Step, Step, bool]:
    """Last log, last update, updated since the log, by the rules of a round."""
    last_log: Step = 0
    last_update: Step = None
    updated = False
    for _, group in itertools.groupby(sorted(events, key=lambda e: e.call), key=lambda e: e.call):
        of_call = list(group)
        if Event(of_call[0].call, "update", None) in of_call:
            last_update, updated = None, False
        for event in of_call:
            if event.kind == "written":
                last_log, updated = event.value, False
            elif event.value is not None:
                last_update, updated = event.value if last_update is None else max(last_update, event.value), True
    return last_log, last_update, updated


def test_a_model_that_is_updated_at_every_step_costs_one_event() -> None:
    rank = leased()
    for step in range(1, 900):
        rank.model_updated(step)
        rank.log_ready(step)

    assert said(rank) == (Event(rank.calls, "update", 899),)


@pytest.mark.parametrize("word", ["falling updates", "marks"])
def test_however_much_is_said_under_the_longest_lease_it_fits_a_frame(word: str) -> None:
    rank = leased(70_000)
    for step in range(70_000):
        if word == "marks":
            rank.log_written(step + 1)
        else:
            rank.model_updated(70_000 - step)
        rank.log_ready(5)

    assert sent(rank).call == 70_001


@pytest.mark.parametrize("word", ["setting", "mark", "reset"])
def test_what_else_was_said_survives_endless_falling_updates(word: str) -> None:
    rank = leased(3000)
    say: dict[str, Any] = {"setting": rank.set_frequency, "mark": rank.log_written, "reset": rank.model_updated}
    rank.model_updated(9000)
    for step in range(2900):
        if step == 5:
            say[word](None if word == "reset" else 7)
        rank.model_updated(8000 - step)
        rank.log_ready(9999)

    told = [(e.kind, e.value) for e in said(rank)]
    assert {"setting": ("frequency", 7), "mark": ("written", 7), "reset": ("update", None)}[word] in told
    assert max(v for kind, v in told if kind == "update" and v is not None) == (7995 if word == "reset" else 9000)
    assert len(told) < 2000


def test_log_written_of_the_step_just_decided_says_nothing() -> None:
    world = Lockstep(1, settings(10))
    log_until(world, 10)
    rank = world.ranks[0]

    rank.log_written(10)
    assert said(rank) == ()
    rank.log_written(7)
    rank.log_written(10)  # now it is another one, and the last of a rank's marks is the one that counts
    assert [(e.kind, e.value) for e in said(rank)] == [("written", 10)]


def test_log_written_none_forgets_all_logs() -> None:
    world = Lockstep(2, settings(10))
    log_until(world, 3)
    world.ranks[1].log_written(None)
    for step in range(4, 10):
        assert world.call([step, step]) == (False, True)

    assert world.call([10, 10]) == (True, False)
    assert world.ranks[0].state.last_log_step == 10


def test_of_new_frequencies_the_last_is_said() -> None:
    rank = leased()
    rank.model_updated(3)
    for value in (5, None, 9):
        rank.set_frequency(value)

    assert said(rank) == (Event(2, "update", 3), Event(2, "frequency", 9))


@pytest.mark.parametrize("value", [True, "5", -1, math.nan, 2**63, 1.5, [3]])
def test_what_is_refused_at_the_call_leaves_no_word(value: Any) -> None:
    rank = leased()
    for say in (rank.model_updated, rank.log_written, rank.set_frequency):
        with pytest.raises((TypeError, ValueError), match="given"):
            say(value)
    with pytest.raises(ValueError, match="greater than 0, given 0"):
        rank.set_frequency(0)

    assert said(rank) == ()


def test_what_was_said_is_kept_until_a_round_is_accepted_and_said_once() -> None:
    world = Lockstep(2, settings(10))
    log_until(world, 1)
    rank = world.ranks[1]
    rank.model_updated(1)
    for step in range(2, 10):
        world.call([step, step])
    assert all(isinstance(got, RoundMismatch) for got in outcomes(world, [11, 10]))
    rank.log_written(4)
    assert [e.kind for e in rank._events] == ["update", "written"]

    assert world.call([12, 11]) == (False, False)
    assert said(rank) == ()
    assert (rank.state.last_model_update_step, rank.state.last_log_step) == (1, 4)


# Replies


def reply_to(rank: Ledger, **changes: Any) -> bytes:
    plain = Decision(1, "run", rank._round, False, 0, rank.state)  # noqa: FBT003
    return encode(msgspec.structs.replace(plain, **changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"round": 1}, "the reply is for round 1 of run 'run', not 2 of 'run'"),
        ({"run": "other"}, "run 'other'"),
        ({"protocol": 2}, "the reply"),
        ({"lease": 1001}, "a lease of 1001 calls, 1000 are the most"),
    ],
)
def test_a_reply_from_elsewhere_is_refused(changes: dict[str, Any], said: str) -> None:
    rank = leased()
    sent(rank)
    before = rank.state

    with pytest.raises(UnreadableReply, match=said):
        rank._accept(reply_to(rank, **changes))
    assert rank.state == before
    assert not rank.leased(1)


def test_a_reply_that_cannot_be_read_is_refused() -> None:
    rank = leased()
    sent(rank)

    with pytest.raises(UnreadableReply):
        rank._accept(b"\xc1")


def test_a_lease_is_exactly_as_long_as_the_reply_says() -> None:
    for lease in (0, 1, 1000):
        rank = leased()
        sent(rank)
        rank._accept(reply_to(rank, lease=lease))
        assert [rank.leased(step) for step in range(lease + 1)] == [True] * lease + [False]


# State


def test_the_state_is_the_same_bytes_on_all_ranks_at_every_call() -> None:
    world = Lockstep(3, settings(7))
    seen = set()
    for step in range(40):
        world.ranks[step % 3].model_updated(step)
        world.call([step] * 3)
        states = {encode(rank.state_dict()) for rank in world.ranks}
        assert len(states) == 1
        seen |= states
        if step == 20:
            for rank in world.ranks:
                rank.load_state_dict(world.ranks[2].state_dict())

    assert len(seen) > 20


def test_the_state_is_one_bytes_value_and_says_what_is_missing_in_it() -> None:
    world = Lockstep(1, settings(10))
    missed = []
    for step in range(13):
        world.call([step])
        (value,) = world.ranks[0].state_dict().values()
        assert type(value) is bytes
        missed.append(decode_state(value).missed)

    assert missed == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]


def test_a_state_says_the_same_right_after_it_was_loaded() -> None:
    old, new = Lockstep(2, settings(10)), Lockstep(3, settings(10))
    log_until(old, 14)
    log_until(new, 3)
    state = old.ranks[1].state_dict()

    for rank in new.ranks:
        rank.load_state_dict(state)
        assert rank.state_dict() == state


def test_after_a_load_the_next_call_is_a_round_and_the_cadence_goes_on() -> None:
    old, new = Lockstep(2, settings(10)), Lockstep(3, settings(10))
    log_until(old, 14)
    log_until(new, 3)  # has a lease
    for rank in new.ranks:
        rank.model_updated(9999)  # belongs to what is given up
        rank.load_state_dict(old.ranks[0].state_dict())
        assert rank.calls == 4  # those made so far stay counted

    answers = [new.call([step] * 3) for step in range(15, 21)]

    assert answers[0] == (False, False)
    assert [ready for ready, _ in answers] == [False] * 5 + [True]
    entry = new.ranks[0].last_entry
    assert entry is not None
    assert (entry.seq, entry.step, entry.calls, entry.partial) == (2, 20, 6, True)
    assert new.ranks[0].state.last_model_update_step is None


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "takes what state_dict"),
        (None, "takes what state_dict"),
        ([], "takes what state_dict"),
        ({"state": "text"}, "takes what state_dict"),
        ({"state": b""}, "not a state of logsync"),
        ({"state": b"junk"}, "not a state of logsync"),
        (leased(frequency_type="epoch").state_dict(), "counts in frequency type 'epoch', this log in 'step'"),
    ],
)
def test_what_is_no_state_of_this_log_is_refused_and_nothing_changes(state: Any, said: str) -> None:
    rank = leased()
    rank.model_updated(3)
    before = rank.state_dict()

    with pytest.raises(ValueError, match=said):
        rank.load_state_dict(state)

    assert rank.state_dict() == before
    assert rank.leased(1)
    assert [e.value for e in sent(rank).events] == [3]


def test_before_the_first_reply_there_is_no_state() -> None:
    rank = Ledger(0, 1, max_lease=5, frequency_type="step")

    with pytest.raises(RuntimeError, match="no reply"):
        rank.state_dict()
    with pytest.raises(NotImplementedError):
        rank.log_ready(0)
