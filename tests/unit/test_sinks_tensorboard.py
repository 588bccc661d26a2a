"""TensorBoard's event files, as TensorBoard's own reader sees them."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing import event_accumulator, plugin_event_multiplexer
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from logsync.coordinator.errors import Step
from logsync.coordinator.sinks.files import Appender
from logsync.coordinator.sinks.tensorboard import TensorboardSink
from support.sinks import entry, feed, run

Points = list[tuple[int, float]]


def scalars(folder: Path) -> dict[str, Points]:
    """Every tag's (step, value), in the order read. Both of TensorBoard's Python readers must agree."""
    reader: Any = event_accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    found = {tag: [(p.step, p.value) for p in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    newer: Any = plugin_event_multiplexer.EventMultiplexer({"it": str(folder)}, tensor_size_guidance={"scalars": 0})
    newer.Reload()
    steps = {tag: [p.step for p in newer.Tensors("it", tag)] for tag in newer.GetAccumulator("it").Tags()["tensors"]}
    assert {tag: steps[tag] for tag in found} == {tag: [step for step, _ in points] for tag, points in found.items()}
    return found


def times(folder: Path, tag: str) -> list[float]:
    reader: Any = event_accumulator.EventAccumulator(str(folder))
    reader.Reload()
    return [point.wall_time for point in reader.Scalars(tag)]


def test_points_stand_at_the_entries_steps_and_times(tmp_path: Path) -> None:
    feed(TensorboardSink, run(tmp_path), entry(0), entry(1, {"loss": 0.25, "eval/acc": 0.5}), entry(2))

    assert scalars(tmp_path / "tb") == {"loss": [(0, 0.0), (10, 0.25), (20, 1.0)], "eval/acc": [(10, 0.5)]}
    assert times(tmp_path / "tb", "loss") == [1000.0, 1001.0, 1002.0]


def test_what_is_not_finite_stays_so(tmp_path: Path) -> None:
    feed(TensorboardSink, run(tmp_path), entry(0, {"a": math.nan, "b": math.inf, "c": -math.inf}))

    found = scalars(tmp_path / "tb")
    assert math.isnan(found["a"][0][1])
    assert found["b"] == [(0, math.inf)]
    assert found["c"] == [(0, -math.inf)]


@pytest.mark.parametrize(
    ("steps", "places"),
    [
        ([0, 7, 2**62], [0, 7, 2**62]),
        ([0.0, 0.5, 1.0, 1.25], [0, 500_000, 1_000_000, 1_250_000]),
        ([0, 1, 1.5, 2], [0, 1, 1_500_000, 2_000_000]),
        ([1 / 16384, 2 / 16384], [61, 122]),
        ([None, None, None], [0, 1, 2]),
        ([100, None, 200], [100, 100, 200]),
        ([0.5, None], [500_000, 500_000]),
        ([1e300], [2**63 - 1]),
    ],
)
def test_epochs_stand_at_millionths_and_no_step_stands_where_the_last_one_was(
    tmp_path: Path, steps: list[Step], places: list[int]
) -> None:
    feed(TensorboardSink, run(tmp_path), *(entry(seq, {"x": 1.0}, step=step) for seq, step in enumerate(steps)))

    assert [step for step, _ in scalars(tmp_path / "tb")["x"]] == places


def test_each_point_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    sink = feed(TensorboardSink, run(tmp_path), close=False)
    for seq in range(3):
        sink.write(entry(seq))
        assert len(scalars(tmp_path / "tb")["loss"]) == seq + 1
    sink.close()


def test_hyperparameters_are_there_for_the_hparams_tab(tmp_path: Path) -> None:
    sink = TensorboardSink()
    sink.open(run(tmp_path))
    sink.hyperparams({"lr": 0.1, "layers": 3, "amp": True, "optimizer": {"name": "adam", "betas": (0.9, 0.99)}})
    sink.write(entry(0))
    sink.close()

    reader: Any = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    reader.Reload()
    content = reader.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    shown = metadata.parse_session_start_info_plugin_data(content).hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in shown.items()} == {
        "lr": 0.1,
        "layers": 3,
        "amp": True,
        "optimizer/name": "adam",
        "optimizer/betas": "(0.9, 0.99)",
    }
    assert scalars(tmp_path / "tb")["loss"] == [(0, 0.0)]


# Resume


@pytest.mark.parametrize("next_seq", range(6))
@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path: Path, next_seq: int, *, killed: bool) -> None:
    feed(TensorboardSink, run(tmp_path), *map(entry, range(5)), close=not killed)

    again = [entry(seq, {"loss": -1.0}, attempt=1) for seq in range(next_seq, 7)]
    feed(TensorboardSink, run(tmp_path, next_seq, resumed=True), *again)

    old = [(seq * 10, seq / 2) for seq in range(min(next_seq, 5))]
    assert scalars(tmp_path / "tb")["loss"] == old + [(seq * 10, -1.0) for seq in range(next_seq, 7)]


def test_the_checkpoints_entry_that_a_kill_kept_from_the_files_is_added_and_no_other(tmp_path: Path) -> None:
    feed(TensorboardSink, run(tmp_path), entry(0), entry(1), close=False)

    feed(TensorboardSink, run(tmp_path, 3, resumed=True, last_entry=entry(2)), entry(3))
    feed(TensorboardSink, run(tmp_path, 3, resumed=True, last_entry=entry(2)), entry(3))

    assert scalars(tmp_path / "tb")["loss"] == [(0, 0.0), (10, 0.5), (20, 1.0), (30, 1.5)]


def test_points_between_the_new_steps_go_when_the_job_resumes_at_another_pace(tmp_path: Path) -> None:
    feed(TensorboardSink, run(tmp_path), *map(entry, range(6)))

    feed(TensorboardSink, run(tmp_path, 3, resumed=True), *(entry(seq, {"loss": 9.0}, step=seq * 15) for seq in (3, 4)))

    assert scalars(tmp_path / "tb")["loss"] == [(0, 0.0), (10, 0.5), (20, 1.0), (45, 9.0), (60, 9.0)]
    # TensorBoard's fast reader purges nothing, so the old points must not be in the files any more.
    reader: Any = event_accumulator.EventAccumulator(str(tmp_path / "tb"), purge_orphaned_data=False)
    reader.Reload()
    assert [point.step for point in reader.Scalars("loss")] == [0, 10, 20, 45, 60]


def test_an_entry_before_the_checkpoint_survives_one_of_the_same_step_after_it(tmp_path: Path) -> None:
    feed(TensorboardSink, run(tmp_path), entry(0), entry(1, {"loss": 0.5}), entry(2, {"eval": 1.0}, step=10), entry(3))

    feed(TensorboardSink, run(tmp_path, 2, resumed=True), entry(2, {"eval": 2.0}, step=10), entry(3, {"loss": 7.0}))

    assert scalars(tmp_path / "tb") == {"loss": [(0, 0.0), (10, 0.5), (30, 7.0)], "eval": [(10, 2.0)]}


def test_many_resumes_from_one_checkpoint_between_two_entries_of_a_step_keep_each_point_once(tmp_path: Path) -> None:
    feed(TensorboardSink, run(tmp_path), entry(0), entry(1), entry(2, {"loss": 7.0}, step=10), entry(3))

    for attempt in range(1, 4):
        feed(TensorboardSink, run(tmp_path, 2, resumed=True), entry(2, {"loss": -attempt}, step=10), entry(3))
        assert scalars(tmp_path / "tb")["loss"] == [(0, 0.0), (10, 0.5), (10, -attempt), (30, 1.5)]
        reader: Any = event_accumulator.EventAccumulator(str(tmp_path / "tb"), purge_orphaned_data=False)
        reader.Reload()
        assert [point.step for point in reader.Scalars("loss")] == [0, 10, 10, 30]


def test_points_that_move_to_the_new_file_are_not_lost_where_steps_went_back(tmp_path: Path) -> None:
    feed(TensorboardSink, run(tmp_path), *(entry(seq, step=step) for seq, step in enumerate([0, 50, 10, 20, 40])))

    feed(TensorboardSink, run(tmp_path, 4, resumed=True), entry(4, step=40))

    assert sorted(scalars(tmp_path / "tb")["loss"]) == [(0, 0.0), (10, 1.0), (20, 1.5), (40, 2.0), (50, 0.5)]


def test_a_start_that_was_killed_before_it_cut_the_old_files_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed(TensorboardSink, run(tmp_path), entry(0), entry(1), entry(2, {"loss": 7.0}, step=10))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("os.truncate", killed)
        with pytest.raises(KeyboardInterrupt):
            feed(TensorboardSink, run(tmp_path, 2, resumed=True))

    feed(TensorboardSink, run(tmp_path, 2, resumed=True), entry(2, {"loss": 8.0}, step=10))

    assert scalars(tmp_path / "tb")["loss"] == [(0, 0.0), (10, 0.5), (10, 8.0)]


def test_a_tensorboard_that_has_read_the_old_points_forgets_them_too(tmp_path: Path) -> None:
    feed(TensorboardSink, run(tmp_path), *map(entry, range(5)))
    live: Any = event_accumulator.EventAccumulator(str(tmp_path / "tb"))
    newer: Any = plugin_event_multiplexer.EventMultiplexer({"it": str(tmp_path / "tb")})
    for reader in (live, newer):
        reader.Reload()

    feed(TensorboardSink, run(tmp_path, 3, resumed=True), entry(3, step=35), entry(4, step=45))

    for reader in (live, newer):
        reader.Reload()
    assert [point.step for point in live.Scalars("loss")] == [0, 10, 20, 35, 45]
    assert [point.step for point in newer.Tensors("it", "loss")] == [0, 10, 20, 35, 45]


def test_many_resumes_within_a_second_are_read_in_their_order(tmp_path: Path) -> None:
    feed(TensorboardSink, run(tmp_path), *map(entry, range(4)))
    for attempt in range(1, 5):
        again = (entry(seq, {"loss": float(attempt)}) for seq in range(attempt, 4 + attempt))
        feed(TensorboardSink, run(tmp_path, attempt, resumed=True), *again)

    assert scalars(tmp_path / "tb")["loss"] == [(0, 0.0), (10, 1.0), (20, 2.0), (30, 3.0)] + [
        (step, 4.0) for step in (40, 50, 60, 70)
    ]


def test_fractions_are_remembered_over_a_resume(tmp_path: Path) -> None:
    feed(TensorboardSink, run(tmp_path), entry(0, step=0), entry(1, step=0.5))

    feed(TensorboardSink, run(tmp_path, 2, resumed=True), entry(2, step=1), entry(3, step=None))

    assert [step for step, _ in scalars(tmp_path / "tb")["loss"]] == [0, 500_000, 1_000_000, 1_000_000]


def test_a_file_cut_off_at_any_byte_is_repaired_and_has_each_entry_whole_or_not_at_all(tmp_path: Path) -> None:
    values = [{"loss": seq / 2, "b": 1.0} for seq in range(3)]
    feed(TensorboardSink, run(tmp_path), *map(entry, range(3), values))
    (file,) = (tmp_path / "tb").iterdir()
    whole = file.read_bytes()
    counts = set()

    for length in range(0, len(whole) + 1, 3):
        for path in (tmp_path / "tb").iterdir():
            path.unlink()
        file.write_bytes(whole[:length] + (b"\0" * 64 if length % 2 else b""))
        feed(TensorboardSink, run(tmp_path, 3, resumed=True, last_entry=entry(2, values[2])), entry(3))

        found = scalars(tmp_path / "tb")["loss"]
        assert found == [(seq * 10, seq / 2) for seq in range(len(found) - 1)] + [(30, 1.5)], length
        assert [step for step, _ in scalars(tmp_path / "tb").get("b", [])] == [step for step, _ in found[:-1]]
        counts.add(len(found))
    # With two entries there, the checkpoint has the third.
    assert counts == {1, 2, 4}


def test_an_open_that_fails_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(TensorboardSink, run(tmp_path), entry(0), entry(1), entry(2, step=10))
    before = {path: path.read_bytes() for path in (tmp_path / "tb").iterdir()}
    append, room = Appender.append, [0]

    def full(file: Appender, data: bytes) -> None:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= 1
        append(file, data)

    with monkeypatch.context() as patched:
        patched.setattr(Appender, "append", full)
        for appends in (0, 1):
            room[0] = appends
            with pytest.raises(OSError, match="No space left"):
                TensorboardSink().open(run(tmp_path, 4, resumed=True, last_entry=entry(3)))
        assert {path: path.read_bytes() for path in (tmp_path / "tb").iterdir()} == before

    feed(TensorboardSink, run(tmp_path, 2, resumed=True), entry(2, {"loss": 9.0}, step=10))
    assert scalars(tmp_path / "tb")["loss"] == [(0, 0.0), (10, 0.5), (10, 9.0)]


def test_bytes_that_are_no_event_end_an_old_file(tmp_path: Path) -> None:
    feed(TensorboardSink, run(tmp_path), entry(0))
    (file,) = (tmp_path / "tb").iterdir()
    with file.open("ab") as handle:
        handle.write((5).to_bytes(8, "little") + b"\0" * 4 + b"\xff" * 9)

    feed(TensorboardSink, run(tmp_path, 1, resumed=True), entry(1))

    assert scalars(tmp_path / "tb")["loss"] == [(0, 0.0), (10, 0.5)]


# A folder that holds other things


def test_an_old_run_is_moved_away_whole_when_it_is_not_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for attempt in range(3):
        feed(TensorboardSink, run(tmp_path), entry(attempt))

    assert scalars(tmp_path / "tb")["loss"] == [(20, 1.0)]
    assert scalars(tmp_path / "tb.1")["loss"] == [(0, 0.0)]
    assert scalars(tmp_path / "tb.2")["loss"] == [(10, 0.5)]
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "tb.2" in caplog.messages[1]


@pytest.mark.parametrize("resumed", [False, True])
def test_another_programs_events_in_the_folder_are_left_alone(tmp_path: Path, *, resumed: bool) -> None:
    other: Any = EventFileWriter(str(tmp_path))
    values = [summary_pb2.Summary.Value(tag="theirs", simple_value=1.0)]
    for step in (0, 1000):
        other.add_event(event_pb2.Event(step=step, wall_time=1.0, summary=summary_pb2.Summary(value=values)))
    other.close()

    def make() -> TensorboardSink:
        return TensorboardSink(tmp_path)

    feed(make, run(tmp_path / "unused"), entry(0))
    feed(make, run(tmp_path / "unused", 1, resumed=resumed), entry(1))

    found = scalars(tmp_path)
    assert found["theirs"] == [(0, 1.0), (1000, 1.0)]
    assert found["loss"] == ([(0, 0.0)] if resumed else []) + [(10, 0.5)]
    assert not (tmp_path / "unused").exists()


# Faults


def test_a_write_that_fails_half_way_is_taken_back_and_later_ones_succeed(tmp_path: Path) -> None:
    script = """
        import resource, sys
        from pathlib import Path
        from logsync.coordinator.sinks.tensorboard import TensorboardSink
        from support.sinks import entry, run

        sink = TensorboardSink()
        sink.open(run(Path(sys.argv[1])))
        sink.write(entry(0))
        (file,) = Path(sys.argv[1], "tb").iterdir()
        whole, hard = file.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        for room in range(0, 60, 7):
            resource.setrlimit(resource.RLIMIT_FSIZE, (whole + room, hard))
            try:
                sink.write(entry(1))
            except OSError as error:
                print(error.errno)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        sink.write(entry(2))
        sink.close()
    """
    command = [sys.executable, "-c", f"import sys; sys.path += {sys.path!r}\n" + textwrap.dedent(script), str(tmp_path)]
    ran = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, timeout=60)

    assert set(ran.stdout.split()) == {str(errno.EFBIG)}
    assert scalars(tmp_path / "tb")["loss"] == [(0, 0.0), (20, 1.0)]


def test_close_may_come_twice_and_write_needs_an_open(tmp_path: Path) -> None:
    sink = TensorboardSink()
    sink.close()
    with pytest.raises(ValueError, match="not open"):
        sink.write(entry(0))
    sink.open(run(tmp_path))
    sink.close()
    sink.close()


def test_neither_torch_nor_tensorflow_is_loaded(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from logsync.coordinator.sinks.tensorboard import TensorboardSink\n"
        "print('tensorboard' in sys.modules)\n"
        "from support.sinks import entry, feed, run\n"
        "feed(TensorboardSink, run(Path(sys.argv[1])), entry(0))\n"
        "print('tensorboard' in sys.modules, 'torch' in sys.modules, 'tensorflow' in sys.modules)"
    )
    command = [sys.executable, "-c", f"import sys; sys.path += {sys.path!r}\n" + script, str(tmp_path)]
    ran = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, timeout=60)

    assert ran.stdout.split() == ["False", "True", "False", "False"]
