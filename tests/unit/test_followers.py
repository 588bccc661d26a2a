"""Windows of followers: merged into the next entry, once, and never at the ranks' cost."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import CoordinatorFailed, LogsyncError
from logsync.coordinator.followers import LATE, MOST_REMEMBERED, Followed, kept, remembered
from logsync.coordinator.memory import recall, remember
from logsync.coordinator.messages import KeySpec, LogEntry, Window, decode_decision, encode, error_of, pack_values
from support.lockstep import Lockstep, settings


def window(reduce: Any = "mean", **values: float) -> Window:
    keys = [KeySpec(name, reduce, reduce) for name in values]
    return Window(encode(keys), pack_values([number for value in values.values() for number in (value, 1.0)]))


def followed(number: Any = 0, follower: Any = "a", *, late: Any = False, **options: Any) -> Followed:
    return Followed(follower, number, 2, "rollout-3", window(**(options or {"reward": 1.0})), late)


class World(Lockstep):
    """Two ranks that log at every call."""

    def __init__(self) -> None:
        super().__init__(2, settings(1))
        self.step = 0

    def log(self, own: Window | None = None, **fields: Any) -> LogEntry:
        frames = [rank._frame("decision", self.step, window=own, **fields) for rank in self.ranks]
        reply, _ = self.coordinator.handle(frames, 1.0)
        decision = decode_decision(reply)
        self.step += 1
        for rank in self.ranks:
            with contextlib.suppress(LogsyncError):
                rank._accept(reply)
        if decision.failure is not None:
            raise error_of(decision.failure, decision.round)
        assert decision.entry is not None
        self.notices = decision.notices
        return decision.entry


@pytest.fixture
def world() -> World:
    return World()


def test_a_window_is_in_the_next_entry_and_in_no_other(world: World) -> None:
    world.log(window(loss=2.0))
    world.coordinator.follow([followed(reward=5.0)])

    entries = [world.log(window(loss=2.0)) for _ in range(2)]

    assert [entry.metrics for entry in entries] == [{"loss": 2.0, "reward": 5.0}, {"loss": 2.0}]
    assert entries[0].ranks == {"reward": 1}


def test_a_key_that_ranks_have_too_merges_with_theirs(world: World) -> None:
    world.coordinator.follow([followed(reduce="sum", made=5.0), followed(reduce="sum", follower="b", made=7.0)])

    assert world.log(window("sum", made=1.0)).metrics == {"made": 14.0}


def test_a_window_that_comes_again_is_merged_once_also_after_its_entry(world: World) -> None:
    once = followed(reduce="sum", made=5.0)
    world.coordinator.follow([once, once])
    world.coordinator.follow([once])
    first = world.log()
    world.coordinator.follow([once])

    assert first.metrics == {"made": 5.0}
    assert world.log().metrics == {}


def test_a_coordinator_that_takes_over_knows_which_windows_are_merged(world: World) -> None:
    world.coordinator.follow([followed()])
    world.log()

    heir = recall(remember(world.coordinator), settings(1), 2)
    heir.follow([followed(), followed(1, reward=3.0)])
    world.coordinator = heir

    assert world.log().metrics == {"reward": 3.0}


def test_late_windows_are_counted_in_the_entry_that_takes_them(world: World) -> None:
    world.coordinator.follow([followed(late=True), followed(follower="b", late=True), followed(follower="c")])

    assert world.log().metrics == {"reward": 1.0, LATE: 2.0}
    assert LATE not in world.log().metrics


def test_what_a_follower_reduces_otherwise_is_left_out_and_said_and_the_rest_is_merged(world: World) -> None:
    world.coordinator.follow([followed(reduce="sum", loss=5.0, other=1.0), followed(follower="b", reward=2.0)])

    assert world.log(window(loss=2.0)).metrics == {"loss": 2.0, "reward": 2.0}
    assert len(world.notices) == 1
    assert (
        "what follower rollout-3 recorded is left out: metric 'loss' is recorded with reduce='sum'" in world.notices[0]
    )


def test_a_name_that_spread_makes_of_a_ranks_key_costs_the_followers_windows_and_no_entry(world: World) -> None:
    spread = Window(encode([KeySpec("loss", spread=True)]), pack_values([2.0, 1.0]))
    world.coordinator.follow([Followed("a", 0, 2, "rollout-3", window(**{"loss/max": 1.0}))])

    entry = world.log(spread)

    assert entry.metrics == {"loss": 2.0, "loss/min": 2.0, "loss/max": 2.0, "loss/std": 0.0, "loss/argmax_rank": 0.0}
    assert "what followers recorded is left out: metric 'loss/max'" in world.notices[0]


def test_bytes_that_are_no_window_cost_no_entry(world: World) -> None:
    world.coordinator.follow([Followed("a", 0, 2, "rollout-3", Window(b"\xff\xff", b"123"))])

    assert world.log(window(loss=2.0)).metrics == {"loss": 2.0}
    assert "what follower rollout-3 recorded is left out" in world.notices[0]


def test_a_reply_that_followers_make_too_large_is_made_without_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logsync.coordinator.core.MAX_FRAME", 2000)
    world.coordinator.follow([followed(**{f"a metric with a long name {number}": 1.0 for number in range(100)})])

    assert world.log(window(loss=2.0)).metrics == {"loss": 2.0}
    assert world.notices == ("what followers recorded is left out: the reply would be too large",)
    assert world.log(window(loss=2.0)).metrics == {"loss": 2.0}


def test_a_round_that_fails_leaves_windows_for_the_next_entry(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.coordinator.follow([followed()])

    def fail(*_: object) -> None:
        msg = "the disk of the root"
        raise OSError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(Coordinator, "_entry", fail)
        with pytest.raises(CoordinatorFailed, match="the disk of the root"):
            world.log()

    assert world.log().metrics == {"reward": 1.0}


def test_what_waits_is_bounded_and_what_there_is_no_room_for_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    one = followed()
    monkeypatch.setattr("logsync.coordinator.followers.MOST_WAITING_BYTES", 2 * one.size)

    waiting, refused = kept((), [followed(number) for number in range(5)], {})

    assert [window.number for window in waiting] == [0, 1]
    assert [window.number for window in refused] == [2, 3, 4]


def test_of_too_many_followers_those_heard_of_last_are_remembered() -> None:
    many = [followed(3, follower=str(number)) for number in range(MOST_REMEMBERED)]
    merged = remembered({"0": 1, "old": 7}, many[1:])
    merged = remembered(merged, [followed(5, follower="0")])

    assert "old" not in remembered(merged, [followed(0, follower="new")])
    assert merged["0"] == 5
    assert len(merged) == MOST_REMEMBERED


def test_what_waits_is_so_many_windows_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logsync.coordinator.followers.MOST_WAITING", 3)

    waiting, refused = kept((followed(0),), [followed(number) for number in range(5)], {})

    assert [window.number for window in waiting] == [0, 1, 2]
    assert [window.number for window in refused] == [3, 4]


def test_of_however_many_followers_an_entry_has_windows_none_is_merged_again_after_a_recovery(world: World) -> None:
    many = [followed(reduce="sum", follower=str(number), made=1.0) for number in range(MOST_REMEMBERED + 50)]
    world.coordinator.follow(many)
    assert world.log().metrics == {"made": float(len(many))}

    world.coordinator = recall(remember(world.coordinator), world.coordinator._settings, 2)
    world.coordinator.follow(many)

    assert world.log().metrics == {}
