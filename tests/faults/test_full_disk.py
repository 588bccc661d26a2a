from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.fault_world import FaultJob, JobMaker

pytestmark = pytest.mark.timeout(100)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)],  # noqa: S607 - wherever mount is
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # noqa: S607 - as above


def test_training_goes_on_while_no_file_may_grow_and_so_does_the_log_afterwards(job: JobMaker) -> None:
    this = job(steps=250)

    def limit(soft: int) -> None:
        resource.prlimit(this.wait(0, "here")["pid"], resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))

    def fill() -> None:
        limit((this.run_dir / "metrics.jsonl").stat().st_size + 40)  # half a line

    assert "File too large" in log_over_a_full_disk(this, fill, lambda: limit(resource.RLIM_INFINITY))


def test_training_goes_on_while_the_disk_is_full_and_so_does_the_log_afterwards(
    job: JobMaker, small_disk: Path
) -> None:
    ballast = small_disk / "ballast"

    def fill() -> None:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    this = job(steps=250, run_dir=small_disk)

    assert "No space left" in log_over_a_full_disk(this, fill, ballast.unlink)


def log_over_a_full_disk(this: FaultJob, fill: Callable[[], None], empty: Callable[[], None]) -> str:
    """Train with a disk that is full for some steps; check what is logged, and return what rank 0 said of it."""
    this.deed(1, "wait", 50)
    this.deed(2, "wait", 200)
    this.start()
    this.wait(1, "fault")
    fill()
    this.allow(1)
    this.wait(2, "fault")
    empty()
    this.allow(2)

    for rank in range(3):
        done = this.wait(rank, "done", "failed")
        assert (done["event"], done["step"]) == ("done", 249)
    assert this.release() == {0: 0, 1: 0, 2: 0}
    assert [entry["step"] for entry in this.entries()] == list(range(250))  # they have waited
    told = [str(event["text"]) for event in this.events(0, "warning") if "sink jsonl" in event["text"]]
    assert "sink jsonl raised OSError" in told[0]
    assert "waits, and is tried again after a while" in told[0]
    assert told[1] == "sink jsonl works again; it has lost 0 entries so far"
    return told[0]
