"""What a log shows of itself: the frequency manager's properties, and who and what it is."""

from __future__ import annotations

import threading
from typing import Literal, NamedTuple

from logsync.coordinator.frequency import FrequencyType, LogStepType
from logsync.coordinator.messages import LogEntry, Settings, State
from logsync.workers.hosting import Hosting
from logsync.workers.ledger import Ledger
from logsync.workers.transports.base import Transport

__all__ = ["Stats", "Surface"]


class Stats(NamedTuple):
    """What a log has cost this rank so far.

    Attributes:
        calls: calls of `log_ready` that this rank has made.
        rounds: how many exchanges there were, the hello of `connect` not counted.
        bytes_sent: bytes of this rank's frames.
        wait_s: seconds spent in rounds, most of it waiting for the slowest rank.
    """

    calls: int
    rounds: int
    bytes_sent: int
    wait_s: float


class Surface(Ledger):
    """The properties of a `TrainingLog`, which sets what they read."""

    _settings: Settings
    _transport: Transport
    _host: Hosting | None
    _lock: threading.RLock
    _detached: bool
    _rounds: int
    _bytes_sent: int
    _wait_s: float

    def _collect(self) -> None:
        """Wait for the round that is under way, if there is one, and take over its outcome."""
        raise NotImplementedError

    # -- the frequency manager's surface -----------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where the job's logging stood at the last reply; waits for the round that is under way."""
        self._collect()
        return super().state

    @property
    def last_entry(self) -> LogEntry | None:  # noqa: D102 - as the base says
        self._collect()
        return super().last_entry

    @property
    def log_frequency(self) -> LogStepType:
        """The log frequency in force. A new one may be set on any rank and is in force from the next round.

        Of two ranks that set it at the same call the lower one wins, with a warning.

        Raises:
            TypeError, ValueError: when set to what is no frequency; the old one stays.
        """
        return self.state.log_frequency

    @log_frequency.setter
    def log_frequency(self, log_frequency: LogStepType) -> None:
        with self._lock:
            self._set_frequency(log_frequency)

    @property
    def frequency_type(self) -> FrequencyType:
        """What steps count: "epoch", "step" or "batch"."""
        return self._settings.frequency_type

    @property
    def mode(self) -> Literal["exact", "on_change", "on_update"]:
        """When a log is due; see `FrequencyManager`."""
        return self._settings.mode

    @property
    def is_epoch_frequency_manager(self) -> bool:
        """Whether steps are epochs."""
        return self._settings.frequency_type == "epoch"

    @property
    def is_optim_frequency_manager(self) -> bool:
        """Whether steps are optimizer steps."""
        return self._settings.frequency_type == "step"

    @property
    def last_log_step(self) -> LogStepType:
        """The step of the last log that all ranks know of."""
        return self.state.last_log_step

    @property
    def last_model_update_step(self) -> LogStepType:
        """The last model update that had reached the root at the last round."""
        return self.state.last_model_update_step

    # -- who and what ------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """What tells this log from others of the job."""
        return self._settings.name

    @property
    def rank(self) -> int:
        """This process's rank in the log."""
        return self._rank

    @property
    def world_size(self) -> int:
        """How many ranks the log has."""
        return self._world_size

    @property
    def is_coordinator(self) -> bool:
        """Whether this rank speaks for the coordinator, which runs in its process or in an actor: rank 0."""
        return self._host is not None

    @property
    def transport(self) -> str:
        """How frames travel: "local" (the single-node fallback), "collective", "threads", ..."""
        return self._transport.name

    @property
    def detached(self) -> bool:
        """Whether the group was lost and this rank goes on alone; see `on_failure` of `connect`."""
        return self._detached

    @property
    def run_dir(self) -> str:
        """The folder of the log's files, on the coordinator's machine."""
        return self.state.run_dir

    @property
    def stats(self) -> Stats:
        """What the log has cost this rank so far."""
        return Stats(self.calls - self._skipped, self._rounds, self._bytes_sent, self._wait_s)
