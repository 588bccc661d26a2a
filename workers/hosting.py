"""Where a log's coordinator and its sinks run: in rank 0's process, or made elsewhere from a plan."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgspec

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import Step
from logsync.coordinator.followers import Followed
from logsync.coordinator.host import Host
from logsync.coordinator.memory import readmit, recall, remember
from logsync.coordinator.messages import LogEntry, Settings, State, Window
from logsync.coordinator.sinks.base import SinkSpec
from logsync.coordinator.sinks.isolation import SinkSet
from logsync.workers.transports.base import Root

__all__ = ["HostPlan", "Hosted", "Hosting", "Placing", "Plan", "Recovered", "Standing"]

_logger = logging.getLogger(__name__)


class Hosting(Protocol):
    """What rank 0's log asks of its coordinator's host; `Host` says what each does."""

    @property
    def handle(self) -> Root | None:
        """The root's function, None where it does not run in this process."""

    @property
    def entries_made(self) -> int:
        """How many entries this start of the job is known to have made."""

    @property
    def holds_entry(self) -> bool:
        """Whether `annotate` can still add to an entry."""

    def loaded(self, state: State, last_entry: LogEntry | None, call: int) -> None:
        """Note that a state was loaded."""

    def annotate(self, values: Mapping[str, float]) -> None:
        """Add values to the entry just made."""

    def log_hyperparams(self, values: Mapping[str, object]) -> None:
        """Have the sinks keep the run's settings."""

    def release(self) -> None:
        """Hand what is held to the sinks."""

    def go_on_here(self, coordinator: Callable[[], Coordinator], rank: int, number: int) -> tuple[Root, bytes | None]:
        """Go on with `rank` alone in this process, after the group was lost in round `number`.

        Args:
            coordinator: makes one that goes on from the last reply, for a host that has none here.

        Returns:
            The root's function, and the reply of that round if it had been decided.
        """

    def leave(self, rank: int, take: Callable[[int], Window], step: Step, call: int) -> None:
        """Write what is held, and one rank's own window."""

    def close(self) -> None:
        """Hand over what is held and flush the sinks."""


class Standing(NamedTuple):
    """Where the entries of a run stand after a round; as in `ray_wire.Answer`."""

    memory: bytes = b""
    entry_seq: int = -1
    durable_seq: int = -1
    next_seq: int = 0
    entries_made: int = 0
    merged: Mapping[str, int] = MappingProxyType({})  # the number of each follower's last window that is in an entry


class Recovered(NamedTuple):
    """What ranks know of a run whose root was lost.

    Attributes:
        memory: what the coordinator must know.
        entries: those that may not be written yet, by `seq`.
        notes: rank 0's annotations of them.
        released: the last `seq` that rank 0 adds nothing to any more.
    """

    memory: bytes
    entries: Mapping[int, LogEntry]
    notes: Mapping[int, Mapping[str, float]]
    released: int


class Hosted(Protocol):
    """A root outside the ranks' processes; used by one thread at a time."""

    def handle(self, frames: Sequence[bytes]) -> bytes:
        """Decide a round."""

    def follow(self, windows: Sequence[Followed]) -> None:
        """Keep followers' windows for the next entry; before `handle`."""

    def standing(self) -> Standing:
        """Say where the run stands after the last round."""

    def readmit(self, rank: int, hello: bytes) -> bytes:
        """Take in a process that takes the place of `rank`; return the reply to its hello."""

    def release(self, notes: Mapping[str, float]) -> None:
        """Add `notes` to the last entry and hand what is held to the sinks."""

    def hyperparams(self, values: bytes) -> None:
        """Have the sinks keep the run's settings, a JSON object."""

    def loaded(self, state: State, last_entry: LogEntry | None, call: int) -> None:
        """Note that rank 0 has loaded a state."""

    def leave(self, window: Window | None, step: Step, call: int) -> None:
        """Write what is held, and rank 0's own window."""

    def close(self) -> None:
        """Flush the sinks; a second call does nothing."""


class Plan(Protocol):
    """How to make a root; it travels to where the root shall run."""

    def open(self, recovered: Recovered | None) -> Hosted:
        """Make the root, anew or from what ranks know."""


@runtime_checkable
class Placing(Protocol):
    """A transport whose root runs elsewhere than in rank 0's process."""

    def place(self, name: str, *, timeout_s: float, warn_after_s: float, plan: Plan | None) -> Hosting | None:
        """Prepare for a log of that name, before `start`; return rank 0's way to its host.

        Args:
            plan: how the root is made, on rank 0.
        """


@dataclass(frozen=True, slots=True)
class HostPlan:
    """All that `connect` was given on rank 0, to make a `Host` of.

    Attributes:
        keep_run_dir: the user chose `run_dir`.
        reserved: the folder that was made for this run.
        attempt: which start of the job this is.
        hyperparams: the run's settings, a JSON object; empty if there are none yet.
    """

    settings: Settings
    sinks: tuple[SinkSpec, ...]
    world_size: int
    run_dir: str
    keep_run_dir: bool
    reserved: Path | None
    attempt: int
    folder: str = field(default_factory=os.getcwd)  # for paths that are relative to it
    hyperparams: bytes = b""

    def _host_of(self, coordinator: Coordinator, sinks: SinkSet, **options: Any) -> Host:
        return Host(
            coordinator,
            sinks,
            name=self.settings.name,
            world_size=self.world_size,
            reserved=self.reserved,
            **options,
        )

    def begin(self, sinks: SinkSet) -> Host:
        """Return the host of a run that begins; if a sink lacks its package, all ranks are told when they connect."""
        missing = sinks.load()
        coordinator = Coordinator(
            self.settings,
            self.world_size,
            run=secrets.token_hex(8),
            run_dir=self.run_dir,
            keep_run_dir=self.keep_run_dir,
            attempt=self.attempt,
            refusal=missing and f"rank 0 cannot log: {missing}",
        )
        return self._host_of(coordinator, sinks)

    def open(self, recovered: Recovered | None) -> Hosted:
        """Make the host in this process, which works for nothing else."""
        with contextlib.suppress(OSError):  # of another node: relative paths are this one's
            os.chdir(self.folder)
        hosted = _HostedHost(self._host(recovered))
        if self.hyperparams:
            hosted.hyperparams(self.hyperparams)
        return hosted

    def _host(self, recovered: Recovered | None) -> Host:
        sinks = SinkSet(self.sinks)
        if recovered is None:
            return self.begin(sinks)
        sinks.load()
        coordinator = recall(recovered.memory, self.settings, self.world_size, keep_run_dir=self.keep_run_dir)
        return self.resume(coordinator, sinks, recovered)

    def resume(self, coordinator: Coordinator, sinks: SinkSet, recovered: Recovered) -> Host:
        """Return a host that goes on with `coordinator`, and with the entries that may not be written yet."""
        seqs = sorted(recovered.entries)
        oldest = recovered.entries[seqs[0]] if seqs else None
        # Where nothing was logged yet, what lies in the folder is an older run's.
        host = self._host_of(coordinator, sinks, recovered=coordinator.next_seq > 0, oldest=oldest)
        for seq in seqs:
            entry = recovered.entries[seq]
            notes = recovered.notes.get(seq, {})
            host.hold(msgspec.structs.replace(entry, metrics={**entry.metrics, **notes}))
            if seq <= recovered.released:
                host.release()
        return host


class _HostedHost:
    """A `Host` as an actor uses it."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def handle(self, frames: Sequence[bytes]) -> bytes:
        self._host.release()  # rank 0 has gone on, whatever became of its word for it
        return self._host.handle(frames)

    def follow(self, windows: Sequence[Followed]) -> None:
        refused = self._host.coordinator.follow(windows)
        if refused:
            _logger.warning("%d windows of followers are left out: they are too many for one entry", len(refused))

    def standing(self) -> Standing:
        host = self._host
        coordinator = host.coordinator
        return Standing(
            remember(coordinator),
            coordinator.next_seq - 1 if host.holds_entry else -1,
            host.durable_seq,
            coordinator.next_seq,
            host.entries_made,
            coordinator.merged,
        )

    def readmit(self, rank: int, hello: bytes) -> bytes:
        return readmit(self._host.coordinator, rank, hello)

    def release(self, notes: Mapping[str, float]) -> None:
        if notes and self._host.holds_entry:
            self._host.annotate(notes)
        self._host.release()

    def hyperparams(self, values: bytes) -> None:
        self._host.log_hyperparams(msgspec.json.decode(values, type=dict[str, Any]))

    def loaded(self, state: State, last_entry: LogEntry | None, call: int) -> None:
        self._host.loaded(state, last_entry, call)

    def leave(self, window: Window | None, step: Step, call: int) -> None:
        self._host.leave(0, lambda _: window or Window(), step, call)

    def close(self) -> None:
        self._host.close()
