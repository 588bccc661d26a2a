"""Everything of Ray that is tested in the usual run: real worker processes on one Ray.

One file, since tests of several files may run in several processes, and each would start a Ray of its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from logsync.coordinator.errors import LogsyncError
from logsync.workers import connect
from logsync.workers.testing import SCENARIOS
from logsync.workers.transports.ray_actor import RayTransport
from support.ray_jobs import (
    check_file,
    keep_killing,
    kill_actor,
    kill_for_good,
    lines,
    start,
    train,
    wait_for_line,
)
from support.ray_ranks import (
    Followed,
    MortalSink,
    come_back,
    fail_on_rank_1,
    follow,
    follow_nobody,
    follow_slowly,
    follow_to_death,
    lead,
    lose_the_coordinator,
    refused,
    train_while,
    wait_alone,
)
from support.ray_world import RankProcess, RayWorld, run_on_this_ray
from support.same_schedule import follow_the_schedule
from support.torchrun import torchrun
from support.worlds import ThreadsWorld

pytestmark = pytest.mark.timeout(100)

SAME_EVERYWHERE = [
    "merged_values_are_those_of_all_ranks_together",
    "with_explicit_write_a_ready_step_stays_ready_until_it_is_written",
    "a_state_is_the_same_bytes_everywhere_and_continues_the_log",
]


# -- the transport's promise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_transport_keeps_its_promise(worlds: dict[int, RayWorld], name: str) -> None:
    SCENARIOS[name].check(worlds[3].run(name))


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.least_ranks == 1])
def test_the_transport_keeps_its_promise_for_one_rank(worlds: dict[int, RayWorld], name: str) -> None:
    SCENARIOS[name].check(worlds[1].run(name))


@pytest.mark.parametrize("name", SAME_EVERYWHERE)
def test_a_schedule_has_the_same_outcome_to_the_bit_as_among_threads(worlds: dict[int, RayWorld], name: str) -> None:
    assert worlds[3].run(name) == ThreadsWorld(3).run(name)


# Its own time, and who waited for whom, are each run's.
OWN = {"time", "waits"}


def test_a_schedule_logs_the_same_steps_and_values_alone_under_torchrun_and_on_ray(
    world: RayWorld, tmp_path: Path
) -> None:
    on_ray = start(world, follow_the_schedule, str(tmp_path / "ray"), "ray")
    script = Path(__file__).parents[1] / "support" / "same_schedule.py"
    torchrun(script, tmp_path / "torchrun", nproc=2, folder=tmp_path).assert_clean()
    logged = follow_the_schedule(0, 1, str(tmp_path / "local"), "local")
    assert ray.get(on_ray, timeout=60) == [logged, logged]

    found = {
        name: [{key: value for key, value in entry.items() if key not in OWN} for entry in lines(tmp_path / name)]
        for name in ("local", "torchrun", "ray")
    }
    assert [entry["step"] for entry in found["local"]] == [0, 7, 14, 21, 28, 35, 40, 45, 45, 50, 55, 59]
    assert found["torchrun"] == found["local"]
    assert found["ray"] == found["local"]


# -- ranks that come twice, come wrong, end, and come back -----------------------------------------------------


def wait_for(path: Path, tasks: list[Any]) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} does not come"
        ended = ray.wait(tasks, timeout=0.02)[0]
        assert not ended, ray.get(ended)


def test_who_comes_wrong_is_told_and_the_others_go_on(
    worlds: dict[int, RayWorld], world: RayWorld, tmp_path: Path
) -> None:
    gate = tmp_path / "stop"
    tasks = [rank.call.remote(train_while, "refusals", str(gate)) for rank in world.ranks]
    wait_for(tmp_path / "stop.begun", tasks)
    stranger = worlds[1].ranks[0]

    def told(rank: int, world_size: int) -> tuple[str, str]:
        found: tuple[str, str] = ray.get(stranger.call_as.remote(rank, world_size, refused, "refusals"), timeout=40)
        return found

    twice = told(1, 2)
    large = told(1, 3)
    outside = told(2, 2)
    gate.touch()
    sums = ray.get(tasks, timeout=40)

    assert twice[0] == "LaunchError", twice
    assert "rank 1 is taken: rank 1 on " in twice[1], twice
    assert "call " in twice[1], twice
    assert large == ("ConfigMismatch", "world_size is 2 in the log that runs, but 3 on rank 1")
    assert outside == ("LaunchError", "rank=2 does not name a rank of a world of world_size=2")
    assert sums[0] == sums[1] == [2.0] * len(sums[0])
    assert len(sums[0]) > 1


def test_different_settings_of_a_process_that_comes_back_are_refused(world: RayWorld) -> None:
    kind, text = ray.get(
        [rank.call.remote(lambda r, n: refused(r, n, "settings", timeout=20.0 + r)) for rank in world.ranks], timeout=40
    )[1]

    assert kind == "ConfigMismatch", text
    assert "timeout is 20.0 on rank 0, but rank 1: 21.0" in text


def test_a_worker_that_was_killed_comes_back_as_its_rank(
    worlds: dict[int, RayWorld], world: RayWorld, tmp_path: Path
) -> None:
    victim = RankProcess.remote(1, 2)
    survivor = world.ranks[0].call.remote(come_back, "again", str(tmp_path), 0, 30)
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(victim.call.remote(come_back, "again", str(tmp_path), 0, 30), timeout=40)
    heir = worlds[1].ranks[0]
    resumed = ray.get(heir.call_as.remote(1, 2, come_back, "again", str(tmp_path), 12, 30), timeout=40)
    logged = ray.get(survivor, timeout=40)

    assert logged == list(range(0, 30, 2))
    assert resumed == list(range(12, 30, 2))
    entries = lines(tmp_path)
    assert [entry["step"] for entry in entries] == [*range(0, 30, 2), 29]
    # Steps 11 and 12: the victim's went with it, and its heir began at 12.
    assert [entry["step"] for entry in entries if entry.get("partial")] == [12]
    assert [entry["one"] for entry in entries] == [2.0, *[4.0] * 5, 3.0, *[4.0] * 8, 2.0]


def test_a_worker_that_is_gone_is_named_with_its_place(world: RayWorld) -> None:
    victim = RankProcess.remote(1, 2)
    pid = ray.get(victim.pid.remote(), timeout=30)
    survivor = world.ranks[0].call.remote(wait_alone, "gone", 0.5)
    with contextlib.suppress(ray.exceptions.RayActorError):
        ray.get(victim.call.remote(wait_alone, "gone", 0.5), timeout=40)
    text, ranks, warned = ray.get(survivor, timeout=40)

    assert text.startswith("RoundTimeout: round 5 failed: it waited 2."), text
    assert ranks == ["1"]
    assert f"(pid {pid}, node " in text
    assert "was last heard of at call 4, step 3" in text
    assert warned, "nothing was said while it waited"
    assert "for rank 1: rank 1 on " in warned[0]
    assert len(warned) <= 4


def test_without_ray_init_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)

    assert refused(0, 1, "none")[0] == "LaunchError"
    assert "ray.init()" in refused(0, 1, "none")[1]


# -- the coordinator's actor is killed -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_log_is_whole_after_its_coordinator_was_killed_and_killed_for_good(world: RayWorld, tmp_path: Path) -> None:
    tasks = start(world, train, str(tmp_path), 60, 0.02, "killed")
    wait_for_line(tmp_path, 3, tasks)
    kill_actor("killed")
    wait_for_line(tmp_path, 7, tasks)
    kill_for_good("killed")

    check_file(tmp_path, ray.get(tasks, timeout=60), 60)


def test_a_log_is_whole_where_the_coordinator_dies_before_and_after_a_write(world: RayWorld, tmp_path: Path) -> None:
    sink = MortalSink(tmp_path, before=3, after=6)
    tasks = start(world, train, str(tmp_path), 40, 0.01, "mortal", 3, None, sink)

    check_file(tmp_path, ray.get(tasks, timeout=60), 40)
    assert sorted(path.name for path in tmp_path.glob("died-*")) == ["died-after", "died-before"]


@pytest.mark.slow
@pytest.mark.parametrize("on_failure", ["raise", "detach"])
def test_a_coordinator_that_does_not_come_back_is_an_error_that_says_what_was_tried_or_ends_the_log(
    world: RayWorld, tmp_path: Path, on_failure: str
) -> None:
    name = f"lost-{on_failure}"
    tasks = start(world, lose_the_coordinator, name, on_failure, str(tmp_path / "gate"))
    wait_for(tmp_path / "gate.begun", tasks)
    keep_killing(name, tasks)

    for rank, (raised, said, alone) in enumerate(ray.get(tasks, timeout=40)):
        text = said if on_failure == "detach" else raised
        assert f"the coordinator's actor gave rank {rank} no answer for " in text
        assert "(timeout 2 s); it was tried " in text
        assert "times, and last said: Actor" in text
        assert "ray list actors" in text
        if on_failure == "raise":
            assert raised.startswith("CoordinatorLost: ")
        else:
            assert (raised, alone) == ("", 5)
            assert f"rank {rank} has lost the others and trains on" in said


def test_rank_0_that_is_left_alone_goes_on_with_its_own_values_in_the_file_of_the_run(
    world: RayWorld, tmp_path: Path
) -> None:
    tasks = start(world, fail_on_rank_1, "left-alone", str(tmp_path))

    assert ray.get(tasks[0], timeout=40) == [True, True, True, False, False, False]
    with pytest.raises(OSError, match="its own code"):
        ray.get(tasks[1], timeout=40)
    entries = lines(tmp_path)
    assert [(entry["step"], entry["one"]) for entry in entries] == [(0, 2), (1, 2), (2, 2), (3, 1), (4, 1), (5, 1)]
    assert [bool(entry.get("partial")) for entry in entries] == [False] * 3 + [True] * 3


JOB_THAT_ENDS = """
import os
import ray
from logsync.workers import connect
from logsync.workers.transports.ray_actor import RayTransport

ray.init(log_to_driver=False, configure_logging=False)
transport = RayTransport(0, 1, detached=True)
log = connect(1, transport=transport, name="stays", sinks=[], run_dir="not-used", timeout=30.0)
assert log.log_ready(0)
print("logged", flush=True)
os._exit(0)  # without close(): the actor knows a rank that is gone
"""


def detached_log(rank: int, world_size: int, name: str) -> str:
    """Log once with a coordinator that outlives its job; return what went wrong."""
    try:
        transport = RayTransport(rank, world_size, detached=True)
        with connect(1, transport=transport, name=name, sinks=[], run_dir="not-used", timeout=30.0) as log:
            return "" if log.log_ready(0) else "log_ready() is False"
    except LogsyncError as error:
        return str(error)


@pytest.mark.slow
def test_a_detached_coordinator_of_a_job_that_is_gone_is_replaced(worlds: dict[int, RayWorld]) -> None:
    ran = run_on_this_ray(["-c", JOB_THAT_ENDS])
    assert ran.stdout == "logged\n", ran.stdout + ran.stderr
    before = ray.get_actor("stays", namespace="logsync")

    (said,) = ray.get(start(worlds[1], detached_log, "stays"), timeout=60)

    after = ray.get_actor("stays", namespace="logsync")
    ray.kill(after)
    assert not said
    assert after._actor_id != before._actor_id


# -- followers -------------------------------------------------------------------------------------------------


@pytest.fixture
def followers(worlds: dict[int, RayWorld]) -> list[Any]:
    """Three processes: a start costs more than all that these tests do."""
    return worlds[3].ranks


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """A file that ends the training of `lead`; it does so when the test is over, whatever became of it."""
    file = tmp_path / "stop"
    yield file
    file.touch()


def total(run_dir: Path, *names: str) -> float:
    return sum(float(entry.get(name, 0.0)) for entry in lines(run_dir) for name in names)


def test_followers_come_and_go_and_each_of_their_windows_is_in_one_entry(
    world: RayWorld, followers: list[Any], tmp_path: Path, gate: Path
) -> None:
    early = followers[0].call.remote(follow, "followed", "early", 6)  # there is no log yet
    leaders = start(world, lead, "followed", str(tmp_path), str(gate))
    wait_for_line(tmp_path, 2, leaders)
    # Two of one label, and then, in the place of one that has gone, one without a label.
    later = [
        followers[1].call.remote(follow, "followed", "two", 4),
        followers[2].call.remote(follow, "followed", "two", 8),
    ]
    seen: list[Followed] = [Followed(*found) for found in ray.get([early, *later], timeout=60)]
    seen.append(Followed(*ray.get(followers[1].call.remote(follow, "followed", None, 3), timeout=60)))
    gate.touch()
    made = sum(ray.get(leaders, timeout=60))

    early_one, two, another, plain = seen
    assert total(tmp_path, "early/made") == early_one.made
    assert total(tmp_path, "two/made") == two.made + another.made
    assert total(tmp_path, "made") == made + plain.made
    for follower in seen:
        # It calls far more often than there are logs, so it is told of each of them, once.
        assert follower.seqs == list(range(follower.seqs[0], follower.seqs[0] + len(follower.seqs)))
        # A call of the actor for each of them, one that is open when it goes, its last window, and those of an early
        # one that found no log to wait for.
        assert follower.stats.rounds <= len(follower.seqs) + 4, follower.stats
        assert follower.stats.calls > 2 * len(follower.seqs)


def test_a_follower_that_misses_logs_is_told_once_and_its_late_windows_are_counted(
    world: RayWorld, followers: list[Any], tmp_path: Path, gate: Path
) -> None:
    leaders = start(world, lead, "missed", str(tmp_path), str(gate))
    wait_for_line(tmp_path, 1, leaders)
    ready = ray.get(followers[0].call.remote(follow_slowly, "missed", str(tmp_path)), timeout=60)
    gate.touch()
    ray.get(leaders, timeout=60)

    assert ready == 2
    late = [entry["logsync/late_windows"] for entry in lines(tmp_path) if "logsync/late_windows" in entry]
    assert late
    assert set(late) == {1.0}
    assert total(tmp_path, "slow/reward") >= 2


def test_a_follower_that_is_killed_and_one_without_a_log_cost_nobody_anything(
    world: RayWorld, followers: list[Any], tmp_path: Path, gate: Path
) -> None:
    victim = RankProcess.remote(0, 1)
    killed = victim.call.remote(follow_to_death, "bereft")
    leaders = start(world, lead, "bereft", str(tmp_path), str(gate))
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(killed, timeout=40)
    wait_for_line(tmp_path, 1, leaders)
    written = len(lines(tmp_path))
    wait_for_line(tmp_path, written + 5, leaders)  # the ranks go on
    alone = ray.get(followers[0].call.remote(follow_nobody, "nobody"), timeout=40)
    gate.touch()

    assert alone == (0, 0.0)
    assert sum(ray.get(leaders, timeout=60)) == total(tmp_path, "made")


def test_windows_of_followers_are_merged_once_although_the_coordinator_is_killed(
    world: RayWorld, followers: list[Any], tmp_path: Path, gate: Path
) -> None:
    leaders = start(world, lead, "orphaned", str(tmp_path), str(gate))
    following = [follower.call.remote(follow, "orphaned", "f", 14) for follower in followers]
    wait_for_line(tmp_path, 5, leaders)
    kill_for_good("orphaned")
    seen = [Followed(*found) for found in ray.get(following, timeout=60)]
    gate.touch()
    made = sum(ray.get(leaders, timeout=60))

    assert total(tmp_path, "made") == made
    assert total(tmp_path, "f/made") == sum(follower.made for follower in seen)
    assert all(follower.seqs == sorted(set(follower.seqs)) for follower in seen)


@pytest.mark.slow
def test_two_learners_and_three_rollout_workers_share_one_log_file(
    worlds: dict[int, RayWorld],  # noqa: ARG001 - it runs on their Ray
    tmp_path: Path,
) -> None:
    script = Path(__file__).parents[2] / "scripts" / "ray_actors.py"
    ran = run_on_this_ray([str(script), "--episodes", "60", "--log-every", "10", "--run-dir", str(tmp_path)])

    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"the log is {tmp_path}/metrics.jsonl" in ran.stdout
    entries = lines(tmp_path)
    assert [entry["seq"] for entry in entries] == list(range(len(entries)))
    assert [entry["step"] for entry in entries[:9]] == list(range(1, 91, 10))
    assert all(0 < entry["learner/best_arm"] < 1 for entry in entries)
    for number in range(3):
        assert total(tmp_path, f"rollout-{number}/episodes") == 60
