"""The file metrics.jsonl: what is in a line, and that it survives crashes, full disks and restarts."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logsync.coordinator.messages import RESERVED, LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.isolation import SinkSet
from logsync.coordinator.sinks.jsonl import JsonlSink

names = st.text(min_size=1, max_size=20).filter(lambda name: name.isprintable() and name not in RESERVED)
steps = st.none() | st.integers(0, 2**63 - 1) | st.floats(0, allow_infinity=False)


def entry(seq: int, **changes: object) -> LogEntry:
    plain = LogEntry(seq=seq, step=seq * 10, time=1.5, attempt=0, calls=10, world_size=2, metrics={"loss": seq / 3})
    return msgspec.structs.replace(plain, **changes)


def run(run_dir: Path, next_seq: int = 0, *, resumed: bool = False) -> RunInfo:
    return RunInfo(run_dir=run_dir, name="train", attempt=0, world_size=2, next_seq=next_seq, resumed=resumed)


def write(info: RunInfo, *entries: LogEntry, path: Path | str | None = None) -> None:
    sink = JsonlSink(path)
    sink.open(info)
    for one in entries:
        sink.write(one)
    sink.close()


def strict(line: str | bytes) -> dict[str, Any]:
    """Parse as standard JSON, which has no NaN."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(constant)

    parsed = json.loads(line, parse_constant=refuse)
    assert isinstance(parsed, dict)
    return parsed


def seqs(path: Path) -> list[int | None]:
    """Return every line's seq; fail if the file does not end with a whole line."""
    text = path.read_bytes()
    assert not text or text.endswith(b"\n")
    return [strict(line).get("seq") for line in text.splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


# What is in a line


def test_a_plain_entry_is_its_head_and_then_its_metrics_in_order(tmp_path: Path, file: Path) -> None:
    write(run(tmp_path), entry(7, metrics={"train/loss": 0.5, "a": 2.0}))

    assert file.read_text() == '{"seq":7,"step":70,"time":1.5,"attempt":0,"train/loss":0.5,"a":2.0}\n'


def test_what_is_notable_follows_under_the_reserved_names(tmp_path: Path, file: Path) -> None:
    metrics = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0}
    write(run(tmp_path), entry(0, metrics=metrics, partial=True, ranks={"d": 1}, nan_ranks={"a": (0, 3), "b": (1,)}))

    line = strict(file.read_bytes())
    assert list(line)[4:] == ["a", "b", "c", "d", "partial", "calls", "ranks", "nonfinite", "nan_ranks"]
    assert [line[key] for key in "abcd"] == [None, None, None, 1.0]
    assert line["partial"] is True
    assert line["calls"] == 10
    assert line["ranks"] == {"d": 1}
    assert line["nonfinite"] == {"a": "nan", "b": "inf", "c": "-inf"}
    assert line["nan_ranks"] == {"a": [0, 3], "b": [1]}
    assert set(line) - RESERVED == set(metrics)


@given(metrics=st.dictionaries(names, st.floats()), step=steps, time=st.floats(0, 1e11))
def test_every_number_comes_back_exactly(metrics: dict[str, float], step: float | None, time: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(run(Path(folder)), entry(0, step=step, time=time, metrics=metrics))
        line = strict(Path(folder, "metrics.jsonl").read_bytes())

    assert line["step"] == step
    assert type(line["step"]) is type(step)
    assert line["time"] == time
    for key, value in metrics.items():
        kind = line.get("nonfinite", {}).get(key)
        assert line[key] is None if kind else line[key].hex() == value.hex(), key
        assert math.isfinite(value) == (kind is None)
        assert kind is None or repr(float(kind)) == repr(value)


def test_a_line_break_in_a_name_does_not_break_the_line(tmp_path: Path, file: Path) -> None:
    write(run(tmp_path), entry(0, metrics={"a\nb\r\u2028": 1.0}))

    assert file.read_bytes().count(b"\n") == 1
    assert strict(file.read_bytes())["a\nb\r\u2028"] == 1.0


def test_hyperparameters_are_a_file_beside_it_and_whole_at_any_time(tmp_path: Path, file: Path) -> None:
    sink = JsonlSink()
    sink.open(run(tmp_path))
    sink.hyperparams({"lr": 0.1, "optimizer": {"name": "adam"}})
    sink.hyperparams({"lr": 0.2, "optimizer": {"name": "sgd"}})
    sink.close()

    assert strict((tmp_path / "hyperparams.json").read_bytes()) == {"lr": 0.2, "optimizer": {"name": "sgd"}}
    assert file.read_bytes() == b""
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "hyperparams.json"}


def test_hyperparameters_are_valid_json_whatever_they_are(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "my.jsonl")
    sink.open(run(tmp_path / "unused"))
    sink.hyperparams({"betas": (0.9, 0.99), "path": Path("x"), "none": None, "nan": math.nan, "kind": int})
    sink.close()

    found = strict((tmp_path / "hyperparams.json").read_bytes())
    assert found == {"betas": [0.9, 0.99], "path": "x", "none": None, "nan": None, "kind": "<class 'int'>"}


# Where it goes


def test_a_path_of_ones_own_is_used_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "my.jsonl"
    write(run(tmp_path / "unused"), entry(0), path=path)

    assert seqs(path) == [0]
    assert not (tmp_path / "unused").exists()


def test_a_relative_path_means_where_the_sink_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path)
    sink = JsonlSink("my.jsonl")
    monkeypatch.chdir(tmp_path / "later")

    sink.open(run(tmp_path / "unused"))
    sink.write(entry(0))
    sink.close()

    assert seqs(tmp_path / "my.jsonl") == [0]


def test_each_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path, file: Path) -> None:
    sink = JsonlSink()
    sink.open(run(tmp_path))
    for seq in range(5):
        sink.write(entry(seq))
        assert seqs(file) == list(range(seq + 1))
    sink.close()


def test_a_pipe_can_be_written_to(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write(run(tmp_path), entry(0), path=fifo)
        write(run(tmp_path, 1, resumed=True), entry(1), path=fifo)

        assert [strict(line)["seq"] for line in os.read(reader, 65536).splitlines()] == [0, 1]
    finally:
        os.close(reader)


def test_close_brings_the_file_to_the_disk(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))

    write(run(tmp_path), entry(0))

    assert synced == [file.stat().st_ino]


# A run that is not resumed


def test_an_old_file_is_renamed_to_the_next_free_number_and_said(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for attempt in range(3):
        write(run(tmp_path), entry(attempt))

    assert seqs(file) == [2]
    assert seqs(tmp_path / "metrics.jsonl.1") == [0]
    assert seqs(tmp_path / "metrics.jsonl.2") == [1]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "metrics.jsonl.2" in caplog.messages[1]
    assert "load_state_dict" in caplog.messages[1]


def test_an_old_file_keeps_its_bytes_even_if_they_are_no_log(tmp_path: Path, file: Path) -> None:
    file.write_bytes(b"\x00not ours, no line end")
    write(run(tmp_path), entry(0))

    assert (tmp_path / "metrics.jsonl.1").read_bytes() == b"\x00not ours, no line end"


def test_an_empty_old_file_is_simply_used(tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.touch()
    write(run(tmp_path), entry(0))

    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert not caplog.records


# A run that is resumed


@pytest.mark.parametrize("next_seq", range(6))
def test_entries_from_the_restored_seq_on_are_replaced_and_earlier_ones_keep_their_bytes(
    tmp_path: Path, file: Path, next_seq: int
) -> None:
    write(run(tmp_path), *map(entry, range(5)))
    before = file.read_bytes().splitlines(keepends=True)

    resumed = run(tmp_path, next_seq, resumed=True)
    write(dataclasses.replace(resumed, begun=next_seq == 0), entry(next_seq, attempt=1))

    lines = file.read_bytes().splitlines(keepends=True)
    assert lines[:-1] == before[:next_seq]
    assert strict(lines[-1])["attempt"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_cut_off_at_any_byte_is_repaired_and_loses_no_whole_entry(tmp_path: Path, file: Path) -> None:
    write(run(tmp_path), entry(0), entry(1, metrics={"é": math.nan, "b": -1e-300}, ranks={"b": 1}))
    whole = file.read_bytes()
    ends = [whole.index(b"\n"), len(whole) - 1]  # an object is whole one byte before its line is

    for length in range(len(whole) + 1):
        file.write_bytes(whole[:length])
        write(run(tmp_path, 2, resumed=True), entry(2))

        assert seqs(file) == [seq for seq, end in enumerate(ends) if length >= end] + [2], length


@pytest.mark.parametrize("torn", [b"\0" * 4096, b'{"seq":2,"st\n', b"\xff\xfe", b'{"seq":2,"a":NaN}\n', b"[" * 10**6])
def test_a_last_line_that_does_not_parse_is_dropped_and_said(
    tmp_path: Path, file: Path, torn: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write(run(tmp_path), entry(0), entry(1))
    with file.open("ab") as handle:
        handle.write(torn)

    write(run(tmp_path, 2, resumed=True), entry(2))

    assert seqs(file) == [0, 1, 2]
    (warning,) = caplog.messages
    assert "torn last line" in warning
    assert warning.isprintable()


def test_a_torn_entry_that_will_be_replaced_anyway_is_dropped(tmp_path: Path, file: Path) -> None:
    write(run(tmp_path), entry(0), entry(1))
    file.write_bytes(file.read_bytes()[:-9])

    write(run(tmp_path, 1, resumed=True), entry(1))

    assert seqs(file) == [0, 1]


def test_lines_of_others_are_kept_with_one_warning(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(run(tmp_path), entry(0))
    strangers = b'# a remark\n{"note":1}\n{"seq":"9"}\n[9]\n{"seq":true}\n\n'
    ours = file.read_bytes()
    file.write_bytes(strangers + ours + b'{"seq":null}\n')

    write(run(tmp_path, 1, resumed=True), entry(1))

    assert file.read_bytes().startswith(strangers + ours + b'{"seq":null}\n{"seq":1,')
    (warning,) = caplog.messages
    assert "7 lines that are no entries of logsync" in warning


def test_a_resume_without_a_file_starts_one(tmp_path: Path, file: Path) -> None:
    write(run(tmp_path / "moved", 5, resumed=True), entry(5))

    assert seqs(tmp_path / "moved" / "metrics.jsonl") == [5]
    assert not file.exists()


@pytest.mark.parametrize(
    ("stored", "next_seq", "after"),
    [
        (range(3), 4, [0, 1, 2, 3]),  # killed before 3 was written
        (range(4), 4, [0, 1, 2, 3]),
        (range(6), 4, [0, 1, 2, 3]),
        (range(0), 1, [0]),
        (range(0), 4, None),  # the files were left behind: the one entry would stand for nothing
        (range(2), 4, [0, 1]),
    ],
)
def test_the_last_entry_of_the_checkpoint_is_written_where_a_kill_came_before_it(
    stored: range, next_seq: int, after: list[int] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "metrics.jsonl"
    if stored:
        write(run(tmp_path), *map(entry, stored))
    last = entry(next_seq - 1, metrics={"loss": 0.5})
    info = dataclasses.replace(run(tmp_path, next_seq, resumed=True), last_entry=last)
    sink = JsonlSink()
    sink.open(info)
    sink.close()
    sink.open(info)  # a second time, as after a second kill
    sink.close()

    assert seqs(file) == (after or [])
    if after and len(stored) < next_seq == len(after):
        assert strict(file.read_bytes().splitlines()[-1])["loss"] == 0.5
    assert ("what lies between was never written" in caplog.text) == (after == [0, 1])


def test_a_file_of_a_run_before_is_set_aside_by_a_run_that_was_killed_at_its_first_entry(
    tmp_path: Path, file: Path
) -> None:
    write(run(tmp_path), *(entry(seq, time=1.0) for seq in range(3)))
    ours = entry(0, time=2.0)
    sink = JsonlSink()
    sink.open(dataclasses.replace(run(tmp_path, 1, resumed=True), last_entry=ours))
    sink.write(entry(1, time=3.0))
    sink.close()

    assert [strict(line)["time"] for line in file.read_bytes().splitlines()] == [2.0, 3.0]
    assert seqs(tmp_path / "metrics.jsonl.1") == [0, 1, 2]


def test_a_resume_in_mid_run_continues_the_same_file(tmp_path: Path, file: Path) -> None:
    sinks = SinkSet(["jsonl"])
    sinks.prepare(run(tmp_path))
    for seq in range(4):
        sinks.write(entry(seq))

    sinks.prepare(run(tmp_path, 2, resumed=True))
    for seq in range(2, 5):
        sinks.write(entry(seq, attempt=1))
    sinks.close()

    assert seqs(file) == [0, 1, 2, 3, 4]
    assert [strict(line)["attempt"] for line in file.read_bytes().splitlines()] == [0, 0, 1, 1, 1]


def test_cutting_back_a_long_file_does_not_read_it_whole(tmp_path: Path, file: Path) -> None:
    line = b'{"seq":%d,"loss":0.123456789,"pad":"%0200d"}\n'
    file.write_bytes(b"".join(line % (seq, seq) for seq in range(50_000)))
    size = file.stat().st_size
    sink = JsonlSink()

    tracemalloc.start()
    sink.open(run(tmp_path, 49_999, resumed=True))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    sink.close()

    assert file.stat().st_size == size - len(line % (49_999, 49_999))
    assert peak < size / 10


# Faults


def python(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, timeout=60).stdout


def test_a_write_that_fails_half_way_is_taken_back_and_later_ones_succeed(tmp_path: Path, file: Path) -> None:
    # A limit on the file's size fails as a full disk does: the kernel takes a part, then refuses the rest.
    script = """
        import resource, sys
        from pathlib import Path
        from logsync.coordinator.messages import LogEntry
        from logsync.coordinator.sinks.base import RunInfo
        from logsync.coordinator.sinks.jsonl import JsonlSink

        def entry(seq):
            return LogEntry(seq=seq, step=seq, time=0.0, attempt=0, calls=1, world_size=1, metrics={"x" * 50: 1.0})

        file = Path(sys.argv[1], "metrics.jsonl")
        sink = JsonlSink()
        sink.open(RunInfo(Path(sys.argv[1]), "train", 0, 1, 0, False))
        sink.write(entry(0))
        whole = file.stat().st_size
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for room in range(0, whole, 7):
            resource.setrlimit(resource.RLIMIT_FSIZE, (whole + room, hard))
            try:
                sink.write(entry(1))
            except OSError as error:
                print(error.errno)
            assert file.stat().st_size == whole, file.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        sink.write(entry(2))
        sink.close()
    """
    errors = python(script, str(tmp_path)).split()

    assert len(errors) > 10
    assert set(errors) == {str(errno.EFBIG)}
    assert seqs(file) == [0, 2]


def test_a_torn_line_that_could_not_be_taken_back_at_once_is_taken_back_later(tmp_path: Path) -> None:
    script = """
        import io, resource, sys
        from pathlib import Path
        from logsync.coordinator.messages import LogEntry
        from logsync.coordinator.sinks.base import RunInfo
        from logsync.coordinator.sinks.jsonl import JsonlSink

        def entry(seq):
            return LogEntry(seq=seq, step=seq, time=0.0, attempt=0, calls=1, world_size=1, metrics={"x" * 50: 1.0})

        class Stubborn(io.FileIO):  # as a server that has gone away
            gone = True

            def truncate(self, size=None):
                if self.gone:
                    raise OSError(5, "gone")
                return super().truncate(size)

        Path.open = lambda self, mode, buffering: Stubborn(self, mode)
        for way in ("write", "close"):
            path = Path(sys.argv[1], way)
            Stubborn.gone = True
            sink = JsonlSink(path)
            sink.open(RunInfo(Path(sys.argv[1]), "train", 0, 1, 0, False))
            sink.write(entry(0))
            whole = path.stat().st_size
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (whole + 20, limits[1]))
            for _ in range(2):
                try:
                    sink.write(entry(1))
                except OSError:
                    pass
                else:
                    sys.exit("the write did not fail")
                assert path.stat().st_size == whole + 20
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            Stubborn.gone = False
            if way == "write":
                sink.write(entry(2))
            sink.close()
    """
    python(script, str(tmp_path))

    assert seqs(tmp_path / "write") == [0, 2]
    assert seqs(tmp_path / "close") == [0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_costs_only_this_sink_its_entries(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sinks = SinkSet(["jsonl:/dev/full", "jsonl"])
    sinks.prepare(run(tmp_path))

    for seq in range(3):
        sinks.write(entry(seq))
    sinks.close()

    assert seqs(file) == [0, 1, 2]
    assert sinks.lost == {"jsonl:/dev/full": 3}
    assert "sink jsonl:/dev/full lost 3 of 3 entries; last error: OSError: [Errno 28]" in caplog.messages[-1]


def test_a_folder_that_cannot_be_made_yet_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where the folder should be")
    sinks = SinkSet(["jsonl"])
    sinks.prepare(run(tmp_path / "blocked"))

    sinks.write(entry(0))
    assert not sinks.flush(0.05)
    (tmp_path / "blocked").unlink()
    sinks.write(entry(1))
    sinks.close()

    assert seqs(tmp_path / "blocked" / "metrics.jsonl") == [0, 1]
    assert sinks.lost == {}


def test_killed_while_writing_every_whole_line_parses_and_the_file_can_be_continued(tmp_path: Path, file: Path) -> None:
    script = """
        import itertools, sys
        from pathlib import Path
        from logsync.coordinator.messages import LogEntry
        from logsync.coordinator.sinks.base import RunInfo
        from logsync.coordinator.sinks.jsonl import JsonlSink

        sink = JsonlSink()
        sink.open(RunInfo(Path(sys.argv[1]), "train", 0, 1, 0, False))
        for seq in itertools.count():
            sink.write(LogEntry(seq=seq, step=seq, time=0.0, attempt=0, calls=1, world_size=1,
                                metrics={f"metric/{n}": n / 7 for n in range(500)}))
            print(seq, flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [int(next(process.stdout)) for _ in range(50)]
        process.send_signal(signal.SIGKILL)

    write(run(tmp_path, 10**9, resumed=True))

    kept = seqs(file)
    assert kept[:50] == acknowledged
    assert kept == list(range(len(kept)))


def test_close_may_come_twice_and_write_needs_an_open(tmp_path: Path) -> None:
    sink = JsonlSink()
    sink.close()
    with pytest.raises(ValueError, match="not open"):
        sink.write(entry(0))
    sink.open(run(tmp_path))
    sink.close()
    sink.close()


# A root that takes over from one that was lost


def recovered(run_dir: Path, oldest: LogEntry, *, begun: bool = True) -> RunInfo:
    return RunInfo(
        run_dir, "train", 0, 2, next_seq=oldest.seq, resumed=True, last_entry=oldest, begun=begun, recovered=True
    )


def test_entries_that_come_again_after_the_root_was_lost_are_in_the_file_once(tmp_path: Path, file: Path) -> None:
    write(run(tmp_path), *map(entry, range(4)))
    before = file.read_bytes()

    write(recovered(tmp_path, entry(2)), *map(entry, range(2, 6)))

    assert file.read_bytes().startswith(before)
    assert seqs(file) == [0, 1, 2, 3, 4, 5]


def test_a_line_that_the_lost_root_left_torn_is_written_again(tmp_path: Path, file: Path) -> None:
    write(run(tmp_path), *map(entry, range(3)))
    file.write_bytes(file.read_bytes()[:-9])

    write(recovered(tmp_path, entry(1)), entry(1), entry(2), entry(3))

    assert seqs(file) == [0, 1, 2, 3]


def test_a_root_that_was_lost_before_its_first_line_leaves_an_older_runs_file_alone(tmp_path: Path, file: Path) -> None:
    write(run(tmp_path), *map(entry, range(5)))
    older = file.read_bytes()

    write(recovered(tmp_path, entry(0, time=9.0), begun=False), entry(0, time=9.0), entry(1, time=9.5))

    assert seqs(file) == [0, 1]
    assert file.with_name("metrics.jsonl.1").read_bytes() == older


def test_a_root_that_was_lost_after_its_first_line_goes_on_with_it(tmp_path: Path, file: Path) -> None:
    write(run(tmp_path), entry(0))

    write(recovered(tmp_path, entry(0), begun=False), entry(0), entry(1))

    assert seqs(file) == [0, 1]
    assert not file.with_name("metrics.jsonl.1").exists()


def test_a_root_that_takes_anothers_place_keeps_what_that_stored_and_replaces_what_an_earlier_start_did(
    tmp_path: Path, file: Path
) -> None:
    write(run(tmp_path), *(entry(seq, time=float(seq)) for seq in range(6)))
    resumed = dataclasses.replace(run(tmp_path, 3, resumed=True), recovered=True, first_seq=3, attempt=1)
    again = [entry(seq, time=100.0 + seq, attempt=1) for seq in range(3, 6)]

    # The one before was lost before it had opened the file, and the next one when it had written an entry.
    write(dataclasses.replace(resumed, last_entry=again[0]), again[0])
    write(dataclasses.replace(resumed, last_entry=again[0]), *again)

    lines = [strict(line) for line in file.read_bytes().splitlines()]
    assert [(line["seq"], line["time"]) for line in lines] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
        (3, 103.0),
        (4, 104.0),
        (5, 105.0),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
