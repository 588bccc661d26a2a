"""Which rank is slow: what ranks tell, what the root makes of it, and who gets to see it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import BadValue
from logsync.coordinator.messages import (
    PROTOCOL,
    Decision,
    Failure,
    Hello,
    LogEntry,
    Report,
    Rhythm,
    Waits,
    decode_decision,
    encode,
    encode_hello,
)
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.console import ConsoleSink
from logsync.coordinator.sinks.csv_file import CsvSink
from logsync.coordinator.sinks.jsonl import JsonlSink
from logsync.coordinator.waits import flat_metrics, is_notable, waits_of
from logsync.workers import TrainingLog, connect
from logsync.workers.transports.threads import ThreadTransport, ThreadWorld
from support.lockstep import settings


def report(rank: int, waited_s: float | None, *, step: float | None = 10, **fields: Any) -> Report:
    plain: dict[str, Any] = {
        "protocol": PROTOCOL,
        "run": "run",
        "round": 1,
        "rank": rank,
        "world_size": 8,
        "kind": "decision",
        "call": 1,
        "step": step,
        "check_model_update": False,
        "rhythm": Rhythm(current=step),
        "waited_s": waited_s,
    }
    return Report(**{**plain, **fields})


def reports(*waited_s: float | None) -> list[Report]:
    return [report(rank, seconds) for rank, seconds in enumerate(waited_s)]


def found(given: Sequence[Report], interval_s: float = 1.0, hosts: dict[int, str] | None = None) -> Waits:
    waits = waits_of(given, hosts or {}, interval_s, max(r.world_size for r in given))
    assert waits is not None
    return waits


# What the root makes of it


def test_the_slowest_is_the_lowest_rank_that_waited_least() -> None:
    for waited in itertools.product([0.0, 0.25, 3.0], repeat=4):
        waits = found(reports(*waited))

        assert (waits.slowest, waits.least_s, waits.most_s) == (waited.index(min(waited)), min(waited), max(waited))


def test_ranks_that_say_nothing_do_not_count_and_one_rank_waits_for_nobody() -> None:
    assert found(reports(None, 0.5, None, 0.25)).slowest == 3
    for waited in ([], [0.5], [None], [0.5, None], [None, None, 0.0]):
        assert waits_of(reports(*waited), {}, 1.0, 3) is None


def test_each_ranks_wait_is_told_in_milliseconds_and_ranks_that_have_left_or_say_nothing_as_unknown() -> None:
    given = [report(0, 0.25), report(2, 1.0006), report(3, None)]

    waits = waits_of(given, {}, 1.0, world_size=5)

    assert waits is not None
    assert waits.each_ms == (250, -1, 1001, -1, -1)


def test_a_job_of_very_many_ranks_tells_no_waits_of_each_but_still_the_slowest() -> None:
    for world_size, told in ((4096, 4096), (4097, 0)):
        waits = waits_of(reports(0.5, 0.25), {}, 1.0, world_size)

        assert waits is not None
        assert (waits.slowest, len(waits.each_ms)) == (1, told)
        assert msgspec.msgpack.decode(encode(waits), type=Waits) == waits


def test_the_slowest_ranks_host_is_named_where_it_is_known_and_is_fit_to_print() -> None:
    given = reports(0.5, 0.1)

    assert found(given, hosts={0: "node-0", 1: "node-1"}).host == "node-1"
    assert found(given, hosts={0: "node-0"}).host == ""
    assert found(given, hosts={1: "\x1b[2Jevil\n"}).host == "\\x1b[2Jevil\\n"
    worst = found(given, hosts={1: "\x00" * 64})
    assert worst.host.isprintable()
    assert msgspec.msgpack.decode(encode(worst), type=Waits) == worst


def test_the_lag_is_from_the_rank_furthest_behind_to_the_one_furthest_ahead() -> None:
    def lag(*steps: float | None) -> tuple[float, int]:
        waits = found([report(rank, 0.5, step=step) for rank, step in enumerate(steps)])
        return waits.lag, waits.behind

    assert lag(10, 10, 10) == (0, 0)
    assert lag(10, 8, 13, 8) == (5, 1)
    assert lag(1.5, 1.25) == (0.25, 1)
    assert lag(None, 7, None, 9) == (2, 1)
    assert lag(None, None) == (0, 0)


@pytest.mark.parametrize("interval_s", [-5.0, 0.0, 1e300])
def test_a_clock_that_was_set_makes_no_interval_that_a_reply_cannot_carry(interval_s: float) -> None:
    waits = found(reports(0.5, 0.1), interval_s)

    assert msgspec.msgpack.decode(encode(waits), type=Waits) == waits
    assert not is_notable(waits)


@pytest.mark.parametrize(
    ("least_s", "most_s", "interval_s", "notable"),
    [
        (0.0, 0.5, 5.0, True),
        (0.0, 0.49, 5.0, False),  # less than a tenth
        (4.0, 4.5, 5.0, True),  # what both waited is no spread
        (0.0, 0.0101, 0.05, True),
        (0.0, 0.0099, 0.01, False),  # less than 10 ms
        (0.0, 0.5, 0.0, False),  # a clock that was set back
    ],
)
def test_a_spread_is_notable_from_10_ms_and_a_tenth_of_the_interval_on(
    least_s: float,
    most_s: float,
    interval_s: float,
    notable: bool,  # noqa: FBT001 - the table's last column
) -> None:
    assert is_notable(Waits(1, least_s, most_s, interval_s)) == notable


def test_destinations_that_take_only_numbers_get_the_extremes_the_slowest_rank_and_the_lag() -> None:
    waited = entry(Waits(3, 0.125, 0.5, 2.0, host="node-2", lag=4, behind=1))

    assert flat_metrics(waited) == {
        **waited.metrics,
        "logsync/wait_s/min": 0.125,
        "logsync/wait_s/max": 0.5,
        "logsync/wait_s/argmin_rank": 3.0,
        "logsync/lag_steps": 4.0,
    }
    assert flat_metrics(entry(None)) == waited.metrics


# In a round


class Root:
    """A coordinator that is fed reports; the clock is the caller's."""

    def __init__(self, world_size: int, log_frequency: int = 10) -> None:
        config = settings(log_frequency)
        self.world_size = world_size
        self.number = 0
        self.coordinator = Coordinator(config, world_size, run="run", run_dir="x")
        self.send([encode_hello(Hello(r, world_size, "1", config)) for r in range(world_size)], 100.0)

    def send(self, frames: list[bytes], now: float) -> Decision:
        reply, _ = self.coordinator.handle(frames, now)
        self.number += 1
        return decode_decision(reply)

    def round(
        self, now: float, step: int, waited: Sequence[float | None], each: dict[int, dict[str, Any]] | None = None
    ) -> Decision:
        frames = [
            encode(
                report(
                    rank,
                    seconds,
                    **{
                        "step": step,
                        "round": self.number,
                        "world_size": self.world_size,
                        "call": self.number,
                        **(each or {}).get(rank, {}),
                    },
                )
            )
            for rank, seconds in enumerate(waited)
        ]
        return self.send(frames, now)

    def entry(self, *args: Any, **options: Any) -> LogEntry:
        decision = self.round(*args, **options)
        assert decision.failure is None, decision.failure
        assert decision.entry is not None
        return decision.entry


def test_an_entry_tells_the_waits_of_the_rounds_before_and_the_first_has_none() -> None:
    root = Root(3)

    assert root.entry(101.0, 0, [5.0, 6.0, 7.0]).waits is None
    second = root.entry(103.0, 10, [0.5, 0.1, 0.2], {rank: {"host": f"node-{rank}"} for rank in range(3)})
    third = root.entry(107.0, 20, [0.0, 0.5, 1.5])

    # The waits that a frame tells are those of the round before, so the interval is the one before, too.
    assert second.waits == Waits(
        slowest=1, host="node-1", least_s=0.1, most_s=0.5, interval_s=1.0, each_ms=(500, 100, 200)
    )
    assert third.waits == Waits(
        slowest=0, host="node-0", least_s=0.0, most_s=1.5, interval_s=2.0, each_ms=(0, 500, 1500)
    )


def test_the_interval_spans_all_rounds_since_the_last_entry() -> None:
    root = Root(2)
    root.entry(101.0, 0, [None, None])
    root.entry(104.0, 10, [0.0, 0.1])
    for now, step in ((105.0, 11), (106.0, 12), (108.0, 13)):
        assert root.round(now, step, [0.0, 0.1]).entry is None

    waits = root.entry(120.0, 23, [0.5, 0.0]).waits

    assert waits is not None
    assert waits.interval_s == 108.0 - 101.0  # from the round before the last entry's to the one before this one


def test_a_refused_round_changes_no_waits() -> None:
    root = Root(2)
    root.entry(101.0, 0, [None, None])
    root.entry(102.0, 10, [0.0, 0.1])
    refused = root.round(103.0, 20, [0.0, 0.1], {1: {"fault": Failure("bad_value", "no", call=1)}})
    assert refused.failure is not None

    waits = root.entry(104.0, 20, [0.0, 0.1]).waits

    assert waits is not None
    assert waits.interval_s == 103.0 - 101.0


@pytest.mark.parametrize("first_is_due", [False, True])
def test_the_pause_between_two_epochs_is_in_no_interval(*, first_is_due: bool) -> None:
    root = Root(2)
    root.entry(101.0, 0, [None, None])
    root.entry(102.0, 10, [0.0, 0.1])
    ended = root.round(103.0, 12, [None, None], {rank: {"kind": "ended", "rhythm": Rhythm()} for rank in range(2)})
    assert ended.new_epoch is not None

    # An hour later, and one rank another minute later, both come back.
    first = root.round(3700.0, 20 if first_is_due else 13, [None, None])
    entries = [first.entry, root.entry(3701.0, 30, [60.0, 0.0]), root.entry(3703.0, 40, [0.0, 0.5])]

    assert (entries[0] is not None) == first_is_due
    assert [entry.waits for entry in entries[:2] if entry is not None] == [None] * (1 + first_is_due)
    assert entries[2] is not None
    assert entries[2].waits is not None
    assert entries[2].waits.interval_s == 1.0


def test_alone_and_detached_there_are_no_waits() -> None:
    alone = Root(1)
    assert [alone.entry(now, step, [0.5]).waits for now, step in ((101.0, 0), (102.0, 10))] == [None, None]

    root = Root(2)
    root.entry(101.0, 0, [None, None])
    root.coordinator.detach(0, root.number)
    assert root.entry(102.0, 10, [0.5]).waits is None


def test_what_is_merged_is_the_same_whatever_ranks_have_waited() -> None:
    rng = random.Random(1)
    logs = []
    for _ in range(5):
        root = Root(3)
        entries = [root.entry(101.0, 10 * n, [rng.random() for _ in range(3)]) for n in range(4)]
        logs.append([msgspec.structs.replace(entry, waits=None) for entry in entries])

    assert all(log == logs[0] for log in logs)


# What ranks tell


Script = Callable[[int, TrainingLog], Any]


def on_threads(folder: Path, world_size: int, script: Script, **options: Any) -> list[Any]:
    world = ThreadWorld(world_size, timeout_s=30.0)
    results: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        sinks = options.get("sinks", [])
        with connect(10, transport=world.transports[rank], run_dir=folder, **{**options, "sinks": sinks}) as log:
            results[rank] = script(rank, log)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
        assert not thread.is_alive(), "a rank hangs"
    return results


def told(monkeypatch: pytest.MonkeyPatch) -> list[Report]:
    """Every report that a coordinator reads from now on."""
    seen: list[Report] = []
    decide = Coordinator._decide

    def spy(self: Coordinator, number: int, given: list[Report], now: float) -> Decision:
        seen.extend(given)
        return decide(self, number, given, now)

    monkeypatch.setattr(Coordinator, "_decide", spy)
    return seen


def test_a_rank_tells_its_host_until_a_round_was_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "n\u00f6de\x07" + "x" * 200)
    seen = told(monkeypatch)

    def script(rank: int, log: TrainingLog) -> None:
        with pytest.raises(BadValue):
            log.write(-1 if rank else 0)
        log.write(0)
        log.write(10)

    on_threads(tmp_path, 2, script)

    hosts = [[r.host for r in seen if r.rank == rank] for rank in range(2)]
    assert hosts[0] == hosts[1]
    assert hosts[0][:4] == [("n\\xf6de\\x07" + "x" * 200)[:64]] * 2 + ["", ""]


def test_a_rank_tells_what_it_waited_since_the_last_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = told(monkeypatch)

    def script(_: int, log: TrainingLog) -> list[float]:
        totals = [log.stats.wait_s]
        for step in (0, 1, 2, 3, 13):  # the cap of 0 makes every call a round; 0 and 13 log
            log.log_ready(step)
            totals.append(log.stats.wait_s)
        log.write(14)
        return totals

    results = on_threads(tmp_path, 2, script, max_lease=0)

    for rank, totals in enumerate(results):
        own = [r.waited_s for r in seen if r.rank == rank]
        assert own[0] is None
        # Each is the sum over the rounds from the last entry's on: the rounds of 0, 1, 2, 3, and then that of 13 alone.
        assert own[1:5] == pytest.approx([totals[n] - totals[0] for n in (1, 2, 3, 4)])
        assert own[5] == pytest.approx(totals[5] - totals[4])


def test_a_rank_that_has_closed_does_not_tell_what_it_waits_in_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = told(monkeypatch)

    def script(rank: int, log: TrainingLog) -> Waits | None:
        for step in range(0, 30 if rank == 0 else 10, 10):
            log.write(step)
        return log.last_entry.waits if log.last_entry else None

    results = on_threads(tmp_path, 2, script)

    background = [r for r in seen if r.rank == 1 and r.kind == "closed"]
    assert len(background) == 3
    assert background[0].waited_s is not None  # of the round before it closed
    assert [r.waited_s for r in background[1:]] == [None, None]
    assert results[0] is None


def test_the_rank_that_comes_late_is_named_on_every_rank_and_in_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    late, world_size = 2, 3
    arrivals: list[int] = []
    exchange = ThreadTransport.exchange

    def noted(self: ThreadTransport, frame: bytes, *, patient: bool = False) -> bytes:
        arrivals.append(self.rank)
        return exchange(self, frame, patient=patient)

    monkeypatch.setattr(ThreadTransport, "exchange", noted)

    def script(rank: int, log: TrainingLog) -> list[Waits | None]:
        given = []
        for number in range(4):
            deadline = time.monotonic() + 20
            while rank == late and len(arrivals) < world_size * (number + 1) + world_size - 1:  # the hello is one, too
                assert time.monotonic() < deadline, arrivals
                time.sleep(0.001)
            if rank == late:
                time.sleep(0.2)  # what this is about: the others are there, and wait
            log.record(loss=1.0)
            given.append(log.write(10 * number).waits)
        return given

    results = on_threads(tmp_path, world_size, script, sinks=["jsonl", "console"])
    first, *others = results[0]

    assert results == [results[0]] * world_size
    assert first is None
    for waits in others:
        assert waits.slowest == late
        assert waits.host == ascii(socket.gethostname())[1:-1][:64]
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["waits" in line for line in written] == [False, True, True, True]
    assert [(line["waits"]["slowest"], line["loss"]) for line in written[1:]] == [(late, 1.0)] * 3
    assert capsys.readouterr().out.count(f"(slowest: rank {late} on ") == 3


# Who sees it

RUN = RunInfo(run_dir=Path("unused"), name="train", attempt=0, world_size=4, next_seq=0, resumed=False)


def entry(waits: Waits | None, **fields: Any) -> LogEntry:
    plain = LogEntry(1, 50, 1.5, 0, 50, 4, {"loss": 0.5}, waits=waits)
    return msgspec.structs.replace(plain, **fields)


def on_console(monkeypatch: pytest.MonkeyPatch, one: LogEntry) -> str:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    sink = ConsoleSink()
    sink.open(RUN)
    sink.write(one)
    sink.close()
    return stream.getvalue()


def test_the_console_names_the_slowest_rank_and_its_host_when_the_spread_is_notable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    line = "logsync train step=50 seq=1 loss=0.5"
    slow = Waits(3, 0.01, 0.85, 5.2, host="node-2")
    text = "slowest: rank 3 on node-2, others waited up to 0.84 s of 5.20 s for it"

    assert on_console(monkeypatch, entry(slow)) == f"{line} ({text})\n"
    assert on_console(monkeypatch, entry(slow, partial=True)) == f"{line} (partial, from 50 calls; {text})\n"
    assert "slowest: rank 3, others" in on_console(monkeypatch, entry(msgspec.structs.replace(slow, host="")))
    assert "\x1b" not in on_console(monkeypatch, entry(msgspec.structs.replace(slow, host="\x1b[2J")))
    for quiet in (None, Waits(3, 0.8, 0.85, 5.2, host="node-2")):
        assert on_console(monkeypatch, entry(quiet)) == f"{line}\n"


def test_flat_destinations_get_the_waits_as_numbers(tmp_path: Path) -> None:
    sink = CsvSink(tmp_path / "metrics.csv")
    sink.open(RUN)
    sink.write(entry(Waits(3, 0.125, 0.5, 2.0)))
    sink.close()

    with (tmp_path / "metrics.csv").open(newline="") as file:
        values = {row["metric"]: float(row["value"]) for row in csv.DictReader(file)}
    assert values["logsync/wait_s/max"] == 0.5
    assert values["logsync/wait_s/argmin_rank"] == 3


def test_a_json_line_has_the_waits_without_what_is_nothing(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.open(RUN)
    given = [None, Waits(3, 0.125, 0.5, 2.0, "node-2"), Waits(3, 0.125, 0.5, 2.0, lag=4, behind=1)]
    for waits in given:
        sink.write(entry(waits))
    sink.close()

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    times = {"slowest": 3, "least_s": 0.125, "most_s": 0.5, "interval_s": 2.0}
    assert [line.get("waits") for line in lines] == [
        None,
        {**times, "host": "node-2"},
        {**times, "lag": 4, "behind": 1},
    ]
