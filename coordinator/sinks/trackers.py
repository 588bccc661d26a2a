"""What sinks for other programs' trackers share: their packages, whole-numbered steps, resumes, hyperparameters."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from logsync.coordinator.errors import ConfigError, Step
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo

__all__ = ["Axis", "LastLogged", "Replay", "flat", "require"]

_logger = logging.getLogger(__name__)

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
    """The newest entry that a tracker holds, and whether it stands on an axis of fractions."""

    seq: int
    step: Step = None
    fractions: bool = False


class Replay:
    """Tells which entries of a resumed run its tracker, which cannot forget any, holds already.

    Those are the ones that the first attempt logged after the checkpoint, found again by their `seq`; and where the
    job resumes at another pace, so that numbers and steps no longer fit together, all of the steps it had covered.
    """

    def __init__(self, tracker: str, run: RunInfo, held: LastLogged | None) -> None:
        self._held: LastLogged | None = None
        if run.resumed and held is not None and held.seq >= run.next_seq:
            self._held = held
            _logger.info("%s holds entries up to seq %d of this run; they are not logged again", tracker, held.seq)

    def covers(self, entry: LogEntry) -> bool:
        """Say whether the tracker holds `entry`. Entries come in order, and once it lacks one it lacks the rest."""
        held = self._held
        if held is None:
            return False
        if (entry.seq, entry.step) == (held.seq, held.step):
            self._held = None
            return True
        if _reaches(held, entry):
            return True
        self._held = None
        return False


def _reaches(held: LastLogged, entry: LogEntry) -> bool:
    if held.step is None or entry.step is None:
        return held.seq >= entry.seq
    return held.step >= entry.step


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
