"""What sinks for other programs' trackers share: their packages, whole-numbered steps, resumes, hyperparameters."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from logsync.coordinator.errors import ConfigError, Step
from logsync.coordinator.messages import LogEntry

__all__ = ["Axis", "LastLogged", "flat", "require"]

_FRACTION = 1_000_000
_FARTHEST = 2**63 - 1


def require(package: str, extra: str) -> None:
    """Raise `ConfigError` if `package` is not installed; it is looked for, not imported."""
    found = importlib.util.find_spec(package)
    # A folder of that name, such as the ./wandb that W&B makes, is found too, as a package without a file.
    if found is None or found.origin is None:
        msg = f"the sink {extra!r} needs the package {package}, which is not installed: pip install 'logsync[{extra}]'"
        raise ConfigError(msg)


class Axis:
    """Steps as the whole numbers that TensorBoard and MLflow place points at.

    An int is itself. A fraction, that is an epoch, is counted in millionths, so that epoch 1.5 is 1,500,000 (shown as
    1.5M); once a fraction was seen, ints are too, because they are epochs then. An entry without a step is put where
    the one before it is, or, where none had a step so far, at its `seq`.
    """

    def __init__(self, *, fractions: bool = False, last: int | None = None) -> None:
        self.fractions = fractions
        self.last = last

    def place(self, seq: int, step: Step) -> int:
        """Return where the entry `seq` at `step` goes. Entries come in order."""
        if step is None:
            return seq if self.last is None else self.last
        self.fractions = self.fractions or isinstance(step, float)
        self.last = min(round(step * _FRACTION) if self.fractions else int(step), _FARTHEST)
        return self.last


class LastLogged(msgspec.Struct, frozen=True):
    """The newest entry that a tracker holds which cannot forget any, and where it stands on the axis."""

    seq: int
    step: Step = None
    fractions: bool = False

    def covers(self, entry: LogEntry) -> bool:
        """Say whether a resumed run has logged `entry` already, or its stretch of steps at another pace."""
        if self.step is None or entry.step is None or self.step == entry.step:
            return entry.seq <= self.seq
        return entry.step < self.step


class _Value(NamedTuple):
    name: str
    value: bool | int | float | str


def flat(values: Mapping[str, object]) -> dict[str, bool | int | float | str]:
    """Return hyperparameters as one level, nested names joined by "/", and what is no plain value as its text."""
    return dict(_flattened("", values))


def _flattened(prefix: str, values: Mapping[str, object]) -> Iterator[_Value]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(f"{name}/", value)
        else:
            yield _Value(name, value if isinstance(value, (bool, int, float, str)) else str(value))
