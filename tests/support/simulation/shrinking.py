"""Makes a scenario that breaks a promise small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from support.simulation.jobs import fails
from support.simulation.parts import REAL, Parts
from support.simulation.scenarios import EVERYONE, Life, Op, Scenario

__all__ = ["shrink"]


def shrink(scenario: Scenario, parts: Parts = REAL, *, most_runs: int = 3000) -> Scenario:
    """Return a small scenario that breaks the same promise as `scenario`."""
    broken = fails(scenario, parts)
    assert broken is not None, "there is nothing to shrink"
    runs, smaller = 0, True
    while smaller:
        smaller = False
        for candidate in _simpler(scenario):
            runs += 1
            if runs > most_runs:
                return scenario
            found = fails(candidate, parts)
            if found is not None and found.rule == broken.rule:
                scenario, smaller = candidate, True
                break
    return scenario


def _simpler(scenario: Scenario) -> Iterator[Scenario]:
    lives, ops = scenario.lives, scenario.ops
    if len(lives) > 1:
        yield from (replace(scenario, lives=lives[:n] + lives[n + 1 :]) for n in range(len(lives)))
    length = len(ops)
    while length:
        for start in range(0, len(ops), length):
            yield _without_ops(scenario, start, min(start + length, len(ops)))
        length //= 2
    for number, life in enumerate(lives):
        for simpler in _simpler_lives(life):
            yield replace(scenario, lives=(*lives[:number], simpler, *lives[number + 1 :]))
    plain: dict[str, Any] = vars(Scenario((), ()))
    for name in ("jitter", "skew", "own_steps", "frequency_type", "mode", "write", "max_lease", "log_frequency"):
        if getattr(scenario, name) != plain[name]:
            yield replace(scenario, **{name: plain[name]})
    yield from (replace(scenario, ops=simpler) for simpler in _simpler_ops(ops))


def _simpler_ops(ops: tuple[Op, ...]) -> Iterator[tuple[Op, ...]]:
    for index, op in enumerate(ops):
        for plainer in (
            replace(op, records=0),
            replace(op, check=False),
            replace(op, rank=-1),
            replace(op, ranks=EVERYONE),
        ):
            if plainer != op and (op.kind == "call" or op.rank == plainer.rank):
                yield (*ops[:index], plainer, *ops[index + 1 :])


def _simpler_lives(life: Life) -> Iterator[Life]:
    for name in ("faults", "absences", "noise"):
        items = getattr(life, name)
        for index in range(len(items)):
            yield replace(life, **{name: items[:index] + items[index + 1 :]})
    if life.world_size > 1:
        yield from (_without_rank(life, rank) for rank in range(life.world_size))


def _without_rank(life: Life, gone: int) -> Life:
    def left(items: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(replace(i, rank=i.rank - (i.rank > gone)) for i in items if i.rank != gone)

    return Life(life.world_size - 1, left(life.faults), left(life.absences), left(life.noise))


def _without_ops(scenario: Scenario, start: int, end: int) -> Scenario:
    def moved(items: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(replace(i, op=i.op - max(0, min(end, i.op) - start)) for i in items)

    lives = tuple(replace(life, faults=moved(life.faults), absences=moved(life.absences)) for life in scenario.lives)
    return replace(scenario, ops=scenario.ops[:start] + scenario.ops[end:], lives=lives)
