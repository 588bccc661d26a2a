"""Text logs that know their rank: what all ranks would say is said once, and warnings come from everywhere."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

from logsync.coordinator.errors import printable
from logsync.workers.launch import Launched, own_rank

__all__ = ["RankLogger", "get_logger"]

_logger = logging.getLogger(__name__)

_VARIABLE = "LOGSYNC_LOG_RANKS"
_ALONE = Launched("", 0, 1)


def get_logger(name: str, *, all_ranks: bool = False, directory: str | PathLike[str] | None = None) -> RankLogger:
    """Return a logger whose records carry `rank` and `world_size`, for use in any process of a job.

    INFO and below go out on rank 0 only, WARNING and above on every rank. It never communicates. It hands its
    records to the handlers of `logging.getLogger(name)` and of the loggers above it, at the level that is set there,
    and changes none of them. Where nobody has configured a handler, records from INFO on go to stderr:

        2026-03-01 12:00:00,123 INFO [rank 0 of 8] train: epoch 1

    The rank is torch.distributed's once that is initialised, before that the launcher's (torchrun, Open MPI, Slurm),
    and 0 where neither says; so a logger may be made at import. A formatter of yours may use `%(rank)s` and
    `%(world_size)s`; give it `defaults={"rank": "-", "world_size": "-"}` if other loggers' records come to it too.

    The same arguments return the same object, as with `logging.getLogger`. For a single call that all ranks make,
    keep a second logger: `get_logger(name, all_ranks=True)`.

    Args:
        name: as for `logging.getLogger`, usually `__name__`.
        all_ranks: let INFO and below out on every rank. The environment has the last word: LOGSYNC_LOG_RANKS=all,
            or a list of ranks such as 0,3, says which ranks do so in all loggers of the process.
        directory: also append every rank's records, from INFO on or from the level that is set, to
            `directory/rank<R>.log`. Under `run_dir`, say. A file that cannot be written is reported once and
            never raises.

    Raises:
        TypeError, ValueError: `name` is no str, or empty: that is the root logger, which is the application's.
    """
    if not isinstance(name, str):
        msg = f"a logger's name must be a str, given {name!r} ({type(name).__name__})"
        raise TypeError(msg)
    if not name:
        msg = "get_logger() needs a name, such as __name__: the nameless logger is the root logger"
        raise ValueError(msg)
    # Made absolute now: training scripts change their directory.
    key = (name, bool(all_ranks), None if directory is None else Path(directory).expanduser().absolute())
    logger = _loggers.get(key)
    return logger if logger is not None else _loggers.setdefault(key, RankLogger(*key))


class RankLogger(logging.Logger):
    """A logger below `logging.getLogger(name)`, of the same name, that is in nobody's registry; see `get_logger`.

    Its own level and handlers, if it is given any, are its own; its filters are the named logger's.
    """

    def __init__(self, name: str, all_ranks: bool, directory: Path | None) -> None:  # noqa: FBT001 - see get_logger
        super().__init__(name)
        self._named = logging.getLogger(name)
        self.parent = self._named
        self.filters = self._named.filters  # one list, so that a filter set on either holds for both
        self._all_ranks = all_ranks
        self._directory = directory
        self._settled: Launched | None = None

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802 - logging's name
        """Say whether a record of `level` would go anywhere from this rank."""
        # Not the base's: it keeps its answers until the registry clears them, and this logger is not in it. The named
        # logger's does that for us, so that a debug() which nobody asked for costs little.
        if level < logging.INFO and not self.level and not self._named.isEnabledFor(level):
            return False
        if self.disabled or self._named.disabled or self.manager.disable >= level:
            return False
        return self._is_for_file(level) or (level >= self._level_of_handlers() and self._is_for_handlers(level))

    def makeRecord(  # noqa: N802, PLR0917 - logging's name and signature
        self,
        name: str,
        level: int,
        fn: str,
        lno: int,
        msg: object,
        args: Any,
        exc_info: Any,
        func: str | None = None,
        extra: Mapping[str, object] | None = None,
        sinfo: str | None = None,
    ) -> logging.LogRecord:
        """Add `rank` and `world_size` to the record; `extra` may have its own."""
        who = self._who()
        placed = {"rank": who.rank, "world_size": who.world_size, **(extra or {})}
        return super().makeRecord(name, level, fn, lno, msg, args, exc_info, func, placed, sinfo)

    def callHandlers(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Hand `record` to this rank's file, and to the configured handlers or to stderr."""
        level = record.levelno
        if self._directory is not None and self._is_for_file(level):
            _file_of(self._directory, self._who().rank).handle(record)
        if level < self._level_of_handlers() or not self._is_for_handlers(level):
            return
        if self.hasHandlers() or logging.lastResort is None:  # who removed the last resort wants silence
            super().callHandlers(record)
        else:
            _stderr.handle(record)

    def getChild(self, suffix: str) -> RankLogger:  # noqa: N802 - logging's name
        """Return the logger `<name>.<suffix>` with the same options."""
        return get_logger(f"{self.name}.{suffix}", all_ranks=self._all_ranks, directory=self._directory)

    def __reduce__(self) -> tuple[Any, ...]:
        """Find itself again in another process: loggers lie in datasets that go to spawned loader workers."""
        return _found_again, (self.name, self._all_ranks, self._directory)

    def _is_for_file(self, level: int) -> bool:
        return self._directory is not None and level >= self._asked_level()

    def _is_for_handlers(self, level: int) -> bool:
        return level >= logging.WARNING or self._is_chosen()

    def _level_of_handlers(self) -> int:
        return self.getEffectiveLevel() if self.hasHandlers() else self._asked_level()

    def _asked_level(self) -> int:
        """Return the level that somebody has set; INFO if there is only the root logger's initial WARNING."""
        logger: logging.Logger = self
        while not logger.level and logger.parent is not None:
            logger = logger.parent
        untouched = logger.parent is None and logger.level == logging.WARNING
        return logging.INFO if untouched else logger.level

    def _is_chosen(self) -> bool:
        rank = self._who().rank
        text = os.environ.get(_VARIABLE, "").strip()
        chosen = _ranks_of(text, rank) if text else None
        if chosen is None:
            return self._all_ranks or rank == 0
        return chosen == "all" or rank in chosen

    def _who(self) -> Launched:
        if self._settled is not None:
            return self._settled
        who = own_rank()
        if who is not None and who.launcher == "torch.distributed":
            # For good: after destroy_process_group() every spawned process would take itself for rank 0.
            self._settled = who
        return who or _ALONE


_loggers: dict[tuple[str, bool, Path | None], RankLogger] = {}
_files: dict[Path, logging.Handler] = {}


def _found_again(name: str, all_ranks: bool, directory: Path | None) -> RankLogger:  # noqa: FBT001 - from __reduce__
    return get_logger(name, all_ranks=all_ranks, directory=directory)


@lru_cache(maxsize=32)
def _ranks_of(text: str, rank: int) -> frozenset[int] | str | None:
    """Return what LOGSYNC_LOG_RANKS stands for, None if that is not clear; then rank 0 says so, once."""
    if text.lower() == "all":
        return "all"
    parts = [part.strip() for part in text.split(",")]
    if all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):  # noqa: PLR2004 - int() has a limit
        return frozenset(map(int, parts))
    if rank == 0:
        _logger.warning(
            "%s=%s is ignored: it must be 'all' or a list of ranks such as 0,3", _VARIABLE, printable(repr(text), 100)
        )
    return None


class _Line(logging.Formatter):
    """One line that says when, how bad, which rank (where there are several), who, and what."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        fields = vars(record)
        rank, world_size = fields["rank"], fields["world_size"]
        place = "" if world_size == 1 else f" [rank {rank} of {world_size}]"
        return f"{record.asctime} {record.levelname}{place} {record.name}: {record.message}"


class _Stderr(logging.Handler):
    """Write to what `sys.stderr` is at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if sys.stderr is not None:
                sys.stderr.write(f"{self.format(record)}\n")  # in one piece: ranks share it
        except Exception:  # noqa: BLE001 - as all handlers do
            self.handleError(record)


class _RankFile(logging.FileHandler):
    """Append to one rank's file."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - logging's name
        """Report the first failure; a full disk would otherwise bring a traceback for every record."""
        if not self._failed:
            self._failed = True
            _logger.error("cannot write to %s: %s; records may be missing there", self.baseFilename, sys.exc_info()[1])


def _file_of(directory: Path, rank: int) -> logging.Handler:
    """Return the handler of a rank's file, one for all loggers that share it."""
    path = directory / f"rank{rank}.log"
    handler = _files.get(path)
    if handler is not None:
        return handler
    opened: logging.Handler
    try:
        directory.mkdir(parents=True, exist_ok=True)
        opened = _RankFile(path, encoding="utf-8", errors="backslashreplace")
        opened.setFormatter(_Line())
    except OSError as error:
        _logger.error("cannot open %s, so nothing is logged there: %s", path, error)  # noqa: TRY400 - it says all
        opened = logging.NullHandler()
    kept = _files.setdefault(path, opened)
    if kept is not opened:  # another thread was first
        opened.close()
    return kept


_stderr = _Stderr()
_stderr.setFormatter(_Line())
