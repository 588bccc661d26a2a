"""Entries as a Weights & Biases run."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.trackers import LastLogged, Replay, flat, require
from logsync.coordinator.sinks.wandb_files import history
from logsync.coordinator.waits import flat_metrics

__all__ = ["WandbSink"]

_INIT_S = 30.0
_FINISH_S = 30.0


class WandbSink:
    """One W&B run for the job, in the project given, or W&B's own choice (`WANDB_PROJECT`).

    The run's id is the log's `run_id`, so that a resumed job continues it. Charts are drawn over `step`, which is
    logged with every entry, and not over W&B's count of calls. W&B cannot take points back: what it holds already when
    a run resumes is not logged again, so no point is doubled, and the old ones stay where new ones would lie.

    `WANDB_MODE`, `WANDB_DIR`, `WANDB_NAME`, `WANDB_RUN_ID` and W&B's other variables are honoured; files go to
    `run_dir/wandb` and the name is the run folder's otherwise. Nobody is ever asked for a key: without one, and not
    offline, `open` raises and says so. It gives up on a server that is silent for 30 s (`WANDB_INIT_TIMEOUT`), `close`
    on uploads that take longer than 30 s (`WANDB_FINISH_TIMEOUT`); those stay on disk for `wandb sync`. The console is
    not captured unless `WANDB_CONSOLE` says so.
    """

    def __init__(self, project: str | None = None) -> None:
        self._project = project
        require("wandb", "wandb")
        self._run: Any = None
        self._replay: Replay | None = None
        self._last_step: int | float | None = None

    def load(self) -> None:
        """Import wandb."""
        importlib.import_module("wandb")

    def open(self, run: RunInfo) -> None:
        """Begin the run or continue it.

        Raises:
            RuntimeError: there is no API key, and W&B is neither offline nor disabled.
        """
        wandb: Any = importlib.import_module("wandb")
        mode = "offline" if wandb.run is not None and wandb.run.offline else None
        if mode is None and not _may_log_in(wandb):
            msg = (
                "W&B has no API key, and nobody is asked for one here. Run `wandb login` once on rank 0's host, or set "
                "WANDB_API_KEY; WANDB_MODE=offline keeps the run on disk for `wandb sync`, WANDB_MODE=disabled drops it"
            )
            raise RuntimeError(msg)
        run.run_dir.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self._project,
            id=None if "WANDB_RUN_ID" in os.environ else run.run_id or None,
            name=None if "WANDB_NAME" in os.environ else run.run_dir.name,
            dir=None if "WANDB_DIR" in os.environ else str(run.run_dir),
            resume="allow",
            mode=mode,
            settings=wandb.Settings(**_settings()),
        )
        # Every chart over our step. W&B's own counts calls, refuses to go back, and knows no fractions.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("seq", hidden=True)
        self._run.define_metric("*", step_metric="step")
        held = _held(self._run) if run.resumed else None
        self._replay = Replay("W&B", run, held)
        self._last_step = None if held is None else held.step
        missing = run.unwritten(-1 if held is None else held.seq)
        if missing is not None:
            self.write(missing)

    def hyperparams(self, values: Mapping[str, object]) -> None:
        """Put them into the run's config."""
        self._opened().config.update(flat(values), allow_val_change=True)

    def write(self, entry: LogEntry) -> None:
        """Log the entry, unless the run holds it from before a resume."""
        run = self._opened()
        if self._replay is not None and self._replay.covers(entry):
            return
        step = entry.step
        if step is None:  # a point that lacks its axis is not drawn
            step = entry.seq if self._last_step is None else self._last_step
        else:
            self._last_step = step
        run.log({**flat_metrics(entry), "step": step, "seq": entry.seq})

    def close(self) -> None:
        """Finish the run; what was not uploaded in time stays on disk. A second call does nothing."""
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()

    def _opened(self) -> Any:
        if self._run is None:
            msg = "write() on a WandbSink that is not open"
            raise ValueError(msg)
        return self._run


def _held(run: Any) -> LastLogged | None:
    """Return the newest entry that W&B holds from before the resume."""
    if run.offline:  # nobody else knows
        last = None
        for row in history(Path(run.dir).parents[1], run.id):
            last = row if "seq" in row else last
    else:
        last = {key: run.summary.get(key) for key in ("seq", "step")}
    if last is None or last["seq"] is None:
        return None
    return LastLogged(int(last["seq"]), last.get("step"))


def _settings() -> dict[str, object]:
    """Return settings that keep W&B off the console and out of the way, where the user has not chosen otherwise."""
    wanted: dict[str, object] = {
        "console": "off",
        "init_timeout": _INIT_S,
        "finish_timeout": _FINISH_S,
        "finish_timeout_raises": True,
        "reinit": "create_new",
    }
    return {name: value for name, value in wanted.items() if f"WANDB_{name.upper()}" not in os.environ}


def _may_log_in(wandb: Any) -> bool:
    """Say whether W&B needs no key, or has one; never asks anybody."""
    settings = wandb.setup().settings
    if wandb.run is not None or settings.mode in {"offline", "disabled", "dryrun"}:
        return True
    return bool(wandb.login(prompt=False, verify=False))
