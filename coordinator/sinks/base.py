"""What a sink is, how one is named, and how a failing one is kept from everybody else."""

from __future__ import annotations

import importlib
import itertools
import logging
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import msgspec

from logsync.coordinator.errors import printable
from logsync.coordinator.messages import LogEntry

__all__ = ["RESERVED", "RunInfo", "Sink", "SinkSet", "SinkSpec", "make_sink"]

_logger = logging.getLogger(__name__)

RESERVED = frozenset({"seq", "step", "time", "attempt", "partial", "calls", "ranks", "nonfinite", "nan_ranks", "waits"})
"""Names that no metric may have: flat destinations write them beside the metrics."""


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a sink is told before its first entry.

    Attributes:
        run_dir: the folder for the run's files. It may not exist yet.
        name: the log's name.
        attempt: which start of the job this is; 0 is the first.
        world_size: ranks in the job.
        next_seq: the first `seq` that will be written.
        resumed: whether the run continues from a loaded state.
    """

    run_dir: Path
    name: str
    attempt: int
    world_size: int
    next_seq: int
    resumed: bool


@runtime_checkable
class Sink(Protocol):
    """Somewhere that entries go.

    Any method may raise: the failure is reported and the entry counted as lost, and neither training nor another
    sink notices. After a failed `open` comes another `open`; after a failed `write` the next entry's `write`.
    """

    def open(self, run: RunInfo) -> None:
        """Get ready for entries; called before the first one, and again after a `close` when a state is loaded.

        If `run.resumed`, what is stored with a `seq` of `run.next_seq` or more is replaced, not doubled.
        """

    def write(self, entry: LogEntry) -> None:
        """Take one entry. It is this sink's own copy."""

    def close(self) -> None:
        """Flush what is held. Called only after a successful `open`."""


SinkSpec: TypeAlias = str | Sink | Callable[[LogEntry], object]


class _Destination(NamedTuple):
    module: str
    sink: str
    option: str | None = None


_DESTINATIONS = {
    "console": _Destination("logsync.coordinator.sinks.console", "ConsoleSink"),
    "jsonl": _Destination("logsync.coordinator.sinks.jsonl", "JsonlSink", option="PATH"),
}
_KNOWN = ", ".join(name + (f", {name}:{where.option}" if where.option else "") for name, where in _DESTINATIONS.items())


def make_sink(spec: SinkSpec) -> Sink:
    """Return the sink that `spec` stands for.

    A name ("console", "jsonl") or name:option ("jsonl:PATH") makes one; a callable is called with every LogEntry; an
    object with open, write and close is a sink already.

    Raises:
        ValueError: an unknown name, or an option that is missing or not taken.
        TypeError: none of these.
    """
    if isinstance(spec, str):
        return _named_sink(spec)
    if isinstance(spec, type):
        msg = f"a sink is an object, and {spec.__name__} is a class; give {spec.__name__}(...)"
        raise TypeError(msg)
    if isinstance(spec, Sink):
        return spec
    if callable(spec):
        return _CallableSink(spec)
    msg = (
        f"a sink is a name ({_KNOWN}), a callable that takes a LogEntry, or an object with open, write and close; "
        f"given {printable(repr(spec), 100)} of type {type(spec).__name__}"
    )
    raise TypeError(msg)


class SinkSet:
    """Several sinks, none of which can disturb training or another.

    A sink that raises is reported once, with its traceback, as an ERROR of this module's logger; it is tried again
    at the next entry, and `close` says how many entries it lost. Sinks open at the first entry.

    Raises:
        ValueError: an unknown name, a wrong option, or the same destination twice.
        TypeError: something that is not a sink, or sinks that are not a list.
    """

    def __init__(self, sinks: Iterable[SinkSpec]) -> None:
        if isinstance(sinks, str) or not isinstance(sinks, Iterable):
            msg = f'sinks is a list, such as ["console", "jsonl"]; given {printable(repr(sinks), 100)}'
            raise TypeError(msg)
        self._run: RunInfo | None = None
        self._guards: list[_Guard] = []
        for spec in sinks:
            sink, name = make_sink(spec), _name_of(spec)
            taken = {guard.name for guard in self._guards}
            if name in taken and isinstance(spec, str):
                msg = f"sinks names {name!r} twice; the two would write over each other"
                raise ValueError(msg)
            if name in taken:
                name = next(other for n in itertools.count(2) if (other := f"{name} ({n})") not in taken)
            self._guards.append(_Guard(name, sink))

    @property
    def lost(self) -> dict[str, int]:
        """How many entries each sink has lost so far; sinks that lost none are left out."""
        return {guard.name: guard.lost for guard in self._guards if guard.lost}

    def prepare(self, run: RunInfo) -> None:
        """Say what run the entries to come belong to; open sinks are closed, to open again with this run."""
        for guard in self._guards:
            guard.close()
        self._run = run

    def write(self, entry: LogEntry) -> None:
        """Hand `entry` to every sink. Never raises for a sink's failure."""
        if self._run is None:
            _logger.error("entry seq %d (step %s) was dropped: the sinks are closed", entry.seq, entry.step)
            return
        for guard in self._guards:
            guard.write(entry, self._run)

    def close(self) -> None:
        """Flush and close the sinks, and report what each has lost; a second call does nothing."""
        if self._run is None:
            return
        self._run = None
        for guard in self._guards:
            guard.close()
            guard.report_lost()


class _Guard:
    """One sink, its failures caught and counted."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name = name
        self.lost = 0
        self._sink = sink
        self._is_open = False
        self._entries = 0
        self._last_error = ""

    def write(self, entry: LogEntry, run: RunInfo) -> None:
        self._entries += 1
        try:
            if not self._is_open:
                self._sink.open(run)
                self._is_open = True
            self._sink.write(_own_copy(entry))
        except Exception as error:  # noqa: BLE001 - whatever a sink raises, training goes on
            self.lost += 1
            self._failed(error, f"entry seq {entry.seq} (step {entry.step}) is lost to it")

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        try:
            self._sink.close()
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(error, "closing it did not work, so what it had not flushed may be lost")

    def report_lost(self) -> None:
        if self.lost:
            _logger.error(
                "sink %s lost %d of %d entries; last error: %s", self.name, self.lost, self._entries, self._last_error
            )

    def _failed(self, error: Exception, consequence: str) -> None:
        first = not self._last_error
        # Text, not the exception: its traceback would keep the entry and the sink's locals alive.
        self._last_error = printable(traceback.format_exception_only(type(error), error)[-1].strip())
        if first:
            _logger.error(
                "sink %s raised %s; %s. Training and the other sinks go on; this sink is tried again at every entry, "
                "and further errors are counted and reported at close",
                self.name,
                self._last_error,
                consequence,
                exc_info=error,
            )


class _CallableSink:
    """A function as a sink."""

    def __init__(self, function: Callable[[LogEntry], object]) -> None:
        self._function = function

    def open(self, run: RunInfo) -> None:
        """Do nothing."""

    def write(self, entry: LogEntry) -> None:
        """Call the function."""
        self._function(entry)

    def close(self) -> None:
        """Do nothing."""


def _named_sink(spec: str) -> Sink:
    name, colon, option = _parted(spec)
    destination = _DESTINATIONS.get(name)
    if destination is None:
        msg = f"there is no sink named {printable(repr(name), 100)}; the names are: {_KNOWN}"
        raise ValueError(msg)
    if colon and destination.option is None:
        msg = f"sink {name!r} takes no option; given {printable(repr(spec), 100)}"
        raise ValueError(msg)
    if colon and not option:
        msg = f"sink {spec!r} lacks its {destination.option}; write {name}:{destination.option}, or {name} alone"
        raise ValueError(msg)
    make = cast("Callable[..., Sink]", getattr(importlib.import_module(destination.module), destination.sink))
    return make(option) if option else make()


def _parted(spec: str) -> tuple[str, str, str]:
    name, colon, option = spec.partition(":")
    return name.strip().lower(), colon, option


def _name_of(spec: SinkSpec) -> str:
    if isinstance(spec, str):
        return printable("".join(_parted(spec)))
    if isinstance(spec, Sink):
        return type(spec).__name__
    return printable(getattr(spec, "__qualname__", type(spec).__name__))


def _own_copy(entry: LogEntry) -> LogEntry:
    # An entry is frozen, but its dicts are not: a sink that changes them must not change another sink's.
    return msgspec.structs.replace(
        entry, metrics=dict(entry.metrics), ranks=dict(entry.ranks), nan_ranks=dict(entry.nan_ranks)
    )
