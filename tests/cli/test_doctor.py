from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from logsync.workers.cli import extras, roundtrip
from support.command import COMMAND, logsync, surroundings
from support.torchrun import torchrun

# For torchrun, in the place of a script.
MODULE, DOCTOR = Path("-m"), ("logsync.workers.cli", "doctor", "--no-extras")

pytestmark = pytest.mark.timeout(180)


def findings(report: dict[str, Any], topic: str) -> list[tuple[str, str]]:
    return [(each["state"], each["text"]) for each in report["findings"] if each["topic"] == topic]


def examined(folder: Path, *arguments: str, **environ: str) -> tuple[int, dict[str, Any]]:
    ran = logsync("doctor", "--json", *arguments, folder=folder, environ=environ)
    assert ran.stdout, ran.stderr
    report: dict[str, Any] = json.loads(ran.stdout)
    assert report["well"] == (ran.returncode == 0)
    return ran.returncode, report


def test_one_process_by_hand_logs_alone_and_connects_own_reason_is_given(tmp_path: Path) -> None:
    status, report = examined(tmp_path)

    assert status == 0
    assert (report["launcher"], report["rank"], report["world_size"]) == (None, 0, 1)
    assert report["transport"] == "local"
    ((_, why),) = findings(report, "transport")
    assert why == (
        "local: single-node fallback: torch.distributed is not initialised and no launcher started more than one "
        "rank, so this process logs alone"
    )
    assert report["sinks"] == ["console", "jsonl"]
    assert findings(report, "files")[0][1].startswith(f"under {tmp_path}/runs/")
    assert any(text.startswith("torch: 2.") for _, text in findings(report, "extras"))
    assert report["round_trip"] is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_person_gets_the_same_as_lines(tmp_path: Path) -> None:
    ran = logsync("doctor", folder=tmp_path)

    assert ran.returncode == 0
    topics = [line[:13].split() for line in ran.stdout.splitlines()]
    assert [topic[1] for topic in topics if len(topic) == 2 and topic[0] == "✓"] == [
        *("launcher", "transport", "sinks", "files", "versions", "extras")
    ]


def test_half_a_launchers_environment_is_wrong_in_connects_own_words(tmp_path: Path) -> None:
    status, report = examined(tmp_path, "--no-extras", RANK="3")

    assert status == 1
    ((state, text),) = findings(report, "launcher")
    assert state == "wrong"
    assert text.startswith("RANK=3 is set, but WORLD_SIZE is missing: that is half of what torchrun sets")
    assert report["transport"] is None


def test_ranks_that_nobody_told_where_to_meet_are_not_tried(tmp_path: Path) -> None:
    status, report = examined(tmp_path, "--no-extras", SLURM_PROCID="0", SLURM_NTASKS="4")

    assert status == 0
    assert (report["launcher"], report["rank"], report["world_size"]) == ("Slurm", 0, 4)
    assert "Call torch.distributed.init_process_group() before connect()" in findings(report, "transport")[0][1]
    assert findings(report, "ranks")[0][0] == "note"


def test_a_sink_that_cannot_be_made_is_wrong_in_its_own_words(tmp_path: Path) -> None:
    status, report = examined(tmp_path, "--no-extras", "--sink", "console", "--sink", "carrier-pigeon")

    assert status == 1
    assert report["sinks"] == ["console"]
    assert findings(report, "extras") == []
    wrong = [text for state, text in findings(report, "sinks") if state == "wrong"]
    assert len(wrong) == 1
    assert "there is no sink named 'carrier-pigeon'; the names are: console" in wrong[0]


def test_a_folder_that_cannot_be_written_is_wrong() -> None:
    status, report = examined(Path("/proc"), "--no-extras")

    assert status == 1
    ((state, text),) = findings(report, "files")
    assert state == "wrong"
    assert "give connect() a run_dir" in text


def test_extras_are_what_an_import_makes_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in {"whole": "__version__ = '7.8'", "broken": "1 / 0", "dead": "import os; os.abort()"}.items():
        (tmp_path / f"{name}.py").write_text(content)
        monkeypatch.setitem(extras.MODULES, name, name)
    (tmp_path / "here" / "folder").mkdir(parents=True)  # of the working folder, as wandb makes one for its files
    for name in ("absent", "folder"):
        monkeypatch.setitem(extras.MODULES, name, name)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.chdir(tmp_path / "here")

    found = {extra.name: extra for extra in extras.try_extras(["whole", "broken", "dead", "absent", "folder"])}

    assert found["whole"] == extras.Extra("whole", version="7.8")
    assert "ZeroDivisionError" in found["broken"].error
    assert found["dead"].error
    assert found["absent"].missing
    assert found["folder"].missing


def test_an_import_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stuck.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setitem(extras.MODULES, "stuck", "stuck")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")

    (found,) = extras.try_extras(["stuck"], timeout_s=0.5)

    assert found.error == "importing stuck did not end within 0.5 s"


# Several ranks


def test_under_torchrun_ranks_make_rounds_and_rank_0_alone_reports(tmp_path: Path) -> None:
    ran = torchrun(MODULE, *DOCTOR, "--json", nproc=2, folder=tmp_path, timeout_s=120)

    ran.assert_clean()
    (line,) = [line for line in ran.output.splitlines() if line.startswith("{")]
    report = json.loads(line)
    assert (report["launcher"], report["rank"], report["world_size"]) == ("torchrun", 0, 2)
    assert report["transport"] == "collective"
    trip = report["round_trip"]
    assert trip["rounds"] == 20
    assert 0 < trip["median_s"] <= trip["longest_s"] < 60
    assert trip["address"] == "127.0.0.1"
    assert trip["peers"] == ["127.0.0.1"]
    assert report["well"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def lonely(rank: int, **environ: str) -> dict[str, str]:
    return surroundings(
        {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environ}
    )


@pytest.mark.slow
def test_a_rank_whose_peer_does_not_come_says_so_within_its_deadline(tmp_path: Path) -> None:
    ran = subprocess.run(
        [*COMMAND, "doctor", "--no-extras", "--timeout", "2", "--json"],
        env=lonely(0),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )

    assert ran.returncode == 1
    ((state, text),) = findings(json.loads(ran.stdout), "ranks")
    assert state == "wrong"
    assert "joining the job's process group at 127.0.0.1:" in text


@pytest.mark.slow
def test_another_rank_than_0_says_what_is_wrong_on_standard_error_alone(tmp_path: Path) -> None:
    ran = subprocess.run(
        [*COMMAND, "doctor", "--no-extras", "--timeout", "2"],
        env=lonely(1),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )

    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("logsync: rank 1, ranks: ")
    assert ran.stderr.count("\n") == 1


@pytest.mark.slow
def test_an_interface_that_does_not_exist_is_named_in_the_error(tmp_path: Path) -> None:
    wrong = {"GLOO_SOCKET_IFNAME": "nope0"}
    ran = torchrun(MODULE, *DOCTOR, "--timeout", 6, nproc=2, folder=tmp_path, timeout_s=120, environ=wrong)

    assert ran.returncode != 0
    text = " ".join(ran.output.split())
    assert "interface nope0 (GLOO_SOCKET_IFNAME)" in text


def test_what_hangs_is_given_up_with_the_place_where_it_hung() -> None:
    script = (
        "import threading\n"
        "from logsync.workers.cli import roundtrip\n"
        "from logsync.workers.launch import Launched\n"
        "def hang(found, timeout_s, now):\n"
        "    now('making a round')\n"
        "    threading.Event().wait()\n"
        "roundtrip._trial, roundtrip._GRACE_S = hang, 0.0\n"
        "try:\n"
        "    roundtrip.try_round_trip(Launched('torchrun', 0, 2), 0.5)\n"
        "except roundtrip.TrialError as error:\n"
        "    print(error)\n"
    )

    ran = subprocess.run(
        [sys.executable, "-c", script], env=surroundings(), capture_output=True, text=True, timeout=60, check=True
    )

    assert ran.stdout.startswith("no end within 0.5 s, while making a round; look for ranks that did not start")


def test_addresses_are_those_of_established_connections() -> None:
    before = roundtrip._connections()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            new = roundtrip._connections() - before
            port = client.getsockname()[1]

    assert ("127.0.0.1", port, *server_name(new, port)) in new
    assert roundtrip._addresses(new) == ("127.0.0.1", ["127.0.0.1"])


def server_name(connections: set[Any], port: int) -> tuple[str, int]:
    (found,) = {(each.remote, each.remote_port) for each in connections if each.local_port == port}
    return found
