from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logsync.coordinator.reduction import SPREAD
from logsync.workers.cli.heat import heat_of
from logsync.workers.cli.runs import Entry, Waited
from logsync.workers.cli.series import Family, extremes, families, restarts, series_of
from logsync.workers.cli.waiting import waiting_text
from logsync.workers.cli.words import duration

ANY = st.floats(allow_nan=True, allow_infinity=True)


@dataclass
class Made:
    """What a line's entry has beside the rest."""

    attempt: int = 0
    each_ms: tuple[int, ...] = ()
    interval_s: float = 1.0
    waits: bool = True


def made(seq: int, more: Made, time: float | None = None) -> Entry:
    waited = [wait for wait in more.each_ms if wait >= 0] or [0]
    waits = Waited(
        slowest=more.each_ms.index(min(waited)) if more.each_ms else 0,
        least_s=min(waited) / 1000,
        most_s=max(waited) / 1000,
        interval_s=more.interval_s,
        each_ms=more.each_ms,
    )
    return Entry(
        seq=seq,
        step=seq,
        time=1.7e9 + seq if time is None else time,
        attempt=more.attempt,
        metrics={"loss": float(seq)},
        partial=False,
        calls=None,
        ranks={},
        nan_ranks={},
        waits=waits if more.waits else None,
    )


@given(st.lists(ANY, min_size=1, max_size=300), st.integers(1, 20))
def test_the_first_the_last_and_the_extremes_of_every_part_are_drawn(values: list[float], groups: int) -> None:
    chosen = extremes(values, groups)
    drawn = [values[at] for at in chosen]

    assert chosen == sorted(set(chosen))
    assert {chosen[0], chosen[-1]} == {0, len(values) - 1}
    assert len(chosen) <= max(3 * groups + 2, len(values) if len(values) <= 2 * groups else 0)
    for group in range(groups):
        part = range(group * len(values) // groups, (group + 1) * len(values) // groups)
        finite = [values[at] for at in part if math.isfinite(values[at])]
        assert not finite or {min(finite), max(finite)} <= set(drawn)
        assert all(math.isfinite(values[at]) for at in part) or any(
            at in chosen and not math.isfinite(values[at]) for at in part
        )


def test_a_spread_and_the_ranks_own_values_belong_to_their_metric() -> None:
    names = ["loss", *(f"loss/{part}" for part in SPREAD), "loss/rank0", "loss/rank10", "loss/rank2", "lr"]

    assert families(names) == [
        Family("loss", spread=True, ranks={0: "loss/rank0", 2: "loss/rank2", 10: "loss/rank10"}),
        Family("lr", spread=False, ranks={}),
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["loss", "loss/min", "loss/max"],  # two metrics of the user's own
        ["loss/min", "loss/max", "loss/std", "loss/argmax_rank"],
        ["loss/rank0", "lossrank1"],
    ],
)
def test_metrics_that_only_look_alike_stand_alone(names: list[str]) -> None:
    assert families(names) == [Family(name, spread=False, ranks={}) for name in names]


def test_a_series_says_which_entries_hold_it() -> None:
    entries = [made(seq, Made())._replace(metrics={"a": 1.0} if seq % 2 else {"b/c": 2.0}) for seq in range(5)]

    assert {name: list(series.at) for name, series in series_of(entries).items()} == {"b/c": [0, 2, 4], "a": [1, 3]}
    assert list(series_of(entries, "b*")) == ["b/c"]


def test_restarts_are_the_first_entries_of_other_attempts() -> None:
    assert restarts([made(seq, Made(attempt=attempt)) for seq, attempt in enumerate([0, 0, 1, 1, 3, 2])]) == [2, 4, 5]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.5, "0.5 s"), (59.4, "59 s"), (61, "1 min 1 s"), (3661, "1 h 1 min"), (90_000, "1 d 1 h")],
)
def test_durations_are_told_in_two_units(seconds: float, said: str) -> None:
    assert duration(seconds) == said


# Waits


def heat(entries: list[Entry]) -> dict[str, Any]:
    found, why = heat_of(entries)
    assert found is not None, why
    return found


def test_every_ranks_wait_is_a_cell_and_a_rank_that_did_not_wait_has_none() -> None:
    found = heat([made(0, Made(each_ms=(5, 700, -1))), made(1, Made(each_ms=(6, 800, 9)))])

    assert found["rows"] == ["rank 0", "rank 1", "rank 2"]
    assert found["waits"] == [[5, 6], [700, 800], [None, 9]]
    assert [round(edge - 1.7e12) for edge in found["edges"]] == [-1000, 0, 1000]


def test_many_entries_share_a_column_and_the_longest_wait_stays() -> None:
    entries = [made(seq, Made(each_ms=(1, 9000 if seq == 12_345 else 2))) for seq in range(20_000)]

    found = heat(entries)

    assert len(found["edges"]) == len(found["waits"][0]) + 1
    assert found["together"] == 50
    assert len(found["waits"][0]) == 400
    assert found["waits"][1].index(9000) == 12_345 // 50
    assert max(found["waits"][0]) == 1


def test_thousands_of_ranks_share_rows() -> None:
    found = heat([made(0, Made(each_ms=tuple(range(1000))))])

    assert found["rows"][:2] == ["ranks 0 to 3", "ranks 4 to 7"]
    assert found["rows"][-1] == "ranks 996 to 999"
    assert [row[0] for row in found["waits"]] == list(range(3, 1000, 4))


def test_time_without_a_log_is_a_gap_and_edges_only_rise() -> None:
    entries = [
        made(0, Made(each_ms=(1, 1))),
        made(1, Made(each_ms=(2, 2))),
        made(2, Made(attempt=1, each_ms=(3, 3, 3)), time=1.7e9 + 500),
        made(3, Made(attempt=1, each_ms=(4, 4, 4)), time=1.7e9 + 499),  # a clock that was set back
        made(4, Made(attempt=1, each_ms=(5, 5, 5)), time=math.nan),
    ]

    found = heat(entries)

    assert found["waits"][0] == [1, 2, None, 3, 4]
    assert found["waits"][2] == [None, None, None, 3, 4]
    assert all(a < b for a, b in itertools.pairwise(found["edges"]))


@pytest.mark.parametrize(
    ("more", "why"), [(Made(waits=False), "no line of this file tells of waits"), (Made(), "too many ranks")]
)
def test_without_each_ranks_wait_there_is_no_heat_map_and_a_reason(more: Made, why: str) -> None:
    found, said = heat_of([made(0, more)])

    assert found is None
    assert why in said


def test_ranks_that_keep_pace_are_said_to() -> None:
    kept = waiting_text([made(seq, Made(each_ms=(1, 5))) for seq in range(9)])

    assert kept == "ranks kept pace: in 9 log intervals none waited 10 ms, and a tenth of one, for another"
    assert waiting_text([made(0, Made(waits=False))]) is None
