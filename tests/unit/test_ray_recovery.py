"""Deaths of the coordinator's actor at the worst moments: without Ray, so that kills and losses are exact."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from logsync.coordinator.errors import FrameTooLarge, TransportError
from logsync.coordinator.messages import KeySpec, LogEntry, Window, encode, pack_values
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.jsonl import JsonlSink
from logsync.workers.transports import ray_member, ray_root, ray_run, ray_wire
from logsync.workers.transports.ray_wire import Ask, Exchange, Follow
from support.ray_rig import Cluster, RigTransport, side_by_side

pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def until(condition: Callable[[], object], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def following_of(cluster: Cluster) -> dict[str, int]:
    run = cluster.actor.server._current
    return {} if run is None else run._followers


# -- silence ---------------------------------------------------------------------------------------------------------


def test_ranks_of_which_nothing_was_heard_for_long_go_on_where_they_were(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_root, "_SILENCE_S", 1.0)
    transports = [RigTransport(cluster, rank, 2) for rank in range(2)]
    pause = threading.Barrier(2)

    def rank(number: int) -> int:
        this = transports[number]
        with this.log(sinks=["jsonl"], run_dir=tmp_path / "run", timeout=1800.0) as log:
            for step in range(8):
                log.record({"one": 1.0}, reduce="sum")
                log.log_ready(step)
                if step == 3:
                    pause.wait()
                    this.line.is_cut = True  # stopped, or behind a network that is away
                    actor = this.line.actor.server
                    for _, member in actor._sessions.values():
                        member.wake()  # their polls would keep them heard for 10 s
                    until(lambda actor=actor: not actor._sessions)  # type: ignore[misc]
                    pause.wait()
                    this.line.is_cut = False
            return log.stats.rounds

    assert side_by_side(lambda: rank(0), lambda: rank(1)) == [8, 8]
    found = lines(tmp_path / "run")
    assert [(line["seq"], line["step"], line["one"]) for line in found] == [(step, step, 2.0) for step in range(8)]


# -- the actor dies --------------------------------------------------------------------------------------------------


def test_an_entry_that_one_rank_alone_has_heard_of_is_written_also_where_rank_0_speaks_to_the_next_actor_first(
    cluster: Cluster, tmp_path: Path
) -> None:
    transports = [RigTransport(cluster, rank, 2) for rank in range(2)]
    old = cluster.actor
    dying = threading.Event()
    together = threading.Barrier(2)
    transports[0].line.loses = lambda ask: (
        dying.is_set() and transports[0].line.actor is old and isinstance(ask, Exchange)
    )

    def rank(number: int) -> int:
        with transports[number].log(sinks=["jsonl"], run_dir=tmp_path / "run") as log:
            for step in range(6):
                log.record({"one": 1.0}, reduce="sum")
                if step == 3:
                    together.wait()
                    if number == 0:
                        dying.set()
                        log.log_hyperparams({"late": 1})  # said by the log's thread as soon as there is an actor
                log.log_ready(step)
                if step == 3 and number == 1:
                    transports[1].line.is_cut = True
                    cluster.restart()
                    until(lambda: transports[0].line.actor is not old)
                    threading.Timer(1.0, lambda: setattr(transports[1].line, "is_cut", False)).start()
            assert log.last_entry is not None
            return log.last_entry.seq

    assert side_by_side(lambda: rank(0), lambda: rank(1)) == [5, 5]
    assert [(line["seq"], line["one"]) for line in lines(tmp_path / "run")] == [(seq, 2.0) for seq in range(6)]


class NeverOpens(JsonlSink):
    """A file on storage that does not answer the first time."""

    opened = 0

    def open(self, run: RunInfo) -> None:
        NeverOpens.opened += 1
        if NeverOpens.opened == 1:
            threading.Event().wait(60)  # its actor is killed meanwhile
        super().open(run)


def test_a_resumed_run_whose_actor_dies_before_the_file_is_cut_back_keeps_none_of_the_old_attempts_lines(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NeverOpens, "opened", 0)
    with RigTransport(cluster, 0, 1).log(sinks=["jsonl"], run_dir=tmp_path) as log:
        for step in range(10):
            log.record(v=float(step))
            log.log_ready(step)
            if step == 4:
                state = log.state_dict()
    cluster = Cluster()
    with RigTransport(cluster, 0, 1).log(sinks=[NeverOpens()], run_dir=tmp_path) as log:
        log.load_state_dict(state)
        for step in range(5, 10):
            log.record(v=100.0 + step)
            log.log_ready(step)
            if step == 5:
                until(lambda: NeverOpens.opened)
                cluster.restart()

    found = [(line["step"], line["attempt"], line["v"]) for line in lines(tmp_path)]
    assert found == [(s, 0, float(s)) for s in range(5)] + [(s, 1, 100.0 + s) for s in range(5, 10)]


def test_without_a_coordinator_a_detached_rank_0_writes_the_entries_that_were_not_known_to_be_written(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_member, "_OVERTIME_S", 0.2)
    monkeypatch.setattr(ray_member, "_GOODBYE_S", 0.2)
    transport = RigTransport(cluster, 0, 1)
    with transport.log(sinks=["jsonl"], run_dir=tmp_path, timeout=1.0, on_failure="detach") as log:
        for step in range(8):
            log.record(v=float(step))
            log.log_ready(step)
            if step == 3:
                cluster.actor.kill()

    assert [(line["seq"], line["v"]) for line in lines(tmp_path)][:4] == [(seq, float(seq)) for seq in range(4)]
    seqs = [line["seq"] for line in lines(tmp_path)]
    assert seqs == sorted(set(seqs))


class Down:
    """A destination that is away."""

    def open(self, run: RunInfo) -> None:  # noqa: ARG002 - a sink's
        msg = "the server is down"
        raise OSError(msg)

    def write(self, entry: LogEntry) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


def test_what_ranks_keep_for_the_next_actor_is_bounded_although_a_destination_is_away_for_long(
    cluster: Cluster, tmp_path: Path
) -> None:
    transport = RigTransport(cluster, 0, 1)
    with transport.log(sinks=["jsonl", Down()], run_dir=tmp_path) as log:
        for step in range(120):
            log.record(v=1.0)
            if log.log_ready(step):
                log.annotate({"note": float(step)})
            if step == 100:
                cluster.restart()
        assert len(transport.session._kept) <= 64
        assert len(transport.session._notes) <= 64

    assert [(line["seq"], line["note"]) for line in lines(tmp_path)] == [(seq, float(seq)) for seq in range(120)]


def test_a_frame_that_was_too_large_just_when_the_actor_died_is_an_error_for_both_ranks_or_neither(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_member, "MAX_FRAME", 20_000)
    transports = [RigTransport(cluster, rank, 2) for rank in range(2)]
    old = cluster.actor
    together = threading.Barrier(2)
    large = threading.Event()
    transports[0].line.loses = lambda ask: (
        large.is_set() and transports[0].line.actor is old and isinstance(ask, Exchange)
    )

    def rank(number: int) -> list[object]:
        found: list[object] = []
        with transports[number].log(timeout=10.0) as log:
            for step in range(6):
                together.wait()
                if step == 2:
                    large.set()
                    if number == 1:
                        log.record({f"m{name}" * 20: 1.0 for name in range(900)})
                log.record(a=1.0)
                try:
                    found.append(log.log_ready(step))
                except FrameTooLarge as error:
                    found.append(error.ranks)
                    if number == 1:
                        log._window.clear()
                if step == 2 and number == 1:
                    cluster.restart()
        return found

    both = side_by_side(lambda: rank(0), lambda: rank(1))

    assert both == [[True, True, (1,), True, True, True]] * 2


def test_a_coordinator_and_a_rank_that_are_lost_together_do_not_keep_the_other_in_close(cluster: Cluster) -> None:
    transports = [RigTransport(cluster, rank, 2) for rank in range(2)]
    together = threading.Barrier(2)

    def rank_0() -> None:
        log = transports[0].log(timeout=2.0, warn_after=1.0)
        log.log_ready(0)
        together.wait()
        log.close()

    def rank_1() -> None:
        log = transports[1].log(timeout=2.0)
        log.log_ready(0)
        together.wait()
        until(lambda: cluster.actor.server._current and cluster.actor.server._current._waiting)
        transports[1].line.is_cut = True  # its node is gone, and the actor's with it
        cluster.restart()

    error, _ = side_by_side(rank_0, rank_1)

    assert isinstance(error, TransportError), error
    assert 1 in error.ranks


def test_a_worker_that_comes_back_is_told_again_where_the_run_is_if_the_answer_was_lost(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[Ask] = []
    gone = threading.Event()

    def loses(ask: Ask) -> bool:
        if isinstance(ask, Exchange) and not lost:
            lost.append(ask)
            return True
        return False

    def rank_0() -> str:
        with RigTransport(cluster, 0, 2).log() as log:
            for step in range(8):
                log.log_ready(step)
        return "fine"

    def rank_1() -> str:
        monkeypatch.setattr(ray_member, "_PROCESS", "first")
        first = RigTransport(cluster, 1, 2)
        log = first.log()
        for step in range(3):
            log.log_ready(step)
        first.session._closed.set()  # killed: it asks nothing any more
        first.line.is_cut = True
        for _, member in cluster.actor.server._sessions.values():
            member.wake()
        gone.wait(0.5)
        monkeypatch.setattr(ray_member, "_PROCESS", "second")
        second = RigTransport(cluster, 1, 2)
        second.line.loses = loses
        with second.log() as log:
            for step in range(3, 8):
                log.log_ready(step)
        return "fine"

    assert side_by_side(rank_0, rank_1) == ["fine", "fine"]
    assert lost


@pytest.mark.parametrize("seed", range(2))
def test_whenever_actors_are_killed_every_value_is_in_one_line_and_every_line_is_there_once(
    cluster: Cluster, tmp_path: Path, seed: int
) -> None:
    dice = random.Random(seed)
    done = threading.Event()

    def rank(number: int) -> str:
        with RigTransport(cluster, number, 2).log(3, sinks=["jsonl"], run_dir=tmp_path / "run") as log:
            for step in range(150):
                log.record({"one": 1.0}, reduce="sum")
                if log.log_ready(step):
                    log.annotate({"note": float(step)})
                if step % 7 == 0:
                    time.sleep(0.01)  # a kill may come anywhere
        done.set()
        return "fine"

    def killer() -> int:
        kills = 0
        while kills < 4 and not done.wait(dice.uniform(0.005, 0.08)):
            cluster.restart()
            kills += 1
        return kills

    one, other, kills = side_by_side(lambda: rank(0), lambda: rank(1), killer)

    assert (one, other) == ("fine", "fine")
    assert isinstance(kills, int)
    assert kills >= 1
    found = lines(tmp_path / "run")
    assert [line["seq"] for line in found] == list(range(len(found)))
    assert sum(line["one"] for line in found) == 300
    assert all(line.get("note", line["step"]) == line["step"] for line in found)


# -- followers -------------------------------------------------------------------------------------------------------


def test_after_a_recovery_a_follower_that_missed_an_entry_does_not_ask_without_a_pause(cluster: Cluster) -> None:
    transport = RigTransport(cluster, 0, 1)
    log = transport.log(mode="on_update")
    follower = cluster.follower("f")
    following: Any = follower._following
    until(lambda: following_of(cluster))
    log.log_ready(0)
    until(lambda: following.has_news)
    log.model_updated(1)
    assert log.log_ready(1)  # an entry that the follower, which is busy, does not hear of
    for step in range(2, 6):
        log.log_ready(step)
    cluster.restart()
    log.log_ready(6)
    follower.record(a=1.0)
    follower.log_ready()
    until(lambda: following.asked > 1)
    asked = following.asked
    log.close()

    assert following.asked - asked < 20
    follower.close()


def test_a_label_as_long_as_it_may_be_reaches_the_coordinator(cluster: Cluster) -> None:
    label = "r" * 64
    with RigTransport(cluster, 0, 1).log() as log:
        follower = cluster.follower(label)
        until(lambda: following_of(cluster))
        log.log_ready(0)
        until(lambda: follower._following.has_news)
        follower.record(x=1.0)
        assert follower.log_ready()
        run = cluster.actor.server._current
        assert run is not None
        until(lambda: run._followed)
        log.log_ready(1)
        assert log.last_entry is not None
        assert log.last_entry.metrics == {f"{label}/x": 1.0}
        follower.close()


def test_windows_of_followers_that_wait_are_bounded_and_what_is_lost_is_said(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray_run, "MOST_WAITING", 3)
    window = Window(encode([KeySpec("made", "sum", "sum")]), pack_values([1.0, 1.0]))
    with RigTransport(cluster, 0, 1).log() as log:
        for number in range(6):
            asked = Follow(
                ray_wire.WIRE, f"session{number}", "a follower", "", 0, number, window, closing=True, job="job"
            )
            cluster.actor.ask(ray_wire.encode(asked)).result(20)
        log.log_ready(0)
        assert log.last_entry is not None
        assert log.last_entry.metrics == {"made": 3.0}
        assert len(following_of(cluster)) <= 3

    assert caplog.text.count("a window of follower a follower is lost: 3 wait for a round already") >= 3


def test_a_window_that_was_too_late_for_its_entry_is_in_the_next_although_the_actor_dies_between(
    cluster: Cluster,
) -> None:
    made: list[float] = []
    with RigTransport(cluster, 0, 1).log() as log:
        follower = cluster.follower("f")
        following: Any = follower._following
        until(lambda: following_of(cluster))
        log.log_ready(0)
        until(lambda: following.has_news)
        log.log_ready(1)  # while the follower is busy: what comes now is late
        follower.record({"made": 5.0}, reduce="sum")
        assert follower.log_ready()
        until(lambda: following.has_news)  # of the entry that it missed
        cluster.restart()
        follower.record({"made": 2.0}, reduce="sum")
        assert follower.log_ready()
        for step in range(2, 6):
            log.log_ready(step)
            assert log.last_entry is not None
            made.append(log.last_entry.metrics.get("f/made", 0.0))
            if step == 2:  # the next actor knows the run now
                until(lambda: following.asked >= 3 and (sum(made) or cluster.actor.server._current._followed))
        follower.close()

    assert sum(made) == 7.0
