"""Two learners in lockstep and three rollout workers at paces of their own: Ray actors with one log between them.

    python scripts/ray_actors.py

The rollout workers pull the arms of a bandit by the policy of the day and hand what they got to the learners, which
improve the policy. Each process records what it knows. The learners are ranks 0 and 1: they decide together when to
log, and wait for each other only then. The rollout workers follow: they come and go as they like, nobody waits for
them, and what they recorded is in the next entry under their labels.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import time
from pathlib import Path
from typing import Any

import ray

from logsync.workers import connect

ARMS = 10
LEARNERS = 2
ROLLOUTS = 3
PULLS = 32  # in an episode
RATE = 0.02

Pulls = list[tuple[int, float]]


class Board:
    """Holds the policy, and passes episodes from the rollout workers on to the learners in turn."""

    def __init__(self) -> None:
        self._preferences = [0.0] * ARMS
        self._episodes: list[asyncio.Queue[Pulls | None]] = [asyncio.Queue() for _ in range(LEARNERS)]
        self._given = self._gone = 0

    async def policy(self) -> list[float]:
        """Return the probability of each arm."""
        weights = [math.exp(preference) for preference in self._preferences]
        return [weight / sum(weights) for weight in weights]

    async def give(self, episode: Pulls) -> None:
        self._episodes[self._given % LEARNERS].put_nowait(episode)
        self._given += 1

    async def leave(self) -> None:
        """Say that a rollout worker gives no more."""
        self._gone += 1
        if self._gone == ROLLOUTS:
            for queue in self._episodes:
                queue.put_nowait(None)

    async def take(self, learner: int) -> Pulls | None:
        """Return an episode, None when there will be no more."""
        return await self._episodes[learner].get()

    async def improve(self, gradient: list[float]) -> None:
        self._preferences = [p + RATE * g for p, g in zip(self._preferences, gradient, strict=True)]


def roll_out(number: int, episodes: int, log_every: int) -> None:
    board = ray.get_actor("board")
    chance = random.Random(number)  # noqa: S311 - no secret
    with connect(log_every, transport="ray", name="bandit", lockstep=False, label=f"rollout-{number}") as log:
        for _ in range(episodes):
            policy = ray.get(board.policy.remote())
            arms = chance.choices(range(ARMS), policy, k=PULLS)
            pulls = [(arm, chance.gauss(arm / ARMS, 1.0)) for arm in arms]  # the last arm is the best one
            ray.get(board.give.remote(pulls))

            log.record({"reward": sum(reward for _, reward in pulls) / PULLS}, weight=PULLS)
            log.record({"episodes": 1}, reduce="sum")
            log.log_ready()
            time.sleep(0.005 * (1 + number))  # some environments are slower than others
    ray.get(board.leave.remote())  # after the log: the learners' last entry has this worker's last episodes


def learn(learner: int, log_every: int, run_dir: str) -> None:
    board = ray.get_actor("board")
    baseline, step = 0.0, 0
    with connect(log_every, transport="ray", rank=learner, world_size=LEARNERS, name="bandit", run_dir=run_dir) as log:
        while (pulls := ray.get(board.take.remote(learner))) is not None:
            policy = ray.get(board.policy.remote())
            gradient = [0.0] * ARMS
            for arm, reward in pulls:
                for other in range(ARMS):
                    gradient[other] += (reward - baseline) * ((other == arm) - policy[other])
            baseline += 0.05 * (sum(reward for _, reward in pulls) / len(pulls) - baseline)
            ray.get(board.improve.remote(gradient))

            step += 1
            log.record({"learner/best_arm": policy[-1], "learner/baseline": baseline}, weight=len(pulls))
            if log.log_ready(step):
                log.annotate({"learner/rate": RATE})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--episodes", type=int, default=200, help="of each rollout worker")
    parser.add_argument("--log-every", type=int, default=20, help="steps of the learners")
    parser.add_argument("--run-dir", type=Path, help="folder for the log (default: a new one under runs/)")
    args = parser.parse_args()
    run_dir = str((args.run_dir or Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-bandit")).absolute())

    ray.init()
    remote: Any = ray.remote(num_cpus=0)
    board = remote(Board).options(name="board").remote()
    learners = [remote(learn).remote(learner, args.log_every, run_dir) for learner in range(LEARNERS)]
    ray.get(learners + [remote(roll_out).remote(n, args.episodes, args.log_every) for n in range(ROLLOUTS)])
    best = ray.get(board.policy.remote())[-1]
    print(f"the best arm is pulled {best:.0%} of the time; the log is {run_dir}/metrics.jsonl")


if __name__ == "__main__":
    main()
