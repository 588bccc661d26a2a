"""The coordinator's actor is killed again and again, and messages are lost: the log is whole all the same."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import ray

from support.ray_jobs import check_file, kill_actor, kill_for_good, kill_process, start, train, wait_for_line
from support.ray_world import RankProcess, RayWorld

SEED = int(os.environ.get("LOGSYNC_FAULT_SEED", "0")) or random.randrange(1, 10**6)
KILLS = int(os.environ.get("LOGSYNC_RAY_KILLS", "20"))

pytestmark = pytest.mark.slow


@pytest.mark.timeout(60 + 30 * KILLS)
def test_a_log_is_whole_after_many_kills_at_random_moments(world: RayWorld, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    print(f"LOGSYNC_FAULT_SEED={SEED}")
    steps = 3000
    tasks = start(world, train, str(tmp_path), steps, 0.01, "chaos", 2)
    wait_for_line(tmp_path, 3, tasks)
    kills = 0
    while kills < KILLS and not ray.wait(tasks, timeout=chance.uniform(0.0, 2.0))[0]:
        chance.choice([kill_actor, kill_process, kill_for_good])("chaos")
        kills += 1
    print(f"killed the coordinator {kills} times")
    assert kills == KILLS, "training was over before; lower the pauses, or raise the steps"

    check_file(tmp_path, ray.get(tasks, timeout=300), steps, 2)


@pytest.mark.timeout(100)
@pytest.mark.usefixtures("worlds")
def test_a_log_is_whole_where_requests_and_replies_are_lost(tmp_path: Path) -> None:
    # Of what a rank sends to any actor, so many are lost on their way, and as many answers on theirs.
    losses = {"num_failures": 3, "req_failure_prob": 20, "resp_failure_prob": 20}
    surroundings = {"RAY_testing_rpc_failure": json.dumps({"CoreWorkerService.grpc_client.PushTask": losses})}
    ranks = [RankProcess.options(runtime_env={"env_vars": surroundings}).remote(rank, 2) for rank in range(2)]
    found = ray.get([rank.call.remote(train, str(tmp_path), 60, 0.005, "losses") for rank in ranks], timeout=90)
    for rank in ranks:
        ray.kill(rank)

    check_file(tmp_path, [(logged, seen) for logged, seen in found], 60)
