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
_MOST_GAPS = 100


def require(package: str, extra: str) -> None:
    """Raise `ConfigError` if `package` is not installed here; it is looked for, not imported."""
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
    """The newest entry that a tracker holds, and what it lacks before that one.

    Attributes:
        seq, step: the newest entry's.
        fractions: whether it stands on an axis of fractions.
        top: the highest step that the tracker holds, if that is not `step`.
        gaps: the first and last `seq` of entries that the tracker never got; of many, the newest.
    """

    seq: int = -1
    step: Step = None
    fractions: bool = False
    top: Step = None
    gaps: tuple[tuple[int, int], ...] = ()

    @property
    def highest(self) -> Step:
        """The highest step that the tracker holds."""
        return self.step if self.top is None else self.top

    def lacks(self, seq: int) -> bool:
        """Say whether the tracker does not have the entry `seq`."""
        return seq > self.seq or any(first <= seq <= last for first, last in self.gaps)

    def and_then(self, seq: int, step: Step, *, fractions: bool = False) -> LastLogged:
        """Return what the tracker holds once it has this entry too."""
        newest, gaps = (self.seq, self.step), self.gaps
        if seq > self.seq:
            newest = (seq, step)
            gaps = (*gaps, (self.seq + 1, seq - 1)) if seq > self.seq + 1 else gaps
        else:
            parts = [((first, min(last, seq - 1)), (max(first, seq + 1), last)) for first, last in gaps]
            gaps = tuple((first, last) for both in parts for first, last in both if first <= last)
        highest = max((s for s in (self.highest, step) if s is not None), default=None)
        return LastLogged(*newest, fractions, None if highest == newest[1] else highest, gaps[-_MOST_GAPS:])

    def without(self, seq: int) -> LastLogged:
        """Return the same once the entry `seq` was left out, because its step is held already: that is no gap."""
        return self if seq <= self.seq else msgspec.structs.replace(self, seq=seq)

    def missing_entry(self, run: RunInfo) -> LogEntry | None:
        """Return the checkpoint's last entry if the tracker lacks it, and nothing before it or something behind it."""
        last = run.last_entry
        if run.resumed and last is not None and last.seq <= self.seq and self.lacks(last.seq):
            return last
        return run.unwritten(self.seq)


class Replay:
    """Tells which entries of a resumed run its tracker, which cannot forget any, holds already.

    Those are the ones that an earlier attempt logged after the checkpoint, found again by their `seq`, but for those
    that it had lost. Where the job resumes at another pace, so that numbers and steps no longer fit together, steps
    decide: what lies beyond all that are held is new, and further entries up to the newest one's step are not.
    """

    def __init__(self, tracker: str, run: RunInfo, held: LastLogged | None) -> None:
        self._held: LastLogged | None = None
        self._before: Step = None
        if run.resumed and held is not None and held.seq >= run.next_seq:
            self._held = held
            _logger.info("%s holds entries up to seq %d of this run; they are not logged again", tracker, held.seq)

    def covers(self, entry: LogEntry) -> bool:
        """Say whether the tracker holds `entry`. Entries come in order; the same one may come again."""
        held = self._held
        if held is None:
            return False
        before, self._before = self._before, entry.step
        if entry.seq <= held.seq:
            if _is_beyond(entry.step, held.highest):
                self._held = None
                return False
            if (entry.seq, entry.step) == (held.seq, held.step):
                self._held = None  # the same pace: all that follow are new, be it at the same step
                return True
            return not held.lacks(entry.seq)
        fell = _is_beyond(before, entry.step)
        if fell or held.step is None or entry.step is None or _is_beyond(entry.step, held.step):
            self._held = None
            return False
        return True


def _is_beyond(step: Step, other: Step) -> bool:
    return step is not None and other is not None and step > other


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
