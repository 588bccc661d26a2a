"""Runs a Coordinator with its sinks: the only place that acts on what the core returned."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import StateMismatch, Step
from logsync.coordinator.messages import MAX_PATH, LogEntry, State, Window
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.isolation import SinkSet

__all__ = ["Host", "reserve_run_dir"]

_logger = logging.getLogger(__name__)


class Host:
    """The coordinator as a transport sees it: `handle` takes a round's frames and returns the reply.

    An entry is held until `release`, so that `annotate` can still add to it.

    Args:
        coordinator: decides.
        sinks: where entries go.
        name: the log's name.
        world_size: ranks in the job.
        reserved: the folder that was made for this run, removed again if nothing was put into it.
        clock: gives Unix seconds.
        recovered: the coordinator goes on where another one was lost, whose entries the sinks may hold already.
        oldest: of such a one, the first entry that may not be stored yet.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        sinks: SinkSet,
        *,
        name: str,
        world_size: int,
        reserved: Path | None = None,
        clock: Callable[[], float] = time.time,
        recovered: bool = False,
        oldest: LogEntry | None = None,
    ) -> None:
        self.coordinator = coordinator
        self._recovered = recovered
        self._sinks = sinks
        self._name = name
        self._world_size = world_size
        self._reserved = reserved
        self._clock = clock
        self._held: list[LogEntry] = []
        # A rank that leaves in mid-round does so while the transport's thread may still be deciding it.
        self._lock = threading.RLock()
        self._restores = coordinator.restores
        self._durable_seq = (coordinator.next_seq if oldest is None else oldest.seq) - 1
        self._loaded: tuple[State, int] | None = None  # what no round has taken over yet
        self._last_entry = oldest  # or the last entry of the state that was loaded last
        self._refused = False  # ranks loaded different states, and it is not known what this run continues
        # The folder that the sinks were given entries for. Where not even the first is known to be stored, what lies
        # there may still be another run's.
        self._written_to = coordinator.run_dir if recovered and self._durable_seq >= 0 else ""
        self._last_reply = b""
        self._closed = self._left = self._detached = False
        self.ended = threading.Event()
        """Set once `close` has done its work."""
        sinks.prepare(self._run_info())

    @property
    def entries_made(self) -> int:
        """How many entries this start of the job has made."""
        return self.coordinator.entries_made

    @property
    def durable_seq(self) -> int:
        """The `seq` of the last entry that every sink has written, or lost; -1 if there is none."""
        settled = self._sinks.settled_seq
        return self._durable_seq if settled is None else settled

    @property
    def holds_entry(self) -> bool:
        """Whether there is an entry that the sinks have not got yet."""
        return bool(self._held)

    def handle(self, frames: Sequence[bytes | bytearray | memoryview]) -> bytes:
        """Decide one round and return the reply; what it logged is held for `annotate` and `release`.

        Raises:
            RuntimeError: this rank has left the group already, while a round of it was still open. Then it decides
                nothing more for the others, who would take it for logged.
        """
        with self._lock:
            if self._closed or self._left or self._detached:
                msg = "rank 0 has left the group"
                raise RuntimeError(msg)
            self._last_reply = self._decide(frames)
            return self._last_reply

    def detach(self, rank: int, number: int) -> bytes | None:
        """Go on with `rank`, the coordinator's own, alone.

        Returns:
            The reply of round `number` if it was decided before the group was lost.
        """
        with self._lock:
            self._detached = True
            decided = self.coordinator.next_round > number
            self.coordinator.detach(rank, max(number, self.coordinator.next_round))
            return self._last_reply if decided else None

    def go_on_here(
        self,
        coordinator: Callable[[], Coordinator],  # noqa: ARG002 - this host has its own
        rank: int,
        number: int,
    ) -> tuple[Callable[[Sequence[bytes | bytearray | memoryview]], bytes], bytes | None]:
        """Go on with `rank` alone; return what decides rounds from now on, and what `detach` returns."""
        return self.decide_alone, self.detach(rank, number)

    def decide_alone(self, frames: Sequence[bytes | bytearray | memoryview]) -> bytes:
        """Decide a round after `detach`. Never raises."""
        with self._lock:
            return self._decide(frames)

    def _decide(self, frames: Sequence[bytes | bytearray | memoryview]) -> bytes:
        reply, entries = self.coordinator.handle(frames, self._clock())
        self._note_load()
        self._continue_run()
        self._held.extend(entries)
        return reply

    def loaded(self, state: State, last_entry: LogEntry | None, call: int) -> None:
        """Note that a state was loaded, after `call` calls, that all ranks will bring to the next round."""
        with self._lock:
            self._loaded = (state, call)
            self._refused = False
            self._last_entry = last_entry

    def _note_load(self) -> None:
        """Forget the state that was loaded here once a round has taken it over, passed it by or refused it."""
        refused_for = self.coordinator.refused_for
        if refused_for is StateMismatch:
            self._refused = self._loaded is not None or not self._written_to
            self._loaded = None
        elif refused_for is None:
            self._loaded = None

    def _continue_run(self) -> None:
        """Let the sinks continue the run whose state was taken over, if one was."""
        if self.coordinator.restores != self._restores:
            self._restores = self.coordinator.restores
            self._recovered = False  # what is stored behind the loaded state is to be replaced
            self._durable_seq = self.coordinator.next_seq - 1
            self._sinks.prepare(self._run_info())

    def hold(self, entry: LogEntry) -> None:
        """Hold an entry that a coordinator before this one had made."""
        self._held.append(entry)

    def annotate(self, values: Mapping[str, float]) -> None:
        """Add root-side values to the entry just made; without one, say so and drop them.

        Raises:
            ValueError: the entry has a metric of that name already.
        """
        with self._lock:
            if not self._held:
                _logger.warning(
                    "annotate(%s) came when no entry was open, and was dropped; call it right after log_ready() "
                    "returned True or after write()",
                    ", ".join(values),
                )
                return
            entry = self._held[-1]
            taken = [name for name in values if name in entry.metrics]
            if taken:
                msg = (
                    f"annotate() would overwrite the merged metric {taken[0]!r} of entry {entry.seq}; use another name"
                )
                raise ValueError(msg)
            self._held[-1] = msgspec.structs.replace(entry, metrics={**entry.metrics, **values})

    def log_hyperparams(self, values: Mapping[str, object]) -> None:
        """Have the sinks keep the run's settings."""
        self._sinks.hyperparams(dict(values))

    def release(self) -> None:
        """Hand what is held to the sinks; from any thread."""
        with self._lock:
            held, self._held = self._held, []
            for entry in held:
                self._write(entry)

    def _write(self, entry: LogEntry) -> None:
        self._written_to = self.coordinator.run_dir
        self._sinks.write(entry)

    def leave(self, rank: int, take: Callable[[int], Window], step: Step, call: int) -> None:
        """Write what is held and then, marked partial, one rank's own window: the others cannot be asked any more.

        Args:
            take: returns that window, given how many entries were made so far.
        """
        with self._lock:
            self._left = True
            self.release()
            if self._loaded is not None:
                self.coordinator.load(*self._loaded)
                self._continue_run()
            window = take(self.coordinator.entries_made)
            if self._refused:
                # It belongs behind a state that the ranks do not agree on: there is no place for it in the files.
                _logger.warning(
                    "rank %d leaves after ranks loaded different states: what it recorded since is not written, and "
                    "the files of the run stay as they were",
                    rank,
                )
                return
            entry = self.coordinator.leftover(rank, window, step, call, self._clock())
            if entry is not None:
                self._write(entry)

    def close(self) -> None:
        """Hand over what is held and flush the sinks; a second call does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self.release()
        try:
            self._sinks.close()
            if self._reserved is not None:
                with contextlib.suppress(OSError):  # not empty: then it is in use
                    self._reserved.rmdir()
        finally:
            self.ended.set()

    def _run_info(self) -> RunInfo:
        coordinator = self.coordinator
        return RunInfo(
            run_dir=Path(coordinator.run_dir),
            name=self._name,
            attempt=coordinator.attempt,
            world_size=self._world_size,
            next_seq=self._durable_seq + 1 if self._recovered else coordinator.first_seq,
            resumed=coordinator.restores > 0 or self._recovered,
            run_id=coordinator.run_id,
            last_entry=self._last_entry,
            begun=self._written_to == coordinator.run_dir,
            recovered=self._recovered,
            first_seq=coordinator.first_seq,
        )


def reserve_run_dir(name: str, root: str = "runs") -> tuple[str, Path | None]:
    """Choose `root/<start time>-<name>`, made at once so that no other run can take it.

    Returns:
        The folder's path, and the same as a Path if it could be made. Where it could not (a read-only
        disk, say) training goes on; the sinks that need the folder will report it.
    """
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    for attempt in range(1, 1000):
        path = _named(Path(root, stem if attempt == 1 else f"{stem}-{attempt}"))
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            _logger.warning("cannot make the folder %s for the log's files: %s", path, error)
            return str(path), None
        return str(path), path
    return str(_named(Path(root, f"{stem}-{os.getpid()}"))), None


def _named(path: Path) -> Path:
    """Return the absolute path; the relative one where the current folder's name is no text that a frame carries."""
    absolute = path.absolute()
    try:
        short = len(str(absolute).encode()) <= MAX_PATH
    except UnicodeEncodeError:
        short = False
    return absolute if short else path
