"""What the README shows of each fault is what the script says."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.torchrun import Ran, plain_python

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "try_fault.py"
SHOWN = re.findall(
    r"^\$ \.venv/bin/python scripts/try_fault\.py (\S+)\n(.*?)^```",
    (ROOT / "README.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
QUICK = {"raise"}


def plain(line: str) -> str:
    """Return the line without what differs from machine to machine and from run to run."""
    line = re.sub(r"after \d+\.\d s", "after T s", line)
    line = re.sub(r"\[127\.0\.0\.1\]:\d+|fd=\d+", "ADDRESS", line)
    line = re.sub(r"on \S+ \(pid \d+\)", "on HOST (pid N)", line)
    line = re.sub(r"on \S+ left the log", "on HOST left the log", line)
    # Which rank's connection breaks first, and what gloo says of it, is a race; so is whether the last note was read.
    line = re.sub(r"rank \d lost its connection", "rank R lost its connection", line)
    line = re.sub(r"took part in round 25, the last one \(call 25, step 24 on rank \d\)", "WAS LAST HEARD OF", line)
    line = line.replace("was last heard of at call 25, step 24", "WAS LAST HEARD OF")
    return re.sub(r"gloo says: .*", "gloo says: ...", line)


def tried(fault: str, folder: Path) -> Ran:
    folder.mkdir()
    return plain_python(SCRIPT, fault, folder=folder, timeout_s=80)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(sorted(QUICK), id="quick"),
        pytest.param([fault for fault, _ in SHOWN if fault not in QUICK], id="others", marks=pytest.mark.slow),
    ],
)
def test_the_readme_shows_what_the_script_says(faults: list[str], tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        runs = dict(zip(faults, pool.map(lambda fault: tried(fault, tmp_path / fault), faults), strict=True))

    shown = dict(SHOWN)
    for fault, ran in runs.items():
        assert ran.returncode == 0, ran.output
        said = [plain(line) for line in ran.output.splitlines()]
        missing = [line for line in shown[fault].splitlines() if plain(line) not in said]
        assert not missing, f"{missing} not in\n{ran.output}"


def test_every_fault_that_the_script_knows_is_in_the_readme(tmp_path: Path) -> None:
    listed = plain_python(SCRIPT, folder=tmp_path).output
    faults = re.findall(r"^  (\S+) +\S", listed.partition("faults:")[2], re.MULTILINE)

    assert len(faults) == 10
    page = (ROOT / "README.md").read_text()
    assert [fault for fault in faults if f"`{fault}`" not in page] == ["uneven"]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("fault", "rank", "says"), [("kill", 0, "CoordinatorLost"), ("uneven", 0, "logging")])
def test_the_coordinators_rank_can_be_hurt_too(fault: str, rank: int, says: str, tmp_path: Path) -> None:
    ran = plain_python(SCRIPT, fault, "--rank", rank, folder=tmp_path, timeout_s=80)

    assert ran.returncode == 0, ran.output
    assert {line[:7] for line in ran.output.splitlines() if says in line} >= {"[rank 1", "[rank 2"}
