"""Entries as TensorBoard event files."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
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
        self._tb = _Library()
        self._file: Appender | None = None
        self._axis = Axis()

    def load(self) -> None:
        """Import tensorboard."""
        require("tensorboard", "tensorboard")
        self._tb.load()

    def open(self, run: RunInfo) -> None:
        """Cut back or move what is there, and begin a new event file."""
        self._tb.load()
        folder = run.run_dir / "tb" if self._folder is None else self._folder
        folder.mkdir(parents=True, exist_ok=True)
        old = _Old()
        if run.continues:
            old = self._kept(folder, run.next_seq)
        else:
            set_aside(folder, _our_files(folder))
        self._axis = Axis()
        for point in old.points:
            self._axis.place(point.seq, point.step)
        path = _new_file(folder)
        file = Appender(path)
        try:
            file.append(self._beginning(old))
            missing = run.unwritten(old.points[-1].seq if old.points else -1)
            if missing is not None:
                file.append(self._records_of(missing))
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            path.unlink(missing_ok=True)
            raise
        try:
            old.cut_back()  # only now: what moves to the new file is in it
        except BaseException:
            with contextlib.suppress(OSError):
                file.close()
            raise
        self._file = file

    def hyperparams(self, values: Mapping[str, object]) -> None:
        """Show them in the HPARAMS tab."""
        summary = self._tb.hparams.hparams_pb(flat(values))
        self._opened().append(self._tb.record(wall_time=time.time(), summary=summary))

    def write(self, entry: LogEntry) -> None:
        """Append the entry's points as one record, and before it one that says which entry it is."""
        self._opened().append(self._records_of(entry))

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

    def _records_of(self, entry: LogEntry) -> bytes:
        place = self._axis.place(entry.seq, entry.step)
        value = self._tb.summary.Summary.Value
        points = [value(tag=key, simple_value=number) for key, number in flat_metrics(entry).items()]
        mark = self._tb.events.SessionLog(
            status=self._tb.events.SessionLog.CHECKPOINT, msg=_text_of(_Mark(entry.seq, entry.step))
        )
        return self._tb.record(wall_time=entry.time, step=place, session_log=mark) + self._tb.record(
            wall_time=entry.time, step=place, summary=self._tb.summary.Summary(value=points)
        )

    def _beginning(self, old: _Old) -> bytes:
        now = time.time()
        start = self._tb.events.SessionLog(status=self._tb.events.SessionLog.START)
        records = [
            self._tb.record(wall_time=now, file_version="brain.Event:2"),
            self._tb.record(wall_time=now, step=_NOTHING if old.purged is None else old.purged, session_log=start),
        ]
        return b"".join([*records, *(point.read() for point in old.moved)])

    def _kept(self, folder: Path, next_seq: int) -> _Old:
        """Find what stays of our files when entries from `next_seq` on go; nothing is changed yet."""
        found: dict[Path, list[_Point]] = {}
        ends: dict[Path, int] = {}
        lost: list[int] = []
        for path in _our_files(folder):
            points, end = self._points_of(path)
            gone = next((n for n, point in enumerate(points) if point.seq >= next_seq), len(points))
            lost += [point.place for point in points[gone:]]
            ends[path] = points[gone].start if gone < len(points) else end
            found[path] = points[:gone]
        # One for each seq: a start that was killed while it opened may have left copies.
        kept = {point.seq: point for path in reversed(found) for point in reversed(found[path])}
        purged = min(lost, default=None)
        while True:  # what moves along may stand at an earlier step, if steps went back
            first = {path: _first_from(points, purged) for path, points in found.items()}
            moved = [point for path, points in found.items() for point in points[first[path] :]]
            earliest = min([*lost, *(point.place for point in moved)], default=None)
            if earliest == purged:
                break
            purged = earliest
        for path, points in found.items():
            if first[path] < len(points):
                ends[path] = points[first[path]].start
        return _Old(
            tuple(sorted(kept.values(), key=attrgetter("seq"))),
            tuple(point for point in moved if kept[point.seq] is point),
            purged,
            ends,
        )

    def _points_of(self, path: Path) -> tuple[list[_Point], int]:
        """Return a file's whole entries, each with what follows it, and where what is torn begins."""
        points: list[_Point] = []
        mark: _Mark | None = None
        end = marked_at = 0
        whole = self._whole_end(path)
        for record in _records(path):
            event = self._tb.event(record.data) if record.end <= whole else None
            if event is None:
                break
            if mark is not None:  # this is what it announced
                points.append(_Point(mark.seq, mark.step, event.step, path, marked_at, record.end))
                mark = None
            elif event.HasField("session_log"):
                mark, marked_at = _mark_of(event.session_log.msg), record.start
            elif points:
                points[-1] = points[-1]._replace(end=record.end)
            end = end if mark is not None else record.end
        return points, end

    def _whole_end(self, path: Path) -> int:
        """Return where what a crash has torn begins: only at the end, so no other checksum is looked at."""
        records = [(record.start, record.end) for record in _records(path)]
        with path.open("rb") as file:
            for start, end in reversed(records):
                file.seek(start)
                raw = file.read(end - start)
                if self._tb.framed(raw[_HEAD.size : -_TAIL]) == raw:
                    return end
        return 0


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
    """An entry in a file: its mark, its scalars, and what follows them."""

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


class _Old(NamedTuple):
    """What earlier starts left.

    Attributes:
        points: what stays.
        moved: those of them that go to the new file: a purge takes whole steps, and so a point of such a step too
            that was written before the checkpoint.
        purged: the first place on the axis to be purged, None if there is none.
        ends: where each file is to be cut.
    """

    points: tuple[_Point, ...] = ()
    moved: tuple[_Point, ...] = ()
    purged: int | None = None
    ends: Mapping[Path, int] = {}

    def cut_back(self) -> None:
        """Cut the files."""
        for path, end in self.ends.items():
            if end < path.stat().st_size:
                os.truncate(path, end)


def _first_from(points: Sequence[_Point], place: int | None) -> int:
    """Return the index of the first point at `place` or behind it."""
    return next((n for n, point in enumerate(points) if place is not None and point.place >= place), len(points))


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
        return self.framed(self.events.Event(**fields).SerializeToString())

    def framed(self, data: bytes) -> bytes:
        """Return `data` as a record: with its length and the checksums."""
        buffer = _Buffer()
        self._writer(buffer).write(data)
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
