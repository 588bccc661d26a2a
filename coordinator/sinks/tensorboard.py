"""Entries as TensorBoard event files."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from logsync.coordinator.errors import Step
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.files import Appender, absolute, set_aside
from logsync.coordinator.sinks.trackers import Axis, flat, require
from logsync.coordinator.waits import flat_metrics

__all__ = ["TensorboardSink"]

_OURS = ".logsync"  # ends the names of our files
_PREFIX = "events.out.tfevents."
# Readers purge only from the second START on, so there must be a first one, and it must purge nothing.
_NOTHING = 2**63 - 1
_HEAD = struct.Struct("<QI")  # a record is its length, that length's checksum, the data, the data's checksum
_TAIL = 4
_LONGEST = 1 << 30


class TensorboardSink:
    """Scalars, and hyperparameters for the HPARAMS tab, in `run_dir/tb` or the folder that is given.

    A point stands at the entry's step and time. TensorBoard's steps are whole numbers: epochs with a fraction stand at
    millionths (epoch 1.5 at 1,500,000, shown as 1.5M), an entry without a step where the one before it stands (at its
    `seq` if none had a step). It keeps values as 32-bit floats. Every point is in the kernel's hands when `write`
    returns, and on the disk after `close`.

    A resumed run cuts its old event files back to its first `seq`, and a TensorBoard that has read them already is told
    to forget the same points (what is known as `purge_step`); its fast reader, the default, does so only where the
    same steps come again, or when it is restarted. A run that is not resumed moves event files of an earlier one to
    `tb.1`, or the next free number. Event files of other programs in the folder are not touched.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._folder = absolute(folder)
        require("tensorboard", "tensorboard")
        self._tb = _Library()
        self._file: Appender | None = None
        self._axis = Axis()

    def load(self) -> None:
        """Import tensorboard."""
        self._tb.load()

    def open(self, run: RunInfo) -> None:
        """Cut back or move what is there, and begin a new event file."""
        self._tb.load()
        folder = run.run_dir / "tb" if self._folder is None else self._folder
        folder.mkdir(parents=True, exist_ok=True)
        kept: list[_Point] = []
        purged = None
        if run.continues:
            kept, purged = self._cut_back(folder, run.next_seq)
        else:
            set_aside(folder, _our_files(folder))
        self._axis = Axis()
        for point in kept:
            self._axis.place(point.seq, point.step)
        path = _new_file(folder)
        file = Appender(path)
        try:
            file.append(self._beginning(kept, purged))
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            path.unlink(missing_ok=True)
            raise
        self._file = file
        missing = run.unwritten(kept[-1].seq if kept else -1)
        if missing is not None:
            self.write(missing)

    def hyperparams(self, values: Mapping[str, object]) -> None:
        """Show them in the HPARAMS tab."""
        summary = self._tb.hparams.hparams_pb(flat(values))
        self._opened().append(self._tb.record(wall_time=time.time(), summary=summary))

    def write(self, entry: LogEntry) -> None:
        """Append the entry's points as one record, and before it one that says which entry it is."""
        file = self._opened()
        place = self._axis.place(entry.seq, entry.step)
        value = self._tb.summary.Summary.Value
        points = [value(tag=key, simple_value=number) for key, number in flat_metrics(entry).items()]
        mark = self._tb.events.SessionLog(
            status=self._tb.events.SessionLog.CHECKPOINT, msg=_text_of(_Mark(entry.seq, entry.step))
        )
        file.append(
            self._tb.record(wall_time=entry.time, step=place, session_log=mark)
            + self._tb.record(wall_time=entry.time, step=place, summary=self._tb.summary.Summary(value=points))
        )

    def close(self) -> None:
        """Bring the file to the disk and close it; a second call does nothing."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _opened(self) -> Appender:
        if self._file is None:
            msg = "write() on a TensorboardSink that is not open"
            raise ValueError(msg)
        return self._file

    def _beginning(self, kept: list[_Point], purged: int | None) -> bytes:
        now = time.time()
        start = self._tb.events.SessionLog(status=self._tb.events.SessionLog.START)
        records = [
            self._tb.record(wall_time=now, file_version="brain.Event:2"),
            self._tb.record(wall_time=now, step=_NOTHING if purged is None else purged, session_log=start),
        ]
        if purged is not None:
            # A purge takes whole steps, but an entry of the same step may have been written before the checkpoint.
            records += [point.read() for point in kept if point.place >= purged]
        return b"".join(records)

    def _cut_back(self, folder: Path, next_seq: int) -> tuple[list[_Point], int | None]:
        """Cut entries from `next_seq` on off our files.

        Returns:
            The entries that stay, and the first place on the axis that lost a point, if one did.
        """
        kept: list[_Point] = []
        lost: list[int] = []
        for path in _our_files(folder):
            keep = 0
            points: list[_Point] = []
            was_mark = False
            for record in _records(path):
                event = self._tb.event(record.data)
                if event is None:
                    break
                mark = _mark_of(event.session_log.msg) if event.HasField("session_log") else None
                if mark is not None:
                    points.append(_Point(mark.seq, mark.step, event.step, path, record.start, record.end))
                elif was_mark:
                    points[-1] = points[-1]._replace(end=record.end)
                was_mark = mark is not None
                keep = record.end
            gone = next((n for n, point in enumerate(points) if point.seq >= next_seq), len(points))
            lost += [point.place for point in points[gone:]]
            if gone < len(points):
                keep = points[gone].start
            kept += points[:gone]
            if keep < path.stat().st_size:
                os.truncate(path, keep)
        return kept, min(lost, default=None)


_MARK = "logsync "


class _Mark(msgspec.Struct, array_like=True):
    seq: int
    step: Step


_mark = msgspec.json.Decoder(_Mark)


def _text_of(mark: _Mark) -> str:
    return _MARK + msgspec.json.encode(mark).decode()


def _mark_of(text: str) -> _Mark | None:
    if not text.startswith(_MARK):
        return None
    try:
        return _mark.decode(text[len(_MARK) :])
    except msgspec.DecodeError:
        return None


class _Point(NamedTuple):
    """An entry in a file: its mark and its scalars."""

    seq: int
    step: Step
    place: int
    path: Path
    start: int
    end: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.end - self.start)


class _Record(NamedTuple):
    start: int
    end: int
    data: bytes


def _records(path: Path) -> Iterator[_Record]:
    """Yield the records of an event file up to the first that is torn."""
    with path.open("rb") as file:
        start = 0
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            length, _ = _HEAD.unpack(head)
            if not 0 < length <= _LONGEST:
                return
            data = file.read(length)
            if len(data) < length or len(file.read(_TAIL)) < _TAIL:
                return
            end = file.tell()
            yield _Record(start, end, data)
            start = end


class _Library:
    """What is used of the package tensorboard. Its own writer has a thread and dies of its first error."""

    def load(self) -> None:
        self.events = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self.summary = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self.hparams = importlib.import_module("tensorboard.plugins.hparams.summary_v2")
        self._writer = importlib.import_module("tensorboard.summary.writer.record_writer").RecordWriter
        self._undecodable = importlib.import_module("google.protobuf.message").DecodeError

    def event(self, data: bytes) -> Any:
        """Return the event in `data`, or None if there is none."""
        try:
            return self.events.Event.FromString(data)
        except self._undecodable:
            return None

    def record(self, **fields: Any) -> bytes:
        """Return an event as it lies in a file."""
        buffer = _Buffer()
        self._writer(buffer).write(self.events.Event(**fields).SerializeToString())
        return bytes(buffer.data)


class _Buffer:
    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data


def _our_files(folder: Path) -> list[Path]:
    """Return our event files in the order in which TensorBoard reads them."""
    return sorted(path for path in folder.glob(f"{_PREFIX}*{_OURS}") if path.is_file())


def _new_file(folder: Path) -> Path:
    """Return a name that TensorBoard reads after all the others, whatever this host's clock says."""
    stamp = int(time.time())
    others = [path.name.removeprefix(_PREFIX)[:10] for path in folder.glob(f"{_PREFIX}*")]
    stamp = max([stamp, *(int(other) + 1 for other in others if other.isdecimal())])
    return folder / f"{_PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}{_OURS}"
