"""The coordinator's actor is killed while ranks train: the log is whole all the same, and nobody hangs."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from support.ray_jobs import Kill, Trained, check_file, kill_actor, kill_for_good, kill_process, train
from support.ray_world import RankProcess, RayWorld

SEED = int(os.environ.get("LOGSYNC_FAULT_SEED", "0")) or random.randrange(1, 10**6)
KILLS = int(os.environ.get("LOGSYNC_RAY_KILLS", "20"))


def start(world: RayWorld, *arguments: Any) -> list[Any]:
    return [rank.call.remote(train, *arguments) for rank in world.ranks]


def ended(tasks: list[Any], timeout_s: float = 60.0) -> list[Trained]:
    found: list[Trained] = ray.get(tasks, timeout=timeout_s)
    return found


def wait_for_line(run_dir: Path, number: int, tasks: list[Any]) -> None:
    deadline = time.monotonic() + 30
    path = run_dir / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert time.monotonic() < deadline, "the log does not grow"
        ended_early = ray.wait(tasks, timeout=0.01)[0]
        assert not ended_early, ray.get(ended_early)


@pytest.mark.timeout(100)
@pytest.mark.parametrize("kill", [kill_actor, kill_process, kill_for_good])
def test_a_log_is_whole_after_the_coordinator_was_killed(
    ray_folder: Path, world: RayWorld, tmp_path: Path, kill: Kill
) -> None:
    name = kill.__name__
    tasks = start(world, str(tmp_path), 60, 0.02, name)
    wait_for_line(tmp_path, 3, tasks)
    kill(ray_folder, name)

    check_file(tmp_path, ended(tasks), 60)


@pytest.mark.slow
@pytest.mark.timeout(60 + 30 * KILLS)
def test_a_log_is_whole_after_many_kills_at_random_moments(ray_folder: Path, world: RayWorld, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    print(f"LOGSYNC_FAULT_SEED={SEED}")
    steps = 3000
    tasks = start(world, str(tmp_path), steps, 0.01, "chaos", 2)
    wait_for_line(tmp_path, 3, tasks)
    kills = 0
    while kills < KILLS and not ray.wait(tasks, timeout=chance.uniform(0.0, 2.0))[0]:
        kill = chance.choice([kill_actor, kill_process, kill_for_good])
        kill(ray_folder, "chaos")
        kills += 1
    print(f"killed the coordinator {kills} times")
    assert kills == KILLS, "training was over before; lower the pauses, or raise the steps"

    check_file(tmp_path, ended(tasks, 300), steps, 2)


@pytest.mark.timeout(100)
@pytest.mark.usefixtures("ray_folder")
def test_a_log_is_whole_where_requests_and_replies_are_lost(tmp_path: Path) -> None:
    # Of what a rank sends to any actor, so many are lost on their way, and as many answers on theirs.
    losses = {"num_failures": 3, "req_failure_prob": 20, "resp_failure_prob": 20}
    surroundings = {"RAY_testing_rpc_failure": json.dumps({"CoreWorkerService.grpc_client.PushTask": losses})}
    ranks = [RankProcess.options(runtime_env={"env_vars": surroundings}).remote(rank, 2) for rank in range(2)]
    found = ray.get([rank.call.remote(train, str(tmp_path), 60, 0.005, "losses") for rank in ranks], timeout=90)
    for rank in ranks:
        ray.kill(rank)

    check_file(tmp_path, [(logged, seen) for logged, seen in found], 60)
