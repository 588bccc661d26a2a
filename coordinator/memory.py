"""What a coordinator must know to go on where another one was lost; ranks keep it, for the next one.

With the reply it is all there is: no file, no clock. A rank that came back is taken in here, too.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import AgreedError, ConfigMismatch, ProtocolError, printable
from logsync.coordinator.followers import MOST_WAITING
from logsync.coordinator.messages import (
    INT64_MAX,
    NewEpoch,
    Rhythm,
    Settings,
    State,
    decode_hello,
    encode,
    failure_of,
)
from logsync.coordinator.rounds import check_hello

__all__ = ["readmit", "recall", "remember"]

_MOST_RANKS = 256
"""In larger worlds ranks' steps and hosts are not remembered: the first round after a recovery compares no steps."""

_Count = Annotated[int, Meta(ge=0, le=2**62)]
_Step = Annotated[int, Meta(ge=0, le=INT64_MAX)]
_Word = Annotated[str, Meta(max_length=64)]


class _Memory(msgspec.Struct, frozen=True, array_like=True):
    """A coordinator between two rounds; the names are those of its attributes."""

    run: Annotated[str, Meta(max_length=32)]
    next_round: _Count
    state: State
    entries_made: _Count
    first_seq: _Count
    restores: _Count
    counting: _Count
    last_call: _Count
    entry_call: _Count
    missed: _Count
    unanswered: _Count
    rhythms: Annotated[tuple[Rhythm, ...], Meta(max_length=8)]
    first_of_epoch: Annotated[int, Meta(ge=-1, le=2**62)]
    steps: Annotated[dict[_Count, _Step], Meta(max_length=_MOST_RANKS)]
    hosts: Annotated[dict[_Count, _Word], Meta(max_length=_MOST_RANKS)]
    merged: Annotated[dict[_Word, _Count], Meta(max_length=MOST_WAITING)]


_Value = TypeVar("_Value")
_memory = msgspec.msgpack.Decoder(_Memory)


def remember(coordinator: Coordinator) -> bytes:
    """Return what `recall` needs."""
    c = coordinator
    return encode(
        _Memory(
            run=c._run,  # noqa: SLF001 - this file is a part of the class that is used on one transport only
            next_round=c.next_round,
            state=c._state(),  # noqa: SLF001
            entries_made=c.entries_made,
            first_seq=c.first_seq,
            restores=c.restores,
            counting=c._counting,  # noqa: SLF001
            last_call=c._last_call,  # noqa: SLF001
            entry_call=c._entry_call,  # noqa: SLF001
            missed=c._missed,  # noqa: SLF001
            unanswered=c._unanswered,  # noqa: SLF001
            rhythms=c._cadence.snapshot(),  # noqa: SLF001
            first_of_epoch=c._first_of_epoch,  # noqa: SLF001
            steps=_few(c._steps),  # noqa: SLF001
            hosts=_few(c._hosts),  # noqa: SLF001
            merged=c._merged,  # noqa: SLF001
        )
    )


def recall(data: bytes, settings: Settings, world_size: int, *, keep_run_dir: bool = False) -> Coordinator:
    """Return a coordinator that goes on where the one that `remember` was asked about was.

    Args:
        data: what `remember` returned, from a rank.
        settings, world_size, keep_run_dir: as they were given to that one.

    Raises:
        ProtocolError: `data` is none of it.
    """
    try:
        found = _memory.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        msg = f"a rank remembers what no coordinator was: {printable(str(error), 200)}"
        raise ProtocolError(msg) from error
    state = found.state
    c = Coordinator(
        settings,
        world_size,
        run=found.run,
        run_dir=state.run_dir,
        keep_run_dir=keep_run_dir,
        attempt=state.attempt,
    )
    c._take_over(state)  # noqa: SLF001
    c.run_id = state.run_id
    c.entries_made = found.entries_made
    c.first_seq = found.first_seq
    c.restores = found.restores
    c._round = found.next_round  # noqa: SLF001
    c._counting = found.counting  # noqa: SLF001
    c._last_call = found.last_call  # noqa: SLF001
    c._entry_call = found.entry_call  # noqa: SLF001
    c._missed = found.missed  # noqa: SLF001
    c._unanswered = found.unanswered  # noqa: SLF001
    c._cadence.restore(found.rhythms)  # noqa: SLF001
    c._first_of_epoch = found.first_of_epoch  # noqa: SLF001
    c._steps = dict(found.steps)  # noqa: SLF001
    c._hosts = dict(found.hosts)  # noqa: SLF001
    c._merged = dict(found.merged)  # noqa: SLF001
    return c


def readmit(coordinator: Coordinator, rank: int, hello: bytes) -> bytes:
    """Take in a process that takes the place of `rank` between two rounds; return the reply to its hello.

    The reply tells where the job stands, and from what number on the newcomer counts its calls. What its predecessor
    had recorded is gone: the next entry is partial. Its step is compared with the others' from the next round on.
    """
    c = coordinator
    decision = c._decision(max(0, c.next_round - 1))  # noqa: SLF001
    try:
        check_hello(decode_hello(hello, rank), rank, c._world_size, c._settings)  # noqa: SLF001
    except (AgreedError, ConfigMismatch) as error:
        return encode(msgspec.structs.replace(decision, failure=failure_of(error)))
    c._missed = max(1, c._missed)  # noqa: SLF001
    c._steps.pop(rank, None)  # noqa: SLF001
    if rank == c._counting:  # noqa: SLF001
        c._cadence.clear()  # noqa: SLF001
    call = c._last_call  # noqa: SLF001
    epoch = NewEpoch(call, max(0, call - c._entry_call) + c._missed)  # noqa: SLF001
    return encode(msgspec.structs.replace(decision, new_epoch=epoch))


def _few(by_rank: dict[int, _Value]) -> dict[int, _Value]:
    return by_rank if len(by_rank) <= _MOST_RANKS else {}
