"""What a rank and the coordinator's actor say to each other, and the bytes of it: msgpack, typed, bounded."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from logsync.coordinator.errors import (
    ConfigMismatch,
    CoordinatorLost,
    FrameTooLarge,
    LaunchError,
    LogsyncError,
    PeerFailed,
    PeerLost,
    ProtocolError,
    RoundTimeout,
    printable,
)
from logsync.coordinator.messages import INT64_MAX, MAX_FRAME, MAX_NAME, LogEntry, State, Window, encode

__all__ = [
    "KEPT",
    "WIRE",
    "Answer",
    "Ask",
    "Exchange",
    "Follow",
    "Held",
    "Hyperparams",
    "Join",
    "Leave",
    "Loaded",
    "Poll",
    "Quit",
    "Release",
    "decode_answer",
    "decode_ask",
    "encode",
    "error_of",
    "failed",
]

WIRE = 1
"""The version of everything in this file."""

EARLIER = 4
"""Windows that a follower keeps until they are in an entry."""

KEPT = 64
"""Replies with entries that a rank keeps, until the coordinator says that they are written."""

_Natural = Annotated[int, Meta(ge=0, le=INT64_MAX)]
_Seq = Annotated[int, Meta(ge=-1, le=INT64_MAX)]
_Rank = Annotated[int, Meta(ge=0, lt=2**20)]
_Id = Annotated[str, Meta(max_length=64)]
_Text = Annotated[str, Meta(max_length=4096)]
_Short = Annotated[str, Meta(max_length=300)]
_Step = Annotated[int, Meta(ge=-INT64_MAX, le=INT64_MAX)] | Annotated[float, Meta(ge=-1.7976931348623157e308)] | None
_Seconds = Annotated[float, Meta(ge=0, le=1e9)]
_Frame = Annotated[bytes, Meta(max_length=MAX_FRAME)]
_Notes = dict[Annotated[str, Meta(max_length=MAX_NAME)], float]


class Loaded(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 has loaded after `call` calls: the checkpoint's state, and its last entry."""

    state: State
    last_entry: LogEntry | None
    call: _Natural


class Held(msgspec.Struct, frozen=True, array_like=True):
    """What a rank knows of a run that has begun: all that the next actor needs.

    Attributes:
        run: the run's key.
        turn: how many exchanges are complete on this rank.
        reply: of the last one.
        memory: what the coordinator must know after it.
        entries: replies with entries that were not known to be written, oldest first.
        durable_seq, next_seq, entries_made: as the last answer said.
        notes: rank 0's annotations of those entries, by `seq`.
        released: the last `seq` that rank 0 has handed over.
        refused, culprits: why the last exchange was refused for all, and of which ranks; then `reply` is older.
    """

    run: _Id
    turn: _Natural
    reply: _Frame
    memory: _Frame
    entries: Annotated[tuple[_Frame, ...], Meta(max_length=KEPT)] = ()
    durable_seq: _Seq = -1
    next_seq: _Natural = 0
    entries_made: _Natural = 0
    notes: Annotated[dict[_Natural, _Notes], Meta(max_length=KEPT)] = {}
    released: _Seq = -1
    refused: _Text = ""
    culprits: Annotated[tuple[_Rank, ...], Meta(max_length=64)] = ()


class Join(msgspec.Struct, frozen=True, tag="join"):
    """A process takes a rank: before its first exchange, and again at every actor that does not know it yet.

    Attributes:
        session: names this log of this process.
        process: names the process, over all its logs.
        job: the Ray job that it belongs to.
        held: what it knows, if the run has begun for it.
    """

    wire: _Natural
    session: _Id
    process: _Id
    job: _Id
    rank: _Rank
    world_size: Annotated[int, Meta(ge=1, le=2**20)]
    host: _Short
    pid: _Natural
    node: _Short
    timeout_s: _Seconds
    warn_after_s: _Seconds
    held: Held | None = None


class Poll(msgspec.Struct, frozen=True, tag="poll"):
    """A sign of life, answered when there is news, or after a while."""

    session: _Id
    call: _Natural = 0
    step: _Step = None


class Follow(msgspec.Struct, frozen=True, tag="follow"):
    """A follower's window, if it has one, and the wait for the next entry: it is answered when there is one.

    Attributes:
        session: names this log of this process.
        who: the follower in words.
        run: the run that the follower has heard of; empty if of none.
        made: how many entries that run had made by then.
        number: of this window.
        closing: the follower goes, and waits for no entry.
        job: the Ray job that it belongs to.
        earlier: windows that arrived, and may have gone with an actor before they were in an entry; by number.
    """

    wire: _Natural
    session: _Id
    who: _Short
    run: _Id
    made: _Natural
    number: _Natural
    window: Window = Window()
    closing: bool = False
    job: _Id = ""
    earlier: Annotated[dict[_Natural, Window], Meta(max_length=EARLIER)] = {}


class Release(msgspec.Struct, frozen=True, tag="release"):
    """Rank 0 adds no more to entry `seq`."""

    session: _Id
    seq: _Seq
    notes: _Notes = {}


class Hyperparams(msgspec.Struct, frozen=True, tag="hyperparams"):
    """Rank 0's settings of the run, a JSON object."""

    session: _Id
    values: _Frame


class Exchange(msgspec.Struct, frozen=True, tag="exchange"):
    """A rank's frame of a turn.

    Attributes:
        patient: the rank waits for as long as the others take.
        waited_s: how long it has waited for this turn already, at actors before this one.
        too_large: the frame's bytes, if they are more than can be sent.
        call, step: of the rank's last call.
        release: what rank 0 has not said to this actor yet.
        loaded: the state that rank 0 has loaded since the last turn.
    """

    session: _Id
    turn: _Natural
    frame: _Frame
    patient: bool
    waited_s: _Seconds
    too_large: _Natural = 0
    call: _Natural = 0
    step: _Step = None
    release: Release | None = None
    loaded: Loaded | None = None


class Quit(msgspec.Struct, frozen=True, tag="quit"):
    """A rank makes no more exchanges; its reason, if its code raised."""

    session: _Id
    reason: _Text | None = None
    call: _Natural = 0
    step: _Step = None


class Leave(msgspec.Struct, frozen=True, tag="leave"):
    """After `Quit`: rank 0's last window, if the run was not finished; answered when the sinks are flushed."""

    session: _Id
    window: Window | None = None
    call: _Natural = 0
    step: _Step = None


Ask = Join | Exchange | Poll | Release | Hyperparams | Quit | Leave | Follow


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What the actor says.

    Attributes:
        incarnation: names the actor's process.
        kind: "reply": `body` is the root's reply to `turn`, which is complete for the rank, or for a follower the
            last reply that has an entry; "again": all is well;
            "stranger": this actor does not know the session, so join first; "stale": it is an earlier job's, to be
            replaced; "error": `error` of class `name`, about `ranks`. It ends the session unless it is FrameTooLarge,
            on which all agree.
        entry_seq: of the entry in the reply, -1 if it has none.
        durable_seq, next_seq, entries_made: where the entries stand.
        merged: the number of the follower's last window that is in an entry, -1 if that is not known.
        notices: warnings for this rank to print.
    """

    incarnation: _Id
    kind: Literal["reply", "again", "stranger", "stale", "error"]
    turn: _Natural = 0
    body: _Frame = b""
    memory: _Frame = b""
    run: _Id = ""
    entry_seq: _Seq = -1
    durable_seq: _Seq = -1
    next_seq: _Natural = 0
    entries_made: _Natural = 0
    merged: _Seq = -1
    notices: Annotated[tuple[_Text, ...], Meta(max_length=64)] = ()
    name: _Short = ""
    error: _Text = ""
    ranks: Annotated[tuple[_Rank, ...], Meta(max_length=64)] = ()


_ask = msgspec.msgpack.Decoder(Ask)
_answer = msgspec.msgpack.Decoder(Answer)
T = TypeVar("T")

_ERRORS: dict[str, type[LogsyncError]] = {
    error.__name__: error
    for error in (
        ConfigMismatch,
        CoordinatorLost,
        FrameTooLarge,
        LaunchError,
        PeerFailed,
        PeerLost,
        ProtocolError,
        RoundTimeout,
    )
}


def decode_ask(data: bytes) -> Ask:
    """Return what a rank asks; raise `ProtocolError` if these bytes are no question."""
    ask: Ask = _decoded(_ask, data, "a rank")
    return ask


def decode_answer(data: bytes) -> Answer:
    """Return what the actor answers; raise `ProtocolError` if these bytes are no answer."""
    answer: Answer = _decoded(_answer, data, "the coordinator's actor")
    return answer


def _decoded(decoder: Any, data: bytes, sender: str) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        msg = f"what {sender} sent is no message of version {WIRE}: {printable(str(error), 200)}"
        raise ProtocolError(msg) from error


def failed(incarnation: str, error: LogsyncError, turn: int = 0) -> Answer:
    """Return `error` as an answer."""
    name = type(error).__name__ if type(error).__name__ in _ERRORS else CoordinatorLost.__name__
    text = printable(str(error), 3900)
    return Answer(incarnation, "error", turn=turn, name=name, error=text, ranks=error.ranks[:64])


def error_of(answer: Answer) -> LogsyncError:
    """Return the error that travelled as an answer."""
    kind = _ERRORS.get(answer.name, CoordinatorLost)
    return kind(printable(answer.error, 4000), ranks=answer.ranks, round=answer.turn)
