"""Entries on standard output: a table for people at a terminal, plain lines for files."""

from __future__ import annotations

import contextlib
import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import textwrap
from pathlib import Path

import msgspec
import pytest

from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.console import ConsoleSink

RUN = RunInfo(run_dir=Path("unused"), name="train", attempt=0, world_size=2, next_seq=0, resumed=False)
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def entry(seq: int, metrics: dict[str, float], **changes: object) -> LogEntry:
    plain = LogEntry(seq=seq, step=seq * 50, time=1.5, attempt=0, calls=50, world_size=2, metrics=metrics)
    return msgspec.structs.replace(plain, **changes)


class Terminal(io.StringIO):
    """Standard output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def printed(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *entries: LogEntry, columns: int = 80) -> list[str]:
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    sink = ConsoleSink()
    sink.open(RUN)
    for one in entries:
        sink.write(one)
    sink.close()
    return stream.getvalue().splitlines()


def on_terminal(monkeypatch: pytest.MonkeyPatch, *entries: LogEntry, columns: int = 80) -> list[str]:
    return [ANSI.sub("", line) for line in printed(Terminal(), monkeypatch, *entries, columns=columns)]


# In a pipe or a file


def test_an_entry_is_one_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    one = entry(1, {"train/loss": 0.12341234, "lr": 1e-5, "nothing": math.nan})

    assert printed(io.StringIO(), monkeypatch, one) == [
        "logsync train step=50 seq=1 train/loss=0.1234 lr=1e-05 nothing=nan"
    ]


def test_a_line_is_never_folded_or_coloured_even_where_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    many = {f"a rather long name/{n} \t": math.nan for n in range(300)}

    (line,) = printed(io.StringIO(), monkeypatch, entry(0, many))

    assert "\x1b" not in line
    assert line.count("=nan") == 300


def test_a_pipe_gets_each_line_at_once() -> None:
    script = """
        import sys
        from pathlib import Path
        from logsync.coordinator.messages import LogEntry
        from logsync.coordinator.sinks.base import RunInfo
        from logsync.coordinator.sinks.console import ConsoleSink

        sink = ConsoleSink()
        sink.open(RunInfo(Path(), "val", 0, 1, 0, False))
        sink.write(LogEntry(seq=0, step=2.5, time=0.0, attempt=0, calls=1, world_size=1, metrics={"acc": 0.5}))
        sys.stdin.read()  # nothing is flushed by an exit
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "logsync val step=2.5 seq=0 acc=0.5\n"


def test_standard_output_is_looked_up_when_the_sink_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    sink = ConsoleSink()
    redirected = io.StringIO()
    monkeypatch.setattr(sys, "stdout", redirected)
    sink.open(RUN)
    monkeypatch.setattr(sys, "stdout", io.StringIO())

    sink.write(entry(0, {"loss": 1.0}))
    sink.close()

    assert redirected.getvalue() == "logsync train step=0 seq=0 loss=1\n"
    assert not redirected.closed


def test_a_tee_with_only_write_and_flush_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tee:
        text = ""

        def write(self, text: str) -> None:
            self.text += text

        def flush(self) -> None: ...

    tee = Tee()
    monkeypatch.setattr(sys, "stdout", tee)
    sink = ConsoleSink()
    sink.open(RUN)
    sink.write(entry(0, {"loss": 1.0}))
    sink.close()

    assert tee.text == "logsync train step=0 seq=0 loss=1\n"


# On a terminal


def test_entries_are_aligned_rows_under_one_header(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = on_terminal(monkeypatch, *(entry(seq, {"train/loss": 3 / (seq + 1), "lr": 0.001}) for seq in range(4)))

    assert lines == [
        "        step  train/loss        lr",
        "train      0           3     0.001",
        "train     50         1.5     0.001",
        "train    100           1     0.001",
        "train    150        0.75     0.001",
    ]


def test_a_real_terminal_gets_a_coloured_table() -> None:
    script = """
        from pathlib import Path
        from logsync.coordinator.messages import LogEntry
        from logsync.coordinator.sinks.base import RunInfo
        from logsync.coordinator.sinks.console import ConsoleSink

        sink = ConsoleSink()
        sink.open(RunInfo(Path(), "train", 0, 1, 0, False))
        sink.write(LogEntry(seq=0, step=1, time=0.0, attempt=0, calls=1, world_size=1, metrics={"loss": float("nan")}))
        sink.close()
    """
    master, slave = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "COLUMNS", "LINES"}}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    subprocess.run(command, check=True, stdin=slave, stdout=slave, env={**environment, "TERM": "xterm"}, timeout=60)
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)

    assert ANSI.sub("", shown).splitlines() == ["        step      loss", "train      1       nan"]
    assert "\x1b[31mnan\x1b[0m" in shown


def test_a_new_metric_brings_a_new_header_and_a_missing_one_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = on_terminal(
        monkeypatch,
        entry(0, {"loss": 1.0}),
        entry(1, {"loss": 1.0, "eval/acc": 0.5}),
        entry(2, {"loss": 1.0}),
        entry(3, {"eval/acc": 0.25}),
    )

    assert lines == [
        "        step      loss",
        "train      0         1",
        "        step      loss  eval/acc",
        "train     50         1       0.5",
        "train    100         1         -",
        "train    150         -      0.25",
    ]


def test_a_value_too_wide_for_its_column_brings_a_wider_one(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = on_terminal(
        monkeypatch, entry(0, {"tokens": 1.0}), entry(1, {"tokens": 99999999999.0}), entry(2, {"tokens": 2.0})
    )

    assert lines[2:] == ["        step       tokens", "train     50  99999999999", "train    100            2"]


def test_the_header_comes_again_after_40_rows_and_forgets_metrics_that_stayed_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = on_terminal(
        monkeypatch, entry(0, {"loss": 1.0, "once": 1.0}), *(entry(seq, {"loss": 1.0}) for seq in range(1, 121))
    )
    headers = [number for number, line in enumerate(lines) if "step" in line]

    assert headers == [0, 41, 82, 123]
    assert ["once" in lines[number] for number in headers] == [True, True, False, False]


def test_metrics_that_do_not_fit_together_get_tables_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    train = {f"train/{n}": 1.0 for n in range(5)}
    val = {f"val/{n}": 1.0 for n in range(5)}

    lines = on_terminal(monkeypatch, entry(0, train), entry(1, val))

    assert len(lines) == 4
    assert "train/4" in lines[0]
    assert "train/4" not in lines[2]
    assert "val/4" in lines[2]


def test_an_entry_too_wide_for_the_terminal_is_a_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = on_terminal(monkeypatch, entry(1, {"train/loss": 0.5, "b": 2.0}), columns=25)

    assert lines == ["logsync train step=50 seq=1 train/loss=0.5 b=2"]


@pytest.mark.parametrize("columns", range(1, 120, 7))
def test_no_value_is_lost_and_no_row_is_folded_at_any_width(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    metrics = {f"metric/{n}": 1000.0 + n for n in range(8)}
    lines = on_terminal(monkeypatch, entry(0, metrics), columns=columns)

    for n in range(8):
        assert str(1000 + n) in lines[-1]
    if not lines[-1].startswith("logsync"):
        assert all(len(line) <= columns for line in lines)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_red_in_rows_and_in_lines(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    for columns in (80, 10):
        lines = printed(Terminal(), monkeypatch, entry(0, {"loss": value, "x": 1.0}), columns=columns)

        assert f"\x1b[31m{value}\x1b[0m" in lines[-1]


def test_wide_characters_keep_the_columns_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = on_terminal(monkeypatch, entry(0, {"損失の平均値": 1.0, "b": 2.0}))

    assert lines == ["        step  損失の平均値         b", "train      0             1         2"]


@pytest.mark.parametrize("to", ["stdout", "stderr"])
def test_a_progress_bar_stays_whole_and_below_the_rows(to: str) -> None:
    script = """
        import sys
        from tqdm import tqdm
        from logsync.coordinator.sinks.console import ConsoleSink
        from support.sinks import entry, run
        from pathlib import Path

        sink = ConsoleSink()
        sink.open(run(Path("unused")))
        for step in tqdm(range(6), mininterval=0, ncols=60, file=getattr(sys, sys.argv[1])):
            if step % 2 == 0:
                sink.write(entry(step))
        sink.close()
        print("after")
    """
    lines = screen(run_at_terminal(script, to))

    assert lines[:4] == [
        "        step      loss",
        "train      0         0",
        "train     20         1",
        "train     40         2",
    ]
    assert re.fullmatch(r"100%\|█+\| 6/6 \[.*\]", lines[4])
    assert lines[5:] == ["after"]


def run_at_terminal(script: str, *arguments: str) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # without rows tqdm draws nothing
    command = [sys.executable, "-c", f"import sys; sys.path += {sys.path!r}\n" + textwrap.dedent(script), *arguments]
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    shown = b""
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # Linux's way of saying that the other end is closed
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()


def screen(shown: str) -> list[str]:
    """What a terminal shows after `shown`: a carriage return goes back to write over the line."""
    lines: list[str] = []
    for line in ANSI.sub("", shown).replace("\r\n", "\n").removesuffix("\n").split("\n"):
        cells: list[str] = []
        for part in line.split("\r"):
            cells[: len(part)] = part
        lines.append("".join(cells).rstrip())
    return lines


# Both


def test_a_note_says_what_is_partial_and_which_ranks_were_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    one = entry(
        0,
        {"a": math.nan, "b": math.inf, "c": math.nan},
        partial=True,
        nan_ranks={"a": (3,), "b": (3,), "c": tuple(range(16))},
    )
    note = (
        "partial, from 50 calls; not finite because of rank 3: a, b; "
        "not finite because of ranks 0, 1, 2, 3, 4, 5, 6, 7, ...: c"
    )

    assert on_terminal(monkeypatch, one)[-1] == f"  ^ {note}"
    assert printed(io.StringIO(), monkeypatch, one)[-1].endswith(f"a=nan b=inf c=nan ({note})")


@pytest.mark.parametrize("name", ["[red]x", "[/]", ":smile:", "a[b", "[link=http://x]y[/link]"])
def test_markup_in_a_name_is_printed_as_it_is(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    one = entry(0, {name: math.nan}, nan_ranks={name: (1,)})

    assert all(name in line for line in on_terminal(monkeypatch, one)[::2])
    assert printed(io.StringIO(), monkeypatch, one)[0].count(name) == 2


def test_control_characters_in_a_name_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a\x1b[2J\r\nb\u202e"
    one = entry(0, {name: 1.0}, nan_ranks={name: (1,)})

    (line,) = printed(io.StringIO(), monkeypatch, one)
    rows = on_terminal(monkeypatch, one)

    assert line.isprintable()
    assert r"a\x1b[2J\r\nb\u202e=1" in line
    assert len(rows) == 3
    assert all(row.isprintable() for row in rows)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (-0.0, "0"),
        (1.0, "1"),
        (-3.0, "-3"),
        (100000.0, "100000"),
        (123456789012.0, "123456789012"),
        (1e20, "1e+20"),
        (0.12345678, "0.1235"),
        (-1.5, "-1.5"),
        (999.96, "1000"),
        (9999.6, "10000"),
        (12345.678, "12346"),
        (1e-5, "1e-05"),
        (0.1 + 0.2, "0.3"),
        (5e-324, "4.941e-324"),
    ],
)
def test_values_have_four_significant_digits_and_whole_numbers_are_whole(
    monkeypatch: pytest.MonkeyPatch, value: float, shown: str
) -> None:
    (line,) = printed(io.StringIO(), monkeypatch, entry(0, {"x": value}))

    assert line.endswith(f" x={shown}")


@pytest.mark.parametrize(
    ("step", "shown"), [(None, "-"), (0, "0"), (2**60, str(2**60)), (0.5, "0.5"), (1 / 3, "0.333333"), (12.0, "12")]
)
def test_steps_are_exact_integers_or_short_fractions(
    monkeypatch: pytest.MonkeyPatch, step: float | None, shown: str
) -> None:
    (line,) = printed(io.StringIO(), monkeypatch, entry(0, {"x": 1.0}, step=step))

    assert f" step={shown} " in line
    assert f" {shown}  " in on_terminal(monkeypatch, entry(0, {"x": 1.0}, step=step))[1]


def test_close_leaves_standard_output_open_and_write_needs_an_open(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    printed(stream, monkeypatch, entry(0, {"x": 1.0}))
    sink = ConsoleSink()
    sink.close()

    assert not stream.closed
    with pytest.raises(ValueError, match="not open"):
        sink.write(entry(0, {"x": 1.0}))
