"""The file metrics.csv, read by the csv module."""

from __future__ import annotations

import csv
import math
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logsync.coordinator.errors import Step
from logsync.coordinator.sinks.csv_file import CsvSink
from support.sinks import entry, feed, run

COLUMNS = ["seq", "step", "time", "attempt", "metric", "value"]


def rows(path: Path) -> list[dict[str, str]]:
    assert not path.stat().st_size or path.read_bytes().endswith(b"\n")
    with path.open(newline="") as file:
        reader = csv.DictReader(file, strict=True)
        found = list(reader)
        assert reader.fieldnames == COLUMNS
    assert all(None not in row and None not in row.values() for row in found)
    return found


def points(path: Path) -> list[tuple[int, str, float]]:
    return [(int(row["seq"]), row["metric"], float(row["value"])) for row in rows(path)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def test_an_entry_is_a_row_for_each_metric(tmp_path: Path, file: Path) -> None:
    feed(CsvSink, run(tmp_path), entry(7, {"train/loss": 0.5, "a": 2.0}, attempt=1))

    assert file.read_text().splitlines() == [
        "seq,step,time,attempt,metric,value",
        '7,70,1007.0,1,"train/loss",0.5',
        '7,70,1007.0,1,"a",2.0',
    ]


def test_a_late_metric_changes_nothing_that_is_written(tmp_path: Path, file: Path) -> None:
    sink = feed(CsvSink, run(tmp_path), entry(0), entry(1), close=False)
    before = file.read_bytes()
    sink.write(entry(2, {"loss": 1.0, 'late, and "odd"\r\nname': 3.0}))
    sink.close()

    assert file.read_bytes().startswith(before)
    assert points(file) == [(0, "loss", 0.0), (1, "loss", 0.5), (2, "loss", 1.0), (2, 'late, and "odd"\r\nname', 3.0)]


@given(
    metrics=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), st.floats()),
    step=st.none() | st.integers(0, 2**63 - 1) | st.floats(0, allow_infinity=False),
    time=st.floats(0, 1e11),
)
def test_every_number_and_name_comes_back_exactly(metrics: dict[str, float], step: Step, time: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        feed(CsvSink, run(Path(folder)), entry(0, metrics, step=step, time=time))
        found = rows(Path(folder, "metrics.csv"))

    assert {row["metric"]: repr(float(row["value"])) for row in found} == {k: repr(v) for k, v in metrics.items()}
    for row in found:
        assert row["step"] == ("" if step is None else repr(step))
        assert float(row["time"]) == time


def test_what_is_not_finite_is_a_word_that_float_reads(tmp_path: Path, file: Path) -> None:
    feed(CsvSink, run(tmp_path), entry(0, {"a": math.nan, "b": math.inf, "c": -math.inf}))

    assert [row["value"] for row in rows(file)] == ["nan", "inf", "-inf"]


@pytest.mark.parametrize("next_seq", range(6))
@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_run_replaces_what_came_after_its_checkpoint(
    tmp_path: Path, file: Path, next_seq: int, *, killed: bool
) -> None:
    feed(CsvSink, run(tmp_path), *(entry(seq, {"a\nb": seq, "c": 1.0}) for seq in range(5)), close=not killed)

    feed(CsvSink, run(tmp_path, next_seq, resumed=True), entry(next_seq, {"a\nb": -1.0}))

    old = [(seq, key, value) for seq in range(min(next_seq, 5)) for key, value in (("a\nb", seq), ("c", 1.0))]
    assert points(file) == [*old, (next_seq, "a\nb", -1.0)]


def test_a_file_cut_off_at_any_byte_keeps_each_entry_whole_or_not_at_all(tmp_path: Path, file: Path) -> None:
    feed(CsvSink, run(tmp_path), entry(0, {'a"\n,b': 0.25, "é": 0.125}), last := entry(1, {"x": 1.0, "y\n": 2.5}))
    whole = file.read_bytes()
    first = [(0, 'a"\n,b', 0.25), (0, "é", 0.125)]
    second = [(1, "x", 1.0), (1, "y\n", 2.5)]
    assert points(file) == [*first, *second]

    for length in range(len(whole) + 1):
        file.write_bytes(whole[:length])
        feed(CsvSink, run(tmp_path, 2, resumed=True, last_entry=last), entry(2))

        found = points(file)
        if length >= whole.index(b"0.125\n") + 6:
            assert found == [*first, *second, (2, "loss", 1.0)], length
        elif length - whole.index(b"0.25\n") in {5, 6}:  # where nobody knows of a further row, none is missed
            assert found == [first[0], *second, (2, "loss", 1.0)]
        else:
            assert found == [(2, "loss", 1.0)], length


def test_an_entry_that_lacks_its_last_rows_is_replaced_by_the_checkpoints(tmp_path: Path, file: Path) -> None:
    last = entry(1, {"a": 1.0, "b": 2.0, "c": 3.0})
    feed(CsvSink, run(tmp_path), entry(0), entry(1, {**last.metrics, "annotated": 4.0}))
    complete = points(file)
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6

    feed(CsvSink, run(tmp_path, 2, resumed=True, last_entry=last))
    assert points(file) == complete
    for left in (2, 3, 4):
        file.write_bytes(b"".join(lines[:left]))
        feed(CsvSink, run(tmp_path, 2, resumed=True, last_entry=last), entry(2))

        assert points(file) == [(0, "loss", 0.0), *((1, *item) for item in last.metrics.items()), (2, "loss", 1.0)]


@pytest.mark.parametrize("torn", [b"\0" * 4096, b'2,20,1.0,0,"lo', b"\xff\xfe", b'"', b"9" * 200_000])
def test_a_last_row_that_is_torn_is_dropped_and_said(
    tmp_path: Path, file: Path, torn: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    feed(CsvSink, run(tmp_path), entry(0), entry(1))
    with file.open("ab") as handle:
        handle.write(torn)

    feed(CsvSink, run(tmp_path, 2, resumed=True), entry(2))

    assert points(file) == [(0, "loss", 0.0), (1, "loss", 0.5), (2, "loss", 1.0)]
    (warning,) = caplog.messages
    assert "torn last line" in warning


def test_an_old_file_is_renamed_when_the_run_is_not_resumed(tmp_path: Path, file: Path) -> None:
    for attempt in range(2):
        feed(CsvSink, run(tmp_path), entry(attempt))

    assert points(file) == [(1, "loss", 0.5)]
    assert points(tmp_path / "metrics.csv.1") == [(0, "loss", 0.0)]


def test_a_path_of_ones_own_is_used(tmp_path: Path) -> None:
    feed(lambda: CsvSink(tmp_path / "deep" / "my.csv"), run(tmp_path / "unused"), entry(0))

    assert points(tmp_path / "deep" / "my.csv") == [(0, "loss", 0.0)]
    assert not (tmp_path / "unused").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_is_an_error_at_open_where_the_header_does_not_fit() -> None:
    with pytest.raises(OSError, match="No space left"):
        CsvSink("/dev/full").open(run(Path("unused")))


def test_close_may_come_twice_and_write_needs_an_open(tmp_path: Path) -> None:
    sink = CsvSink()
    sink.close()
    with pytest.raises(ValueError, match="not open"):
        sink.write(entry(0))
    sink.open(run(tmp_path))
    sink.close()
    sink.close()
