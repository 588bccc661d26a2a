from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.cells import cell_len

from logsync.workers import connect
from support.command import COMMAND, entry, logsync, ranks_waits, surroundings, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Twenty entries of two attempts, the second from step 120 on."""
    write_run(tmp_path, [entry(seq, attempt=int(seq >= 12)) for seq in range(20)])
    return tmp_path


def rows(output: str, name: str) -> list[list[str]]:
    """The words of the lines that begin with `name`."""
    return [line.split() for line in output.splitlines() if line.startswith(name)]


def test_a_run_that_connect_logged_is_shown_with_its_values(tmp_path: Path) -> None:
    with connect(10, run_dir=tmp_path, sinks=["jsonl"]) as log:
        for step in range(51):
            log.record({"train/loss": 0.5 * step}, spread=True)
            log.log_ready(step)

    shown = logsync("show", tmp_path, "-n", 2)

    assert shown.returncode == 0, shown.stderr
    assert rows(shown.stdout, "train/loss")[0][1:] == [
        *("22.75", "0", "22.75"), *("22.75", "to", "22.75", "(rank", "0)"), "▁▁▃▅▇█"
    ]  # fmt: skip
    assert [line.split()[:2] for line in shown.stdout.splitlines()[-2:]] == [["4", "40"], ["5", "50"]]
    assert "6 entries" in shown.stdout
    assert "train/loss/min" not in shown.stdout


@pytest.mark.parametrize("given", ["folder", "file"])
def test_a_run_is_its_folder_or_its_file(run: Path, given: str) -> None:
    shown = logsync("show", run if given == "folder" else run / "metrics.jsonl")

    assert shown.returncode == 0
    assert "20 entries" in shown.stdout


def test_a_restart_is_told_and_marked_in_the_table_and_the_sparkline(run: Path) -> None:
    shown = logsync("show", run, "-n", 10).stdout

    assert "↻ restarted: attempt 1 begins at step 120" in shown
    assert [row.split()[4:6] for row in shown.splitlines() if row.split()[:1] == ["12"]] == [["↻", "1"]]
    assert re.search(r"loss .*█[▁▂▃▄▅▆▇]+╎[▁▂]+", shown)


def test_the_last_n_entries_are_shown(run: Path) -> None:
    for last in (0, 1, 3, 100):
        shown = json.loads(logsync("show", run, "-n", last, "--json").stdout)
        assert [each["seq"] for each in shown["last"]] == list(range(20))[-last or 20 :]


def test_a_pattern_chooses_metrics(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(0, {"train/loss": 1.0, "train/lr": 2.0, "val/loss": 3.0})])

    shown = logsync("show", tmp_path, "--metrics", "train/*")

    assert "train/loss" in shown.stdout
    assert "train/lr" in shown.stdout
    assert "val/loss" not in shown.stdout


def test_values_that_are_not_finite_stay_visible(tmp_path: Path) -> None:
    values = [1.0, float("nan"), 2.0, float("inf")]
    culprits = [{}, {"loss": (1,)}, {}, {"loss": (0, 1)}]
    write_run(
        tmp_path,
        [entry(seq, {"loss": value}, nan_ranks=culprits[seq]) for seq, value in enumerate(values)],
    )

    shown = logsync("show", tmp_path).stdout

    assert rows(shown, "loss")[0][1:] == ["inf", "1", "2", "▁✗█✗"]
    assert "seq 1: loss is not finite because of rank 1" in shown
    assert "seq 3: loss is not finite because of rank 0, 1" in shown


def test_json_is_one_object_without_a_nan_in_it(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(0), entry(1, {"loss": float("nan"), "lr": 0.5}, partial=True)])

    def refuse(text: str) -> None:
        raise AssertionError(text)

    shown = json.loads(logsync("show", tmp_path, "--json").stdout, parse_constant=refuse)

    assert (shown["entries"], shown["broken_lines"], shown["torn"]) == (2, 0, False)
    assert shown["metrics"]["loss"] == {"entries": 2, "last": None, "lowest": 1.0, "highest": 1.0, "not_finite": 1}
    head = {"seq": 1, "step": 10, "time": 1.7e9 + 2, "attempt": 0}
    rest = {"metrics": {"loss": None, "lr": 0.5}, "partial": True, "calls": 10, "nonfinite": {"loss": "nan"}}
    assert shown["last"][1] == head | rest


def test_the_rank_that_the_others_waited_for_is_named(tmp_path: Path) -> None:
    run = [entry(seq) for seq in range(10)]
    write_run(tmp_path, run, waits=lambda each: ranks_waits(slow=3, wait_ms=500 if each.seq > 5 else 0))

    shown = " ".join(logsync("show", tmp_path).stdout.split())

    assert "in 4 of 10 log intervals ranks waited for a slower one, up to 0.5 s; it was rank 3 on node-1 in 4" in shown


# Files that are not as they should be


def test_a_torn_last_line_and_broken_lines_are_left_out_and_told(run: Path) -> None:
    path = run / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*whole[:3], b'{"seq": 3, "st\n', b"\xff\x00 garbage\n", *whole[3:], whole[-1][:20]]))

    shown = logsync("show", path)

    assert shown.returncode == 0
    assert "20 entries" in shown.stdout
    assert "! 2 lines are no entries and left out, the first of them line 4" in shown.stdout
    assert "! the last line is torn and left out" in shown.stdout


def test_a_last_line_that_lacks_only_its_end_counts(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))

    shown = logsync("show", path)

    assert "20 entries" in shown.stdout
    assert "torn" not in shown.stdout


BAD_FILES = {
    "empty": (b"", "is empty: nothing was logged yet"),
    "torn only": (b'{"seq": 0, "step": 0, "ti', "its only line is not an entry"),
    "other json": (b'{"loss": 1}\n{"loss": 2}\n', "none of its 2 lines is an entry"),
    "a list": (b"[1, 2, 3]\n", "its only line is not an entry"),
    "deep": (b"[" * 100_000 + b"\n", "its only line is not an entry"),
    "binary": (bytes(range(256)) * 4000, "is no log of logsync: none of the first 1000 lines is an entry"),
    "a seq that is none": (b'{"seq": -1, "step": 0}\n{"seq": true, "step": 0}\n', "none of its 2 lines"),
}


@pytest.mark.parametrize("command", ["show", "plot"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_without_an_entry_is_refused_in_one_line(tmp_path: Path, command: str, kind: str) -> None:
    content, said = BAD_FILES[kind]
    path = tmp_path / "some.jsonl"
    path.write_bytes(content)

    ran = logsync(command, path, folder=tmp_path)

    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr.startswith(f"logsync: {path} is ")
    assert said in ran.stderr
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["show", "plot"])
def test_a_path_without_a_run_is_refused_and_runs_nearby_are_named(tmp_path: Path, command: str) -> None:
    run = tmp_path / "runs" / "monday"
    write_run(run, [entry(0)])
    for path, said in [
        (run / "nothing", f"there is no file or folder {run / 'nothing'}"),
        (run.parent, f"is a folder without a metrics.jsonl; the newest run of 1 in {run.parent}: {run}"),
        (run.parent / "mondy", f"; the newest run of 1 in {run.parent}: {run}"),
        (Path("/dev/zero"), "is no regular file"),
    ]:
        ran = logsync(command, path, folder=run)
        assert ran.returncode == 1
        assert said in ran.stderr
        assert ran.stdout == ""


def test_a_file_that_may_not_be_read_is_refused_in_one_line(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.chmod(0)
    # Root may read everything, unless it goes without that right.
    unprivileged = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    assert not unprivileged or shutil.which("setpriv"), "setpriv (of util-linux) is needed to run this as root"

    ran = logsync("show", path, prefix=unprivileged)

    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"logsync: cannot read {path}: Permission denied\n"


def test_numbers_and_fields_that_nobody_expects_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    one = {"seq": 0, "step": None, "time": "noon", "attempt": -3, "loss": 1, "huge": 10**400, "text": "hello"}
    two = {"seq": 1, "step": 0.5, "time": 1e300, "attempt": "x", "loss": 2, "nan_ranks": {"loss": 7}, "ranks": []}
    lines = [one | {"more": {"a": 1}, "waits": {}}, two | {"waits": {"slowest": "x"}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    for command in ("show", "plot"):
        ran = logsync(command, path, folder=tmp_path)
        assert ran.returncode == 0, ran.stderr
    shown = json.loads(logsync("show", path, "--json").stdout)

    assert list(shown["metrics"]) == ["loss"]
    assert [each["metrics"] for each in shown["last"]] == [{"loss": 1.0}, {"loss": 2.0}]


def test_control_characters_of_names_are_escaped(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(0, {"a\x1b[31mred\nb": 1.0, "[bold]not markup": 2.0})])

    for arguments in (["show", tmp_path], ["show", tmp_path, "--json"]):
        shown = logsync(*arguments).stdout
        assert "\x1b" not in shown
    shown = logsync("show", tmp_path).stdout
    assert r"a\x1b[31mred\nb" in shown
    assert "[bold]not markup" in shown


def test_thousands_of_metrics_are_cut_unless_a_pattern_asks_for_them(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(seq, {f"layer{n}/norm": float(n) for n in range(3000)}) for seq in range(3)])

    short, long = logsync("show", tmp_path).stdout, logsync("show", tmp_path, "-m", "layer?/*").stdout

    assert len(short.splitlines()) < 60
    assert "and 2960 more metrics; --metrics PATTERN chooses" in short
    assert len(rows(long, "layer")) == 10


# Where it is shown


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    names = ["loss", "a/much/longer/name/of/a/metric/than/anybody/should/use", "数/据", "x" * 200]
    write_run(tmp_path, [entry(seq, dict.fromkeys(names, 1e-9 * seq)) for seq in range(30)])

    shown = logsync("show", tmp_path / "metrics.jsonl", environ={"COLUMNS": str(width)}, folder=tmp_path)

    assert shown.returncode == 0
    assert max(map(cell_len, shown.stdout.splitlines())) <= width


def test_a_pipe_gets_no_colours_whatever_the_environment_says(run: Path) -> None:
    shown = logsync("show", run, environ={"FORCE_COLOR": "1", "CLICOLOR_FORCE": "1"})

    assert "\x1b" not in shown.stdout


def test_a_terminal_that_knows_only_ascii_gets_only_ascii(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(seq, {"损失": float(seq)}, attempt=seq // 5) for seq in range(10)])

    shown = logsync("show", tmp_path, environ={"PYTHONIOENCODING": "ascii"})

    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.isascii()
    assert r"\u635f\u5931" in shown.stdout


def test_a_terminal_gets_colours(run: Path) -> None:
    host, terminal = pty.openpty()
    try:
        ran = logsync("show", run, stdout=terminal, environ={"TERM": "xterm-256color"})
        assert ran.returncode == 0
        assert b"\x1b[" in os.read(host, 65536)
    finally:
        os.close(terminal)
        os.close(host)


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(tmp_path: Path) -> None:
    write_run(tmp_path, [entry(seq) for seq in range(20_000)])
    shell = f"set -o pipefail; {' '.join(COMMAND)} show {tmp_path} --json -n 20000 | head -c 10"

    ran = subprocess.run(
        ["/bin/bash", "-c", shell], env=surroundings(), capture_output=True, text=True, timeout=60, check=False
    )

    assert ran.stdout == '{"path":"/'
    assert ran.stderr == ""
    assert ran.returncode == 128 + 13  # SIGPIPE, as it ends cat


@pytest.mark.parametrize("command", ["show", "doctor"])
def test_a_full_disk_behind_standard_output_is_an_error_in_one_line(run: Path, command: str) -> None:
    with Path("/dev/full").open("w") as full:
        arguments = [command, run] if command == "show" else [command, "--no-extras"]
        ran = logsync(*arguments, stdout=full, stderr=subprocess.PIPE, folder=run)

    assert ran.returncode == 1
    assert ran.stderr == "logsync: No space left on device\n"


def test_standard_output_may_be_closed(run: Path) -> None:
    ran = subprocess.run(
        ["/bin/bash", "-c", f"{' '.join(COMMAND)} show {run} >&-"],
        env=surroundings(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (ran.returncode, ran.stderr) == (0, "")
