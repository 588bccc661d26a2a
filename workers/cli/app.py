"""The command `logsync`: its arguments, its errors and its exit codes."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import click
import msgspec
from rich.console import Console

from logsync.coordinator.errors import printable
from logsync.workers.cli.runs import RunError, RunFile, find

__all__ = ["command", "main"]

_EXIT_CODES = """
\b
Exit codes:
  0  all is well
  1  something is wrong with the run, its file or the surroundings; the message says what
  2  the command was wrong, or an extra is not installed
"""
_LINGER_S = 10.0  # torchrun ends all ranks when one has failed, and rank 0 has not reported yet
_RUN = click.Path(path_type=Path, readable=False)  # what is wrong with it is said with exit code 1


def main() -> NoReturn:
    """Run the command and exit."""
    if sys.stdout is None:  # closed before it started
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - for the life of the process
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name in a script that the terminal cannot write is escaped
            stream.reconfigure(errors="backslashreplace")
    # A reader that has seen enough (`| head`) ends us as it ends cat: with no traceback and no message.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        status = command.main(prog_name="logsync", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as exit_:
        _leave(exit_.exit_code)
    except click.ClickException as error:
        error.show()
        _leave(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _leave(130)
    except RunError as error:
        _say(str(error))
        _leave(1)
    except OSError as error:
        if error.errno != errno.EPIPE:
            _say(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        _leave(1)
    _leave(status if isinstance(status, int) else 0)


def _say(text: str) -> None:
    sys.stderr.write(f"logsync: {text}\n")


def _leave(status: int) -> NoReturn:
    try:
        sys.stdout.flush()
    except OSError:  # reported already, or nobody reads; the interpreter would complain once more at its end
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - as above
    sys.exit(status)


def _console() -> Console:
    # Not rich's own guess: FORCE_COLOR or a notebook would put escapes into files.
    return Console(file=sys.stdout, force_terminal=sys.stdout.isatty(), force_jupyter=False, highlight=False)


def _version() -> str:
    try:
        return version("logsync")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


@click.group(
    epilog=_EXIT_CODES
    + """
\b
Completion, for bash (zsh and fish alike):
  eval "$(_LOGSYNC_COMPLETE=bash_source logsync)"
""",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(_version(), prog_name="logsync")
def command() -> None:
    """Look at the runs of logsync.

    RUN is a run's folder, or a metrics.jsonl.
    """


@command.command(
    epilog="""
\b
Examples:
  logsync show runs/20260101-120000-train
  logsync show runs/20260101-120000-train --follow --metrics 'train/*'
  logsync show metrics.jsonl -n 1 --json
"""
    + _EXIT_CODES
)
@click.argument("run", type=_RUN)
@click.option("-n", "--last", type=click.IntRange(min=0), default=10, show_default=True, help="How many entries.")
@click.option("-f", "--follow", "follows", is_flag=True, help="Go on with new entries, until Ctrl-C.")
@click.option("-m", "--metrics", metavar="PATTERN", help="Only metrics whose names fit, such as 'train/*'.")
@click.option("--json", "as_json", is_flag=True, help="For machines; with --follow one object per line.")
def show(run: Path, last: int, follows: bool, metrics: str | None, as_json: bool) -> None:  # noqa: FBT001 - click's
    """Show a run's metrics as sparklines, its last entries, and where it was restarted.

    In a sparkline a red x is a value that is not finite, and a | is a restart. In a pipe, --follow prints
    one line per entry; it goes on when the file is cut back by a resumed run, or replaced.
    """
    from logsync.workers.cli import show as showing  # noqa: PLC0415 - the other commands do without

    wish = showing.Wish(last, metrics, as_json)
    if follows:
        path = run / "metrics.jsonl" if run.is_dir() else find(run)
        try:
            showing.follow(RunFile(path), wish, _console())
        except KeyboardInterrupt:  # its usual end
            return
    else:
        showing.show(RunFile(find(run)), wish, _console())


@command.command(
    epilog="""
\b
Examples:
  logsync plot runs/20260101-120000-train
  logsync plot metrics.jsonl -o loss.html --metrics 'train/loss*'
"""
    + _EXIT_CODES
)
@click.argument("run", type=_RUN)
@click.option("-o", "--output", type=_RUN, help="The page; plot.html beside the run's file if not given.")
@click.option("-m", "--metrics", metavar="PATTERN", help="Only metrics whose names fit, such as 'train/*'.")
@click.option("--json", "as_json", is_flag=True, help="Tell for machines what was written.")
def plot(run: Path, output: Path | None, metrics: str | None, as_json: bool) -> None:  # noqa: FBT001 - click's
    """Draw a run as one HTML page that loads nothing.

    The page has every metric over steps or time with the band over ranks, restarts marked, and every rank's wait for
    the others as a heat map.
    """
    try:
        from plotly.offline import get_plotlyjs  # noqa: PLC0415 - an extra
    except ImportError as error:
        _say(f"plot needs plotly, which cannot be imported ({error}): pip install 'logsync[plot]'")
        raise click.exceptions.Exit(2) from error
    from logsync.workers.cli import page as drawing  # noqa: PLC0415 - the other commands do without

    found = RunFile(find(run))
    found.poll()
    page = drawing.make_page(found, metrics, get_plotlyjs())
    path = found.path.with_name("plot.html") if output is None else output
    path.write_text(page.text, encoding="utf-8")
    if as_json:
        told = {"page": str(path), "bytes": path.stat().st_size, "entries": len(found.entries)}
        click.echo(msgspec.json.encode(told | page._replace(text="")._asdict()))
        return
    size = path.stat().st_size / 1e6
    click.echo(f"{printable(str(path))}: {page.metrics} metrics of {len(found.entries)} entries, {size:.1f} MB")
    for note in page.notes:
        click.echo(f"  {note}")


@command.command(
    epilog="""
\b
Examples:
  logsync doctor
  logsync doctor --sink console --sink tensorboard
  torchrun --nproc-per-node 2 -m logsync.workers.cli doctor
  srun -n 2 logsync doctor --timeout 10 --json
"""
    + _EXIT_CODES
)
@click.option("--sink", "sinks", multiple=True, metavar="NAME", help="A sink to try, as in connect(sinks=[...]); many.")
@click.option(
    "--timeout", type=click.FloatRange(1, 3600), default=30.0, show_default=True, help="Seconds for the ranks to meet."
)
@click.option("--extras/--no-extras", default=True, show_default=True, help="Import every extra, which takes seconds.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def doctor(sinks: tuple[str, ...], timeout: float, extras: bool, as_json: bool) -> int:  # noqa: FBT001 - click's
    """Say what connect() would choose here, and try it.

    That is the launcher, the rank, the transport and the sinks, with versions and extras. Started by torchrun, the
    ranks meet with gloo and make some rounds; rank 0 reports the times and the address that was used.
    """
    from logsync.workers.cli import doctor as examining  # noqa: PLC0415 - the other commands do without

    hear = (lambda _: None) if as_json else examining.Teller(_console())
    report = examining.examine(sinks, timeout, hear, extras=extras)
    if report.rank == 0 and as_json:
        click.echo(examining.as_json(report))
    if report.rank != 0 and not report.well:
        for finding in report.findings:
            if finding.state == "wrong":
                _say(f"rank {report.rank}, {finding.topic}: {finding.text}")
        time.sleep(_LINGER_S)
    return 0 if report.well else 1
