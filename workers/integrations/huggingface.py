"""logsync for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import base64
import contextlib
import logging
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from logsync.coordinator.sinks.base import SinkSpec
from logsync.workers.door import connect
from logsync.workers.integrations.numbers import Numbers
from logsync.workers.training_log import TrainingLog

__all__ = ["LogsyncCallback"]

_logger = logging.getLogger(__name__)


class LogsyncCallback(TrainerCallback, ExportableState):
    """Logs what the Trainer logs, at the Trainer's own steps, on all ranks together.

    Every record of the Trainer's `log_history` is an entry with the same step and values: training losses, each
    evaluation, and the summary at the end of the training. What else is recorded in `callback.training_log`, say in
    `compute_loss`, is merged over the steps and the ranks of its entry.

    The Trainer decides when to log (`logging_steps`, `logging_strategy`, `logging_first_step`), unless
    `log_frequency` is given: then logsync does, with one answer for all ranks, and the Trainer's loss is gathered and
    logged there. Put the callback behind others that ask for logs.

    It communicates only where the Trainer comes on every rank: at the ends of steps, after the Trainer's own logs and
    evaluations, and at the end of the training. A `trainer.log()` elsewhere, which may be on one rank only, cannot
    hang: its values go into the next entry. The Trainer must evaluate on all ranks, as it does by itself.

    The log's state goes into each checkpoint's `trainer_state.json`, and resuming from it continues the file: at any
    world size, without doubled entries. The file is complete when `train()` returns. An evaluation after that opens the
    run again, which counts as another start of it.

    Args:
        log_frequency: optimizer steps between logs; None leaves it to the Trainer.
        sinks, name: as `connect` takes them.
        run_dir: the folder for files; `<output_dir>/logsync` if not given.
        options: more of `connect`'s, such as `mode`, `timeout` and `on_failure`.
    """

    def __init__(
        self,
        log_frequency: int | None = None,
        *,
        sinks: Sequence[SinkSpec] = ("console", "jsonl"),
        run_dir: str | PathLike[str] | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        self._frequency = log_frequency
        self._options = {**options, "sinks": sinks, "name": name}
        self._run_dir = run_dir
        self._numbers = Numbers()
        self._log: TrainingLog | None = None
        self._due = False  # the Trainer's next log is to be written, on every rank
        self._logged = 0  # the step of the last one
        self.saved: str | None = None
        """The state of the closed log, or the one that the Trainer restored."""

    @property
    def training_log(self) -> TrainingLog:
        """The log, while the Trainer trains.

        Raises:
            RuntimeError: it does not.
        """
        if self._log is None:
            msg = "the log is open from the beginning to the end of Trainer.train() only"
            raise RuntimeError(msg)
        return self._log

    def close(self) -> None:
        """Close the log; on every rank. The end of the training does so."""
        log, self._log = self._log, None
        if log is not None:
            self.saved = _text(log)
            log.close()

    # -- the Trainer's events ----------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the log, or go on with it."""
        log = self._open(args)
        found = self._found(state) if state.global_step else None
        if found is not None:
            log.load_state_dict({"state": base64.b64decode(found)})
        elif state.global_step:
            _logger.warning(
                "the training goes on at step %d from a checkpoint that has no state of logsync's log %r: the log "
                "begins anew",
                state.global_step,
                log.name,
            )
        # The Trainer saves only what was there when its state was made, which an older checkpoint brings.
        _callbacks(state).setdefault(type(self).__name__, self.state())
        self._due, self._logged = False, state.global_step
        with contextlib.suppress(TypeError):  # an optimizer of a kind that tells nothing of its steps
            log.watch_optimizer(kwargs.get("optimizer"))
        config: Any = getattr(kwargs.get("model"), "config", None)
        described = config.to_dict() if hasattr(config, "to_dict") else {}
        log.log_hyperparams({**described, **args.to_sanitized_dict()})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Make this step's call."""
        ready = self.training_log.log_ready(state.global_step)
        if self._frequency is not None:
            control.should_log = ready
        self._due = control.should_log and state.global_step > self._logged
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """See whether the Trainer is about to log."""
        if self._frequency is not None:
            control.should_log = False
        self._due = control.should_log and state.global_step > self._logged
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what the Trainer logs, and write it if it is the log that all ranks know of."""
        if self._log is None:  # an evaluation outside the training; on_evaluate has it, too
            return
        self._numbers.record(self._log, logs or {}, across="last")
        if self._due:
            self._due, self._logged = False, state.global_step
            self._log.write(state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write an entry of its own for the evaluation."""
        training = self._log is not None
        log = self._open(args)
        if not training and self.saved is not None:
            log.load_state_dict({"state": base64.b64decode(self.saved)})
        self._numbers.record(log, metrics or {}, across="last")
        log.write(state.global_step)
        if not training:
            self.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the summary of the training, which the Trainer has just logged, and close the log."""
        self.training_log.write(state.global_step)
        self.close()

    # -- its state in checkpoints ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what the Trainer keeps in `trainer_state.json`; never communicates."""
        # Where TrainingArguments ask for callbacks to be restored, the Trainer makes a new one from these arguments.
        options = {"log_frequency": self._frequency, "run_dir": self._run_dir, **self._options}
        plain = {key: value for key, value in options.items() if _is_plain(value)}
        saved = self.saved if self._log is None else _text(self._log)
        return {"args": plain, "attributes": {"saved": saved}}

    def _found(self, state: TrainerState) -> str | None:
        """Return this log's state from the checkpoint, the newest if there are several callbacks of this class."""
        states = _callbacks(state).get(type(self).__name__) or []
        for one in reversed(states if isinstance(states, list) else [states]):
            saved = one["attributes"].get("saved")
            if saved is not None and one["args"].get("name") == self._options["name"]:
                return str(saved)
        return None

    def _open(self, args: TrainingArguments) -> TrainingLog:
        if self._log is None:
            folder = self._run_dir or Path(args.output_dir or ".") / "logsync"
            self._log = connect(self._frequency, write="explicit", run_dir=folder, **self._options)
        return self._log


def _callbacks(state: TrainerState) -> dict[str, Any]:
    """Return what the Trainer keeps of its callbacks: a dict of their states, or of a list of them, by class."""
    kept: Any = state.stateful_callbacks
    found: dict[str, Any] = kept
    return found


def _text(log: TrainingLog) -> str:
    return base64.b64encode(log.state_dict()["state"]).decode()


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))
