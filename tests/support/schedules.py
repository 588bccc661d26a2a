"""Random schedules of calls and events, run against an oracle that is asked at every call."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from logsync.coordinator.frequency import FrequencyManager
from support.lockstep import Lockstep, settings

__all__ = ["Moment", "Schedule", "check_schedule", "random_schedule"]

Number = int | float | None


@dataclass
class Moment:
    """One call on every rank, and what ranks said since the call before.

    `said` has (rank, kind, value) in the order of events; kind is update, written or frequency.
    """

    steps: list[Number]
    said: list[tuple[int, str, Number]] = field(default_factory=list)
    check: bool = False
    write_after: bool = False


@dataclass
class Schedule:
    world_size: int
    mode: str
    frequency_type: str
    log_frequency: Number
    write: str
    max_lease: int
    moments: list[Moment]


class Oracle:
    """One FrequencyManager that is told everything at once and asked at every call.

    The rules of the README, written without leases, frames or compression.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.manager = FrequencyManager(schedule.log_frequency, schedule.mode, schedule.frequency_type)  # type: ignore[arg-type]

    def hear(self, moment: Moment, decided: Number, open_marks: set[int]) -> set[str]:  # noqa: C901 - a list of rules
        """Take in a moment's events and rank 0's step; return what brought a log nearer.

        `log_written` of the step that was `decided` last does nothing, but from ranks with `open_marks`: those that
        have marked another step since.
        """
        manager, nearer = self.manager, set()
        by_rank = []
        for event in sorted(moment.said, key=lambda event: event[0]):
            rank, kind, value = event
            if kind == "written":
                if value is not None and value == decided and rank not in open_marks:
                    continue
                open_marks.add(rank)
            by_rank.append(event)
        settings_said = [(rank, value) for rank, kind, value in by_rank if kind == "frequency"]
        if settings_said:
            lowest = settings_said[0][0]
            manager.log_frequency = [value for rank, value in settings_said if rank == lowest][-1]
            nearer.add("frequency")
        if any(kind == "update" and value is None for _, kind, value in by_rank):
            manager.model_updated(None)
            nearer.add("reset")
        writers = [rank for rank, kind, _ in by_rank if kind == "written"]
        for position, (rank, kind, value) in enumerate(by_rank):
            if kind == "written" and rank == min(writers):
                manager.log_written(value)
                nearer.add("written")
            if kind == "update" and value is not None:
                if any(r == rank and k == "update" and v is None for r, k, v in by_rank[position + 1 :]):
                    continue  # this rank took it back before anybody could hear of it
                last = manager.last_model_update_step
                manager.model_updated(value if last is None else max(last, value))
        step, last_log = moment.steps[0], manager.last_log_step
        if step is not None and last_log is not None and step < last_log:
            manager.log_written(step)
            manager.model_updated(None)
            nearer.add("rollback")
        return nearer

    def adopt(self, manager: FrequencyManager) -> None:
        """Go on from where the coordinator stands."""
        vars(self.manager).update(vars(manager))

    def standing(self) -> tuple[Any, ...]:
        manager = self.manager
        return (
            manager.log_frequency,
            manager.last_log_step,
            manager.last_model_update_step,
            manager.updated_since_log,
        )


class Pace:
    """The rhythm of the counting rank, kept as the definition says: over the calls of the last 8 rounds."""

    def __init__(self) -> None:
        self.rounds: deque[tuple[list[float], list[int]]] = deque(maxlen=8)
        self.open: tuple[list[float], list[int]] = ([], [])
        self.previous: Number = None
        self.since = 0
        self.rise: float | None = None
        self.gap = 1

    def step(self, step: Number) -> bool:
        """Take in a call; say whether it kept to the pace that the last reply was computed from."""
        kept = True
        if step is None or step == self.previous:
            self.since += 1
            return kept
        if self.previous is not None:
            gap, rise = self.since + 1, step - self.previous
            kept = gap >= self.gap and (rise <= 0 or (self.rise is not None and rise <= self.rise))
            self.open[1].append(gap)
            if rise > 0:
                self.open[0].append(rise)
        self.since, self.previous = 0, step
        return kept

    def round(self, *, forget: bool) -> None:
        self.rounds.append(self.open)
        self.open = ([], [])
        if forget:
            self.rounds.clear()
        rises = [rise for rises, _ in self.rounds for rise in rises]
        gaps = [gap for _, gaps in self.rounds for gap in gaps]
        self.rise, self.gap = max(rises, default=None), min(gaps, default=1)


def check_schedule(schedule: Schedule) -> Counter[str]:  # noqa: C901, PLR0915 - one walk with many things to look at
    """Run `schedule`; assert agreement, equivalence and lateness; return counts of what it exercised."""
    world = Lockstep(
        schedule.world_size,
        settings(
            schedule.log_frequency,
            mode=schedule.mode,
            frequency_type=schedule.frequency_type,
            write=schedule.write,
            max_lease=schedule.max_lease,
        ),
    )
    oracle, pace, facts = Oracle(schedule), Pace(), Counter[str]()
    excused: set[str] = set()
    open_marks: set[int] = set()
    late_for = 0
    for number, moment in enumerate(schedule.moments):
        where = _Where(number + 1, schedule)
        _tell(world, moment)
        nearer = oracle.hear(moment, world.ranks[0].state.last_log_step, open_marks)
        if not pace.step(moment.steps[0]):
            nearer.add("pace")
        if moment.steps[0] is None:
            nearer.add("none")
        oldest = _least_of_round
        if any(kind == "update" and value is not None and value < oldest(world) for _, kind, value in moment.said):
            nearer.add("older update")
        answer, leased = world.call(moment.steps, check=moment.check)
        facts["decisions"] += 1
        excused |= nearer
        if leased:
            facts["leased"] += 1
            facts["updates in a lease"] += any(kind == "update" for _, kind, _ in moment.said)
            facts["settings in a lease"] += any(kind == "frequency" for _, kind, _ in moment.said)
            if oracle.manager.log_ready(moment.steps[0]):  # a check of updates counts in a round only
                assert excused, f"late without an excuse at {where}"
                late_for += 1
                assert late_for <= schedule.max_lease, where  # the round after the lease logs
                facts["late calls"] += 1
            continue
        open_marks.clear()
        facts["rounds"] += 1
        facts["exact rounds"] += not excused
        facts["rises over 1"] += pace.rise is not None and pace.rise > 1
        said = oracle.manager.log_ready(moment.steps[0], moment.check)
        if "written" in excused:  # how far behind a log marked in the same lease the step was is seen at the round
            assert said or not answer, where
        else:
            assert answer == said, where
        manager = world.coordinator.frequency_manager
        logged = answer and schedule.write == "auto"
        rolled_back = "rollback" in excused
        if logged:
            oracle.manager.log_written(moment.steps[0])
            facts["logs"] += 1
        pace.round(forget=rolled_back)
        if "written" in excused:
            oracle.adopt(manager)
        excused, late_for = set(), 0
        if moment.write_after or (answer and schedule.write == "explicit" and number % 3):
            world.write(moment.steps)
            oracle.manager.log_written(moment.steps[0])
            pace.round(forget=False)
            facts["writes"] += 1
        _assert_same_standing(oracle, manager, where)
        world.least = min((s for s in moment.steps if s is not None), default=math.inf)  # type: ignore[attr-defined]
    return facts


@dataclass
class _Where:
    """A place for messages, put into words only when one is needed."""

    call: int
    schedule: Schedule

    def __str__(self) -> str:
        return f"call {self.call} of {self.schedule}"


def _least_of_round(world: Lockstep) -> float:
    return getattr(world, "least", math.inf)


def _assert_same_standing(oracle: Oracle, manager: FrequencyManager, where: _Where) -> None:
    ours = (
        manager.log_frequency,
        manager.last_log_step,
        manager.last_model_update_step,
        manager.updated_since_log,
    )
    assert ours == oracle.standing(), f"the coordinator, then the oracle, after {where}"


def _tell(world: Lockstep, moment: Moment) -> None:
    for rank, kind, value in moment.said:
        speaker = world.ranks[rank]
        if kind == "update":
            speaker.model_updated(value)
        elif kind == "written":
            speaker.log_written(value)
        else:
            speaker.set_frequency(value)


def random_schedule(rng: random.Random, calls: int = 150) -> Schedule:
    """Draw a schedule: stretches of steady pace, with jumps, steps back and events strewn in."""
    world_size = rng.randint(1, 8)
    frequency_type = rng.choice(["step", "batch", "epoch"])
    whole = frequency_type != "epoch" or rng.random() < 0.2
    lengths = [100 + rng.randint(-3, 3) for _ in range(world_size)]
    offsets = [rng.choice([0, 0, 0, 7]) if r else 0 for r in range(world_size)]
    frequency: Number = rng.choice([1, 2, 5, 10, 25, 50]) if whole else rng.choice([0.05, 0.1, 0.25, 0.5, 1, 1 / 16])
    if rng.random() < 0.03:
        frequency = None
    eventful = rng.choice([0.0, 0.02, 0.02, 0.1])
    moments: list[Moment] = []
    position = 0
    while len(moments) < calls:
        rise, micro = rng.choice([1, 1, 1, 2, 3, 10]), rng.choice([1, 1, 1, 2, 4])
        if moments and rng.random() < 0.3:
            position = max(0, position + rng.choice([-40, -7, -1, 13, 60]))
        for _ in range(rng.randint(5, 60)):
            position += rise
            for _ in range(micro):
                steps: list[Number] = [
                    position + offsets[r] if whole else position / lengths[r] for r in range(world_size)
                ]
                moments.append(Moment(steps))
                if eventful and rng.random() < eventful:
                    _add_event(rng, moments[-1], whole=whole)
        if rng.random() < 0.02:
            moments[-1].steps = [None] * world_size
    return Schedule(
        world_size,
        rng.choice(["exact", "on_change", "on_update"]),
        frequency_type,
        frequency,
        rng.choice(["auto", "auto", "explicit"]),
        rng.choice([0, 3, 20, 1000, 1000, 1000]),
        _with_updates(rng, moments[:calls]),
    )


def _add_event(rng: random.Random, moment: Moment, *, whole: bool) -> None:
    rank = rng.randrange(len(moment.steps))
    step = moment.steps[rank]
    what = rng.choice(
        ["update", "update", "old update", "reset", "written", "forgotten", "frequency", "check", "write"]
    )
    if what == "update":
        moment.said.append((rank, "update", step))
    elif what == "old update":
        moment.said.append((rank, "update", 0 if step is None else max(step - (30 if whole else 0.3), 0)))
    elif what == "reset":
        moment.said.append((rank, "update", None))
    elif what == "written":
        moment.said.append((rank, "written", step))
    elif what == "forgotten":
        moment.said.append((rank, "written", None))
    elif what == "frequency":
        for _ in range(rng.choice([1, 1, 2])):
            value = rng.choice([1, 4, 20, None] if whole else [0.02, 0.2, 2, None])
            moment.said.append((rng.randrange(len(moment.steps)), "frequency", value))
    elif what == "check":
        moment.check = True
    else:
        moment.write_after = True


def _with_updates(rng: random.Random, moments: list[Moment]) -> list[Moment]:
    """In some schedules, let a rank report the model as updated at every step, or now and then."""
    every = rng.choice([0, 1, 1, 7, 40])
    rank = rng.randrange(len(moments[0].steps))
    for number, moment in enumerate(moments):
        if every and number % every == 0 and moment.steps[rank] is not None:
            moment.said.append((rank, "update", moment.steps[rank]))
    return moments
