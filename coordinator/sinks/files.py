"""Files that entries are appended to: continued, cut back or set aside when a run opens them, and never left torn."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from logsync.coordinator.errors import printable
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo

__all__ = ["Appender", "Reader", "Record", "absolute", "open_for", "replace", "set_aside"]

_logger = logging.getLogger(__name__)


class Record(NamedTuple):
    """One record as it lies in a file.

    Attributes:
        data: its bytes.
        seq: the entry's number; None for what is no entry, -1 for what belongs to the file, such as a header.
        whole: whether it can be read back; False for a torn one.
        time, attempt: the entry's, where it has them.
    """

    data: bytes
    seq: int | None
    whole: bool = True
    time: float | None = None
    attempt: int | None = None


Reader: TypeAlias = Callable[[BinaryIO], Iterator[Record]]


class Appender:
    """A file at whose end records are put, each whole or not at all.

    What was given to `append` is in the kernel's hands when it returns, and on the disk after `close`. What could
    be written only in part (a full disk) is taken back.

    Args:
        newest_seq: the last `seq` that was there when the file was opened, -1 if there was none.
    """

    def __init__(self, path: Path, newest_seq: int = -1) -> None:
        self._path = path
        self.newest_seq = newest_seq
        # Unbuffered: one write() per record, and nothing left that a later flush or close could fail to write.
        self._file: io.FileIO = path.open("ab", buffering=0)
        self._torn_at: int | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was written to the file yet; a pipe is always empty."""
        return os.fstat(self._file.fileno()).st_size == 0

    @property
    def is_regular(self) -> bool:
        """Whether this is a file proper, and no pipe or device."""
        return stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)

    def missing_entry(self, run: RunInfo) -> LogEntry | None:
        """Return the checkpoint's last entry if the run was killed before it was written here."""
        newest = self.newest_seq
        missing = run.unwritten(newest)
        if missing is None and run.resumed and 0 <= newest < run.next_seq - 1:
            _logger.warning(
                "%s ends at seq %d and is continued at seq %d: what lies between was never written",
                self._path,
                newest,
                run.next_seq,
            )
        return missing

    def append(self, data: bytes) -> None:
        """Append `data`; if that fails, leave the file as it was."""
        self._take_back_torn_record()
        start = os.fstat(self._file.fileno()).st_size
        rest = memoryview(data)
        try:
            while rest:  # a full disk takes a part and says why only when asked for the rest
                rest = rest[self._file.write(rest) :]
        except BaseException:
            if start < os.fstat(self._file.fileno()).st_size < start + len(data):
                self._torn_at = start
                with contextlib.suppress(OSError):  # then the next append or close tries again
                    self._take_back_torn_record()
            raise

    def close(self) -> None:
        """Bring the file to the disk and close it; a second call does nothing."""
        if self._file.closed:
            return
        with self._file:
            self._take_back_torn_record()
            if self.is_regular:  # a pipe cannot be synced
                os.fsync(self._file.fileno())

    def _take_back_torn_record(self) -> None:
        if self._torn_at is not None:
            self._file.truncate(self._torn_at)
            self._torn_at = None


def absolute(path: str | Path | None) -> Path | None:
    """Return where `path` is from here: training scripts change their directory."""
    return None if path is None else Path(path).expanduser().absolute()


def open_for(run: RunInfo, path: Path, read: Reader, *beside: Path, keeps_own: bool = False) -> Appender:
    """Make the folder of `path`, continue the file or set it aside, and open it for appending.

    A resumed run's file is cut back: entries from the run's first `seq` on go, and so does a torn last record.

    Args:
        read: yields the file's records in order; every byte belongs to one.
        beside: files that belong to it, and are set aside with it.
        keeps_own: of what this start of the job has stored, only a torn last record is cut off.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    newest = -1
    if path.is_file() and path.stat().st_size:
        if not run.continues or _is_anothers(path, run, read):
            set_aside(path, beside=beside)
        else:
            newest = _cut_back(path, run, read, keeps_own=keeps_own)
    return Appender(path, newest)


def _is_anothers(path: Path, run: RunInfo, read: Reader) -> bool:
    """Say whether the file is of a run before, which this one had no time to set aside: it was killed at once."""
    last = run.last_entry
    if last is None or run.begun:
        return False
    with path.open("rb") as file:
        found = next((record for record in read(file) if record.seq == last.seq), None)
    if found is None or found.time in {None, last.time}:
        return False
    # One start of the job makes an entry once. Another start may have made it again, from an earlier checkpoint; but
    # what a root that was lost had made, in a run that goes on from no checkpoint, was made in this one.
    return (run.recovered and run.first_seq == 0) or found.attempt == last.attempt


def set_aside(path: Path, files: Sequence[Path] | None = None, *, beside: Sequence[Path] = ()) -> None:
    """Rename what an earlier run left at `path` to the next free number, and say so.

    Args:
        files: if given, `path` is a folder, and only these files of it move; it stays.
        beside: files that get the same number, where there are such.
    """
    if files is not None and not files:
        return
    number = next(n for n in itertools.count(1) if not any(os.path.lexists(_numbered(p, n)) for p in (path, *beside)))
    aside = _numbered(path, number)
    if files is None:
        for other in beside:
            with contextlib.suppress(FileNotFoundError):
                other.rename(_numbered(other, number))
        path.rename(aside)
    else:
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
    _logger.warning(
        "%s held a log that this run does not continue; it is now %s. To continue a log, give the state of its "
        "checkpoint to load_state_dict() before the first log_ready()",
        path,
        aside,
    )


def replace(path: Path, data: bytes) -> None:
    """Put `data` at `path`, where a reader finds the old bytes or the new ones, never a part."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(data)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _cut_back(path: Path, run: RunInfo, read: Reader, *, keeps_own: bool) -> int:
    """Leave in the file the records before the first that is to be replaced, and no torn one.

    Returns:
        The last `seq` that is left, -1 if there is none.
    """

    def is_replaced(seq: int, attempt: int | None) -> bool:
        if keeps_own:
            return 0 < run.first_seq <= seq and attempt != run.attempt
        return seq >= run.next_seq

    with path.open("r+b") as file:
        keep, torn, strangers, newest = _records_to_keep(read(file), is_replaced)
        if keep < file.seek(0, os.SEEK_END):
            file.truncate(keep)
            _logger.info("cut %s back to %d bytes, to continue it behind seq %d", path, keep, newest)
        file.seek(max(keep - 1, 0))
        if file.read(1) not in {b"", b"\n"}:  # killed between a line and its end
            file.write(b"\n")
    if torn:
        _logger.warning("dropped the torn last line of %s: %s", path, printable(repr(torn), 100))
    if strangers:
        _logger.warning("%s has %d lines that are no entries of logsync; they are kept as they are", path, strangers)
    return newest


def _records_to_keep(
    records: Iterator[Record], is_replaced: Callable[[int, int | None], bool]
) -> tuple[int, bytes, int, int]:
    """Return how many bytes to keep, the torn last record if there is one, how many have no `seq`, the last `seq`."""
    keep = strangers = 0
    newest = before = -1
    last = Record(b"", None)
    for last in records:
        if last.seq is not None and is_replaced(last.seq, last.attempt):
            return keep, b"", strangers, newest
        keep += len(last.data)
        strangers += last.seq is None
        before, newest = newest, newest if last.seq is None else last.seq
    if last.whole:
        return keep, b"", strangers, newest
    return keep - len(last.data), last.data, strangers - (last.seq is None), before
