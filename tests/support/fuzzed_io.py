"""What must hold for bytes from the wire, from the job's store, from the log's file, and in a log's replies."""

from __future__ import annotations

import contextlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from logsync.coordinator.errors import FrameTooLarge, LogsyncError
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.jsonl import JsonlSink
from logsync.workers.door import connect
from logsync.workers.transports import gloo
from logsync.workers.transports.local import LocalTransport
from logsync.workers.transports.nodes import flat, stages
from logsync.workers.transports.notes import Note, Notes, dead_neighbours
from logsync.workers.transports.postmortem import error_of_verdict, judge
from support.bounds import assert_within_bounds
from support.fuzzing import frugal, telling
from support.mutants import JSON, damaged, made, mutated

__all__ = ["check_file", "check_log", "check_notes", "check_reply_header", "check_slots"]

Dice = random.Random

# -- the group -------------------------------------------------------------------------------------------------------

LIMIT = 2**16  # what a root takes in these worlds; the real one takes minutes to fuzz
LARGEST_SLOT = 2**17
LENGTHS = [0, 1, 5, 1007, 1008, 1009, 4000, LIMIT, LIMIT + 1, 2**24 + 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**64 - 1]


class _Done:
    def wait(self) -> None:
        """Be done already."""


class _Group:
    """A gloo group of which this process is one rank and the test all others."""

    def __init__(self) -> None:
        self.slots: list[list[bytes]] = []
        self.gathered: list[bytes] = []
        self.replies: list[bytes] = []

    def gather(self, outputs: list[list[Any]], inputs: list[Any], _: object) -> _Done:
        if outputs:
            others = self.gathered = self.slots.pop(0)
            outputs[0][0].copy_(inputs[0])
            for tensor, data in zip(outputs[0][1:], others, strict=True):
                _fill(tensor, data)
        return _Done()

    def broadcast(self, tensors: list[Any], _: object) -> _Done:
        if self.replies:
            _fill(tensors[0], self.replies.pop(0))
        return _Done()


def _fill(tensor: Any, data: bytes) -> None:
    """Put `data` at the tensor's beginning, as a rank that sends less would."""
    piece = data[: len(tensor)]
    if piece:
        tensor[: len(piece)] = torch.frombuffer(bytearray(piece), dtype=torch.uint8)


def _wire_of(group: Any, rank: int, world_size: int, root: Any = None) -> Any:
    """Return one rank's end of a group that torch does not know."""
    nodes = flat(world_size)
    (stage,) = stages(nodes, rank)
    return gloo.Wire([gloo.Way(stage, rank, group, 1.0)], nodes, 1.0, root)


def _slot(length: int, word: bytes, body: bytes) -> bytes:
    return struct.pack("<Q8s", length, word) + body


def check_slots(dice: Dice) -> None:
    """Fill the root's inbox with hostile slots: it asks again, refuses or decides, and its next round is as ever."""
    heard: list[list[bytes]] = []

    def root(frames: list[memoryview]) -> bytes:
        heard.append([bytes(frame) for frame in frames])
        return b"decided"

    size = dice.choice((2, 3))
    group = _Group()
    wire = _wire_of(group, 0, size, root)
    wire._limit = LIMIT
    word = dice.choice((b"fits", b"outgrown", dice.randbytes(8)))
    hostile = [
        [_slot(dice.choice(LENGTHS), word, dice.randbytes(40)) for _ in range(size - 1)]
        for _ in range(dice.randrange(1, 4))
    ]
    honest = [_slot(5, b"fits", b"honest"[:5])] * (size - 1)
    # Slots grow with every request for more, so that no rank can have it repeated without end.
    group.slots = [*hostile, *[honest] * 9]
    with telling(*(slot for slots in hostile for slot in slots)), frugal(LARGEST_SLOT * (size + 2)):
        outcome = wire.exchange(b"mine", patient=True)
        if isinstance(outcome, FrameTooLarge):
            assert str(outcome).isprintable()
            assert not heard
        else:
            assert outcome == b"decided", outcome
            assert len(heard) == 1
            assert heard[0][0] == b"mine"
            claimed = [int.from_bytes(slot[:8], "little") for slot in group.gathered]
            assert [len(frame) for frame in heard[0][1:]] == claimed
        assert wire._slot <= LARGEST_SLOT
        heard.clear()
        group.slots = [honest] * 2
        assert wire.exchange(b"mine", patient=True) == b"decided"
        assert heard == [[b"mine", *[b"hones"] * (size - 1)]]


def check_reply_header(dice: Dice) -> None:
    """Give a rank a hostile reply: it takes what a root can have sent, and loses the group without allocating else."""
    group = _Group()
    wire = _wire_of(group, 1, 3)
    wire._limit = LIMIT
    status, slot, length = dice.choice((0, 1, 2)), 1024, 500
    for _ in range(dice.choice((1, 1, 2))):
        field = dice.randrange(3)
        status = dice.choice((3, 7, 2**31, 2**32 - 1)) if field == 0 else status
        slot = dice.choice((2048, LARGEST_SLOT, 0, 1, 512, 1500, 2**18, 2**31, 2**32 - 1)) if field == 1 else slot
        length = dice.choice(LENGTHS) if field == 2 else length
    head = struct.pack("<II8s", status, slot, length.to_bytes(8, "little"))
    text = dice.choice((b"\1\0\0\0too large\xff", dice.randbytes(30)))
    after = struct.pack("<II8s", 0, 1024, (4).to_bytes(8, "little")) + b"next"
    tail = [b"t" * 50] if length > 1008 else []
    group.replies = [head + text, *tail, after, after]
    sane = status <= 2 and slot in (1024, 2048, LARGEST_SLOT) and (4 if status == 2 else 0) <= length <= 2**24
    with telling(head + text), frugal(3 * LARGEST_SLOT if sane else 0):
        outcome = wire.exchange(b"mine", patient=True)
        if not sane:
            assert isinstance(outcome, gloo.Broken), outcome
            assert "header of the reply is corrupt" in outcome.detail
            wire.drop()
        elif status == 2:
            assert isinstance(outcome, FrameTooLarge)
            assert str(outcome).isprintable()
            assert len(str(outcome)) < 1000
        else:
            assert outcome == b"next" if status == 1 else len(outcome) == length


# -- the store -------------------------------------------------------------------------------------------------------


def check_notes(dice: Dice) -> None:
    """Put hostile notes and verdicts into the store: what is read is within its bounds, and honest notes are there."""
    store: Any = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it
    honest, hostile = made("note", dice), mutated(made("note", dice), dice, JSON)
    judged = mutated(made("verdict", dice), dice, JSON)
    for rank, data in ((0, honest), (1, hostile), (2, honest)):
        store.set(f"logsync/run/{rank}", data)
    store.set("logsync/run/verdict", judged)
    notes = Notes(store, "run", 0, 3)
    with telling(hostile, judged), frugal(len(hostile) + len(judged)):
        found = notes.read()
        assert {0, 2} <= set(found) <= {0, 1, 2}
        for note in found.values():
            assert_within_bounds(note)
        _assert_judged(found, dice)
        verdict = notes.verdict()
        if verdict is not None:
            assert_within_bounds(verdict)
            assert str(error_of_verdict(verdict)).isprintable()


def _assert_judged(found: dict[int, Note], dice: Dice) -> None:
    """Assert that a verdict which others can read follows from the notes, whatever they say."""
    dead_neighbours(found)
    verdict = judge(
        found,
        rank=dice.randrange(3),
        world_size=3,
        round_number=dice.choice((1, 7)),
        waited_s=dice.choice((0.1, 3.0)),
        timeout_s=3.0,
        detail="nothing",
    )
    assert_within_bounds(verdict)
    assert str(error_of_verdict(verdict)).isprintable()


# -- the file --------------------------------------------------------------------------------------------------------


def _lines(dice: Dice, folder: Path) -> list[bytes]:
    sink = JsonlSink(folder / "whole.jsonl")
    sink.open(RunInfo(folder, "train", 0, 2, 0, resumed=False))
    count = dice.randrange(1, 6)
    for seq in range(count):
        sink.write(LogEntry(seq, seq * 10, 1.5e9, 0, 10, 2, {"loss": 0.5, "é": float("nan")}, partial=seq == 2))
    sink.close()
    lines = (folder / "whole.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "whole.jsonl").unlink()
    return lines


def check_file(dice: Dice, folder: Path) -> None:
    """Resume over a hostile file: it is cut to a beginning of itself that can be continued, and loses nothing whole."""
    lines = _lines(dice, folder)
    whole = b"".join(lines)
    whim, at = dice.random(), dice.randrange(len(whole))
    if whim < 0.1:
        hostile = whole[: dice.choice((at, -1))]
    elif whim < 0.3:
        hostile = whole[:at] + b"\xff" + whole[at + 1 :]
    elif whim < 0.6:
        hostile = damaged(whole, dice, JSON)
    else:
        bent = [mutated(line[:-1], dice, JSON) + b"\n" if dice.random() < 0.4 else line for line in lines]
        hostile = b"".join(bent)
    path, next_seq = folder / "metrics.jsonl", dice.randrange(7)
    path.write_bytes(hostile)
    with telling(hostile), frugal(len(hostile)):
        sink = JsonlSink(path)
        sink.open(RunInfo(folder, "train", 1, 2, next_seq, resumed=True))
        kept = path.read_bytes()
        assert hostile.startswith(kept) or (kept.endswith(b"\n") and hostile == kept[:-1])
        assert kept == b"" or kept.endswith(b"\n")
        assert all(seq is None or seq < next_seq for seq in map(_seq_of, kept.split(b"\n")))
        if len(kept) >= len(hostile) > 0:
            assert _parsed(kept.split(b"\n")[-2]) is not _TORN, "a torn last line is kept"
        for number, line in enumerate(lines[:next_seq]):
            if not hostile.startswith(b"".join(lines[: number + 1])):
                break
            assert kept.startswith(b"".join(lines[: number + 1])), f"entry {number} is lost: {line!r}"
        sink.write(LogEntry(next_seq, 5, 1.0, 1, 1, 2, {"x": 1.0}))
        sink.close()
        assert json.loads(path.read_bytes().split(b"\n")[-2])["seq"] == next_seq
    path.unlink()


_TORN = object()


def _parsed(line: bytes) -> Any:
    """Return what a line says."""
    try:
        return msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _TORN


def _seq_of(line: bytes) -> int | None:
    """Return the `seq` of an entry, None of any other line."""
    found = _parsed(line)
    seq = found.get("seq") if isinstance(found, dict) else None
    return seq if type(seq) is int else None


# -- a log ----------------------------------------------------------------------------------------------------------


class _Liar(LocalTransport):
    """A transport that bends replies."""

    def __init__(self, dice: Dice) -> None:
        super().__init__()
        self._dice = dice
        self.sent: list[bytes] = []
        self.lies = False

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        reply = super().exchange(frame, patient=patient)
        if self.lies and self._dice.random() < 0.6:
            reply = mutated(reply, self._dice)
        self.sent.append(reply)
        return reply


def check_log(dice: Dice) -> None:
    """Give a whole log hostile replies: it raises errors of its own tree, and leaves when it is told to."""
    transport = _Liar(dice)
    with contextlib.suppress(ZeroDivisionError), connect(dice.choice((1, 3)), sinks=[], transport=transport) as log:
        transport.lies = True
        for step in range(dice.randrange(1, 6)):
            log.record(loss=step)
            try:
                log.write(step) if dice.random() < 0.2 else log.log_ready(step)
            except LogsyncError:
                continue
            except Exception as error:
                msg = f"{type(error).__name__}: {error}\nthe bytes: {transport.sent[-1].hex()}"
                raise AssertionError(msg) from error
        raise ZeroDivisionError
