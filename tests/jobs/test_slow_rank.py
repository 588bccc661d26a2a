from __future__ import annotations

import re
import socket
from collections import Counter
from pathlib import Path

import pytest

from support.torchrun import Ran, entries, plain_python, torchrun

SCRIPTS = Path(__file__).parent / "scripts"
STEPS = [f"INFO [rank 0 of 2] train: step {step}" for step in range(6)]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("slow")
    ran = torchrun(SCRIPTS / "slow_rank.py", folder, nproc=2, folder=folder)
    ran.assert_clean()
    return ran


def said(text: str) -> list[str]:
    """The text's lines of get_logger, without their times."""
    return re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (.*)$", text, re.MULTILINE)


def test_a_rank_that_sleeps_is_named_in_the_entries_on_all_ranks(job: Ran) -> None:
    logged = [entry["waits"] for entry in entries(job.folder) if "waits" in entry]
    ours, theirs = (job.result(rank) for rank in range(2))

    assert ours == theirs
    assert ours[0] is None
    assert ours[1:] == logged
    # A busy machine may hold up the other rank for once.
    assert Counter(waits["slowest"] for waits in logged).most_common(1)[0][0] == 1
    assert max(waits["most_s"] - waits["least_s"] for waits in logged) > 0.1


def test_a_rank_that_sleeps_is_named_on_the_console_with_its_host(job: Ran) -> None:
    host = re.escape(ascii(socket.gethostname())[1:-1][:64])

    assert re.search(
        rf"\(slowest: rank 1 on {host}, others waited up to \d+\.\d\d s of \d+\.\d\d s for it\)", job.output
    )


def test_a_timer_names_the_rank_whose_section_takes_longest(job: Ran) -> None:
    logged = [entry for entry in entries(job.folder) if "time_s/load" in entry]

    assert len(logged) == 6
    assert {entry["time_s/load/argmax_rank"] for entry in logged} == {1}
    assert all(entry["time_s/load/max"] >= 0.25 for entry in logged)


def test_under_torchrun_rank_0_informs_and_every_rank_warns_once(job: Ran) -> None:
    lines = said(job.output)

    assert [line for line in lines if "[rank 0 of 2]" in line] == [
        "INFO [rank 0 of 2] train: starting",
        *STEPS,
        "INFO [rank 0 of 2] train.all: done",
        "WARNING [rank 0 of 2] train: careful",
        "INFO [rank 0 of 2] train: destroyed",
    ]
    assert [line for line in lines if "[rank 1 of 2]" in line] == [
        "INFO [rank 1 of 2] train.all: done",
        "WARNING [rank 1 of 2] train: careful",
    ]


@pytest.mark.parametrize("rank", range(2))
def test_every_ranks_file_has_all_that_it_said(job: Ran, rank: int) -> None:
    lines = said((job.folder / "text" / f"rank{rank}.log").read_text())

    assert [line.replace(f"[rank {rank} of 2]", "[rank 0 of 2]") for line in lines] == [
        "INFO [rank 0 of 2] train: starting",
        *STEPS,
        "WARNING [rank 0 of 2] train: careful",
        "INFO [rank 0 of 2] train: destroyed",
    ]


def test_ranks_that_only_torch_distributed_knows_are_known_from_then_on(tmp_path: Path) -> None:
    job = plain_python(SCRIPTS / "spawned.py", tmp_path, folder=tmp_path)
    job.assert_clean()

    assert Counter(said(job.output)) == Counter(
        {
            "INFO train: alone": 1,
            "INFO [rank 0 of 2] train: begun": 1,
            "WARNING [rank 0 of 2] train: careful": 1,
            "WARNING [rank 1 of 2] train: careful": 1,
            "INFO [rank 0 of 2] train: over": 1,
        }
    )
