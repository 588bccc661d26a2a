"""`connect`: check what the user asked for, find the other ranks, and open the log."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

from logsync.coordinator.errors import ConfigError
from logsync.coordinator.frequency import FrequencyManager, FrequencyType, LoggingModeType, LogStepType
from logsync.coordinator.host import reserve_run_dir
from logsync.coordinator.messages import INT64_MAX, MAX_PATH, Settings
from logsync.coordinator.sinks.base import Sink, SinkSpec
from logsync.coordinator.sinks.isolation import SinkSet
from logsync.workers.follower import FollowerLog
from logsync.workers.hosting import Hosting, HostPlan, Placing
from logsync.workers.launch import choose_following, choose_transport, restart_count
from logsync.workers.training_log import TrainingLog, open_logs
from logsync.workers.transports.base import Transport

__all__ = ["connect"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,62}[A-Za-z0-9])?")
_LONGEST_S = 30 * 24 * 3600.0
_LONGEST_LEASE = 1_000_000


@overload
def connect(
    log_frequency: LogStepType,
    *,
    mode: LoggingModeType = ...,
    frequency_type: FrequencyType = ...,
    transport: str | Transport = ...,
    sinks: Sequence[SinkSpec] = ...,
    run_dir: str | PathLike[str] | None = ...,
    name: str | None = ...,
    write: Literal["auto", "explicit"] = ...,
    timeout: float = ...,
    warn_after: float = ...,
    on_failure: Literal["raise", "detach"] = ...,
    max_lease: int = ...,
    rank: int | None = ...,
    world_size: int | None = ...,
    process_group: Any = ...,
    lockstep: Literal[True] = ...,
    label: None = ...,
) -> TrainingLog: ...


@overload
def connect(
    log_frequency: LogStepType,
    *,
    lockstep: Literal[False],
    label: str | None = ...,
    transport: str,
    name: str | None = ...,
    mode: LoggingModeType = ...,
    frequency_type: FrequencyType = ...,
    sinks: Sequence[SinkSpec] = ...,
    run_dir: str | PathLike[str] | None = ...,
    write: Literal["auto", "explicit"] = ...,
    timeout: float = ...,
    warn_after: float = ...,
    on_failure: Literal["raise", "detach"] = ...,
    max_lease: int = ...,
) -> FollowerLog: ...


def connect(
    log_frequency: LogStepType,
    *,
    mode: LoggingModeType = "exact",
    frequency_type: FrequencyType = "step",
    transport: str | Transport = "auto",
    sinks: Sequence[SinkSpec] = ("console", "jsonl"),
    run_dir: str | PathLike[str] | None = None,
    name: str | None = None,
    write: Literal["auto", "explicit"] = "auto",
    timeout: float = 1800.0,
    warn_after: float = 60.0,
    on_failure: Literal["raise", "detach"] = "raise",
    max_lease: int = 1000,
    rank: int | None = None,
    world_size: int | None = None,
    process_group: Any = None,
    lockstep: bool = True,
    label: str | None = None,
) -> TrainingLog | FollowerLog:
    """Open a log that all ranks share. Collective: every rank calls it, for the same logs in the same order.

    Args:
        log_frequency: log every so many of `frequency_type`; None never logs but by `write`.
        mode: when a log is due: "exact", "on_update", "on_change"; see `FrequencyManager`.
        frequency_type: what steps count: "step" (optimizer steps), "batch" (micro-batches) or "epoch" (floats too).
        transport: "auto" takes torch.distributed if it is initialised, a Ray Train worker's context if there is one,
            and otherwise the single-node fallback;
            "collective", "ray", "local", or an object that is a `Transport`. "collective:tree" gathers frames on the
            first rank of each node before they go to rank 0, "collective:flat" never does; without either it is a tree
            from 256 ranks on.
        sinks: where rank 0 writes: "console", "jsonl", "jsonl:PATH", a callable taking a `LogEntry`, or an object
            with open, write and close.
        run_dir: the folder for files; runs/<start time>-<name> if not given, or the loaded state's.
        name: tells logs of one job apart; "train" if not given.
        write: "auto" merges and writes when `log_ready` is True; "explicit" leaves that to `write`.
        timeout: seconds that a round waits for the slowest rank.
        warn_after: seconds after which a wait is told to the log, with the ranks that are missing, and again every
            so many seconds.
        on_failure: what a lost group does: "raise" a `TransportError` at the call that notices it and at every later
            one, or "detach": say so once in the log, answer False from then on, and let the job train on. Rank 0
            goes on logging its own values at the cadence, marked partial; what `write` returns is this rank's own.
        max_lease: the most calls in a row that are answered without communication.
        rank, world_size: this process's, for transport "ray" outside Ray Train; checked against what others find.
        process_group: the ranks that share the log; all of torch.distributed's if not given.
        lockstep: False for a process that follows the log of a Ray job without being one of its ranks, at a pace of its
            own; see `FollowerLog`. This call is not collective then and never waits, and what the ranks were given
            counts.
        label: stands before the names of a follower's metrics.

    Returns:
        The log; use it in a `with` block, or call `close()`.

    Raises:
        TypeError, ValueError: an argument makes no sense.
        ConfigError: a sink's package is not installed where rank 0 runs; on the other ranks none is needed.
        LaunchError: a launcher started several ranks but nothing connects them, or its variables are half there.
        ConfigMismatch: ranks gave different settings.
        CollectiveSetupError: the gloo group could not be built.
        RoundTimeout: a rank did not come within `timeout`.
    """
    checked = FrequencyManager(log_frequency, mode, frequency_type)
    settings = Settings(
        name=_checked_name(name),
        log_frequency=_fits_int64(checked.log_frequency),
        mode=checked.mode,
        frequency_type=checked.frequency_type,
        write=_checked_write(write),
        timeout=_checked_seconds("timeout", timeout),
        max_lease=_checked_lease(max_lease),
        on_failure=_checked_on_failure(on_failure),
    )
    sink_set = SinkSet(sinks)
    if not lockstep:
        label = None if label is None else _checked_label(label)
        following = choose_following(
            transport, settings.name, rank=rank, world_size=world_size, process_group=process_group
        )
        return FollowerLog(following, settings.name, label)
    if label is not None:
        msg = f"label={label!r} was given to a rank: only a follower, with lockstep=False, has one"
        raise ConfigError(msg)
    folder = None if run_dir is None else _checked_folder(run_dir)
    warn_after = _checked_seconds("warn_after", warn_after)
    found = choose_transport(
        transport,
        timeout_s=settings.timeout,
        warn_after_s=warn_after,
        rank=rank,
        world_size=world_size,
        process_group=process_group,
    )
    if folder is not None:
        _refuse_shared_folder(folder, found.rank)
    plan = None
    if found.rank == 0:
        reserved = reserve_run_dir(settings.name) if folder is None and _may_use_files(sinks) else None
        plan = _plan(settings, sinks, folder, reserved, found.world_size)
    host: Hosting | None
    if isinstance(found, Placing):
        host = found.place(settings.name, timeout_s=settings.timeout, warn_after_s=warn_after, plan=plan)
    else:
        host = None if plan is None else plan.begin(sink_set)
    log = TrainingLog(found, settings, host, given_run_dir=folder, warn_after_s=warn_after)
    log._open(_version())  # noqa: SLF001 - half of the constructor: it communicates
    return log


def _refuse_shared_folder(folder: str, rank: int) -> None:
    """Two logs in one folder would take each other's files; every rank sees that alike."""
    for log in open_logs():
        given = log.given_run_dir
        if given is not None and log.rank == rank and Path(given).resolve() == Path(folder).resolve():
            msg = f"run_dir {folder} is in use by the open log {log.name!r}; give every log a folder of its own"
            raise ConfigError(msg)


def _may_use_files(sinks: Sequence[SinkSpec]) -> bool:
    """Say whether a sink may want the run's folder; the console and plain callables do not."""
    return any(spec != "console" and (isinstance(spec, (str, Sink)) or not callable(spec)) for spec in sinks)


def _plan(
    settings: Settings,
    sinks: Sequence[SinkSpec],
    given: str | None,
    reserved: tuple[str, Path | None] | None,
    world_size: int,
) -> HostPlan:
    run_dir, made = reserved or (given or "runs", None)
    return HostPlan(
        settings,
        tuple(sinks),
        world_size,
        run_dir=run_dir,
        keep_run_dir=given is not None,
        reserved=made,
        attempt=restart_count(),
    )


def _version() -> str:
    try:
        return version("logsync")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _checked_name(name: object) -> str:
    if name is None:
        return "train"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        msg = (
            f"name must be 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit (it names a "
            f"folder), given {name!r}"
        )
        raise ConfigError(msg)
    return name


def _checked_label(label: object) -> str:
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        msg = (
            f"label must be 1 to 64 letters, digits, '.', '_', '/' or '-', starting and ending with a letter or digit, "
            f"given {label!r}"
        )
        raise ConfigError(msg)
    return label


def _checked_write(write: object) -> Literal["auto", "explicit"]:
    if write == "auto":
        return "auto"
    if write == "explicit":
        return "explicit"
    msg = f"write must be 'auto' or 'explicit', given {write!r}"
    raise ConfigError(msg)


def _checked_on_failure(on_failure: object) -> Literal["raise", "detach"]:
    if on_failure == "raise":
        return "raise"
    if on_failure == "detach":
        return "detach"
    msg = f"on_failure must be 'raise' or 'detach', given {on_failure!r}"
    raise ConfigError(msg)


def _checked_seconds(name: str, seconds: object) -> float:
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        msg = f"{name} must be a number of seconds, given {seconds!r} ({type(seconds).__name__})"
        raise TypeError(msg)
    if not 0 < seconds <= _LONGEST_S:
        msg = f"{name} must be greater than 0 and at most {_LONGEST_S:.0f} seconds, given {_shown(seconds)}"
        raise ConfigError(msg)
    return float(seconds)


def _checked_lease(max_lease: object) -> int:
    if isinstance(max_lease, bool) or not isinstance(max_lease, int):
        msg = f"max_lease must be an int, given {max_lease!r} ({type(max_lease).__name__})"
        raise TypeError(msg)
    if not 0 <= max_lease <= _LONGEST_LEASE:
        msg = f"max_lease must be from 0 to {_LONGEST_LEASE} calls, given {_shown(max_lease)}"
        raise ConfigError(msg)
    return max_lease


def _shown(number: float) -> str:
    """Return the number for a message; one of thousands of digits does not belong in it."""
    return str(number) if abs(number) <= INT64_MAX or isinstance(number, float) else "an int beyond int64"


def _checked_folder(run_dir: str | PathLike[str]) -> str:
    folder = str(Path(run_dir).absolute())
    try:
        size = len(folder.encode())
    except UnicodeEncodeError:
        msg = f"run_dir must be a path in UTF-8, given {folder!r}"
        raise ConfigError(msg) from None
    if size > MAX_PATH:
        msg = f"run_dir has {size} bytes, {MAX_PATH} are the most"
        raise ConfigError(msg)
    return folder


def _fits_int64(log_frequency: LogStepType) -> LogStepType:
    if isinstance(log_frequency, int) and log_frequency > INT64_MAX:
        msg = f"log frequency must be at most 2**63 - 1, given an int of {log_frequency.bit_length()} bits"
        raise ConfigError(msg)
    return log_frequency
