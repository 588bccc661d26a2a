"""Entries as a Weights & Biases run."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.trackers import LastLogged, Replay, flat, require
from logsync.coordinator.sinks.wandb_files import history
from logsync.coordinator.waits import flat_metrics

__all__ = ["WandbSink"]

# Within what close() may take in all, and W&B's own process keeps the job's for no longer.
_INIT_S = 8.0
_FINISH_S = 8.0
_HELD = "logsync/held"


class WandbSink:
    """One W&B run for the job, in the project given, or W&B's own choice (`WANDB_PROJECT`).

    The run's id is the log's `run_id`, so that a resumed job continues it. Charts are drawn over `step`, which is
    logged with every entry, and not over W&B's count of calls. W&B cannot take points back: what it holds already when
    a run resumes is not logged again, so no point is doubled, and the old ones stay where new ones would lie.

    `WANDB_MODE`, `WANDB_DIR`, `WANDB_NAME`, `WANDB_RUN_ID` and W&B's other variables are honoured; files go to
    `run_dir/wandb` and the name is the run folder's otherwise. Nobody is ever asked for a key: without one, and not
    offline, `open` raises and says so. It gives up on a server that is silent for 8 s (`WANDB_INIT_TIMEOUT`), and tries
    again later; `close` on uploads that take longer than 8 s (`WANDB_FINISH_TIMEOUT`), which stay on disk for
    `wandb sync`. The console is not captured unless `WANDB_CONSOLE` says so, and W&B's reports of its own errors are
    off unless `WANDB_ERROR_REPORTING` says so.
    """

    def __init__(self, project: str | None = None) -> None:
        self._project = project
        self._run: Any = None
        self._replay: Replay | None = None
        self._held = LastLogged()
        self._tells_what_it_holds = False

    def load(self) -> None:
        """Import wandb."""
        require("wandb", "wandb")
        importlib.import_module("wandb")

    def open(self, run: RunInfo) -> None:
        """Begin the run or continue it.

        Raises:
            RuntimeError: there is no API key, and W&B is neither offline nor disabled.
        """
        self.load()
        wandb: Any = importlib.import_module("wandb")
        if "WANDB_SERVICE" not in os.environ:  # W&B's own process does not run yet
            # Where the host for its own errors cannot be reached, as on many clusters, it holds up the job's end.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
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
        try:
            self._begin(run)
        except BaseException:
            with contextlib.suppress(Exception):
                self.close()
            raise

    def _begin(self, run: RunInfo) -> None:
        # Every chart over our step. W&B's own counts calls, refuses to go back, and knows no fractions.
        for name in ("step", "seq", _HELD):
            self._run.define_metric(name, hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._held, self._tells_what_it_holds = _held(self._run) if run.resumed else (LastLogged(), False)
        self._replay = Replay("W&B", run, self._held)
        missing = self._held.missing_entry(run)
        if missing is not None:
            self.write(missing)

    def hyperparams(self, values: Mapping[str, object]) -> None:
        """Put them into the run's config."""
        self._opened().config.update(flat(values), allow_val_change=True)

    def write(self, entry: LogEntry) -> None:
        """Log the entry, unless the run holds it from before a resume."""
        run = self._opened()
        if self._replay is not None and self._replay.covers(entry):
            self._tells_what_it_holds = self._tells_what_it_holds or entry.seq > self._held.seq
            self._held = self._held.without(entry.seq)
            return
        before, held = self._held.step, self._held.and_then(entry.seq, entry.step)
        step = entry.step
        if step is None:  # a point that lacks its axis is not drawn
            step = entry.seq if before is None else before
            held = msgspec.structs.replace(held, step=before)
        row: dict[str, float | str] = {**flat_metrics(entry), "step": step, "seq": entry.seq}
        # Where rows alone do not tell it; of a run that is resumed online, W&B shows no other row than the newest.
        if self._tells_what_it_holds or held != LastLogged(entry.seq, held.step):
            self._tells_what_it_holds = True
            row[_HELD] = msgspec.json.encode(held).decode()
        run.log(row)
        self._held = held

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


def _held(run: Any) -> tuple[LastLogged, bool]:
    """Return what W&B holds from before the resume, and whether it was told to W&B in its rows."""
    held = LastLogged()
    if run.offline:  # nobody else knows
        for row in history(Path(run.dir).parents[1], run.id):
            if _HELD in row:
                held = msgspec.json.decode(row[_HELD], type=LastLogged)
            elif "seq" in row:
                held = held.and_then(int(row["seq"]), row.get("step"))
        return held, False
    seq, step, told = (run.summary.get(key) for key in ("seq", "step", _HELD))
    if isinstance(told, str):
        return msgspec.json.decode(told, type=LastLogged), True
    return (held if seq is None else LastLogged(int(seq), step)), False


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
