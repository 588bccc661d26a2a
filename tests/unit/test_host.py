"""The coordinator with its sinks: entries are held for `annotate`, then handed over once."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from logsync.coordinator.errors import LogsyncError
from logsync.coordinator.host import Host, reserve_run_dir
from logsync.coordinator.messages import Decision, KeySpec, LogEntry, Window, encode, pack_values
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.isolation import SinkSet
from support.lockstep import Lockstep, settings


class Recorder:
    """A sink that remembers what was done to it."""

    def __init__(self) -> None:
        self.runs: list[RunInfo] = []
        self.entries: list[LogEntry] = []
        self.closed = 0

    def open(self, run: RunInfo) -> None:
        self.runs.append(run)

    def write(self, entry: LogEntry) -> None:
        self.entries.append(entry)

    def close(self) -> None:
        self.closed += 1


class Driven:
    """A host, its one rank, and its sink."""

    def __init__(self, *sinks: Any, run_dir: str = "unused", **options: Any) -> None:
        self.sink = Recorder()
        world = Lockstep(1, settings(10))
        world.coordinator.run_dir = run_dir
        self.rank = world.ranks[0]
        self.sinks = SinkSet([self.sink, *sinks])
        self.host = Host(world.coordinator, self.sinks, name="val", world_size=1, clock=lambda: 1234.5, **options)

    @property
    def stored(self) -> list[LogEntry]:
        """What the sink has, once it has what it was given."""
        assert self.sinks.flush()
        return self.sink.entries

    def round(self, step: object, kind: Any = "decision", **metrics: float) -> Decision:
        keys = [KeySpec(name) for name in metrics]
        window = Window(encode(keys), pack_values([n for v in metrics.values() for n in (v, 1.0)])) if keys else None
        return self.rank._accept(self.host.handle([self.rank._frame(kind, step, window=window)]))


@pytest.fixture
def driven() -> Driven:
    return Driven()


def test_an_entry_is_held_until_it_is_released_and_then_handed_over_once(driven: Driven) -> None:
    driven.round(0, loss=1.0)
    assert driven.host.holds_entry
    assert driven.sink.entries == []

    driven.host.release()
    driven.host.release()

    assert not driven.host.holds_entry
    (entry,) = driven.stored
    assert (entry.seq, entry.step, entry.time, entry.metrics) == (0, 0, 1234.5, {"loss": 1.0})


def test_what_was_not_released_is_handed_over_before_anything_later(driven: Driven) -> None:
    driven.round(0, a=1.0)
    driven.round(7, kind="write", b=2.0)
    driven.host.close()

    assert [entry.seq for entry in driven.sink.entries] == [0, 1]


def test_a_round_without_an_entry_holds_nothing(driven: Driven) -> None:
    driven.round(0)
    driven.host.release()
    driven.round(3)

    assert not driven.host.holds_entry


def test_annotations_are_added_to_the_newest_entry_and_only_there(driven: Driven) -> None:
    first = driven.round(0, loss=1.0)
    driven.host.annotate({"lr": 0.1})
    driven.host.annotate({"mfu": 0.4})
    driven.host.release()
    driven.round(10, loss=2.0)
    driven.host.close()

    assert [entry.metrics for entry in driven.sink.entries] == [{"loss": 1.0, "lr": 0.1, "mfu": 0.4}, {"loss": 2.0}]
    assert first.entry is not None
    assert first.entry.metrics == {"loss": 1.0}  # what went to the ranks is not touched


def test_an_annotation_does_not_overwrite_and_is_all_or_nothing(driven: Driven) -> None:
    driven.round(0, loss=1.0)
    driven.host.annotate({"lr": 0.1})

    for taken in ("loss", "lr"):
        with pytest.raises(ValueError, match=f"would overwrite the merged metric '{taken}' of entry 0"):
            driven.host.annotate({"new": 1.0, taken: 5.0})
    driven.host.close()

    assert driven.sink.entries[0].metrics == {"loss": 1.0, "lr": 0.1}


def test_an_annotation_without_an_entry_is_dropped_with_a_warning(
    driven: Driven, caplog: pytest.LogCaptureFixture
) -> None:
    driven.host.annotate({"lr": 0.1})
    driven.round(0)
    driven.host.release()
    driven.host.annotate({"lr": 0.1})
    driven.host.close()

    assert [(record.levelname, "annotate(lr)" in record.message) for record in caplog.records] == [
        ("WARNING", True)
    ] * 2
    assert driven.sink.entries[0].metrics == {}


def test_sinks_are_told_of_the_run(driven: Driven) -> None:
    driven.round(0)
    driven.host.release()
    assert driven.stored

    run = RunInfo(Path("unused"), "val", attempt=0, world_size=1, next_seq=0, resumed=False, run_id="run")
    assert driven.sink.runs == [run]


def test_close_flushes_once(driven: Driven) -> None:
    driven.round(0)
    for _ in range(3):
        driven.host.close()

    assert (len(driven.sink.entries), driven.sink.closed) == (1, 1)


def test_a_failing_round_makes_no_entry_and_the_next_one_does(driven: Driven) -> None:
    with pytest.raises(LogsyncError):
        driven.round("no step")
    assert not driven.host.holds_entry
    driven.round(1)
    assert driven.host.holds_entry


def test_a_garbled_frame_is_answered_and_never_raises(driven: Driven) -> None:
    assert driven.host.handle([b"garbage"])
    assert driven.host.handle([])


# A loaded state


def saved_at(step: int) -> dict[str, bytes]:
    """The state of another run at its log of `step`."""
    other = Driven(run_dir="before")
    for s in range(step + 1):
        if not other.rank.leased(s):
            other.round(s)
    return other.rank.state_dict()


@pytest.mark.parametrize("kind", ["decision", "write"])
def test_after_a_load_the_sinks_open_again_with_the_restored_run(driven: Driven, kind: str) -> None:
    driven.round(0)
    driven.host.release()
    driven.rank.load_state_dict(saved_at(20))

    driven.round(30, kind)  # the round of the load makes an entry itself
    driven.host.close()

    first, second = driven.sink.runs
    assert (first.next_seq, first.resumed) == (0, False)
    assert (second.run_dir, second.next_seq, second.resumed, second.attempt) == (Path("before"), 3, True, 1)
    assert [entry.seq for entry in driven.sink.entries] == [0, 3]


@pytest.mark.parametrize("write_at_once", [False, True])
def test_no_seq_is_doubled_in_the_file_of_a_run_that_is_loaded_back(tmp_path: Path, *, write_at_once: bool) -> None:
    driven = Driven("jsonl", run_dir=str(tmp_path))
    for step in range(0, 50, 10):
        driven.round(step)
        driven.host.release()
        if step == 10:
            state = driven.rank.state_dict()
    driven.rank.load_state_dict(state)

    driven.round(11, "write" if write_at_once else "decision")
    driven.round(20)
    driven.host.close()

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["seq"], line["attempt"]) for line in lines][:2] == [(0, 0), (1, 0)]
    assert [line["step"] for line in lines] == ([0, 10, 11] if write_at_once else [0, 10, 20])
    assert [line["seq"] for line in lines] == [0, 1, 2]


# Leaving without the others


def test_leaving_hands_over_what_is_held_and_then_ones_own_window_as_partial(driven: Driven) -> None:
    driven.round(0, loss=1.0)

    driven.host.leave(0, lambda _: Window(encode([KeySpec("loss")]), pack_values([6.0, 2.0])), 7, 8)

    assert [(e.seq, e.step, e.metrics, e.partial) for e in driven.stored] == [
        (0, 0, {"loss": 1.0}, False),
        (1, 7, {"loss": 3.0}, True),
    ]


def test_leaving_with_an_empty_window_writes_no_entry(driven: Driven) -> None:
    driven.round(0)
    driven.host.leave(0, lambda _: Window(), 7, 8)

    assert [entry.seq for entry in driven.stored] == [0]


# The folder


def test_a_folder_is_named_by_time_and_name_and_is_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20231114-221320")
    taken = [reserve_run_dir("val", str(tmp_path / "deep" / "runs")) for _ in range(3)]

    assert [Path(text).name for text, _ in taken] == [
        "20231114-221320-val",
        "20231114-221320-val-2",
        "20231114-221320-val-3",
    ]
    for text, path in taken:
        assert path == Path(text)
        assert path.is_dir()
        assert path.is_absolute()


def test_where_no_folder_can_be_made_a_path_is_still_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "runs").touch()

    text, path = reserve_run_dir("val", str(tmp_path / "runs"))

    assert Path(text).parent == tmp_path / "runs"
    assert path is None
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize("used", [False, True])
def test_a_reserved_folder_goes_again_if_it_stayed_empty(tmp_path: Path, *, used: bool) -> None:
    text, reserved = reserve_run_dir("val", str(tmp_path))
    driven = Driven("jsonl", run_dir=text, reserved=reserved)
    if used:
        driven.round(0)

    driven.host.close()

    assert [path.name for path in tmp_path.iterdir()] == ([Path(text).name] if used else [])
