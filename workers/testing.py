"""The transport contract as tests, to which anyone's transport can be put.

A *scenario* is played by every rank of a world at once; what the ranks return is checked together. Scenarios go
through `connect`, as users do, or through the bare transport where the promise is about bytes.

    def make_world(size):                       # however ranks are made: threads, processes, actors
        ...                                     # an object with world_size and run(name), see `World`

    check_transport(make_world)

To see every scenario as a test of its own, run `SCENARIOS[name].check(world.run(name))` for each name.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from logsync.coordinator.errors import LogsyncError
from logsync.coordinator.frequency import FrequencyManager
from logsync.coordinator.host import Host
from logsync.coordinator.messages import MAX_FRAME, decode_state, encode
from logsync.workers.door import connect
from logsync.workers.training_log import TrainingLog
from logsync.workers.transports.base import Root, Transport
from logsync.workers.transports.local import LocalTransport

__all__ = ["SCENARIOS", "Member", "Scenario", "World", "check_transport", "play"]


_TIMEOUT_S = 60.0
_SHORT_TIMEOUT_S = 2.0
_GRACE_S = 5.0  # what a transport has, beyond its timeout, to find out who is missing
_AT_ONCE_S = 2.0
_LOST = ("RoundTimeout", "PeerLost", "PeerFailed", "CoordinatorLost")


class World(Protocol):
    """Ranks that can be told to play a scenario."""

    world_size: int

    def run(self, name: str) -> list[Any]:
        """Have every rank call `play(name, member)` with its own member; return what they returned, by rank.

        Raise what a rank raised, or for a rank that does not return in time. Ranks may then be at different places, so
        the next call needs a world that was made anew.
        """


class Member:
    """One rank of a world: it knows how to make a transport to the others.

    Args:
        rank, world_size: as the transport will have them.
        make_transport: returns a new transport that is not started yet, whose rounds wait for as many seconds as it
            is given; the n-th calls on all ranks belong together.

    Attributes:
        entries: what the logs of this rank have handed to their sinks.
    """

    def __init__(self, rank: int, world_size: int, make_transport: Callable[[float], Transport]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.make_transport = make_transport
        self.entries: list[Any] = []

    def connect(self, log_frequency: float | None = 1, **options: Any) -> TrainingLog:
        """Open a log whose entries rank 0 collects in `entries`."""
        options = {"sinks": [self.entries.append], "run_dir": "not-used", "timeout": _TIMEOUT_S, **options}
        return connect(log_frequency, transport=self.make_transport(options["timeout"]), **options)

    def start(self, root: Root, timeout_s: float = _TIMEOUT_S) -> Transport:
        """Start a bare transport that has `root` on rank 0."""
        transport = self.make_transport(timeout_s)
        transport.start(root if self.rank == 0 else None)
        return transport

    @contextlib.contextmanager
    def failing_root(self, log: TrainingLog) -> Iterator[None]:
        """Have the coordinator of `log` raise an OSError about "the disk of the root" where it makes an entry."""
        host = log._host  # noqa: SLF001
        if isinstance(host, Host):
            host.coordinator._entry = _broken_disk  # type: ignore[assignment, method-assign]  # noqa: SLF001
        yield
        if isinstance(host, Host):
            del host.coordinator._entry  # noqa: SLF001

    def is_last(self) -> bool:
        """Whether this is the highest rank."""
        return self.rank == self.world_size - 1


def _broken_disk(*_: object) -> None:
    msg = "the disk of the root"
    raise OSError(msg)


class Scenario(NamedTuple):
    """What every rank does, and what must hold of the list of what they returned."""

    name: str
    play: Callable[[Member], Any]
    check: Callable[[list[Any]], None]
    least_ranks: int


SCENARIOS: dict[str, Scenario] = {}


def check_transport(make_world: Callable[[int], World], sizes: Sequence[int] = (1, 2, 3)) -> None:
    """Play every scenario on worlds of the given sizes.

    Raises:
        AssertionError: a promise is broken; the text names the scenario, the size, and the rank if one raised.
        RuntimeError: Python runs with -O, which leaves out the checks.
    """
    if not __debug__:
        msg = "check_transport() checks by assert statements; run Python without -O"
        raise RuntimeError(msg)
    for size in sizes:
        world = make_world(size)
        for scenario in SCENARIOS.values():
            if size >= scenario.least_ranks:
                try:
                    scenario.check(world.run(scenario.name))
                except Exception as error:  # a result of the wrong shape breaks a promise, too
                    msg = f"{scenario.name} with {size} ranks: {type(error).__name__}: {error}"
                    raise AssertionError(msg) from error


def play(name: str, member: Member) -> Any:
    """Play this rank's part of a scenario; what it returns can be pickled.

    Raises:
        AssertionError: this rank raised what the scenario does not expect; the text names it.
    """
    try:
        return SCENARIOS[name].play(member)
    except Exception as error:
        msg = f"rank {member.rank} of {member.world_size} in {name}: {type(error).__name__}: {error}"
        raise AssertionError(msg) from error


def _scenario(
    check: Callable[[list[Any]], None], least_ranks: int = 1
) -> Callable[[Callable[[Member], Any]], Callable[[Member], Any]]:
    def register(played: Callable[[Member], Any]) -> Callable[[Member], Any]:
        SCENARIOS[played.__name__] = Scenario(played.__name__, played, check, least_ranks)
        return played

    return register


def _alike(results: list[Any]) -> None:
    assert all(result == results[0] for result in results), f"ranks differ: {results}"


def _raised(call: Callable[[], object]) -> tuple[str, str, tuple[int, ...]]:
    """Return the class, text and ranks of the error that `call` raises."""
    try:
        call()
    except LogsyncError as error:
        return type(error).__name__, str(error), error.ranks
    return "nothing was raised", "", ()


def _agreed(kind: str, *words: str) -> Callable[[list[Any]], None]:
    """Check that all ranks got one error of `kind`, naming the last rank, and that the log then had all values.

    The scenario returns (error, last entry's metrics): every rank recorded x=1 in two calls, so their sum is 2 a rank.
    """

    def check(results: list[Any]) -> None:
        _alike(results)
        (found, text, ranks), metrics = results[0]
        assert found == kind, f"{found}: {text}"
        assert len(results) - 1 in ranks, f"the error is about ranks {ranks}: {text}"
        for word in words:
            assert word in text, text
        assert metrics["x"] == 2 * len(results), f"recorded values were lost or doubled: {metrics}"

    return check


# -- bytes -------------------------------------------------------------------------------------------------------


def _digest(frames: Iterable[bytes | bytearray | memoryview]) -> bytes:
    return b"|".join(hashlib.sha256(frame).hexdigest().encode() for frame in frames)


def _check_bytes(results: list[Any]) -> None:
    replies, expected, root_runs = zip(*results, strict=True)
    _alike(list(replies))
    _alike([run for run in root_runs if run is not None])
    for number, reply in enumerate(replies[0]):
        frames = [expected[rank][number] for rank in range(len(results))]
        assert reply.startswith(b"|".join(frames)), f"round {number}: the root saw other frames, or in another order"
    assert root_runs[0] == len(replies[0]), f"the root ran {root_runs[0]} times in {len(replies[0])} rounds"


def _rounds_of(member: Member, sizes: Sequence[tuple[int, int]]) -> Any:
    """Make raw rounds with frames and replies of given sizes, those of the replies being the least."""
    runs = 0
    wanted = iter([reply for _, reply in sizes])

    def root(frames: Sequence[bytes | bytearray | memoryview]) -> bytes:
        nonlocal runs
        runs += 1
        return _digest(frames).ljust(next(wanted, 0), b".")

    transport = member.start(root)
    replies, sent = [], []
    try:
        for number, (size, _) in enumerate(sizes):
            frame = bytes([65 + (number + member.rank) % 26]) * size
            sent.append(_digest([frame]))
            replies.append(transport.exchange(frame))
    finally:
        transport.close()
    return replies, sent, runs if member.rank == 0 else None


@_scenario(_check_bytes)
def every_rank_gets_the_same_bytes_and_the_root_runs_once_a_round(member: Member) -> Any:
    times = member.rank + 1
    return _rounds_of(member, [(10 * times, 0), (0, 0), (300 * times, 0), (7, 500)])


@_scenario(_check_bytes)
def frames_and_replies_grow_and_shrink(member: Member) -> Any:
    times = member.rank + 1
    frames = [(size * times, 0) for size in (1007, 1008, 1009, 2**16, 300_000)]
    replies = [(10, size) for size in (1007, 1008, 1009, 2**16, 2**20)]
    again = [(4000 * times, 9000), *[(5, 0)] * 20, (2**20 * times, 2**20), (1, 1)]
    return _rounds_of(member, [*frames, *replies, *[(5, 0)] * 20, *again])


@_scenario(_check_bytes)
def one_ranks_frame_may_be_much_larger_than_the_others(member: Member) -> Any:
    large = [rank for rank in range(member.world_size) for _ in range(3)]
    return _rounds_of(member, [(100_000 if member.rank == rank else 3, 0) for rank in large + large[::-1]])


def _check_too_large(results: list[Any]) -> None:
    _alike(results)
    (kind, text, ranks), reply = results[0]
    assert kind == "FrameTooLarge", f"{kind}: {text}"
    assert ranks == (len(results) - 1,), text
    assert f"rank {len(results) - 1}" in text, text
    assert reply == b"the next round", "the group did not go on"


@_scenario(_check_too_large, least_ranks=2)
def a_frame_over_the_maximum_is_refused_on_all_ranks_and_the_group_goes_on(member: Member) -> Any:
    transport = member.start(lambda _: b"the next round")
    try:
        size = MAX_FRAME + 1 if member.is_last() else 100
        return _raised(lambda: transport.exchange(bytes(size))), transport.exchange(b"small")
    finally:
        transport.close()


def _check_closed(results: list[Any]) -> None:
    assert results == [True] * len(results)


@_scenario(_check_closed, least_ranks=2)
def a_last_window_over_the_maximum_does_not_keep_the_log_from_closing(member: Member) -> Any:
    log = member.connect(100)
    log.log_ready(0)
    if member.is_last():
        frame = log._frame  # noqa: SLF001

        def large(*args: Any, **options: Any) -> bytes:
            # Thousands of metrics a log could not record in a test's time; the padding goes with the window.
            return frame(*args, **options) + bytes(MAX_FRAME if options["window"].values else 0)

        log._frame = large  # type: ignore[method-assign]  # noqa: SLF001
        log.record(x=1.0)
    log.close()
    return True


# -- agreed errors: they reach every rank, and leave the group working -----------------------------------------


def _x(log: TrainingLog) -> None:
    log.record({"x": 1.0}, reduce="sum")


@_scenario(_agreed("BadType", "must be an int", "call 2"))
def a_bad_step_in_a_due_call_is_everybodys_error(member: Member) -> Any:
    with member.connect(10, max_lease=0) as log:
        log.log_ready(0)
        _x(log)
        error = _raised(lambda: log.log_ready("7" if member.is_last() else 1))  # type: ignore[arg-type]
        _x(log)
        return error, log.write(2).metrics


@_scenario(_agreed("BadValue", "greater than or equal to 0", "call 4"))
def a_bad_step_under_a_lease_is_reported_by_the_next_round_with_its_call(member: Member) -> Any:
    with member.connect(10) as log:
        for step in range(3):
            log.log_ready(step)
        _x(log)
        log.log_ready(-3 if member.is_last() else 3)
        error = _raised(lambda: log.write(3))
        _x(log)
        return error, log.write(4).metrics


@_scenario(_agreed("BadType", "number"))
def bad_values_to_write_are_everybodys_error(member: Member) -> Any:
    with member.connect(10) as log:
        _x(log)
        error = _raised(lambda: log.write(0, {"acc": "high" if member.is_last() else 0.5}))
        _x(log)
        return error, log.write(1).metrics


@_scenario(_agreed("RoundMismatch", "step 2"), least_ranks=2)
def a_skipped_call_is_everybodys_error(member: Member) -> Any:
    with member.connect(100, max_lease=0) as log:
        log.log_ready(0)
        _x(log)
        error = _raised(lambda: log.log_ready(2 if member.is_last() else 1))
        _x(log)
        assert not log.log_ready(3 if member.is_last() else 2)
        return error, log.write(3).metrics


def _check_mixed_up(results: list[Any]) -> None:
    _alike(results)
    (kind, text, ranks), metrics = results[0]
    assert kind == "RoundMismatch", f"{kind}: {text}"
    assert ranks, text
    assert "write()" in text, text
    assert metrics["x"] == 2 * len(results), f"recorded values were lost or doubled: {metrics}"


@_scenario(_check_mixed_up, least_ranks=2)
def write_on_one_rank_and_log_ready_on_the_others_is_everybodys_error(member: Member) -> Any:
    with member.connect(100, max_lease=0) as log:
        log.log_ready(0)
        _x(log)
        error = _raised(lambda: log.write(1) if member.is_last() else log.log_ready(1))
        _x(log)
        return error, log.write(2).metrics


@_scenario(_agreed("ReductionMismatch", "'y'"), least_ranks=2)
def a_key_with_two_reductions_is_everybodys_error(member: Member) -> Any:
    log = member.connect(100)
    _x(log)
    _x(log)
    log.record({"y": 1.0}, reduce="max" if member.is_last() else "min")
    error = _raised(lambda: log.write(0))
    # The keys are what they are, so no later window merges; what was recorded is still there to be merged alone.
    shares = log._window.take()  # noqa: SLF001
    kept = {cell.spec.name: share.value for cell, share in shares.shares}
    log._window.clear()  # noqa: SLF001
    log.close()
    return error, {"x": kept["x"] * member.world_size}


@_scenario(_agreed("StateMismatch", "loaded none"), least_ranks=2)
def a_state_that_one_rank_does_not_load_is_everybodys_error(member: Member) -> Any:
    with member.connect(100) as log:
        log.log_ready(0)
        state = log.state_dict()
        if not member.is_last():
            log.load_state_dict(state)
        error = _raised(lambda: log.write(1))
        log.load_state_dict(state)
        _x(log)
        _x(log)
        return error, log.write(2).metrics


def _check_failing_root(results: list[Any]) -> None:
    _alike(results)
    (kind, text, _), metrics = results[0]
    assert kind == "CoordinatorFailed", f"{kind}: {text}"
    assert "the disk of the root" in text, text
    assert metrics["x"] == 2 * len(results), f"recorded values were lost or doubled: {metrics}"


@_scenario(_check_failing_root)
def a_failing_root_is_everybodys_error_and_the_group_goes_on(member: Member) -> Any:
    with member.connect(100) as log:
        _x(log)
        with member.failing_root(log):
            error = _raised(lambda: log.write(0))
        _x(log)
        return error, log.write(1).metrics


def _check_config(results: list[Any]) -> None:
    _alike(results)
    last = len(results) - 1
    for field, (value, (kind, text, ranks)) in results[0].items():
        assert kind == "ConfigMismatch", f"{field}: {text}"
        assert ranks == (last,), f"{field}: {ranks}"
        assert field in text, text
        assert f"rank {last}: {value}" in text, text


@_scenario(_check_config, least_ranks=2)
def different_settings_are_refused_by_name_on_all_ranks(member: Member) -> Any:
    different = {
        "log_frequency": 5,
        "mode": "on_update",
        "frequency_type": "batch",
        "name": "val",
        "write": "explicit",
        "timeout": 59.0,
        "max_lease": 7,
    }
    found = {}
    for field, value in different.items():
        options: dict[str, Any] = {"log_frequency": 1}
        if member.is_last():
            options[field] = value
        frequency = options.pop("log_frequency")
        error = _raised(lambda frequency=frequency, options=options: member.connect(frequency, **options))  # type: ignore[misc]
        found[field] = repr(value), error
    return found


# -- what is merged, and when ----------------------------------------------------------------------------------


def _check_merged(results: list[Any]) -> None:
    size = len(results)
    _alike([entries for entries, _ in results])
    for number, (step, metrics, ranks) in enumerate(results[0][0]):
        calls = range(10 * number - 9, 10 * number + 1) if number else range(1)
        values = [(call + rank, rank + 1) for call in calls for rank in range(size)]
        mean = sum(v * w for v, w in values) / sum(w for _, w in values)
        assert step == 10 * number
        assert abs(metrics["loss"] - mean) <= 1e-12 * mean, (metrics, mean)
        assert metrics["tokens"] == len(values)
        assert metrics["most"] == calls[-1] + size - 1
        assert metrics["least"] == calls[0]
        assert metrics["speed"] == 10.0 * size * (size + 1) / 2
        assert metrics["speed/argmax_rank"] == size - 1
        assert metrics[f"own/rank{size - 1}"] == size - 1
        assert metrics[f"only{size - 1}"] == 1.0
        assert ranks == ({f"only{rank}": 1 for rank in range(size)} if size > 1 else {})
    assert len(results[0][0]) == 6
    assert {rounds for _, rounds in results} == {6 + 1 + 1}, (
        "one round a log, one more in the first interval, one to close"
    )


@_scenario(_check_merged)
def merged_values_are_those_of_all_ranks_together(member: Member) -> Any:
    found = []
    rank = member.rank
    with member.connect(10) as log:
        for step in range(51):
            log.record({"loss": float(step + rank)}, weight=rank + 1)
            log.record({"tokens": 1}, reduce="sum")
            log.record({"most": step + rank}, reduce="max")
            log.record({"least": step + rank}, reduce="min")
            log.record({"speed": 10.0 * (rank + 1)}, across="sum", spread=True)
            log.record({"own": rank}, reduce="last", per_rank=True)
            log.record({f"only{rank}": 1.0})
            if log.log_ready(step):
                entry = log.last_entry
                assert entry is not None
                found.append((entry.step, entry.metrics, entry.ranks))
    return found, log.stats.rounds


def _check_large(results: list[Any]) -> None:
    _alike([count for count, _ in results])
    assert results[0][0] == 4500
    assert all(sent > 2**20 for _, sent in results), "the frames were smaller than the scenario claims"


@_scenario(_check_large)
def frames_of_a_megabyte_go_through(member: Member) -> Any:
    with member.connect(10) as log:
        log.record({f"{number:0240d}": float(number) for number in range(4500)})
        return len(log.write(0).metrics), log.stats.bytes_sent


def _check_early_close(results: list[Any]) -> None:
    size = len(results)
    for leaver in range(size):
        entries = results[0][leaver]
        assert sum(metrics.get("x", 0.0) for _, metrics in entries) == 25.0 * (size - 1) + 5.0, entries
        steps = [step for step, _ in entries]
        assert steps == sorted(steps), steps
        assert steps[-1] == 24, f"what was open at the end is missing: {steps}"


@_scenario(_check_early_close, least_ranks=2)
def a_rank_that_closes_early_keeps_answering_the_root_included(member: Member) -> Any:
    found = []
    for leaver in range(member.world_size):
        member.entries.clear()
        with member.connect(10) as log:
            for step in range(5 if member.rank == leaver else 25):
                _x(log)
                log.log_ready(step)
        found.append([(entry.step, entry.metrics) for entry in member.entries])
    return found


def _check_one_by_one(results: list[Any]) -> None:
    size = len(results)
    _alike([last_entry for last_entry, _ in results])
    for entries in results[0][1]:
        steps = [step for step, _ in entries]
        assert steps == sorted(steps), steps
        assert steps[-1] == 12 * size - 7, f"what was open at the end is missing: {steps}"
        assert 15 in steps or size == 1, f"the entry of write() is missing: {steps}"
        total = sum(metrics.get("x", 0.0) for _, metrics in entries)
        assert total == sum(6 + 12 * place for place in range(size)), entries


@_scenario(_check_one_by_one)
def ranks_that_close_one_by_one_lose_nothing(member: Member) -> Any:
    last_entries, found = [], []
    for place in (member.rank, member.world_size - 1 - member.rank):
        member.entries.clear()
        with member.connect(10) as log:
            for step in range(6 + 12 * place):
                _x(log)
                log.log_ready(step)
                if step == 15:
                    log.write(step)
        last_entries.append((log.last_entry.step, log.last_entry.metrics) if log.last_entry else None)
        found.append([(entry.step, entry.metrics) for entry in member.entries])
    return last_entries, found


def _check_sat_out(results: list[Any]) -> None:
    closed, *others = results
    assert closed == (None, None), f"a rank that had closed got what was meant for the others: {closed}"
    _alike(others)
    (kind, text, ranks), metrics = others[0]
    assert kind == "BadType", f"{kind}: {text}"
    assert ranks == (len(results) - 1,), text
    assert metrics["x"] == 1 + 2 * len(others), f"recorded values were lost or doubled: {metrics}"


@_scenario(_check_sat_out, least_ranks=2)
def a_rank_that_has_closed_sits_out_the_others_mistakes(member: Member) -> Any:
    with member.connect(10, max_lease=0) as log:
        log.log_ready(0)
        _x(log)
        if member.rank == 0:
            return None, None
        error = _raised(lambda: log.log_ready("7" if member.is_last() else 1))  # type: ignore[arg-type]
        _x(log)
        return error, log.write(2).metrics


@_scenario(_check_closed, least_ranks=2)
def a_rank_that_has_closed_waits_for_longer_than_the_timeout(member: Member) -> Any:
    with member.connect(100, timeout=_SHORT_TIMEOUT_S, max_lease=0) as log:
        log.log_ready(0)
        if member.is_last():
            return True
        time.sleep(1.5 * _SHORT_TIMEOUT_S)  # a long step
        return not log.log_ready(1)


_EPOCH = 100  # steps from the first one of an epoch to the first one of the next


def _lengths(world_size: int) -> list[list[int]]:
    """Return how many calls each rank makes in each epoch: every rank ends first in one of the first two."""
    return [
        [3 + 4 * rank for rank in range(world_size)],
        [3 + 4 * rank for rank in reversed(range(world_size))],
        [5 * (rank == world_size - 1) for rank in range(world_size)],
    ]


def _check_uneven(results: list[Any]) -> None:
    manager, due = FrequencyManager(3), {}
    for epoch, lengths in enumerate(_lengths(len(results))):
        for step in range(_EPOCH * epoch, _EPOCH * epoch + max(lengths)):
            due[step] = manager.log_ready(step)
            if due[step]:
                manager.log_written(step)
    for rank, (answers, last, _) in enumerate(results):
        steps = [
            _EPOCH * epoch + call
            for epoch, lengths in enumerate(_lengths(len(results)))
            for call in range(lengths[rank])
        ]
        assert answers == [(step, due[step]) for step in steps], f"rank {rank} was answered {answers}"
        assert last == results[0][1], f"rank {rank} ended with {last}, rank 0 with {results[0][1]}"
    for rank, of_rank in enumerate(zip(*_lengths(len(results)), strict=True)):
        calls = sum(metrics.get(f"x/rank{rank}", 0.0) for metrics in results[0][2])
        assert calls == sum(of_rank), f"values of rank {rank} were lost or doubled: {results[0][2]}"


@_scenario(_check_uneven)
def ranks_that_end_their_epochs_early_answer_the_others_and_come_back(member: Member) -> Any:
    member.entries.clear()
    answers = []
    with member.connect(3) as log:
        for epoch, lengths in enumerate(_lengths(member.world_size)):
            for step in range(_EPOCH * epoch, _EPOCH * epoch + lengths[member.rank]):
                log.record({"x": 1.0}, reduce="sum", per_rank=True)
                answers.append((step, log.log_ready(step)))
            log.end_epoch()
        last = log.write(1000).metrics, log.state_dict()
    return answers, last, [entry.metrics for entry in member.entries]


@_scenario(_check_closed, least_ranks=2)
def ranks_that_have_ended_their_epoch_wait_for_longer_than_the_timeout(member: Member) -> Any:
    with member.connect(100, timeout=_SHORT_TIMEOUT_S, max_lease=0) as log:
        log.log_ready(0)
        if member.rank == 1:
            time.sleep(1.5 * _SHORT_TIMEOUT_S)  # a long step: only ranks that have ended wait for this one
            log.log_ready(1)
        log.end_epoch()
        return not log.log_ready(2)


def _check_logged(expected: list[int]) -> Callable[[list[Any]], None]:
    def check(results: list[Any]) -> None:
        _alike(results)
        assert results[0] == expected, results[0]

    return check


def _logged_steps(
    log: TrainingLog, steps: Iterable[int], before: Callable[[int], object] = lambda _: None
) -> list[int]:
    logged = []
    for step in steps:
        before(step)
        if log.log_ready(step):
            logged.append(step)
    return logged


@_scenario(_check_logged([0, 10, 20, 30, 35, 40, 45]))
def a_frequency_set_on_one_rank_is_in_force_on_all_from_the_next_round(member: Member) -> Any:
    with member.connect(10) as log:

        def change(step: int) -> None:
            if step == 25 and member.is_last():
                log.log_frequency = 5
            assert log.log_frequency == (10 if step <= 30 else 5)

        return _logged_steps(log, range(50), change)


@_scenario(_check_logged([0, 10, 20, 27, 34]), least_ranks=2)
def of_two_frequencies_the_lower_ranks_wins(member: Member) -> Any:
    with member.connect(10) as log:

        def change(step: int) -> None:
            if step == 15:
                log.log_frequency = 7 + member.rank

        return _logged_steps(log, range(40), change)


@_scenario(_check_logged([0, 13, 25]))
def an_update_on_any_rank_makes_a_log_due_in_mode_on_update(member: Member) -> Any:
    with member.connect(10, mode="on_update") as log:

        def update(step: int) -> None:
            if step in (13, 25) and member.is_last():
                log.model_updated(step)

        return _logged_steps(log, range(35), update)


def _check_explicit(results: list[Any]) -> None:
    _alike(results)
    ready, metrics = results[0]
    assert ready == [0, 10, 20, 21, 22]
    assert metrics == [{"acc": 1.0 + (len(results) - 1) / 2}] * 2


@_scenario(_check_explicit)
def with_explicit_write_a_ready_step_stays_ready_until_it_is_written(member: Member) -> Any:
    ready, written = [], []
    with member.connect(10, write="explicit") as log:
        for step in range(23):
            if log.log_ready(step):
                ready.append(step)
                if step < 20:
                    written.append(log.write(step, {"acc": 1.0 + member.rank}).metrics)
    return ready, written


def _check_body(results: list[Any]) -> None:
    assert all(result == results[0] for result in results), results
    assert [keys for _, keys in results[0]] == [["extra", "loss"]] * 3


@_scenario(_check_body)
def a_body_on_rank_0_only_hangs_nobody(member: Member) -> Any:
    found = []
    with member.connect(10) as log:
        for step in range(30):
            log.record(loss=1.0)
            if member.rank == 0:
                log.record(extra=1.0)
            if log.log_ready(step):
                if member.rank == 0:
                    log.annotate({"lr": 0.1})
                    sum(range(100_000))
                entry = log.last_entry
                assert entry is not None
                found.append((entry.step, sorted(entry.metrics)))
    return found


def _check_two_logs(results: list[Any]) -> None:
    _alike(results)
    train, val = results[0]
    assert (train, val) == ([0, 10, 20], [0, 4, 8, 12, 16, 20, 24])


@_scenario(_check_two_logs)
def several_logs_live_in_one_job(member: Member) -> Any:
    with member.connect(10) as train, member.connect(4, name="val", run_dir="not-used-either") as val:
        logged: tuple[list[int], list[int]] = ([], [])
        for step in range(25):
            for log, steps in zip((train, val), logged, strict=True):
                if log.log_ready(step):
                    steps.append(step)
    return logged


def _check_state(results: list[Any]) -> None:
    _alike(results)
    _, steps, seqs = results[0]
    assert steps == [0, 10, 20, 30, 40]
    assert seqs == [0, 1, 2, 3, 4]


def _check_overlapped(results: list[Any]) -> None:
    _alike(results)
    by_step, at_once = results[0]
    assert by_step == at_once
    assert [seq for seq, _, _ in by_step] == list(range(5))


@_scenario(_check_overlapped)
def rounds_beside_the_training_make_the_same_entries(member: Member) -> Any:
    made = []
    for overlapped in (True, False):
        seen: dict[int, tuple[int, Any, dict[str, float]]] = {}
        with member.connect(5) as log:
            for step in range(23):
                if overlapped or step % 3 == 1:
                    log.log_step(step, {"x": float(step + member.rank)}, weight=1 + member.rank)
                else:
                    log.record({"x": float(step + member.rank)}, weight=1 + member.rank)
                    log.log_ready(step)
                if step % 4 == 0 and log.last_entry is not None:  # which waits for the round
                    seen[log.last_entry.seq] = (log.last_entry.seq, log.last_entry.step, log.last_entry.metrics)
        made.append([seen[seq] for seq in sorted(seen)])
    return tuple(made)


@_scenario(_check_state)
def a_state_is_the_same_bytes_everywhere_and_continues_the_log(member: Member) -> Any:
    steps, seqs, states = [], [], []
    with member.connect(10) as log:
        for step in range(25):
            if log.log_ready(step):
                steps.append(step)
                seqs.append(log.last_entry.seq if log.last_entry else -1)
            states.append(log.state_dict())
    with member.connect(10) as log:
        log.load_state_dict(states[-1])
        for step in range(25, 45):
            if log.log_ready(step):
                steps.append(step)
                seqs.append(log.last_entry.seq if log.last_entry else -1)
    return [_timeless(state) for state in states], steps, seqs


def _timeless(state: dict[str, bytes]) -> dict[str, bytes]:
    """Return the state without what differs from run to run, so that ranks may have made it each by itself."""
    found = decode_state(state["state"])
    entry = None if found.entry is None else msgspec.structs.replace(found.entry, time=0.0)
    return {"state": encode(msgspec.structs.replace(found, run_id="", entry=entry))}


def _check_state_travels(results: list[Any]) -> None:
    _alike(results)
    logged, _ = results[0]
    assert logged == [(seq, 10 * seq, seq // 3 if seq < 5 else 2) for seq in range(7)], logged


@_scenario(_check_state_travels)
def a_state_is_loaded_at_another_world_size(member: Member) -> Any:
    logged: list[tuple[int, Any, int]] = []
    states: list[dict[str, bytes]] = []

    def go_on(log: TrainingLog, steps: Iterable[int]) -> None:
        with log:
            if states:
                log.load_state_dict(states[-1])
            for step in steps:
                if log.log_ready(step):
                    entry = log.last_entry
                    assert entry is not None
                    logged.append((entry.seq, entry.step, entry.attempt))
            states.append(_timeless(log.state_dict()))

    go_on(connect(10, transport=LocalTransport(), sinks=[]), range(25))
    go_on(member.connect(10), range(25, 45))
    go_on(connect(10, transport=LocalTransport(), sinks=[]), range(45, 65))
    return logged, states


# -- the group is lost -----------------------------------------------------------------------------------------


def _timed(call: Callable[[], object]) -> tuple[tuple[str, str, tuple[int, ...]], float]:
    started = time.monotonic()
    error = _raised(call)
    return error, time.monotonic() - started


def _check_never_came(results: list[Any]) -> None:
    for absent in results[0]:
        for rank, told in enumerate(result[absent] for result in results):
            for (kind, text, ranks), _ in told:
                assert kind in _LOST, f"rank {rank}, while rank {absent} was missing: {kind}: {text}"
                assert rank == absent or absent in ranks, f"rank {rank} heard of ranks {ranks}, not {absent}: {text}"
            seconds = [taken for _, taken in told]
            assert seconds[0] <= _SHORT_TIMEOUT_S + _GRACE_S, f"rank {rank} knew after {seconds[0]:.1f} s"
            assert max(seconds[1:]) < _AT_ONCE_S, f"rank {rank} waited for a group that was lost: {seconds}"


@_scenario(_check_never_came, least_ranks=2)
def a_rank_that_never_comes_is_every_other_ranks_error_in_time_and_for_good(member: Member) -> Any:
    found = {}
    with member.connect(None, name="healthy") as healthy:
        for absent in (0, member.world_size - 1):
            doomed = member.connect(1, name="doomed", run_dir="not-used-either", timeout=_SHORT_TIMEOUT_S)
            if member.rank == absent:
                healthy.write(absent)  # comes back when the others have given the doomed log up
            found[absent] = [
                _timed(lambda doomed=doomed: doomed.log_ready(0)),  # type: ignore[misc]
                _timed(lambda doomed=doomed: doomed.log_ready(1)),  # type: ignore[misc]
                _timed(lambda doomed=doomed: doomed.write(1)),  # type: ignore[misc]
                _timed(doomed.close),
            ]
            if member.rank != absent:
                healthy.write(absent)
    return found


def _check_reason(results: list[Any]) -> None:
    for leaver in results[0]:
        for rank, (kind, text, ranks) in enumerate(result[leaver] for result in results):
            if rank != leaver:
                assert kind == "PeerFailed", f"rank {rank}: {kind}: {text}"
                assert ranks == (leaver,), text
                assert f"rank {leaver}" in text, text
                assert "ValueError: the loss of batch 17" in text, text


@_scenario(_check_reason, least_ranks=2)
def a_rank_that_raises_leaves_its_reason_to_the_others(member: Member) -> Any:
    found = {}
    for leaver in (0, member.world_size - 1):

        def train(leaver: int = leaver) -> None:
            with member.connect(1) as log:
                log.log_ready(0)
                if member.rank == leaver:
                    msg = "the loss of batch 17"
                    raise ValueError(msg)
                log.log_ready(1)

        try:
            found[leaver] = _raised(train)
        except ValueError:
            found[leaver] = "its own", "", ()
    return found


def _or_hangs(
    call: Callable[[], tuple[str, str, tuple[int, ...]]],
    meanwhile: Callable[[threading.Thread], None] = lambda _: None,
) -> tuple[str, str, tuple[int, ...]]:
    """Return what `call` returns, unless it takes too long: a hang here would take the whole world with it.

    Args:
        meanwhile: called with the thread that `call` runs on.
    """
    results: list[tuple[str, str, tuple[int, ...]]] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    meanwhile(thread)
    thread.join(2 * _GRACE_S)
    return results[0] if results else ("nothing was raised", f"it hangs for {2 * _GRACE_S:.0f} s", ())


def _check_left(results: list[Any]) -> None:
    for rank, errors in enumerate(results[:-1]):
        for kind, text, _ in errors:
            assert kind in _LOST, f"rank {rank}: {kind}: {text}"


def _wait_in_exchange(thread: threading.Thread) -> None:
    """Return when `thread` has been in one exchange for a while, in something that this calls."""
    since = time.monotonic()
    while thread.is_alive() and time.monotonic() - since < _GRACE_S:
        frame = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - nothing else tells
        names = []
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        if "exchange" in names[1:]:
            thread.join(1.5)  # those that look up now and then do so less and less often
            return
        time.sleep(0.01)


def _check_ended(results: list[Any]) -> None:
    for rank, (kind, text, _) in enumerate(results[:-1]):
        assert kind in _LOST, f"rank {rank}: {kind}: {text}"


@_scenario(_check_ended, least_ranks=2)
def a_round_that_waits_on_another_thread_is_ended_by_close(member: Member) -> Any:
    found: tuple[str, str, tuple[int, ...]] = "", "", ()
    with member.connect(None) as healthy:
        transport = member.start(lambda _: b"")
        transport.exchange(b"")

        def close(thread: threading.Thread) -> None:
            _wait_in_exchange(thread)
            transport.close()

        if not member.is_last():
            found = _or_hangs(lambda: _raised(lambda: transport.exchange(b"", patient=True)), close)
        healthy.write(0)  # the last rank is here until all others know
        transport.close()
    return found


@_scenario(_check_left, least_ranks=2)
def a_transport_that_is_closed_ends_the_others_rounds(member: Member) -> Any:
    transport = member.start(lambda _: b"")
    transport.exchange(b"")
    try:
        if member.is_last():
            return []
        return [_or_hangs(lambda: _raised(lambda: transport.exchange(b""))) for _ in range(2)]
    finally:
        transport.close()
        transport.close()  # a second one does nothing
