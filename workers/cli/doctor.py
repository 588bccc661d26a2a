"""`logsync doctor`: what `connect` would do here, and whether it would work."""

from __future__ import annotations

import inspect
import logging
import os
import platform
import socket
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from logsync.coordinator.errors import ConfigError, LaunchError, printable
from logsync.coordinator.sinks.base import make_sink
from logsync.workers import connect, launch
from logsync.workers.cli.extras import provided, try_extras
from logsync.workers.cli.roundtrip import RoundTrip, TrialError, try_round_trip
from logsync.workers.launch import Launched, choose_transport, launched, restart_count

__all__ = ["Finding", "Report", "Teller", "as_json", "examine"]

State = Literal["good", "note", "wrong"]
_MARKS = {"good": ("✓", "ok", "green"), "note": ("·", "--", "dim"), "wrong": ("✗", "NO", "bold red")}
_TOPIC_WIDTH = 9
_LIBRARIES = ("msgspec", "rich", "click")


class Finding(NamedTuple):
    """One thing that was looked at, and how it stands."""

    topic: str
    state: State
    text: str


class Report(msgspec.Struct):
    """What the doctor found, on this rank; rank 0 hands each finding to `hear` at once."""

    hear: Callable[[Finding], None]

    launcher: str | None = None
    rank: int = 0
    world_size: int = 1
    transport: str | None = None
    sinks: list[str] = []
    round_trip: RoundTrip | None = None
    findings: list[Finding] = []

    @property
    def well(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.state != "wrong" for finding in self.findings)

    def add(self, topic: str, state: State, text: str) -> None:
        """Note a finding."""
        finding = Finding(topic, state, text)
        self.findings.append(finding)
        if self.rank == 0:
            self.hear(finding)


def examine(sinks: Sequence[str], timeout_s: float, hear: Callable[[Finding], None], *, extras: bool) -> Report:
    """Look at the surroundings. Collective where a launcher has started several ranks: every rank calls it.

    Args:
        sinks: what `connect` would be given; its own default if there is none.
        timeout_s: how long the trial of the ranks may take.
        hear: is given each finding of rank 0 as soon as it is there.
        extras: whether to import what is optional.
    """
    report = Report(hear)
    found = _look_at_launcher(report)
    if found is not None:
        _look_at_transport(report, found, timeout_s)
    if report.rank == 0:
        _look_at_sinks(report, sinks)
        _look_at_versions(report)
        if extras:
            _look_at_extras(report)
    return report


class Teller:
    """Prints findings one by one, as lines of a table."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._plain = not console.encoding.startswith("utf")
        self._topic = ""

    def __call__(self, finding: Finding) -> None:
        """Print one finding."""
        mark, plain_mark, style = _MARKS[finding.state]
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(width=2 if self._plain else 1)
        table.add_column(width=_TOPIC_WIDTH, style="bold")
        table.add_column(overflow="fold")
        topic = finding.topic if finding.topic != self._topic else ""
        table.add_row(Text(plain_mark if self._plain else mark, style), topic, Text(finding.text))
        self._topic = finding.topic
        self._console.print(table)


def as_json(report: Report) -> str:
    """Return the report for machines."""
    found = {name: getattr(report, name) for name in ("launcher", "rank", "world_size", "transport", "sinks")}
    trip = report.round_trip
    found["round_trip"] = None if trip is None else trip._asdict()
    found["findings"] = [finding._asdict() for finding in report.findings]
    return msgspec.json.encode(found | {"well": report.well}).decode()


def _look_at_launcher(report: Report) -> Launched | None:
    try:
        found = launched()
    except LaunchError as error:
        report.add("launcher", "wrong", str(error))
        return None
    if found is None:
        report.add("launcher", "good", "none: neither torchrun's, Open MPI's nor Slurm's variables are set")
        return Launched("", 0, 1)
    report.launcher, report.rank, report.world_size = found
    again = f", restarted {restart_count()} times" if restart_count() else ""
    report.add("launcher", "good", f"{found.launcher}: rank {found.rank} of {found.world_size}{again}")
    return found


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage())


def _look_at_transport(report: Report, found: Launched, timeout_s: float) -> None:
    logger = logging.getLogger(launch.__name__)
    ear, level = _Ear(), logger.level
    logger.addHandler(ear)
    logger.setLevel(logging.INFO)
    try:
        chosen = choose_transport(
            "auto", timeout_s=timeout_s, warn_after_s=timeout_s, rank=None, world_size=None, process_group=None
        )
    except ConfigError as error:
        report.add("transport", "note", f"not before there is a process group: {error}")
        _try_ranks(report, found, timeout_s)
    else:
        report.transport = chosen.name
        report.add("transport", "good", f"{chosen.name}: {'; '.join(ear.heard)}")
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)


def _try_ranks(report: Report, found: Launched, timeout_s: float) -> None:
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        report.add("ranks", "note", "not tried: MASTER_ADDR and MASTER_PORT do not say where the ranks could meet")
        return
    try:
        trip = try_round_trip(found, timeout_s)
    except TrialError as error:
        report.add("ranks", "wrong", str(error))
        return
    report.transport, report.round_trip = trip.transport, trip
    report.add("transport", "good", f"{trip.transport}, with a process group, which was made for this trial")
    where = f"on {trip.address}" if trip.address else "on an address that this system does not tell"
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    chosen = f" (GLOO_SOCKET_IFNAME={printable(interface)})" if interface else ""
    report.add("ranks", "good", f"gloo {where}{chosen}, the other ranks on {', '.join(trip.peers) or 'unknown'}")
    report.add(
        "ranks",
        "good",
        f"{trip.rounds} rounds of {found.world_size} ranks: {1000 * trip.median_s:.2f} ms in the median, "
        f"{1000 * trip.longest_s:.2f} ms the longest; {trip.setup_s:.2f} s to set up",
    )


def _look_at_sinks(report: Report, sinks: Sequence[str]) -> None:
    wanted = tuple(sinks) or inspect.signature(connect).parameters["sinks"].default
    for spec in wanted:
        shown = printable(spec)
        try:
            sink = make_sink(spec)
            getattr(sink, "load", bool)()  # imports what it needs, where it needs anything
        except (ImportError, OSError, TypeError, ValueError) as error:
            report.add("sinks", "wrong", f"{shown}: {printable(str(error))}")
        else:
            report.sinks.append(spec)
            report.add("sinks", "good", shown if sinks else f"{shown} (the default of connect())")
    folder = Path.cwd() / "runs"
    nearest = folder if folder.is_dir() else folder.parent
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        text = f"{printable(str(nearest))} cannot be written: {error.strerror}; give connect() a run_dir that can"
        report.add("files", "wrong", text)
    else:
        text = f"under {printable(str(folder))}/<start time>-train, unless connect() gets a run_dir"
        report.add("files", "good", text)


def _look_at_versions(report: Report) -> None:
    report.add("versions", "good", f"logsync {_version('logsync')}, Python {platform.python_version()}")
    report.add("versions", "good", ", ".join(f"{name} {_version(name)}" for name in _LIBRARIES))
    report.add("versions", "good", f"{platform.platform()}, host {printable(socket.gethostname())}")


def _look_at_extras(report: Report) -> None:
    for extra in try_extras(provided()):
        if extra.missing:
            report.add("extras", "note", f"{extra.name}: not installed; pip install 'logsync[{extra.name}]'")
        elif extra.error:
            report.add("extras", "wrong", f"{extra.name}: installed, but its import fails: {extra.error}")
        else:
            report.add("extras", "good", f"{extra.name}: {extra.version or 'importable'}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed: run from a checkout)" if name == "logsync" else "unknown"
