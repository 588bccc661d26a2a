"""What the trackers' sinks share: which entries a resumed one holds, and what is said where a package is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from logsync.coordinator.errors import ConfigError, Step
from logsync.coordinator.sinks.isolation import SinkSet
from logsync.coordinator.sinks.trackers import LastLogged, Replay, flat, require
from support.sinks import entry, run

Points = list[tuple[int, Step]]


def logged(held: LastLogged | None, next_seq: int, points: Points, *, resumed: bool = True) -> Points:
    replay = Replay("it", run(Path("unused"), next_seq, resumed=resumed), held)
    return [(seq, step) for seq, step in points if not replay.covers(entry(seq, step=step))]


def test_at_the_same_pace_what_is_held_is_skipped_by_number() -> None:
    points: Points = [(3, 30), (4, 40), (5, 40), (6, 50)]

    assert logged(LastLogged(3, 30), 3, points) == points[1:]
    assert logged(LastLogged(4, 40), 3, points) == points[2:]
    assert logged(LastLogged(5, 40), 3, points) == points[3:]


def test_at_another_pace_the_steps_that_are_held_are_skipped() -> None:
    assert logged(LastLogged(6, 60), 3, [(3, 130), (4, 230)]) == [(3, 130), (4, 230)]
    assert logged(LastLogged(6, 60), 3, [(n, 30 + n) for n in range(3, 40)]) == [(n, 30 + n) for n in range(31, 40)]
    assert logged(LastLogged(4, 40), 3, [(3, 35), (4, 38), (5, 40), (6, 45)]) == [(6, 45)]


def test_without_steps_numbers_decide() -> None:
    points: Points = [(3, None), (4, None), (5, None)]

    assert logged(LastLogged(4, None), 3, points) == [(5, None)]
    assert logged(LastLogged(4, 40), 3, points) == [(5, None)]


def test_after_the_first_new_entry_nothing_is_skipped_even_if_steps_go_back() -> None:
    assert logged(LastLogged(4, 40), 4, [(4, 50), (5, 20), (6, 30)]) == [(4, 50), (5, 20), (6, 30)]


def held_after(*points: tuple[int, Step]) -> LastLogged:
    held = LastLogged()
    for seq, step in points:
        held = held.and_then(seq, step)
    return held


def test_steps_that_go_back_neither_double_what_is_held_nor_hide_what_is_new() -> None:
    points: Points = [(15, 80), (16, 90), (17, 100), (18, 0), (19, 2), (20, 5)]
    held = held_after(*points)

    assert logged(held, 15, [*points, (21, 10), (22, 3)]) == [(21, 10), (22, 3)]
    # At half the pace, the counter begins anew: what the tracker has of that cannot be told from the steps.
    half: Points = [*((n, n) for n in range(15, 21)), (21, 0), (22, 4)]
    assert logged(held, 15, half) == [(21, 0), (22, 4)]


def test_what_an_earlier_attempt_lost_is_logged_by_a_later_one_and_the_rest_is_not() -> None:
    held = held_after(*((n, n) for n in (0, 1, 2, 3, 4, 10)))
    again: Points = [(n, n) for n in range(5, 13)]

    assert logged(held, 5, again) == [(n, n) for n in (5, 6, 7, 8, 9, 11, 12)]
    # That one is killed when it has filled a part of the gap.
    for n in (5, 6):
        held = held.and_then(n, n)
    assert (held.seq, held.gaps) == (10, ((7, 9),))
    assert logged(held, 5, again) == [(n, n) for n in (7, 8, 9, 11, 12)]
    assert held.and_then(8, 8).gaps == ((7, 7), (9, 9))


def test_what_is_left_out_at_another_pace_is_no_gap() -> None:
    held = held_after((0, 0), (1, 10), (2, 20)).without(3).without(2).and_then(4, 30)

    assert (held.seq, held.step, held.gaps) == (4, 30, ())
    assert held_after((2, 20)).without(3).step == 20


def test_an_entry_that_comes_again_because_its_write_failed_is_answered_alike() -> None:
    held = held_after((3, 30), (6, 60))
    replay = Replay("it", run(Path("unused"), 3, resumed=True), held)

    assert [replay.covers(entry(seq)) for seq in (3, 4, 4, 5, 5, 6, 7, 7)] == [True] + [False] * 4 + [
        True,
        False,
        False,
    ]


def test_the_checkpoints_entry_is_missing_if_it_was_lost_even_if_later_ones_are_there() -> None:
    info = run(Path("unused"), 3, resumed=True, last_entry=entry(2))

    assert held_after((0, 0), (1, 10)).missing_entry(info) == entry(2)
    assert held_after((0, 0), (1, 10), (4, 40)).missing_entry(info) == entry(2)
    assert held_after((0, 0), (1, 10), (2, 20)).missing_entry(info) is None
    assert held_after((0, 0)).missing_entry(info) is None
    assert held_after((0, 0), (1, 10)).missing_entry(run(Path("unused"), 3)) is None


def test_what_is_remembered_of_a_tracker_stays_small() -> None:
    held = held_after(*((2 * n, n) for n in range(1000)))

    assert len(held.gaps) == 100
    assert held.lacks(1997)
    assert not held.lacks(1998)


@pytest.mark.parametrize("held", [None, LastLogged(3, 30)])
def test_nothing_is_skipped_where_the_tracker_stops_before_the_checkpoint(held: LastLogged | None) -> None:
    assert logged(held, 4, [(4, 20), (5, 30)]) == [(4, 20), (5, 30)]


def test_nothing_is_skipped_in_a_run_that_is_not_resumed() -> None:
    assert logged(LastLogged(9, 90), 0, [(0, 0), (1, 10)], resumed=False) == [(0, 0), (1, 10)]


def test_hyperparameters_become_one_level_of_plain_values() -> None:
    values = {"lr": 0.1, "on": True, "n": 3, "name": "x", "none": None, "opt": {"betas": (0.9, 0.99), "deep": {"a": 1}}}

    assert flat(values) == {
        "lr": 0.1,
        "on": True,
        "n": 3,
        "name": "x",
        "none": "None",
        "opt/betas": "(0.9, 0.99)",
        "opt/deep/a": 1,
    }


# Packages


def test_a_missing_package_is_an_error_that_says_what_to_install() -> None:
    with pytest.raises(
        ConfigError, match=r"needs the package no_such, which is not installed: pip install 'logsync\[x\]'"
    ):
        require("no_such", "x")


def test_a_folder_that_has_the_packages_name_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_by_it").mkdir()
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(ConfigError, match="not installed"):
        require("made_by_it", "x")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "prometheus"])
def test_a_package_is_missed_where_a_sink_is_loaded_and_not_where_it_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    sinks = SinkSet([name, "jsonl"])

    assert sinks.load().endswith(f"pip install 'logsync[{name}]'")


def test_naming_a_sink_imports_no_tracker() -> None:
    script = (
        "import sys; from logsync.coordinator.sinks.base import make_sink\n"
        "for name in ('csv', 'logging', 'tensorboard', 'wandb', 'mlflow', 'prometheus'): make_sink(name)\n"
        "print({'tensorboard', 'wandb', 'mlflow', 'prometheus_client', 'google'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path += {sys.path!r}\n" + script]

    assert subprocess.run(command, check=True, text=True, capture_output=True, timeout=60).stdout == "set()\n"
