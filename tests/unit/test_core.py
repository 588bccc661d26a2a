"""One round at the root: all frames in, one reply and what was logged out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest

from logsync.coordinator.core import Coordinator
from logsync.coordinator.messages import (
    MAX_FRAME,
    PROTOCOL,
    Decision,
    Event,
    Failure,
    Hello,
    KeySpec,
    LogEntry,
    Report,
    Rhythm,
    Settings,
    State,
    Window,
    decode_decision,
    encode,
    encode_hello,
    pack_values,
)
from logsync.coordinator.reduction import Partials
from support.lockstep import settings

Step = int | float | None


def window(**means: float) -> Window:
    """A window with one value of weight 1 for each key."""
    values = [number for mean in means.values() for number in (mean, 1.0)]
    return Window(encode([KeySpec(name) for name in means]), pack_values(values))


def update(call: int, step: Step) -> Event:
    return Event(call, "update", step)


class Root:
    """A coordinator past its first round; ranks' frames are made here, so that a test can bend them."""

    def __init__(self, world_size: int = 1, config: Settings | None = None, **options: Any) -> None:
        self.config = config or settings(10)
        self.coordinator = Coordinator(self.config, world_size, **{"run": "run", "run_dir": "runs/here", **options})
        self.world_size = world_size
        self.number = 0
        self.entries: tuple[LogEntry, ...] = ()
        self.previous: list[Step] = [None] * world_size
        hello = self.send([encode_hello(Hello(r, world_size, "1", self.config)) for r in range(world_size)])
        assert hello.failure is None

    def send(self, frames: Sequence[bytes], now: float = 0.0) -> Decision:
        reply, self.entries = self.coordinator.handle(frames, now)
        self.number += 1
        return decode_decision(reply)

    def frames(self, steps: Sequence[Step], each: Mapping[int, Mapping[str, Any]], **fields: Any) -> list[bytes]:
        frames = []
        for rank, step in enumerate(steps):
            before = self.previous[rank]
            rises = step is not None and before is not None and step > before
            plain: dict[str, Any] = {
                "protocol": PROTOCOL,
                "run": "run",
                "round": self.number,
                "rank": rank,
                "world_size": self.world_size,
                "kind": "decision",
                "call": self.number,
                "step": step,
                "check_model_update": False,
                "rhythm": Rhythm(step - before if rises else None, 1, 0, step),  # type: ignore[operator]
            }
            frames.append(encode(Report(**{**plain, **fields, **each.get(rank, {})})))
        return frames

    def round(self, *steps: Step, each: Mapping[int, Mapping[str, Any]] | None = None, **fields: Any) -> Decision:
        """Make a round with these steps; `fields` are all ranks', `each` those of single ranks."""
        decision = self.send(self.frames(steps, each or {}, **fields))
        self.previous = list(steps)
        return decision


def failure(decision: Decision, kind: str) -> Failure:
    assert decision.failure is not None
    assert decision.failure.kind == kind, decision.failure.text
    assert (decision.log_ready, decision.lease, decision.entry) == (False, 0, None)
    return decision.failure


def unnumbered(decision: Decision) -> Decision:
    """The decision without the one thing that a failed round before it changes."""
    return msgspec.structs.replace(decision, round=0)


def one(decision: Decision) -> LogEntry:
    assert decision.failure is None, decision.failure
    assert decision.entry is not None
    return decision.entry


# The same frames, the same bytes


def random_frames(rng: random.Random, root: Root) -> list[bytes]:
    """Draw a round in which most things happen now and then, bad ones too."""
    kind = rng.choice(["decision"] * 8 + ["write"])
    step = root.number * rng.choice([1, 1, 1, 3])
    each: dict[int, dict[str, Any]] = {}
    for rank in range(root.world_size):
        each[rank] = {"window": window(**{rng.choice("abc"): rng.gauss(0, 1) for _ in range(3)})}
        if rng.random() < 0.2:
            value = rng.choice([None, 3, 7])
            each[rank]["events"] = (Event(root.number, rng.choice(["update", "written", "frequency"]), value),)
        if rng.random() < 0.03:
            each[rank]["kind"] = "write"
        if rng.random() < 0.03:
            each[rank]["step"] = step + 1
        if rng.random() < 0.03:
            each[rank]["fault"] = Failure("bad_value", "no", call=1)
    frames = root.frames([step] * root.world_size, each, kind=kind)
    if rng.random() < 0.05:
        frames[0] = frames[0][:-3]
    return frames


@pytest.mark.parametrize("mode", ["exact", "on_change", "on_update"])
def test_two_coordinators_that_are_fed_alike_reply_alike(mode: str) -> None:
    kinds = set()
    for seed in range(20):
        rng = random.Random(seed)
        root, other = (Root(3, settings(4, mode=mode)) for _ in range(2))
        for _ in range(60):
            frames = random_frames(rng, root)
            first, entries = root.coordinator.handle(frames, 1.5)
            second, others = other.coordinator.handle([memoryview(bytearray(f)) for f in frames], 1.5)
            assert first == second
            assert entries == others
            root.number += 1
            kinds.add(getattr(decode_decision(first).failure, "kind", "fine"))

    assert kinds == {"fine", "protocol", "bad_value", "round_mismatch"}


def test_the_clock_shows_in_the_entry_only() -> None:
    early, late = Root(), Root()

    for number, step in enumerate([0, 5, 10]):
        frames = early.frames([step], {})
        first, second = early.send(frames, now=100.0), late.send(frames, now=2e9 + number)
        if first.entry is not None:
            assert (first.entry.time, one(second).time) == (100.0, 2e9 + number)
        assert msgspec.structs.replace(first, entry=None) == msgspec.structs.replace(second, entry=None)


def test_the_entries_handed_out_are_those_on_the_reply() -> None:
    root = Root()

    assert [root.entries for step in range(25) if root.round(step).entry is None and root.entries] == []
    entry = one(root.round(25, kind="write", window=window(a=2.0)))
    assert root.entries == (entry,)


# Ready, merged, written


def test_a_ready_round_is_merged_written_and_marked_in_one_act() -> None:
    root = Root(2)

    first = root.round(0, 0, each={0: {"window": window(loss=1.0)}, 1: {"window": window(loss=4.0, extra=7.0)}})
    waiting = root.round(9, 9)
    second = root.round(10, 10)

    assert first.log_ready
    entry = one(first)
    assert (entry.seq, entry.step, entry.metrics, entry.ranks) == (0, 0, {"loss": 2.5, "extra": 7.0}, {"extra": 1})
    assert (first.state.last_log_step, first.state.next_seq) == (0, 1)
    assert (waiting.log_ready, waiting.entry) == (False, None)
    assert (second.log_ready, one(second).seq, one(second).metrics, second.state.last_log_step) == (True, 1, {}, 10)


def test_a_write_is_written_whatever_the_cadence_and_marks_its_step() -> None:
    for mode in ("exact", "on_change", "on_update"):
        root = Root(1, settings(None if mode == "exact" else 10, mode=mode))
        root.round(0)

        decision = root.round(3, kind="write", call=1, window=window(acc=0.5))

        assert not decision.log_ready
        assert (one(decision).step, one(decision).metrics) == (3, {"acc": 0.5})
        assert decision.state.last_log_step == 3


def test_the_window_of_a_round_that_is_not_ready_is_not_merged() -> None:
    root = Root()
    root.round(0)

    assert root.round(1, window=Window(b"not a schema", b"")).failure is None


def test_entries_say_how_many_calls_they_cover() -> None:
    root = Root()

    calls = {decision.entry.step: decision.entry.calls for step in range(31) if (decision := root.round(step)).entry}
    final = one(root.round(30, kind="write", call=34))

    assert calls == {0: 1, 10: 10, 20: 10, 30: 10}
    assert final.calls == 3


def test_an_entry_before_any_call_covers_none() -> None:
    assert one(Root().round(0, kind="write", call=0)).calls == 0


def test_with_explicit_writes_a_ready_step_stays_ready_until_it_is_written() -> None:
    root = Root(1, settings(10, write="explicit"))

    for step in (0, 1, 2):
        ready = root.round(step)
        assert (ready.log_ready, ready.entry, ready.lease, ready.state.last_log_step) == (True, None, 0, None)
    assert one(root.round(2, kind="write", window=window(a=1.0))).metrics == {"a": 1.0}
    assert [root.round(step).log_ready for step in (3, 11, 12, 13)] == [False, False, True, True]


def test_check_model_update_is_the_counting_ranks() -> None:
    for checking, ready in ((0, False), (1, True)):
        root = Root(2)
        root.round(0, 0)
        root.round(5, 5, events=(update(2, 5),))

        assert root.round(10, 10, each={checking: {"check_model_update": True}}).log_ready is ready


# What is wrong with a round is on the reply, and nothing has changed

SOME_EVENTS = (Event(3, "update", 2), Event(3, "written", 1), Event(3, "frequency", 7))


def _as_sent(root: Root, **changes: Any) -> list[bytes]:
    return root.frames([10, 10], {1: changes}, events=SOME_EVENTS, window=window(a=1.0))


BAD_ROUNDS: dict[str, tuple[str, Any]] = {
    "garbage": ("protocol", lambda root: [b"\x93garbage", *_as_sent(root)[1:]]),
    "nothing": ("protocol", lambda _: [b"", b""]),
    "a frame too few": ("protocol", lambda root: _as_sent(root)[:1]),
    "another run": ("protocol", lambda root: _as_sent(root, run="other")),
    "another round": ("protocol", lambda root: _as_sent(root, round=1)),
    "another rank": ("protocol", lambda root: _as_sent(root, rank=0)),
    "another version": ("protocol", lambda root: _as_sent(root, protocol=PROTOCOL + 1)),
    "a window that is none": ("protocol", lambda root: _as_sent(root, window=Window(b"?", b""))),
    "a window cut off": ("protocol", lambda root: _as_sent(root, window=Window(encode([KeySpec("a")]), b"1234"))),
    "a write among decisions": ("round_mismatch", lambda root: _as_sent(root, kind="write")),
    "a bad step": ("bad_value", lambda root: _as_sent(root, fault=Failure("bad_value", "no", call=3))),
    "a fault of endless control characters": (
        "bad_value",
        lambda root: _as_sent(root, fault=Failure("bad_value", "\0" * 4096, call=3)),
    ),
    "a step of a bad type": ("bad_type", lambda root: _as_sent(root, fault=Failure("bad_type", "no", call=3))),
    "two reductions": (
        "reduction_mismatch",
        lambda root: _as_sent(root, window=Window(encode([KeySpec("a", "sum", "sum")]), pack_values([1.0, 1.0]))),
    ),
    "a state on one rank only": ("state_mismatch", lambda root: _as_sent(root, restore=encode(state_at(50)))),
    "a state that is none": (
        "protocol",
        lambda root: root.frames([10, 10], {}, restore=b"junk", events=SOME_EVENTS),
    ),
    "a state of epochs": (
        "state_mismatch",
        lambda root: root.frames([10, 10], {}, restore=encode(state_at(50, frequency_type="epoch"))),
    ),
    "a state, then two reductions": (
        "reduction_mismatch",
        lambda root: root.frames(
            [90, 90],
            {1: {"window": Window(encode([KeySpec("a", "max", "max")]), pack_values([1.0, 1.0]))}},
            restore=encode(state_at(50)),
            window=window(a=1.0),
            events=SOME_EVENTS,
        ),
    ),
    "a rollback, then two reductions": (
        "reduction_mismatch",
        lambda root: root.frames(
            [0, 0],
            {1: {"window": Window(encode([KeySpec("a", "max", "max")]), pack_values([1.0, 1.0]))}},
            kind="write",
            window=window(a=1.0),
            rhythm=Rhythm(None, 1, 0, 0, ((3, 0),)),
        ),
    ),
}


def state_at(step: Step, **changes: Any) -> State:
    plain = State(
        log_frequency=10,
        configured=10,
        frequency_type="step",
        last_log_step=step,
        last_model_update_step=None,
        updated_since_log=False,
        next_seq=5,
        run_dir="runs/before",
        attempt=0,
    )
    return msgspec.structs.replace(plain, **changes)


@pytest.mark.parametrize("bad", BAD_ROUNDS)
@pytest.mark.parametrize("mode", ["exact", "on_update"])
def test_an_agreed_error_leaves_everything_as_it_was(bad: str, mode: str) -> None:
    kind, frames = BAD_ROUNDS[bad]
    root, twin = Root(2, settings(6, mode=mode)), Root(2, settings(6, mode=mode))
    for each in (root, twin):
        for step in (1, 4):
            before = each.round(step, step, events=(update(1, step),)).state

    failed = root.send(frames(root))

    failure(failed, kind)
    assert failed.state == before
    assert root.entries == ()
    after, undisturbed = [
        [each.round(s, s, call=s, window=window(b=float(s))) for s in (5, 6, 7, 12, 13, 20)] for each in (root, twin)
    ]
    assert [unnumbered(d) for d in after] == [unnumbered(d) for d in undisturbed]
    assert any(d.entry for d in after)


def test_an_error_names_the_rank_the_call_and_what_it_was() -> None:
    root = Root(3)

    fault = Failure("bad_type", "log step must be an int, given 'x'", call=41)
    told = failure(root.round(1, None, 1, each={1: {"fault": fault}}), "bad_type")

    assert (told.ranks, told.call) == ((1,), 41)
    assert told.text == "rank 1, call 41: log step must be an int, given 'x'"


def test_a_fault_of_an_unknown_kind_is_still_an_error_of_a_value() -> None:
    failure(Root().round(1, fault=Failure("config_mismatch", "no")), "bad_value")


@pytest.mark.parametrize("step", [1.5, 2.0])
def test_a_step_that_does_not_fit_the_frequency_type_is_a_protocol_error(step: float) -> None:
    assert failure(Root(2).round(1, step), "protocol").ranks == (1,)
    failure(Root(2).round(step, step), "protocol")


@pytest.mark.parametrize("event", [Event(1, "frequency", 0), Event(1, "frequency", 0.5), Event(1, "update", 0.5)])
def test_an_event_that_no_rank_could_have_made_is_a_protocol_error(event: Event) -> None:
    assert failure(Root(2).round(1, 1, each={1: {"events": (event,)}}), "protocol").ranks == (1,)


def test_an_exception_in_the_coordinator_reaches_the_ranks_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    root, twin = Root(), Root()
    with monkeypatch.context() as patch:
        patch.setattr(Partials, "reduce", lambda *_: 1 // 0)
        told = failure(root.round(0, window=window(a=1.0)), "coordinator_failed")

    assert "round 1: ZeroDivisionError: " in told.text
    root.previous = [None]
    assert unnumbered(root.round(3, call=1)) == unnumbered(twin.round(3, call=1))


def test_a_reply_that_is_too_large_is_an_agreed_error_and_the_next_round_works() -> None:
    keys = [KeySpec(f"{n:05}".rjust(250, "x"), spread=True) for n in range(13_000)]
    huge = Window(encode(keys), pack_values([1.0] * (2 * len(keys))))
    root = Root()

    told = failure(root.round(0, window=huge), "frame_too_large")

    assert str(MAX_FRAME) in told.text
    assert one(root.round(1, window=window(a=1.0))).seq == 0


def test_different_settings_are_refused_in_the_first_round() -> None:
    coordinator = Coordinator(settings(10), 2, run="run", run_dir="x")
    hellos = [encode_hello(Hello(r, 2, "1", settings(10 + r))) for r in range(2)]

    reply, entries = coordinator.handle(hellos)

    told = failure(decode_decision(reply), "config_mismatch")
    assert told.ranks == (1,)
    assert entries == ()


# A call too many or too few


@pytest.mark.parametrize("frequency_type", ["step", "batch"])
def test_a_skipped_call_is_named_on_all_ranks_and_the_round_after_works(frequency_type: str) -> None:
    root = Root(3, settings(10, frequency_type=frequency_type))
    root.round(450, 450, 450)

    told = failure(root.round(515, 515, 514, each={2: {"call": 64}}), "round_mismatch")

    assert (told.ranks, told.call, told.step) == ((2,), 64, 514)
    assert "rank 2 is at step 514 while rank 0 is at step 515" in told.text
    assert "step 450" in told.text
    again = root.round(516, 516, 515, window=window(a=1.0))
    assert (again.log_ready, one(again).step, one(again).metrics) == (True, 516, {"a": 1.0})


def test_a_skipped_call_is_noticed_before_anything_is_merged() -> None:
    root = Root(2)
    root.round(0, 0)

    failed = root.round(10, 11, window=window(a=1.0))

    failure(failed, "round_mismatch")
    assert failed.state.last_log_step == 0
    assert root.entries == ()


def test_ranks_whose_steps_always_lie_apart_are_no_mismatch() -> None:
    root = Root(3)

    for step in range(0, 40, 3):
        assert root.round(step, step + 100, step + 7).failure is None


def test_a_jump_that_all_ranks_make_is_no_mismatch() -> None:
    root = Root(2)

    for step in (0, 1, 500, 20, None, 21):
        assert root.round(step, step).failure is None


def test_epoch_fractions_may_differ_freely() -> None:
    root = Root(2, settings(0.5, frequency_type="epoch"))

    for call in range(1, 300):
        assert root.round(call / 100, call / 101).failure is None


def test_skipped_calls_of_several_ranks_are_all_named() -> None:
    root = Root(5)
    root.round(*[3] * 5)

    assert failure(root.round(9, 8, 9, 8, 9), "round_mismatch").ranks == (1, 3)


def test_a_write_where_others_decide_is_a_mismatch_that_names_the_few() -> None:
    root = Root(4)

    told = failure(root.round(5, 5, 5, 5, each={2: {"kind": "write"}}), "round_mismatch")

    assert told.ranks == (2,)
    assert "rank 2 called write()" in told.text
    assert "rank 0 called log_ready()" in told.text


# Settings


def said(*values: tuple[int, Step]) -> dict[str, Any]:
    return {"events": tuple(Event(call, "frequency", value) for call, value in values)}


@pytest.mark.parametrize(
    ("each", "taken", "conflict"),
    [
        ({0: said((2, 3))}, 3, False),
        ({2: said((2, 3))}, 3, False),
        ({0: said((2, None))}, None, False),
        ({0: said((2, 3)), 1: said((2, 4))}, 3, True),  # at the same call the lower rank's
        ({1: said((2, 3)), 2: said((2, 4))}, 3, True),
        ({1: said((2, 3)), 2: said((2, 3))}, 3, False),
        ({0: said((2, 3)), 1: said((3, 4))}, 4, False),  # a later call's
        ({0: said((3, 3)), 1: said((2, 4))}, 3, False),
        ({0: said((2, 3), (4, 5)), 2: said((3, 4))}, 5, False),
    ],
)
def test_a_setting_of_the_latest_call_counts_and_of_two_the_lower_ranks(
    each: dict[int, dict[str, Any]], taken: Step, *, conflict: bool
) -> None:
    root = Root(3)
    root.round(0, 0, 0)

    decision = root.round(1, 1, 1, each=each)

    assert decision.state.log_frequency == taken
    assert decision.state.configured == 10
    assert len(decision.notices) == conflict
    if conflict:
        low, high = each
        assert f"log_frequency was set to 3 on rank {low} and to 4 on rank {high} at call 2" in decision.notices[0]
    assert root.round(3, 3, 3).log_ready is (taken == 3)


def test_a_new_frequency_counts_for_the_decision_of_its_own_round() -> None:
    root = Root()
    root.round(0)

    assert root.round(4, **said((2, 4))).log_ready


# Updates


@pytest.mark.parametrize(
    ("each", "last", "updated"),
    [
        ({0: [update(3, 5)]}, 5, True),
        ({1: [update(3, 5)]}, 5, True),  # of every rank
        ({0: [update(3, 5)], 1: [update(2, 7)]}, 7, True),  # the largest
        ({0: [update(3, None)], 1: [update(2, 7)]}, None, False),  # a reset beats earlier calls
        ({0: [update(3, None)], 1: [update(3, 7)]}, 7, True),  # an update beats a reset of its own call
        ({0: [update(3, 7)], 1: [update(3, None)]}, 7, True),
        ({0: [update(4, 7)], 1: [update(3, None)]}, 7, True),
        ({0: [update(1, 9), update(2, None), update(3, 4)]}, 4, True),  # the largest since the last reset
        ({0: [update(1, 9), update(3, None)], 1: [update(2, 8), update(4, 2)]}, 2, True),
        ({0: [update(2, None)], 1: [update(3, None)]}, None, False),
    ],
)
def test_the_last_update_is_the_largest_since_the_last_reset(
    each: dict[int, list[Event]], last: Step, *, updated: bool
) -> None:
    root = Root(2)
    root.round(0, 0)

    state = root.round(1, 1, each={rank: {"events": tuple(events)} for rank, events in each.items()}).state

    assert (state.last_model_update_step, state.updated_since_log) == (last, updated)


def test_an_update_does_not_go_back_from_one_round_to_the_next() -> None:
    root = Root()

    lasts = [root.round(0, events=(update(1, step),)).state.last_model_update_step for step in (5, 3, None, 3, 4)]

    assert lasts == [5, 5, None, 3, 4]


def test_on_update_an_update_of_any_rank_makes_the_due_log_ready() -> None:
    root = Root(2, settings(10, mode="on_update"))
    root.round(0, 0, each={1: {"events": (update(1, 0),)}})  # before the log of step 0

    answers = [
        root.round(10, 10).log_ready,
        root.round(11, 11, each={1: {"events": (update(3, 2),)}}).log_ready,
        root.round(22, 22).log_ready,
    ]

    assert answers == [False, True, False]


def test_waiting_for_an_update_is_told_once_after_100_rounds() -> None:
    root = Root(1, settings(10, mode="on_update"))
    root.round(0)
    told = [step for step in range(1, 400) if root.round(step).notices]
    assert told == [109]

    assert root.round(400, events=(update(401, 400),)).log_ready
    assert [step for step in range(401, 600) if root.round(step).notices] == [509]


# A log marked by hand


def test_log_written_of_another_step_moves_the_cadence() -> None:
    root = Root(2)
    root.round(0, 0)

    marked = root.round(5, 5, each={1: {"events": (Event(2, "written", 4),)}})

    assert marked.state.last_log_step == 4
    assert [root.round(step, step).log_ready for step in (10, 13, 14)] == [False, False, True]


def test_of_two_ranks_that_mark_a_log_at_one_call_the_lower_counts() -> None:
    for low, high in ((4, 2), (2, 4)):
        root = Root(3)
        root.round(0, 0, 0)
        marks = {1: {"events": (Event(2, "written", low),)}, 2: {"events": (Event(2, "written", high),)}}
        assert root.round(5, 5, 5, each=marks).state.last_log_step == low


def test_log_written_none_makes_the_next_decision_ready() -> None:
    root = Root()
    root.round(0)

    assert root.round(1, events=(Event(2, "written", None),)).log_ready


# Rollback


def test_a_step_behind_the_last_log_starts_counting_again_from_there_with_one_notice() -> None:
    root = Root(2)
    for step in (0, 20):
        root.round(step, step, events=(update(1, step),), rhythm=Rhythm(1, 1, 0, step))

    back = root.round(7, 7)
    onwards = [root.round(step, step) for step in (8, 16, 17)]

    assert (back.log_ready, back.lease) == (False, 0)
    assert (back.state.last_log_step, back.state.last_model_update_step, back.state.updated_since_log) == (
        7,
        None,
        False,
    )
    (notice,) = back.notices
    assert "behind the last log at step 20" in notice
    assert "again from step 7" in notice
    assert [d.log_ready for d in onwards] == [False, False, True]
    assert not any(d.notices for d in onwards)


def test_a_step_back_inside_a_lease_is_seen() -> None:
    root = Root()
    for step in (0, 20):
        root.round(step)

    decision = root.round(25, call=12, rhythm=Rhythm(1, 1, 0, 25, ((3, 16),)))  # at 16 in between, at call 3

    assert decision.state.last_log_step == 16
    assert len(decision.notices) == 1


@pytest.mark.parametrize(
    ("falls", "marked", "last"),
    [
        (((5, 16),), None, 16),
        (((5, 16), (7, 12)), None, 12),  # the furthest back
        (((5, 21),), None, 20),  # not behind the log
        (((5, 16),), (4, 18), 16),
        (((5, 16),), (6, 18), 18),  # marked later
        (((5, 16),), (6, 99), 25),  # ahead of where the step is at the round's call
        (((5, 16),), (6, None), None),
    ],
)
def test_steps_back_and_marks_count_in_the_order_of_their_calls(
    falls: tuple[tuple[int, int], ...], marked: tuple[int, Step] | None, last: Step
) -> None:
    root = Root(1, settings(1000))
    root.round(20, call=2)
    events = () if marked is None else (Event(marked[0], "written", marked[1]),)

    decision = root.round(25, call=9, rhythm=Rhythm(1, 1, 0, 25, falls), events=events, kind="decision")

    assert decision.state.last_log_step == (25 if decision.log_ready else last)
    assert decision.log_ready is (last is None)


def test_a_step_back_that_stays_after_the_last_log_is_nothing() -> None:
    root = Root()
    for step in (0, 20, 28):
        root.round(step)

    for step in (21, 20):
        decision = root.round(step)
        assert (decision.state.last_log_step, decision.notices) == (20, ())


def test_a_follower_behind_the_last_log_is_nothing() -> None:
    root = Root(2, settings(10, frequency_type="epoch"))

    for step in (0, 20, 28):
        assert root.round(step, step / 4).notices == ()


# Leases


def test_a_lease_ends_at_the_call_before_the_next_log() -> None:
    root = Root()

    leases = {step: root.round(step).lease for step in (0, 1, 2, 9, 10, 20, 23)}

    assert leases == {0: 0, 1: 8, 2: 7, 9: 0, 10: 1, 20: 0, 23: 0}


def test_the_longest_lease_is_the_one_that_was_set() -> None:
    for frequency, longest in ((1_000_000, 7), (None, 7), (1_000_000, 0)):
        root = Root(1, settings(frequency, max_lease=longest))
        root.round(0)
        assert root.round(1).lease == longest


def test_after_a_write_the_lease_counts_from_the_last_call_to_the_step_that_was_written() -> None:
    root = Root()
    for step in (0, 1):
        root.round(step)

    decision = root.round(4, kind="write", rhythm=Rhythm(1, 1, 0, 5))

    assert decision.lease == 8  # 14 is due, 5 was the last: 6 to 13


@pytest.mark.parametrize("kind", ["decision", "write"])
def test_with_an_old_update_on_change_looks_at_the_smallest_step_of_any_rank(kind: str) -> None:
    root = Root(2, settings(10, mode="on_change", frequency_type="epoch"))

    def at(*steps: int, kind: str = "decision", **fields: Any) -> Decision:
        rhythms = {rank: {"rhythm": Rhythm(1, 1, 0, step)} for rank, step in enumerate(steps)}
        return root.round(*(steps if kind == "decision" else (22, 22)), each=rhythms, kind=kind, **fields)

    at(0, 0, events=(update(1, 0),))
    assert at(20, 20).log_ready  # the update is older than the last log now

    # An update of rank 1 at its step 25 would make a log due when rank 0 is at 35.
    assert at(30, 25, kind=kind).lease == 4


# Who counts


def test_the_lowest_rank_that_has_not_closed_counts() -> None:
    root = Root(3)
    root.round(0, 0, 0)
    root.round(1, 1, 1)

    closed = {"kind": "closed", "call": 2}
    first = root.round(1, 9, 9, each={0: closed})
    ready = root.round(1, 10, 10, each={0: {**closed, "window": window(a=1.0)}, 1: {"window": window(a=4.0)}})
    later = root.round(1, 10, 20, each={0: closed, 1: closed})

    assert (first.log_ready, first.lease, first.finished) == (False, 0, False)
    assert (ready.log_ready, one(ready).step, one(ready).metrics) == (True, 10, {"a": 2.5})
    assert (later.log_ready, one(later).step, later.finished) == (True, 20, False)


def test_a_change_of_the_counting_rank_empties_the_rhythm() -> None:
    root = Root(2, settings(100))
    for step in (0, 1, 2):
        root.round(step, step)

    still = Rhythm(None, None, 3, 2)
    decision = root.round(2, 2, each={0: {"kind": "closed"}, 1: {"rhythm": still}})

    assert decision.lease == 0


def test_a_change_of_the_counting_rank_empties_the_rhythm_even_if_its_round_fails() -> None:
    root = Root(2, settings(100))
    for step in (0, 1, 2):
        root.round(step, step)
    still: dict[int, dict[str, Any]] = {0: {"kind": "closed"}, 1: {"rhythm": Rhythm(None, None, 3, 2)}}
    sums = Window(encode([KeySpec("a", "sum", "sum")]), pack_values([1.0, 1.0]))
    failed = root.round(2, 2, each={0: still[0], 1: {"kind": "write", "window": sums}}, window=window(a=1.0))
    failure(failed, "reduction_mismatch")

    assert root.round(2, 2, each=still).lease == 0


def test_the_last_round_writes_what_is_open() -> None:
    root = Root(2)
    root.round(0, 0)

    last = root.round(7, 7, kind="closed", each={1: {"window": window(a=3.0)}})

    assert last.finished
    assert (one(last).step, one(last).metrics, one(last).ranks) == (7, {"a": 3.0}, {"a": 1})
    assert root.entries == (one(last),)


def test_the_last_entry_has_the_step_and_the_calls_of_the_rank_that_was_last_in_the_run() -> None:
    root = Root(2)
    early = {"kind": "closed", "call": 1}
    root.round(0, 0)
    root.round(0, 13, each={0: early, 1: {"call": 14}})

    last = one(root.round(0, 17, kind="closed", each={0: early, 1: {"call": 18, "window": window(a=1.0)}}))

    assert (last.step, last.calls) == (17, 4)


def test_the_last_round_writes_no_empty_entry() -> None:
    root = Root(2)
    root.round(0, 0)

    last = root.round(7, 7, kind="closed")

    assert (last.finished, last.entry) == (True, None)


def test_the_last_entry_does_not_step_back_behind_a_write() -> None:
    root = Root()
    root.round(8)
    root.round(20, kind="write")

    assert one(root.round(8, kind="closed", window=window(a=1.0))).step == 20


def test_a_last_round_that_fails_is_still_the_last() -> None:
    sums = Window(encode([KeySpec("a", "sum", "sum")]), pack_values([1.0, 1.0]))
    last = Root(2).round(7, 7, kind="closed", window=window(a=1.0), each={1: {"window": sums}})

    failure(last, "reduction_mismatch")
    assert last.finished


# Loading a state


def test_a_state_that_all_ranks_loaded_is_taken_over_before_the_decision() -> None:
    root = Root(2)
    for step in (0, 1, 2):
        root.round(step, step)
    state = state_at(50, last_model_update_step=44, updated_since_log=True, attempt=3)

    decision = root.round(51, 51, restore=encode(state))

    assert (decision.log_ready, decision.lease) == (False, 0)
    assert decision.state == msgspec.structs.replace(state, attempt=4, run_id="run")
    assert root.round(60, 60).log_ready
    assert one(root.round(70, 70)).attempt == 4


def test_a_state_moves_the_files_unless_the_user_chose_where() -> None:
    for chosen, run_dir in ((False, "runs/before"), (True, "runs/here")):
        root = Root(keep_run_dir=chosen)
        assert root.round(51, restore=encode(state_at(50))).state.run_dir == run_dir


def test_a_start_that_the_launcher_counts_higher_keeps_its_number() -> None:
    assert Root(attempt=7).round(51, restore=encode(state_at(50, attempt=3))).state.attempt == 7


def test_a_frequency_that_was_changed_in_the_run_is_kept_unless_connect_asks_for_a_new_one() -> None:
    state = encode(state_at(50, log_frequency=25, configured=10))

    assert Root(1, settings(10)).round(51, restore=state).state.log_frequency == 25
    assert Root(1, settings(5)).round(51, restore=state).state.log_frequency == 5


@pytest.mark.parametrize(
    ("loaded", "named"),
    [
        ({0: 50}, (1, 2)),
        ({2: 50}, (0, 1)),
        ({0: 50, 1: 50, 2: 60}, (2,)),
    ],
)
def test_a_state_that_only_some_ranks_loaded_or_another_one_is_a_mismatch_that_names_them(
    loaded: dict[int, int], named: tuple[int, ...]
) -> None:
    root = Root(3)

    told = failure(
        root.round(51, 51, 51, each={r: {"restore": encode(state_at(s))} for r, s in loaded.items()}),
        "state_mismatch",
    )

    assert told.ranks == named
    assert "load_state_dict()" in told.text
    assert root.round(51, 51, 51, restore=encode(state_at(50))).state.next_seq == 5  # once all have it, it works


def test_a_rank_that_closed_need_not_load() -> None:
    root = Root(2)

    assert root.round(51, 51, each={0: {"kind": "closed"}, 1: {"restore": encode(state_at(50))}}).failure is None


@pytest.mark.parametrize(("missed", "partial"), [(0, False), (1, True), (4, True)])
def test_the_first_entry_after_a_load_is_partial_if_calls_are_missing(missed: int, *, partial: bool) -> None:
    root = Root()
    root.round(51, call=1, restore=encode(state_at(50, missed=missed)))

    first, second = one(root.round(60, call=10)), one(root.round(70, call=20))

    assert (first.seq, first.calls, first.partial) == (5, 10, partial)
    assert (second.calls, second.partial) == (10, False)


def test_a_load_in_mid_run_counts_calls_from_the_load() -> None:
    root = Root()
    for step in (0, 1, 2):
        root.round(step)

    root.round(51, call=44, restore=encode(state_at(50, missed=4)), restored_at=43)

    assert one(root.round(60, call=53)).calls == 10


def test_a_state_loaded_right_before_the_last_round_is_taken_over() -> None:
    last = Root(2).round(51, 51, kind="closed", call=0, restore=encode(state_at(50)), window=window(a=1.0))

    assert one(last).seq == 5
    assert last.state.run_dir == "runs/before"


def test_steps_are_not_compared_over_a_load() -> None:
    root = Root(2)
    root.round(5, 6)

    assert root.round(51, 51, restore=encode(state_at(50))).failure is None
    failure(root.round(52, 53), "round_mismatch")


# What is left when the others cannot be asked


def test_a_leftover_is_a_partial_entry_of_one_rank() -> None:
    root = Root(3)
    root.round(0, 0, 0)

    entry = root.coordinator.leftover(0, window(a=2.0), 7, 8, 99.0)

    assert entry is not None
    assert (entry.seq, entry.step, entry.time, entry.calls, entry.partial) == (1, 7, 99.0, 7, True)
    assert (entry.metrics, entry.ranks) == ({"a": 2.0}, {"a": 1})
    assert root.coordinator.leftover(0, Window(), 7, 8, 99.0) is None
