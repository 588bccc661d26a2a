"""What a sink is, and how one is named."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

from logsync.coordinator.errors import printable
from logsync.coordinator.messages import LogEntry

__all__ = ["RunInfo", "Sink", "SinkSpec", "make_sink", "name_of"]


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
        run_id: names the run, the same over all its starts.
        last_entry: when resumed, the entry before `next_seq`, as it was before `annotate`. A run that was killed at
            its last log may not have stored it.
        begun: whether this process has given entries to the sinks for this `run_dir` already.
        first_seq: where recovered, what other starts of the job have stored from there on is replaced; 0 if nothing is.
        recovered: the root was lost and another one goes on in the same start of the job. All that is stored stays;
            entries come again, from `next_seq` on, that may be stored already. `last_entry` is the first of them.
    """

    run_dir: Path
    name: str
    attempt: int
    world_size: int
    next_seq: int
    resumed: bool
    run_id: str = ""
    last_entry: LogEntry | None = None
    begun: bool = False
    recovered: bool = False
    first_seq: int = 0

    @property
    def continues(self) -> bool:
        """Whether files that lie in `run_dir` are this run's, to be continued.

        A state from before the first entry cannot tell: the run may have been killed before it had set aside what
        another one left there.
        """
        return self.recovered or (self.resumed and (self.next_seq > 0 or self.begun))

    def unwritten(self, newest_seq: int) -> LogEntry | None:
        """Return the checkpoint's last entry if the run was killed before it was stored.

        Args:
            newest_seq: the last `seq` below `next_seq` that is stored, -1 if there is none.
        """
        last = self.last_entry
        return last if self.resumed and last is not None and last.seq == newest_seq + 1 == self.next_seq - 1 else None


@runtime_checkable
class Sink(Protocol):
    """Somewhere that entries go.

    All methods are called on one thread, which is this sink's alone, and may take their time. Any may raise, and
    neither training nor another sink notices: after a failed `open` comes another `open`, after an `OSError` of `write`
    the same entry again, and after any other error the next one.

    A sink may have two more methods. `load()` imports what it needs, or raises a `ConfigError` that says what to
    install, which all ranks get from `connect`; it is called early, on rank 0's main thread.
    `hyperparams(values)` keeps the run's settings, all that were given so far; it is called after `open`, again after
    every further one and after an `OSError`, and must not mind being called twice.
    """

    def open(self, run: RunInfo) -> None:
        """Get ready for entries; called before the first one, or at once where a state was loaded.

        If `run.resumed`, what is stored with a `seq` of `run.next_seq` or more is replaced, not doubled.
        """

    def write(self, entry: LogEntry) -> None:
        """Take one entry. It is this sink's own copy."""

    def close(self) -> None:
        """Flush what is held. Called only after a successful `open`, and never while another call does not return."""


SinkSpec: TypeAlias = str | Sink | Callable[[LogEntry], object]


class _Destination(NamedTuple):
    module: str
    sink: str
    option: str | None = None


_DESTINATIONS = {
    "console": _Destination("logsync.coordinator.sinks.console", "ConsoleSink"),
    "jsonl": _Destination("logsync.coordinator.sinks.jsonl", "JsonlSink", option="PATH"),
    "csv": _Destination("logsync.coordinator.sinks.csv_file", "CsvSink", option="PATH"),
    "logging": _Destination("logsync.coordinator.sinks.python_logging", "LoggingSink", option="LOGGER_NAME"),
    "tensorboard": _Destination("logsync.coordinator.sinks.tensorboard", "TensorboardSink", option="DIR"),
    "wandb": _Destination("logsync.coordinator.sinks.wandb", "WandbSink", option="PROJECT"),
    "mlflow": _Destination("logsync.coordinator.sinks.mlflow", "MlflowSink", option="TRACKING_URI"),
    "prometheus": _Destination("logsync.coordinator.sinks.prometheus", "PrometheusSink", option="PORT"),
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


def name_of(spec: SinkSpec) -> str:
    """Return how messages call the sink that `spec` stands for."""
    if isinstance(spec, str):
        # A server's address may hold a password.
        return printable(re.sub("//[^/@]*@", "//", "".join(_parted(spec))))
    if isinstance(spec, Sink):
        return type(spec).__name__
    return printable(getattr(spec, "__qualname__", type(spec).__name__))
