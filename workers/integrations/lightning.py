"""logsync for Lightning: a callback that runs the log, and a logger that fills it. Also for `pytorch_lightning`."""

from __future__ import annotations

import contextlib
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from logsync.coordinator.sinks.base import SinkSpec
from logsync.workers.door import connect
from logsync.workers.integrations.numbers import Numbers
from logsync.workers.training_log import TrainingLog

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.utilities import rank_zero_only
elif "lightning.pytorch" not in sys.modules and "pytorch_lightning" in sys.modules:
    # The one that the script has imported: installed are often both, and their classes are not each other's.
    from pytorch_lightning import Callback
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.utilities import rank_zero_only
else:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.utilities import rank_zero_only

__all__ = ["LogsyncCallback", "LogsyncLogger"]


class LogsyncCallback(Callback):
    """Runs one log on all ranks of a Trainer: a call for each training batch, and writes where Lightning logs.

    An entry is made, on all ranks together: after every batch at which Lightning logs (`log_every_n_steps`), or, if
    `log_frequency` is given, at those steps instead; at the end of each epoch; and after each validation and test. It
    has what was recorded in `callback.training_log` since, and what `LogsyncLogger(callback)` was given. Its step is
    the number that Lightning gives its loggers, which counts from 0.

    It communicates only in hooks, which Lightning calls on every rank, so that metrics which are logged on one rank
    only cannot hang. The Trainer's optimizers are watched (`watch_optimizer`).

    Lightning's checkpoints have its state, and a `fit` from one of them continues the run, at any world size, without
    doubled entries. A checkpoint that Lightning takes at the end of a batch or epoch comes before it logs that end's
    metrics; a run that goes on from there is without them. The files are complete when `fit` returns; a `test`, or a
    `fit` of the same Trainer, that comes after it opens the run again, which counts as another start of it.

    Args:
        log_frequency: steps between logs; None leaves it to Lightning.
        sinks, run_dir, name: as `connect` takes them.
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
        self._options = {**options, "sinks": sinks, "run_dir": run_dir, "name": name}
        self._log: TrainingLog | None = None
        self._saved: dict[str, bytes] = {}  # the state of the closed log, or of a checkpoint
        self._step = 0
        self._due = False  # Lightning is about to log this step
        self._ended: int | None = None  # the epoch whose metrics Lightning is about to log

    @property
    def training_log(self) -> TrainingLog:
        """The log, from `setup` to the end of `fit`, `validate` or `test`.

        Raises:
            RuntimeError: none of them is under way.
        """
        if self._log is None:
            msg = "the log is open only while Trainer.fit(), validate() or test() runs"
            raise RuntimeError(msg)
        return self._log

    @property
    def is_open(self) -> bool:
        """Whether there is a log now."""
        return self._log is not None

    # -- Lightning's hooks -------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the log, or go on with the one of the stage before."""
        if stage == "predict" or getattr(trainer, "fast_dev_run", False):
            return
        self._log = connect(self._frequency, write="explicit", **self._options)
        if self._saved and (stage != "fit" or _step(trainer) > 0):
            self._log.load_state_dict(self._saved)
        self._due, self._ended = False, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the log."""
        log, self._log = self._log, None
        if log is not None:
            self._saved = log.state_dict()
            log.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the log, so that the other ranks hear why."""
        log, self._log = self._log, None
        if log is not None:
            log.__exit__(type(exception), exception, exception.__traceback__)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the optimizers."""
        if self._log is not None:
            with contextlib.suppress(TypeError):  # an optimizer of a kind that tells nothing of its steps
                self._log.watch_optimizer(*trainer.optimizers)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write what Lightning has logged of the batch before."""
        self._write_if_due()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Make this batch's call."""
        if self._log is None:
            return
        self._step = _step(trainer)
        ready = self._log.log_ready(self._step)
        self._due = ready if self._frequency is not None else _will_log(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what Lightning has logged of the epoch before."""
        self._write_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last batch, before Lightning logs the epoch."""
        self._write_if_due()
        self._ended = trainer.current_epoch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what Lightning has logged of the last epoch."""
        self._write_if_due()
        self._write_epoch()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the batch before, by itself."""
        self._write_if_due()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what Lightning has logged of the validation."""
        self._write_evaluation(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what Lightning has logged of the test."""
        self._write_evaluation(trainer)

    # -- its state in checkpoints ------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the log's state; never communicates."""
        return dict(self._saved if self._log is None else self._log.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was taken."""
        self._saved = dict(state_dict)
        if self._log is not None and self._saved:
            self._log.load_state_dict(self._saved)

    def _write_if_due(self) -> None:
        if self._log is not None and self._due:
            self._due = False
            self._log.write(self._step)

    def _write_epoch(self) -> None:
        if self._log is not None and self._ended is not None:
            self._log.record({"epoch": self._ended}, reduce="last", across="mean")
            self._ended = None
            self._log.write(self._step)

    def _write_evaluation(self, trainer: Trainer) -> None:
        if self._log is not None and not trainer.sanity_checking:
            self._log.write(_step(trainer))


class LogsyncLogger(Logger):
    """Takes what `self.log(...)` gives to Lightning's loggers; never communicates.

    `LogsyncLogger(callback)` records it on every rank in the callback's log, whose next entry has the newest value of
    each rank, averaged over the ranks that have one: what `sync_dist=True` would gather at each step, gathered when it
    is logged. A metric that has it is the same on all ranks, and comes through as it is. A step of your own
    (`self.log("step", ...)`) does not move the entry.

    `LogsyncLogger(run_dir=...)` by itself writes rank 0's values, as Lightning's other loggers do, with each call as an
    entry of a log of its own.

    Args:
        callback: the one that is given to the same Trainer.
        sinks, run_dir, name: of the logger's own log, as `connect` takes them.
    """

    def __init__(
        self,
        callback: LogsyncCallback | None = None,
        *,
        sinks: Sequence[SinkSpec] = ("console", "jsonl"),
        run_dir: str | PathLike[str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__()
        self._callback = callback
        self._options: dict[str, Any] = {"sinks": sinks, "run_dir": run_dir, "name": name}
        self._own: TrainingLog | None = None
        self._saved: dict[str, bytes] = {}
        self._numbers = Numbers()

    @property
    def experiment(self) -> TrainingLog | None:
        """The log; None where there is none, as on other ranks than 0 without a callback."""
        if self._callback is not None:
            return self._callback.training_log if self._callback.is_open else None
        if self._own is None and getattr(rank_zero_only, "rank", 0) == 0:
            self._own = connect(None, transport="local", **self._options)
            if self._saved:
                self._own.load_state_dict(self._saved)
        return self._own

    @property
    def save_dir(self) -> str | None:
        """The folder that the run's folder is in, None if that is not known here."""
        return None if self.experiment is None else str(Path(self.experiment.run_dir).parent)

    @property
    def name(self) -> str:
        """The run's folder: Lightning puts its checkpoints there."""
        return "" if self.experiment is None else Path(self.experiment.run_dir).name

    @property
    def version(self) -> str:
        """Empty: the run's folder is new for every run."""
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record the numbers among `metrics`; by itself, write them."""
        log = self.experiment
        if log is None:
            return
        self._numbers.record(log, metrics, across="mean")
        if self._callback is None:
            log.write(step)

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Keep the run's settings."""
        if self.experiment is not None:
            self.experiment.log_hyperparams(vars(params) if isinstance(params, Namespace) else dict(params))

    def finalize(self, status: str) -> None:
        """Close the logger's own log; what is logged later continues it."""
        own, self._own = self._own, None
        if own is not None:
            self._saved = own.state_dict()
            own.close()


def _step(trainer: Trainer) -> int:
    """Return what Lightning gives to its loggers as the step."""
    steps: int = trainer.fit_loop.epoch_loop._batches_that_stepped  # noqa: SLF001 - its own callbacks read it, too
    return steps


def _will_log(trainer: Trainer) -> bool:
    """Say whether Lightning logs after this batch; the same on all ranks, unlike what some of them have to log."""
    if trainer.fit_loop._should_accumulate() and trainer.lightning_module.automatic_optimization:  # noqa: SLF001
        return False
    every: int = vars(trainer)["log_every_n_steps"]
    return every > 0 and (_step(trainer) + 1) % every == 0
