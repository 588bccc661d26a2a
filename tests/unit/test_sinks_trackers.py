"""What the trackers' sinks share: which entries a resumed one holds, and what is said where a package is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from logsync.coordinator.errors import ConfigError, Step
from logsync.coordinator.sinks.base import make_sink
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
def test_the_error_comes_where_the_sink_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)

    with pytest.raises(ConfigError, match=rf"pip install 'logsync\[{name}\]'"):
        make_sink(name)


def test_naming_a_sink_imports_no_tracker() -> None:
    script = (
        "import sys; from logsync.coordinator.sinks.base import make_sink\n"
        "for name in ('csv', 'logging', 'tensorboard', 'wandb', 'mlflow', 'prometheus'): make_sink(name)\n"
        "print({'tensorboard', 'wandb', 'mlflow', 'prometheus_client', 'google'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path += {sys.path!r}\n" + script]

    assert subprocess.run(command, check=True, text=True, capture_output=True, timeout=60).stdout == "set()\n"
