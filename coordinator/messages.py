"""What ranks and the root tell each other, and the bytes of it.

Everything is msgpack, decoded into typed, frozen structs: no pickle, nothing executed, unknown shapes refused. Ints
are int64, floats float64. Containers are bounded here and frames as a whole by `MAX_FRAME`, which is checked before
anything is decoded.
"""

from __future__ import annotations

import struct
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from logsync.coordinator.errors import LogsyncError, ProtocolError, agreed_error, kind_of, printable

__all__ = [
    "HELLO_SIZE",
    "INT64_MAX",
    "MAX_CALL",
    "MAX_FALLS",
    "MAX_FRAME",
    "MAX_NAME",
    "MAX_PATH",
    "MAX_WAITS",
    "MAX_WAIT_S",
    "PROTOCOL",
    "RESERVED",
    "Decision",
    "Event",
    "Failure",
    "Hello",
    "KeySpec",
    "LogEntry",
    "NewEpoch",
    "Report",
    "ReportKind",
    "Rhythm",
    "Settings",
    "State",
    "Waits",
    "Window",
    "decode_decision",
    "decode_hello",
    "decode_report",
    "decode_state",
    "encode",
    "encode_hello",
    "error_of",
    "failure_of",
    "pack_values",
    "unpack_schema",
    "unpack_values",
]

PROTOCOL = 1
"""The version of everything in this file. A frame of another one is refused by number."""

HELLO_SIZE = 1008
"""Bytes of a hello, frozen for ever, so that ranks of different versions can exchange it: 1 KiB with 16 bytes left
for a transport's own header."""

MAX_FRAME = 16 * 2**20
"""Bytes of the largest frame or reply. A transport may carry less."""

INT64_MAX = 2**63 - 1
MAX_CALL = 2**61
MAX_NAME = 256
MAX_FALLS = 64
MAX_PATH = 4096
MAX_WAIT_S = 1e9
MAX_WAITS = 4096
_MAX_KEYS = 65_536
_MAX_METRICS = 2**20  # spread and per_rank multiply keys
_MAX_EVENTS = 65_536
_MAX_RANKS = 2**20
_MAX_TEXT = 4096

RESERVED = frozenset({"seq", "step", "time", "attempt", "partial", "calls", "ranks", "nonfinite", "nan_ranks", "waits"})
"""Names that no metric may have: flat destinations write them beside the metrics."""

# `int | float` decodes either; the bound on ints keeps what follows inside int64.
_Int = Annotated[int, Meta(ge=-INT64_MAX, le=INT64_MAX)]
_Natural = Annotated[int, Meta(ge=0, le=INT64_MAX)]
# What is counted on from, or added to another count, is never at the end of int64.
_Call = Annotated[int, Meta(ge=0, le=MAX_CALL)]
_Count = Annotated[int, Meta(ge=0, le=2 * MAX_CALL)]
_Rank = Annotated[int, Meta(ge=0, lt=_MAX_RANKS)]
_FewRanks = Annotated[tuple[_Rank, ...], Meta(max_length=16)]
_Number = Annotated[int, Meta(ge=0, le=INT64_MAX)] | Annotated[float, Meta(ge=0, le=1.7976931348623157e308)]
_MaybeStep = _Number | None
_Text = Annotated[str, Meta(max_length=_MAX_TEXT)]
_Key = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
_Metric = Annotated[str, Meta(min_length=1, max_length=MAX_NAME + 32)]  # with "/argmax_rank" and the like behind it
_Path = Annotated[str, Meta(max_length=MAX_PATH)]
_Seconds = Annotated[float, Meta(ge=0, le=MAX_WAIT_S)]
_Millis = Annotated[int, Meta(ge=-1, le=1000 * int(MAX_WAIT_S))]
_Host = Annotated[str, Meta(max_length=64)]
_RunId = Annotated[str, Meta(max_length=32)]

ReportKind = Literal["decision", "write", "ended", "closed"]

Reduction = Literal["mean", "sum", "min", "max", "last"]


class Waits(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who waited for whom, in the rounds from the one that made the entry before to the last one before this entry.

    It comes one round late, since a wait is over when the reply is there.

    Attributes:
        slowest: the rank that waited least, because it came last; the lowest of several.
        least_s, most_s: the seconds that it waited, and that the rank waited that came first.
        interval_s: the seconds that these rounds and the work between them took.
        host: the host name of `slowest`, printable; empty if it is not known.
        lag: steps from the rank that is furthest behind, `behind`, to the one that is furthest ahead.
        each_ms: each rank's wait in whole milliseconds, rank 0's first; -1 for a rank that is not known to have
            waited, such as one that has closed. Empty in a job of more than 4,096 ranks.
    """

    slowest: _Rank
    least_s: _Seconds
    most_s: _Seconds
    interval_s: _Seconds
    host: Annotated[str, Meta(max_length=128)] = ""
    lag: _Number = 0
    behind: _Rank = 0
    each_ms: Annotated[tuple[_Millis, ...], Meta(max_length=MAX_WAITS)] = ()


class LogEntry(msgspec.Struct, frozen=True):
    """What a log produces, made only by the root; the same on every rank.

    Attributes:
        seq: 0, 1, 2, ... over the whole run, restarts included.
        step: the counting rank's step; None if it was logged at step None.
        time: when it was decided, Unix seconds.
        attempt: which start of the job made it; 0 is the first.
        calls: how many calls of `log_ready` or `log_step` its window covers.
        world_size: ranks in the job.
        metrics: the merged values, float64.
        ranks: how many ranks contributed, for each key that not all of them held.
        nan_ranks: for each value that is NaN or infinite, the lowest 16 ranks that made it so.
        partial: whether steps or ranks are missing from it: after a restart from a checkpoint that was not taken at
            a log, or when a rank wrote what it had after the group was lost.
        waits: which rank was slow; None in the first entry after a start, and where one rank logs alone. Times are
            never the same twice, so they are not in `metrics`.
    """

    seq: _Natural
    step: _MaybeStep
    time: float
    attempt: _Natural
    calls: _Natural
    world_size: Annotated[int, Meta(ge=1, le=_MAX_RANKS)]
    metrics: Annotated[dict[_Metric, float], Meta(max_length=_MAX_METRICS)]
    ranks: Annotated[dict[_Metric, _Natural], Meta(max_length=_MAX_METRICS)] = {}
    nan_ranks: Annotated[dict[_Metric, _FewRanks], Meta(max_length=_MAX_METRICS)] = {}
    partial: bool = False
    waits: Waits | None = None


class KeySpec(msgspec.Struct, frozen=True, array_like=True):
    """How one key is folded: `reduce` over the calls of a window on one rank, `across` over the ranks."""

    name: _Key
    reduce: Reduction = "mean"
    across: Reduction = "mean"
    spread: bool = False
    per_rank: bool = False


# gc=False on what a root holds thousands of: no cycle can go through them, and the collector took a third of a round.
class Window(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One rank's share of an entry.

    Attributes:
        schema: the msgpack bytes of a list of `KeySpec`. Ranks that hold the same keys send the same bytes, so the
            root decodes them once.
        values: for each key two little-endian float64: the folded value (for "mean" the weighted sum), and the
            weight behind it (otherwise the number of values).
    """

    schema: Annotated[bytes, Meta(max_length=MAX_FRAME)] = b""
    values: Annotated[bytes, Meta(max_length=MAX_FRAME)] = b""


class Rhythm(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a rank's step moved over its calls since the last round that was accepted.

    Attributes:
        rise: the largest increment from one call to the next, None if there was no increment.
        gap: the fewest calls between two changes of the step, None if there were not two.
        since: calls since the last change; 0 if the last call changed it.
        current: the step of the last call.
        falls: where the step went back, as (call, step) in order of calls; the first call of all counts as one. At
            most 64, those that went back furthest.
    """

    rise: _MaybeStep = None
    gap: _Natural | None = None
    since: _Natural = 0
    current: _MaybeStep = None
    falls: Annotated[tuple[tuple[_Natural, _Number], ...], Meta(max_length=MAX_FALLS)] = ()


class Event(msgspec.Struct, frozen=True, array_like=True):
    """Something a rank's user said between two calls; `call` is the number of the next call.

    kind "update" with a step is a model update, without one it forgets all updates; "written" marks a log as written
    (without a step: forgets all logs); "frequency" sets the log frequency.
    """

    call: _Natural
    kind: Literal["update", "written", "frequency"]
    value: _MaybeStep


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An agreed error on its way to all ranks."""

    kind: Annotated[str, Meta(max_length=32)]
    text: _Text
    ranks: Annotated[tuple[_Rank, ...], Meta(max_length=64)] = ()
    call: _Natural | None = None
    step: _MaybeStep = None


class State(msgspec.Struct, frozen=True, array_like=True):
    """Where the job's logging stands: what a checkpoint holds, and what every reply tells the ranks.

    Attributes:
        configured: the frequency that `connect` was given, beside `log_frequency`, the one in force.
        next_seq: the `seq` of the next entry.
        missed: calls since the last entry whose windows are not in the state; the next entry is partial if there
            are any. Always 0 in a reply.
        run_id: the same over all starts of the job, for destinations that find their run by a name.
        entry: the last entry, in a checkpoint only. Rank 0 may be killed before it has stored it, when other ranks
            have it already in theirs.
    """

    log_frequency: _MaybeStep
    configured: _MaybeStep
    frequency_type: Literal["epoch", "step", "batch"]
    last_log_step: _MaybeStep
    last_model_update_step: _MaybeStep
    updated_since_log: bool
    next_seq: _Count
    run_dir: _Path
    attempt: _Count
    missed: _Count = 0
    run_id: _RunId = ""
    entry: LogEntry | None = None


class Report(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One rank's frame of a round.

    Attributes:
        kind: "decision" at a log_ready call, "write" at write(), "ended" from a rank that makes no more calls in this
            epoch, "closed" from one that has closed.
        call: how many calls this rank has made, this one included.
        fault: what was wrong with the step of this call, or of one under the lease, or with write()'s values.
        restore: the bytes given to `load_state_dict` since the last accepted round; empty if none were.
        restored_at: how many calls this rank had made then.
        waited_s: seconds that this rank waited in the accepted rounds since the last entry, that one's included; None
            if it has not waited with the others, but answered in the background.
        host: this rank's host name; empty once a round was accepted.
    """

    protocol: _Natural
    run: _RunId
    round: _Natural
    rank: _Rank
    world_size: Annotated[int, Meta(ge=1, le=_MAX_RANKS)]
    kind: ReportKind
    call: _Call
    step: _MaybeStep
    check_model_update: bool
    rhythm: Rhythm
    events: Annotated[tuple[Event, ...], Meta(max_length=_MAX_EVENTS)] = ()
    window: Window = Window()
    fault: Failure | None = None
    restore: Annotated[bytes, Meta(max_length=16_384)] = b""
    waited_s: _Seconds | None = None
    host: _Host = ""
    restored_at: _Call = 0


class NewEpoch(msgspec.Struct, frozen=True, array_like=True):
    """Every rank has ended its epoch or closed: those that go on count alike from here.

    Attributes:
        call: how many calls the rank has made that made most.
        missed: how many of its calls are in no entry yet; as in `State`.
    """

    call: _Count
    missed: _Count


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """The reply of a round, the same bytes for all ranks.

    Attributes:
        log_ready: the answer to this call.
        lease: how many of the next calls every rank answers False by itself.
        entry: what was logged in this round, if anything was.
        state: where the job's logging stands after the round.
        failure: the agreed error of the round; then nothing else in here changed.
        finished: every rank has closed; this was the last round.
        notices: warnings for the log of rank 0.
        new_epoch: if this round was the end of an epoch, also where it failed.
        active: the lowest 16 ranks that still make calls, if some have ended their epoch.
    """

    protocol: _Natural
    run: _RunId
    round: _Natural
    log_ready: bool
    lease: _Natural
    state: State
    entry: LogEntry | None = None
    failure: Failure | None = None
    finished: bool = False
    notices: Annotated[tuple[_Text, ...], Meta(max_length=64)] = ()
    new_epoch: NewEpoch | None = None
    active: _FewRanks = ()


class Settings(msgspec.Struct, frozen=True):
    """What all ranks must have given `connect` alike."""

    name: Annotated[str, Meta(min_length=1, max_length=128)]
    log_frequency: _MaybeStep
    mode: Literal["exact", "on_change", "on_update"]
    frequency_type: Literal["epoch", "step", "batch"]
    write: Literal["auto", "explicit"]
    timeout: Annotated[float, Meta(gt=0)]
    max_lease: _Natural
    on_failure: Literal["raise", "detach"] = "raise"


class Hello(msgspec.Struct, frozen=True):
    """The first frame of every rank."""

    rank: _Rank
    world_size: Annotated[int, Meta(ge=1, le=_MAX_RANKS)]
    version: Annotated[str, Meta(max_length=64)]
    settings: Settings


# A hello is laid out by hand, so that any two versions can at least read each other's number.
_HELLO_HEAD = struct.Struct("<8sII")
_MAGIC = b"logsync\0"

_encoder = msgspec.msgpack.Encoder()
_report = msgspec.msgpack.Decoder(Report)
_decision = msgspec.msgpack.Decoder(Decision)
_state = msgspec.msgpack.Decoder(State)
_hello = msgspec.msgpack.Decoder(Hello)
_schema = msgspec.msgpack.Decoder(Annotated[tuple[KeySpec, ...], Meta(max_length=_MAX_KEYS)])

encode = _encoder.encode


def encode_hello(hello: Hello) -> bytes:
    """Return the `HELLO_SIZE` bytes of `hello`."""
    body = encode(hello)
    head = _HELLO_HEAD.pack(_MAGIC, PROTOCOL, len(body))
    if len(head) + len(body) > HELLO_SIZE:  # names are bounded, so only a mistake of ours can get here
        msg = f"a hello of {len(body)} bytes does not fit {HELLO_SIZE}"
        raise ValueError(msg)
    return (head + body).ljust(HELLO_SIZE, b"\0")


def decode_hello(data: bytes | bytearray | memoryview, rank: int) -> Hello:
    """Return the hello that came from `rank`; raise `ProtocolError` if it is not one, or of another version."""
    data = bytes(data)
    if len(data) < _HELLO_HEAD.size or data[:8] != _MAGIC:
        msg = f"rank {rank} did not introduce itself as logsync: its first bytes are {data[:16]!r}"
        raise ProtocolError(msg, ranks=(rank,))
    _, protocol, length = _HELLO_HEAD.unpack_from(data)
    if protocol != PROTOCOL:
        msg = (
            f"rank {rank} speaks protocol {protocol} and rank 0 speaks {PROTOCOL}; "
            "install the same version of logsync on every node"
        )
        raise ProtocolError(msg, ranks=(rank,))
    hello: Hello = _decoded(_hello, data[_HELLO_HEAD.size : _HELLO_HEAD.size + length], rank)
    return hello


def decode_report(data: bytes | bytearray | memoryview, rank: int) -> Report:
    """Return the report that came from `rank`; raise `ProtocolError` if the bytes are not one."""
    report: Report = _decoded(_report, data, rank)
    return report


def decode_decision(data: bytes | bytearray | memoryview) -> Decision:
    """Return the decision in a reply; raise `ProtocolError` if the bytes are not one."""
    decision: Decision = _decoded(_decision, data, None)
    return decision


def decode_state(data: bytes) -> State:
    """Return the state in a checkpoint's bytes; raise `ProtocolError` if they are not one."""
    state: State = _decoded(_state, data, None)
    return state


def unpack_schema(data: bytes, rank: int) -> tuple[KeySpec, ...]:
    """Return the keys of a window that came from `rank`; raise `ProtocolError` if the bytes are not a schema."""
    schema: tuple[KeySpec, ...] = _decoded(_schema, data, rank) if data else ()
    taken = next((spec.name for spec in schema if spec.name in RESERVED), None)
    if taken is not None:
        msg = f"rank {rank} sent a metric {taken!r}, which the log's files use themselves"
        raise ProtocolError(msg, ranks=(rank,))
    return schema


def pack_values(values: list[float]) -> bytes:
    """Return the bytes of `values`, exactly."""
    return struct.pack(f"<{len(values)}d", *values)


def unpack_values(data: bytes, keys: int, rank: int) -> tuple[float, ...]:
    """Return the `2 * keys` floats of a window that came from `rank`; raise `ProtocolError` if they are not there."""
    if len(data) != 16 * keys:
        msg = f"the window of rank {rank} has {len(data)} bytes for {keys} keys; {16 * keys} were expected"
        raise ProtocolError(msg, ranks=(rank,))
    return struct.unpack(f"<{2 * keys}d", data)


def _decoded(decoder: Any, data: bytes | bytearray | memoryview, rank: int | None) -> Any:
    sender = "the coordinator" if rank is None else f"rank {rank}"
    ranks = () if rank is None else (rank,)
    if len(data) > MAX_FRAME:
        msg = f"what {sender} sent has {len(data)} bytes, {MAX_FRAME} are the most"
        raise ProtocolError(msg, ranks=ranks)
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        head = bytes(data[:1])
        detail = printable(str(error), 200)
        shown = head.hex() or "none"
        msg = f"what {sender} sent is not a message of protocol {PROTOCOL}: {detail} (first byte {shown})"
        raise ProtocolError(msg, ranks=ranks) from error


def failure_of(error: LogsyncError) -> Failure:
    """Return `error` as it travels to all ranks: its text fit for a log, its ranks at most 64."""
    return Failure(kind_of(error), printable(str(error), _MAX_TEXT - 64), error.ranks[:64], error.call, error.step)


def error_of(failure: Failure, round_number: int) -> LogsyncError:
    """Return the error that travelled as `failure`."""
    return agreed_error(failure.kind)(
        printable(failure.text, _MAX_TEXT),
        ranks=failure.ranks,
        call=failure.call,
        step=failure.step,
        round=round_number,
    )
