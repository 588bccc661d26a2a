from __future__ import annotations

import re
from pathlib import Path

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
