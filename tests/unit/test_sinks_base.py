"""Naming sinks, and keeping one that fails from training and from the others."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from logsync.coordinator.messages import RESERVED, LogEntry
from logsync.coordinator.sinks.base import RunInfo, Sink, make_sink
from logsync.coordinator.sinks.isolation import SinkSet
from logsync.coordinator.sinks.jsonl import JsonlSink

RUN = RunInfo(run_dir=Path("unused"), name="train", attempt=0, world_size=2, next_seq=0, resumed=False)
RESUMED = RunInfo(run_dir=Path("unused"), name="train", attempt=1, world_size=2, next_seq=1, resumed=True)


def entry(seq: int) -> LogEntry:
    return LogEntry(seq=seq, step=seq * 10, time=0.0, attempt=0, calls=10, world_size=2, metrics={"loss": 1.0})


class Recorder:
    """A sink that remembers what was done to it, and fails where `fails` has the word."""

    def __init__(self, *fails: str) -> None:
        self.fails = set(fails)
        self.done: list[object] = []

    def open(self, run: RunInfo) -> None:
        self._do("open", run)

    def write(self, entry: LogEntry) -> None:
        self._do("write", entry.seq)

    def close(self) -> None:
        self._do("close", None)

    def _do(self, what: str, detail: object) -> None:
        if what in self.fails:
            msg = f"no {what} today"
            raise OSError(msg)
        self.done.append(what if detail is None else (what, detail))


def opened(*sinks: Recorder) -> SinkSet:
    sink_set = SinkSet(sinks)
    sink_set.prepare(RUN)
    return sink_set


@pytest.mark.parametrize("spec", ["jsonl", " JSONL ", "jsonl:some/File.jsonl", "Jsonl:a:b"])
def test_a_name_in_any_case_makes_its_sink(spec: str) -> None:
    assert isinstance(make_sink(spec), JsonlSink)


def test_an_option_is_kept_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "A b:C .jsonl"
    sinks = SinkSet([f"JSONL:{path}"])
    sinks.prepare(RUN)

    sinks.write(entry(0))
    sinks.close()

    assert path.read_bytes().count(b"\n") == 1


@pytest.mark.parametrize("spec", ["tensorbord", "", "j son", ":x", "\x1b[2Jconsole"])
def test_an_unknown_name_is_refused_with_the_names_there_are(spec: str) -> None:
    with pytest.raises(ValueError, match=r"no sink named .* console, jsonl, jsonl:PATH") as refused:
        SinkSet([spec])

    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [("console:x", "takes no option"), ("console:", "takes no option"), ("jsonl:", "lacks its PATH")],
)
def test_an_option_too_many_or_too_few_is_refused(spec: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        SinkSet([spec])


@pytest.mark.parametrize("spec", [None, 3, b"jsonl", Path("metrics.jsonl"), {"jsonl": 1}])
def test_what_is_no_sink_is_refused_with_its_type_and_what_is_accepted(spec: object) -> None:
    with pytest.raises(TypeError, match=rf"callable that takes a LogEntry.*of type {type(spec).__name__}$"):
        make_sink(spec)  # type: ignore[arg-type]


def test_a_class_is_refused_where_an_object_was_meant() -> None:
    with pytest.raises(TypeError, match=r"Recorder is a class; give Recorder\(\.\.\.\)"):
        make_sink(Recorder)  # type: ignore[arg-type]


@pytest.mark.parametrize("sinks", ["jsonl", None, 5])
def test_sinks_that_are_not_a_list_are_refused(sinks: object) -> None:
    with pytest.raises(TypeError, match="sinks is a list"):
        SinkSet(sinks)  # type: ignore[arg-type]


def test_one_destination_cannot_be_named_twice() -> None:
    with pytest.raises(ValueError, match="'jsonl' twice"):
        SinkSet(["jsonl", "console", " JSONL"])

    SinkSet(["jsonl", "jsonl:elsewhere.jsonl"])


def test_an_object_with_open_write_and_close_is_used_as_it_is() -> None:
    sink = Recorder()

    assert make_sink(sink) is sink
    assert isinstance(sink, Sink)


def test_a_callable_gets_every_entry() -> None:
    seen: list[LogEntry] = []
    sinks = SinkSet([seen.append, functools.partial(seen.insert, 0)])
    sinks.prepare(RUN)

    sinks.write(entry(0))
    sinks.close()

    assert seen == [entry(0), entry(0)]


def test_a_destination_is_imported_only_when_named() -> None:
    script = (
        "import sys; from logsync.coordinator.sinks.isolation import SinkSet; SinkSet([print]);"
        "ours = {m for m in sys.modules if m.startswith('logsync.coordinator.sinks.')};"
        "assert {m.rpartition('.')[2] for m in ours} == {'base', 'isolation', 'lane'}, ours;"
        "assert 'rich' not in sys.modules; SinkSet(['jsonl']); assert 'rich' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", script], check=True)


def test_nothing_opens_before_the_first_entry() -> None:
    sink = Recorder()
    sinks = opened(sink)
    assert sinks.flush()
    assert sink.done == []

    sinks.write(entry(0))
    assert sinks.flush()
    assert sink.done == [("open", RUN), ("write", 0)]


def test_a_run_without_entries_opens_and_closes_nothing() -> None:
    sink = Recorder("close")
    sinks = opened(sink)

    sinks.close()

    assert sink.done == []


def test_a_resume_in_mid_run_closes_the_sinks_and_opens_them_at_once_with_the_new_run() -> None:
    sink = Recorder()
    sinks = opened(sink)

    sinks.write(entry(0))
    sinks.prepare(RESUMED)
    assert sinks.flush()
    assert sink.done == [("open", RUN), ("write", 0), "close", ("open", RESUMED)]

    sinks.write(entry(1))
    assert sinks.flush()
    assert sink.done[4:] == [("write", 1)]


def test_a_second_close_does_nothing() -> None:
    sink = Recorder()
    sinks = opened(sink)
    sinks.write(entry(0))

    sinks.close()
    sinks.close()

    assert sink.done.count("close") == 1


def test_an_entry_after_close_is_dropped_with_an_error_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    sink = Recorder()
    sinks = opened(sink)
    sinks.close()

    sinks.write(entry(4))

    assert sink.done == []
    assert "entry seq 4 (step 40) was dropped" in caplog.text


@pytest.mark.parametrize("fault", ["open", "write", "close"])
def test_a_sink_that_raises_costs_the_others_nothing(fault: str) -> None:
    before, after = Recorder(), Recorder()
    sinks = opened(before, Recorder(fault), after)

    for seq in range(3):
        sinks.write(entry(seq))
    sinks.close()

    for sink in (before, after):
        assert sink.done == [("open", RUN), ("write", 0), ("write", 1), ("write", 2), "close"]


def test_a_sink_cannot_change_what_the_others_get() -> None:
    seen: list[LogEntry] = []
    given = entry(0)
    sinks = SinkSet([lambda e: e.metrics.clear(), seen.append])
    sinks.prepare(RUN)

    sinks.write(given)
    sinks.close()

    assert seen == [entry(0)]
    assert given == entry(0)


@pytest.mark.parametrize("fault", ["open", "write"])
def test_what_passes_makes_entries_wait_and_loses_none(fault: str) -> None:
    sink = Recorder(fault)
    sinks = opened(sink)

    for seq in range(3):
        sinks.write(entry(seq))
    assert not sinks.flush(0.2)
    sink.fails.clear()
    assert sinks.flush()

    assert sink.done == [("open", RUN), ("write", 0), ("write", 1), ("write", 2)]
    assert sinks.lost == {}


def test_a_failing_sink_is_reported_once_with_its_traceback_and_its_losses_at_close(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(got: LogEntry) -> None:
        if got.seq in {2, 3, 6}:
            msg = "no write today"
            raise ValueError(msg)

    sinks = SinkSet([refuse])
    sinks.prepare(RUN)
    name = refuse.__qualname__

    for seq in range(7):
        sinks.write(entry(seq))
        assert sinks.flush()
    sinks.close()
    sinks.close()

    first, well, second, summary = caplog.records
    assert [first.levelno, well.levelno, second.levelno, summary.levelno] == [40, 30, 40, 40]
    assert first.exc_info is not None
    assert f"sink {name} raised ValueError: no write today; entry seq 2 (step 20) is lost" in first.getMessage()
    assert well.getMessage() == f"sink {name} works again; it has lost 2 entries so far"
    assert summary.getMessage() == f"sink {name} lost 3 of 7 entries; last error: ValueError: no write today"


def test_a_failing_close_is_reported_and_loses_no_entry(caplog: pytest.LogCaptureFixture) -> None:
    sinks = opened(Recorder("close"))
    sinks.write(entry(0))

    sinks.close()

    assert sinks.lost == {}
    assert "no close today" in caplog.text


def test_losses_are_counted_for_each_sink_by_a_name_of_its_own() -> None:
    sinks = opened(Recorder("write"), Recorder(), Recorder("open"), Recorder("write"))

    sinks.write(entry(0))
    sinks.write(entry(1))
    sinks.close()

    assert sinks.lost == {"Recorder": 2, "Recorder (3)": 2, "Recorder (4)": 2}


def test_what_an_error_says_is_fit_for_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    class Hostile(Exception):
        def __str__(self) -> str:
            return "\x1b[2J" + "x" * 100_000

    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    def fail(got: LogEntry) -> None:
        raise (Hostile, Unprintable)[got.seq]

    sinks = SinkSet([fail])
    sinks.prepare(RUN)
    for seq in range(2):
        sinks.write(entry(seq))
        assert sinks.flush()
        text = caplog.records[0].getMessage()
        assert text.isprintable()
        assert len(text) < 1500
    sinks.close()

    assert list(sinks.lost.values()) == [2]


def test_a_sink_that_wants_to_end_the_process_ends_nothing() -> None:
    def leave(_: LogEntry) -> None:
        raise SystemExit(3)

    sinks = SinkSet([leave])
    sinks.prepare(RUN)
    sinks.write(entry(0))
    sinks.close()

    assert list(sinks.lost.values()) == [1]


def test_reserved_names_are_those_of_an_entry_beside_its_metrics() -> None:
    fields = set(LogEntry.__struct_fields__) - {"metrics", "world_size"}

    assert fields | {"nonfinite"} == RESERVED
