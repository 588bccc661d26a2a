from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from support.torchrun import plain_python

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_bench_call_measures_every_row_under_a_lease_and_writes_no_file(tmp_path: Path) -> None:
    job = plain_python(SCRIPTS / "bench_call.py", "--blocks", 3, "--calls", 100, folder=tmp_path)
    job.assert_clean()

    rows = re.findall(r" / .* (\d+\.\d+) +\d+\.\d+ - \d+\.\d+ ", job.output)
    assert len(rows) == 12, job.output
    assert all(float(ratio) > 0 for ratio in rows)
    assert len(re.findall(r" (?:met|MISSED) ", job.output)) == 5, job.output
    assert [path.name for path in tmp_path.iterdir()] == ["output.txt"]


@pytest.mark.slow
def test_bench_round_starts_its_own_ranks_and_measures_all_three_sides(tmp_path: Path) -> None:
    arguments = ("--ranks", 2, "--blocks", 3, "--rounds", 5)
    job = plain_python(SCRIPTS / "bench_round.py", *arguments, folder=tmp_path)
    job.assert_clean()

    rows = re.findall(r"^ +2  \S.*? +(\d+)  ", job.output, re.MULTILINE)
    assert len(rows) == 3, job.output
    assert all(int(microseconds) > 0 for microseconds in rows)


@pytest.mark.slow
def test_bench_training_compares_every_way_to_log_and_draws_it(tmp_path: Path) -> None:
    picture = tmp_path / "picture.svg"
    job = plain_python(SCRIPTS / "bench_training.py", "--quick", "--picture", picture, folder=tmp_path, timeout_s=110)
    job.assert_clean()

    rows = re.findall(r"^ +2 +2ms  (\S.*?)  +\d+\.\d+%", job.output, re.MULTILINE)
    assert len(rows) == 8, job.output
    drawn = ET.parse(picture).getroot()  # noqa: S314 - our own
    texts = {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert set(rows) <= texts


def test_bench_scale_measures_every_world_and_reasons_from_that(tmp_path: Path) -> None:
    job = plain_python(SCRIPTS / "bench_scale.py", "--quick", "--rounds", 2, folder=tmp_path)
    job.assert_clean()

    rows = re.findall(r"^ *(\d+) +(\d+\.\d+) +\d+\.\d+ .*\d+\.\d+$", job.output, re.MULTILINE)
    assert [int(ranks) for ranks, _ in rows] == [16, 64, 256], job.output
    assert all(float(ms) > 0 for _, ms in rows)
    large = re.findall(r"^ *(10?000) +(directly|by nodes of 8) +(\d+) .* (\d+\.\d)% *$", job.output, re.MULTILINE)
    assert [row[:3] for row in large] == [
        ("1000", "directly", "999"),
        ("10000", "directly", "9999"),
        ("1000", "by nodes of 8", "131"),
        ("10000", "by nodes of 8", "1256"),
    ], job.output
    assert float(large[1][3]) > float(large[0][3])
    assert len(re.findall(r"saturates first is (deciding|reading|writing|the link)\.", job.output)) == 2, job.output
