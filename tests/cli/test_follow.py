from __future__ import annotations

import contextlib
import json
import os
import pty
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.command import COMMAND, entry, surroundings, write_run

DEADLINE_S = 30.0


class Following:
    """`logsync show --follow` in a pipe, line by line."""

    def __init__(self, *arguments: object) -> None:
        self._process = subprocess.Popen(
            [*COMMAND, "show", "--follow", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=surroundings(),
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._said: queue.SimpleQueue[str] = queue.SimpleQueue()
        for stream, lines in ((self._process.stdout, self._lines), (self._process.stderr, self._said)):
            threading.Thread(target=self._read, args=(stream, lines), daemon=True).start()

    @staticmethod
    def _read(stream: Any, lines: queue.SimpleQueue[str]) -> None:
        for line in stream:
            lines.put(line.rstrip("\n"))

    def next(self) -> str:
        return self._lines.get(timeout=DEADLINE_S)

    def next_said(self) -> str:
        return self._said.get(timeout=DEADLINE_S)

    def interrupt(self) -> int:
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(DEADLINE_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()


@contextlib.contextmanager
def following(*arguments: object) -> Iterator[Following]:
    started = Following(*arguments)
    try:
        yield started
    finally:
        started.kill()


def append(path: Path, *lines: bytes) -> None:
    with path.open("ab") as file:
        file.write(b"".join(lines))


@pytest.fixture
def lines(tmp_path: Path) -> list[bytes]:
    """Twelve lines of a run, the last six of attempt 1."""
    path = write_run(tmp_path / "made", [entry(seq, attempt=int(seq >= 6)) for seq in range(12)])
    return path.read_bytes().splitlines(keepends=True)


def test_the_last_entries_come_first_and_then_each_new_one(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines[:5]))

    with following(tmp_path, "-n", 2) as shown:
        assert shown.next() == "step=30 seq=3 attempt=0 loss=0.25"
        assert shown.next() == "step=40 seq=4 attempt=0 loss=0.2"
        append(path, lines[5])
        assert shown.next().startswith("step=50 seq=5 ")
        append(path, *lines[6:8])
        assert shown.next() == "# restarted: attempt 1"
        assert [shown.next()[:13], shown.next()[:13]] == ["step=60 seq=6", "step=70 seq=7"]
        assert shown.interrupt() == 0


def test_a_line_is_shown_once_and_when_it_is_whole(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines[0] + lines[1][:10])

    with following(tmp_path) as shown:
        assert "seq=0" in shown.next()
        append(path, lines[1][10:-1])
        assert "seq=1" in shown.next()
        append(path, b"\n", lines[2])
        assert "seq=2" in shown.next()


def test_a_file_that_is_cut_back_by_a_resume_is_followed_from_there(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines[:6]))

    with following(tmp_path, "-n", 1) as shown:
        assert "seq=5" in shown.next()
        # Cut back and longer than before at once, as between two looks at the file.
        again = [
            line.replace(b'"loss":', b'"again":1,"loss":').replace(b'"time":17', b'"time":18') for line in lines[4:9]
        ]
        path.write_bytes(b"".join([*lines[:4], *again]))
        assert shown.next() == (
            "# the file was cut back to seq 3, as a run that is resumed or started again does; what follows is new"
        )
        new = [shown.next() for _ in range(6)]

    assert [line.split()[1] for line in new if not line.startswith("#")] == [f"seq={seq}" for seq in range(4, 9)]
    assert all("again=1" in line for line in new if not line.startswith("#"))


def test_a_file_that_is_replaced_by_another_run_is_followed(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines))

    with following(tmp_path, "-n", 1, "--json") as shown:
        assert json.loads(shown.next())["seq"] == 11
        path.rename(tmp_path / "metrics.jsonl.1")
        path.write_bytes(lines[0].replace(b'"time":17', b'"time":19'))
        assert json.loads(shown.next()) == {"cut_back_to_seq": None}
        assert json.loads(shown.next())["time"] == 1.9e9
        assert shown.interrupt() == 0


def test_a_run_that_has_not_logged_yet_is_waited_for(tmp_path: Path, lines: list[bytes]) -> None:
    with following(tmp_path) as shown:
        assert shown.next_said() == f"waiting for {tmp_path / 'metrics.jsonl'}"
        (tmp_path / "metrics.jsonl").write_bytes(lines[0])
        assert "seq=0" in shown.next()


def test_on_a_terminal_the_view_is_drawn_again(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(lines[:3]))
    host, terminal = pty.openpty()
    shown = subprocess.Popen(
        [*COMMAND, "show", "--follow", str(tmp_path)],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env=surroundings({"TERM": "xterm-256color", "LINES": "40"}),
    )
    os.close(terminal)
    try:
        seen = read_until(host, b"3 entries")
        append(path, *lines[3:7])
        seen += read_until(host, b"7 entries")
        shown.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the terminal's other end has closed
            while os.read(host, 65536):
                pass
        assert shown.wait(DEADLINE_S) == 0
    finally:
        shown.kill()
        shown.wait()
        os.close(host)
    assert b"Traceback" not in seen
    assert "╎".encode() in seen


def read_until(host: int, text: bytes) -> bytes:
    seen = b""
    deadline = time.monotonic() + DEADLINE_S
    while text not in seen:
        assert time.monotonic() < deadline, seen
        seen += os.read(host, 65536)
    return seen
