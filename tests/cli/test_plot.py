from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from logsync.coordinator.messages import LogEntry
from logsync.workers.cli.page import make_page
from logsync.workers.cli.runs import RunFile
from support.command import entry, logsync, ranks_waits, write_run


def data_of(page: str) -> dict[str, Any]:
    """What a page draws."""
    found: dict[str, Any] = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    return found


def drawn(path: Path, pattern: str | None = None) -> dict[str, Any]:
    run = RunFile(path)
    run.poll()
    return data_of(make_page(run, pattern, "// the library").text)


def metric(found: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = (each for each in found["metrics"] if each["name"] == name)
    return dict(one)


def with_spread(seq: int) -> LogEntry:
    spread = {"loss": 2.0, "loss/min": 1.0, "loss/max": 3.0 + seq, "loss/std": 1.0, "loss/argmax_rank": float(seq % 2)}
    return entry(seq, spread)


def test_the_page_is_beside_the_run_or_where_it_was_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [entry(0)])

    beside = logsync("plot", tmp_path / "run")
    asked = logsync("plot", tmp_path / "run", "-o", tmp_path / "it.html", "--json")

    assert (beside.returncode, asked.returncode) == (0, 0)
    assert f"{tmp_path / 'run' / 'plot.html'}: 1 metrics of 1 entries" in beside.stdout
    told = json.loads(asked.stdout)
    assert told["page"] == str(tmp_path / "it.html")
    assert told["bytes"] == (tmp_path / "it.html").stat().st_size == (tmp_path / "run" / "plot.html").stat().st_size
    assert (told["entries"], told["metrics"], told["points"], told["heat"]) == (1, 1, 1, False)


def test_a_page_that_cannot_be_written_is_an_error_in_one_line(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(0)])

    ran = logsync("plot", tmp_path, "-o", tmp_path / "nowhere" / "it.html")

    assert ran.returncode == 1
    assert ran.stderr == f"logsync: No such file or directory: {tmp_path / 'nowhere' / 'it.html'}\n"


def test_a_spread_is_a_band_that_names_the_highest_rank(tmp_path: Path) -> None:
    found = drawn(write_run(tmp_path, [with_spread(seq) for seq in range(4)]))

    assert [each["name"] for each in found["metrics"]] == ["loss"]
    loss = metric(found, "loss")
    assert loss["merged"]["y"] == [2, 2, 2, 2]
    assert loss["low"]["y"] == [1, 1, 1, 1]
    assert loss["high"]["y"] == [3, 4, 5, 6]
    assert loss["high"]["rank"] == [0, 1, 0, 1]
    assert found["places"][loss["merged"]["at"]]["step"] == [0, 10, 20, 30]


def test_the_ranks_own_values_are_lines_and_their_range_a_band(tmp_path: Path) -> None:
    run = [entry(seq, {"gpu": 2.0, "gpu/rank0": 1.0 + seq, "gpu/rank1": 3.0 - seq}) for seq in range(3)]

    gpu = metric(drawn(write_run(tmp_path, run)), "gpu")

    assert [(each["rank"], each["y"]) for each in gpu["ranks"]] == [(0, [1, 2, 3]), (1, [3, 2, 1])]
    assert (gpu["low"]["y"], gpu["high"]["y"]) == ([1, 2, 1], [3, 2, 3])


def test_a_hundred_ranks_are_a_band_alone_and_the_page_says_so(tmp_path: Path) -> None:
    run = [entry(0, {"gpu": 2.0, **{f"gpu/rank{rank}": float(rank) for rank in range(100)}})]

    found = drawn(write_run(tmp_path, run))

    assert "ranks" not in metric(found, "gpu")
    assert metric(found, "gpu")["high"]["y"] == [99]
    assert "more than 16 ranks are drawn as a band" in str(found["notes"])


def test_attempts_are_marked_where_they_begin(tmp_path: Path) -> None:
    found = drawn(write_run(tmp_path, [entry(seq, attempt=seq // 4) for seq in range(10)]))

    assert [(each["attempt"], each["step"], each["time"]) for each in found["attempts"]] == [
        (attempt, 40 * attempt, 1_700_000_000_000 + 8000 * attempt) for attempt in range(3)
    ]


@pytest.mark.parametrize("entries", [2000, 2001, 50_000])
def test_thinned_curves_keep_every_peak_at_its_own_step_and_say_so(tmp_path: Path, entries: int) -> None:
    peak = entries * 2 // 3
    values = [math.sin(seq) + (1000 if seq == peak else 0) for seq in range(entries)]
    found = drawn(write_run(tmp_path, [entry(seq, {"loss": value}) for seq, value in enumerate(values)]))

    loss = metric(found, "loss")
    thinned = entries > 2000
    kept = loss["peaks"] if thinned else loss["merged"]
    where = found["places"][kept["at"]]["step"]
    assert where[kept["y"].index(max(kept["y"]))] == 10 * peak
    assert min(kept["y"]) == pytest.approx(min(values), rel=1e-6)
    assert len(loss["merged"]["y"]) == (1000 if thinned else entries)
    assert ("so that no peak is lost" in str(found["notes"])) == thinned
    if thinned:
        first = values[: entries // 1000]
        assert loss["merged"]["y"][0] == pytest.approx(sum(first) / len(first), rel=1e-6)


def test_values_that_are_not_finite_are_gaps_with_a_mark_that_names_ranks(tmp_path: Path) -> None:
    run = [entry(0), entry(1, {"loss": float("nan")}, nan_ranks={"loss": (3, 5)}), entry(2, {"loss": float("-inf")})]

    loss = metric(drawn(write_run(tmp_path, run)), "loss")

    assert loss["merged"]["y"] == [1, None, None]
    assert loss["bad"]["step"] == [10, 20]
    assert loss["bad"]["text"] == ["nan, because of rank 3, 5", "-inf"]


def test_every_ranks_wait_is_on_the_page(tmp_path: Path) -> None:
    run = [entry(seq) for seq in range(6)]

    found = drawn(write_run(tmp_path, run, waits=lambda each: ranks_waits(slow=2, wait_ms=100 * each.seq + 300)))

    assert found["heat"]["rows"] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert found["heat"]["waits"][0] == [301, 401, 501, 601, 701, 801]
    assert found["heat"]["waits"][2] == [1] * 6
    assert found["heat"]["slowest"] == ["<br>slowest: rank 2 on node-1"] * 6
    assert found["waited"].startswith(
        "In 6 of 6 log intervals ranks waited for a slower one, up to 0.8 s; it was rank 2"
    )


def test_waits_without_each_ranks_are_a_curve_and_no_waits_are_explained(tmp_path: Path) -> None:
    def least_and_most(_: LogEntry) -> dict[str, object]:
        return {name: value for name, value in ranks_waits(1, 500).items() if name != "each_ms"}

    some = drawn(write_run(tmp_path / "some", [entry(seq) for seq in range(3)], waits=least_and_most))
    none = drawn(write_run(tmp_path / "none", [entry(0)]))

    assert some["heat"] is None
    assert metric(some, "waits of the ranks")["merged"]["y"] == [0.501] * 3
    assert "too many ranks" in some["waited"]
    assert none["heat"] is None
    assert "no line of this file tells of waits" in none["waited"]


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        *[
            ("time_s/data", "seconds"),
            ("wait_s", "seconds"),
            ("step_ms", "milliseconds"),
            ("tokens_per_s", "per second"),
        ],
        *[("gpu/memory_gb", "GB"), ("mem_MiB", "MiB"), ("sent_bytes", "bytes"), ("mfu_pct", "%")],
        *[("loss", ""), ("its", ""), ("train/items", ""), ("classes", "")],
    ],
)
def test_units_are_read_off_names(tmp_path: Path, name: str, unit: str) -> None:
    assert metric(drawn(write_run(tmp_path, [entry(0, {name: 1.0})])), name)["unit"] == unit


def test_without_steps_entries_are_counted(tmp_path: Path) -> None:
    found = drawn(write_run(tmp_path, [entry(seq, step=None) for seq in range(3)]))

    assert found["step_title"] == "entry"
    assert found["places"] == [{"step": [0, 1, 2], "time": [1_700_000_000_000 + 2000 * seq for seq in range(3)]}]


def test_names_cannot_leave_the_element_that_the_data_is_in(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>@LIBRARY@\x1b[31m"
    path = write_run(tmp_path, [entry(0, {name: 1.0})])
    run = RunFile(path)
    run.poll()

    page = make_page(run, None, "// the library").text

    assert "<script>alert" not in page
    assert data_of(page)["metrics"][0]["name"] == name.replace("\x1b", r"\x1b")


def test_thousands_of_metrics_make_a_page_of_a_few_megabytes(tmp_path: Path) -> None:
    path = write_run(tmp_path, [entry(seq, {f"layer{n}": n + 1 / 3 for n in range(3000)}) for seq in range(40)])

    found = drawn(path)

    assert len(found["metrics"]) == 3000
    assert len(found["places"]) == 1
    assert len(json.dumps(found)) < 5e6
