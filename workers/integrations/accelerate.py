"""logsync as a tracker of Hugging Face's Accelerate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from accelerate.tracking import GeneralTracker, on_main_process

from logsync.coordinator.sinks.base import SinkSpec
from logsync.workers.door import connect
from logsync.workers.integrations.numbers import Numbers
from logsync.workers.training_log import TrainingLog

__all__ = ["LogsyncTracker"]


class LogsyncTracker(GeneralTracker):
    """Takes what `accelerator.log()` is given, on the main process, as Accelerate has it; never communicates.

    By itself, `Accelerator(log_with=LogsyncTracker())`, it writes each `accelerator.log(values, step=step)` as an entry
    of that step. It has then a log of its own, which only the main process knows of.

    After `join(log)`, with what all ranks have from `connect`, the values join that log's entries, beside what all
    ranks recorded: given at the step of the entry just made (in the body of `if log.log_ready(step):`, or after
    `log.write(step)`) they are added to it, as by `annotate`; otherwise they go into the next entry. Close that log as
    always, before `accelerator.end_training()`, which ends the process group.

    For checkpoints: `accelerator.register_for_checkpointing(log)`, or the tracker itself if the log is its own. A load
    continues the run, and doubles no entry.

    Args:
        run_name: tells runs apart, see `name` of `connect`; Accelerate gives it to a tracker that is registered by its
            class.
        sinks, run_dir: of the tracker's own log, as `connect` takes them.
    """

    name = "logsync"
    requires_logging_directory = False
    main_process_only = True

    def __init__(
        self,
        run_name: str | None = None,
        *,
        sinks: Sequence[SinkSpec] = ("console", "jsonl"),
        run_dir: str | PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        self._shared: TrainingLog | None = None
        self._own: TrainingLog | None = None
        self._finished = False
        self._options: dict[str, Any] = {"sinks": sinks, "run_dir": run_dir, "name": run_name}
        self._numbers = Numbers()

    @property
    def tracker(self) -> TrainingLog | None:
        """The log behind it; None where it has none: on other processes than the main one, and after the end."""
        return self._shared or self._own

    def join(self, log: TrainingLog) -> None:
        """Hand the values to `log`, before `accelerator.init_trackers()`; on every rank, or the main process only."""
        self._shared = log

    @on_main_process
    def start(self) -> None:
        """Open the tracker's own log, unless it has joined one; older versions of Accelerate do not call this."""
        if self._shared is None and self._own is None and not self._finished:
            self._own = connect(None, transport="local", **self._options)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the run's settings."""
        self.start()
        if self.tracker is not None:
            self.tracker.log_hyperparams(values)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Log the numbers among `values`; texts are left out, and told of once.

        Raises:
            ValueError: after `join`, a value has the name of a metric that all ranks have merged in this entry.
        """
        self.start()
        if self._own is not None:
            self._numbers.record(self._own, values, across="last")
            self._own.write(step)
        elif self._shared is not None and step is not None and step == self._shared.last_log_step:
            self._shared.annotate(self._numbers.of(values))
        elif self._shared is not None:
            self._numbers.record(self._shared, values, across="last")

    @on_main_process
    def finish(self) -> None:
        """Close the tracker's own log."""
        own, self._own, self._finished = self._own, None, True
        if own is not None:
            own.close()

    def state_dict(self) -> dict[str, bytes]:
        """Return the state of the tracker's own log, of which only the main process has one."""
        return {} if self._own is None else self._own.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, bytes]) -> None:
        """Go on where `state_dict` was taken; elsewhere than on the main process nothing happens."""
        if self._own is not None:
            self._own.load_state_dict(state_dict)
