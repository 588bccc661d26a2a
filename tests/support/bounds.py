"""What every field of every message may be, said a second time and without the library's own decoders."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

from logsync.coordinator.messages import (
    Decision,
    Event,
    Failure,
    Hello,
    KeySpec,
    LogEntry,
    NewEpoch,
    Reduction,
    Report,
    Rhythm,
    Settings,
    State,
    Waits,
    Window,
)
from logsync.workers.transports.notes import Note, Verdict

__all__ = ["INT64", "assert_within_bounds"]

Rule = Callable[[Any], bool]

INT64 = 2**63 - 1


def _int(value: object, least: int = 0, most: int = INT64) -> bool:
    return type(value) is int and least <= value <= most


def _call(value: object) -> bool:
    return _int(value, 0, 2**61)


def _count(value: object) -> bool:
    return _int(value, 0, 2**62)


def _rank(value: object) -> bool:
    return _int(value, 0, 2**20 - 1)


def _world(value: object) -> bool:
    return _int(value, 1, 2**20)


def _whole(value: object) -> bool:
    return _int(value, -INT64)


def _number(value: object) -> bool:
    return _int(value) or (type(value) is float and 0 <= value < math.inf)


def _float(value: object) -> bool:
    return type(value) is float


def _seconds(value: object) -> bool:
    return type(value) is float and 0 <= value <= 1e9


def _flag(value: object) -> bool:
    return type(value) is bool


def _maybe(rule: Rule) -> Rule:
    return lambda value: value is None or rule(value)


def _text(most: int, least: int = 0) -> Rule:
    return lambda value: type(value) is str and least <= len(value) <= most


def _blob(most: int) -> Rule:
    return lambda value: type(value) is bytes and len(value) <= most


def _one_of(*words: str) -> Rule:
    return lambda value: type(value) is str and value in words


def _many(rule: Rule, most: int) -> Rule:
    return lambda value: type(value) is tuple and len(value) <= most and all(map(rule, value))


def _by_metric(rule: Rule) -> Rule:
    name = _text(288, 1)
    return lambda value: (
        type(value) is dict and len(value) <= 2**20 and all(map(name, value)) and all(map(rule, value.values()))
    )


def _a(kind: type) -> Rule:
    def rule(value: object) -> bool:
        assert type(value) is kind
        assert_within_bounds(value)
        return True

    return rule


_step = _maybe(_number)
_folds = _one_of(*get_args(Reduction))
_unit = _one_of("epoch", "step", "batch")

BOUNDS: dict[type, dict[str, Rule]] = {
    LogEntry: {
        "seq": _int, "step": _step, "time": _float, "attempt": _int, "calls": _int, "world_size": _world,
        "metrics": _by_metric(_float), "ranks": _by_metric(_int), "nan_ranks": _by_metric(_many(_rank, 16)),
        "partial": _flag, "waits": _maybe(_a(Waits)),
    },
    Waits: {
        "slowest": _rank, "least_s": _seconds, "most_s": _seconds, "interval_s": _seconds, "host": _text(128),
        "lag": _number, "behind": _rank, "each_ms": _many(lambda value: _int(value, -1, 10**12), 4096),
    },
    KeySpec: {"name": _text(256, 1), "reduce": _folds, "across": _folds, "spread": _flag, "per_rank": _flag},
    Window: {"schema": _blob(2**24), "values": _blob(2**24)},
    Rhythm: {
        "rise": _step, "gap": _maybe(_int), "since": _int, "current": _step,
        "falls": _many(lambda fall: type(fall) is tuple and len(fall) == 2 and _int(fall[0]) and _number(fall[1]), 64),
    },
    Event: {"call": _int, "kind": _one_of("update", "written", "frequency"), "value": _step},
    Failure: {
        "kind": _text(32), "text": _text(4096), "ranks": _many(_rank, 64), "call": _maybe(_int), "step": _step,
    },
    State: {
        "log_frequency": _step, "configured": _step, "frequency_type": _unit, "last_log_step": _step,
        "last_model_update_step": _step, "updated_since_log": _flag, "next_seq": _count, "run_dir": _text(4096),
        "attempt": _count, "missed": _count, "run_id": _text(32), "entry": _maybe(_a(LogEntry)),
    },
    NewEpoch: {"call": _count, "missed": _count},
    Report: {
        "protocol": _int, "run": _text(32), "round": _int, "rank": _rank, "world_size": _world,
        "kind": _one_of("decision", "write", "ended", "closed"), "call": _call, "step": _step,
        "check_model_update": _flag, "rhythm": _a(Rhythm), "events": _many(_a(Event), 65_536),
        "window": _a(Window), "fault": _maybe(_a(Failure)),
        "restore": _blob(16_384), "waited_s": _maybe(_seconds), "host": _text(64), "restored_at": _call,
    },
    Decision: {
        "protocol": _int, "run": _text(32), "round": _int, "log_ready": _flag, "lease": _int, "state": _a(State),
        "entry": _maybe(_a(LogEntry)), "failure": _maybe(_a(Failure)), "finished": _flag,
        "notices": _many(_text(4096), 64), "new_epoch": _maybe(_a(NewEpoch)), "active": _many(_rank, 16),
    },
    Settings: {
        "name": _text(128, 1), "log_frequency": _step, "mode": _one_of("exact", "on_change", "on_update"),
        "frequency_type": _unit, "write": _one_of("auto", "explicit"), "max_lease": _int,
        "timeout": lambda value: type(value) is float and value > 0, "on_failure": _one_of("raise", "detach"),
    },
    Hello: {"rank": _rank, "world_size": _world, "version": _text(64), "settings": _a(Settings)},
    Note: {
        "doing": _one_of("idle", "waiting", "failed", "left"), "round": _whole, "beat": _whole, "call": _whole,
        "step": lambda value: value is None or _whole(value) or (type(value) is float and math.isfinite(value)),
        "host": _text(2000), "pid": _whole, "pid_space": _text(2000), "dead": _many(_whole, 4096),
        "text": _text(2000),
    },
    Verdict: {
        "round": _whole, "kind": _one_of("timeout", "lost", "failed"), "ranks": _many(_whole, 4096),
        "text": _text(2000),
    },
}  # fmt: skip


def assert_within_bounds(message: Any) -> None:
    """Assert that every field of a message is of its type and within its bounds."""
    if type(message) is tuple:  # a schema
        assert len(message) <= 65_536
        for spec in message:
            assert_within_bounds(spec)
        return
    bounds = BOUNDS[type(message)]
    assert set(bounds) == set(message.__struct_fields__)
    for field, rule in bounds.items():
        value = getattr(message, field)
        assert rule(value), f"{type(message).__name__}.{field} = {value!r:.200}"
