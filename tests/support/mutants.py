"""Messages as no honest rank sends them: valid ones, bent and broken in every way that a decoder must withstand.

All dice are `random.Random`, or hypothesis's own, which shrinks what fails.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_args

import msgspec

from logsync.coordinator.messages import (
    PROTOCOL,
    Decision,
    Event,
    Failure,
    Hello,
    KeySpec,
    LogEntry,
    Reduction,
    Report,
    Rhythm,
    Settings,
    State,
    Window,
    encode,
    encode_hello,
)
from logsync.workers.transports.notes import Note, Verdict

__all__ = [
    "HUGE",
    "JSON",
    "MAKERS",
    "MSGPACK",
    "damaged",
    "made",
    "misplaced",
    "mutated",
    "odd_decision",
    "odd_report",
    "odd_window",
]

Dice = random.Random

_NUMBERS = [0, 1, -1, 2, 63, 2**20 - 1, 2**20, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)]
_FLOATS = [0.0, -0.0, 0.5, -0.5, 5e-324, 1e308, math.inf, -math.inf, math.nan]
_TEXTS = ["", "x", "update", "\0\x1b[2J\n\u2028\u202e", "é😀", *("x" * n for n in (33, 65, 129, 257, 289, 2001, 4097))]
_SHAPES: list[Any] = [[], {}, [[]], [0] * 17, [0] * 65, [[1, 1]] * 65, [""] * 65, {"": 0}, {"x": None}, {"x": [0] * 17}]

_NAMES = ("", "x" * 288, "x" * 289, "seq", "\0")

HUGE = (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff")
"""Arrays, maps, texts and bytes of msgpack that only claim their length."""

_MSGPACK_ODDITIES = (
    *HUGE,
    *(head + b"\x01\x00\x00\x00" for head in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")),
    b"\xdc\xff\xff",
    b"\xc1",  # no msgpack at all
    b"\xa2\xff\xfe",  # no UTF-8
    b"\xa3\xed\xa0\x80",  # half of a surrogate pair
    b"\x82\xa1x\x01\xa1x\x02",  # a key twice
    b"\x81\x90\x01",  # a key that cannot be one
    b"\xd4\x05\x00",
    b"\xd6\xff\x00\x00\x00\x00",  # a time
    b"\xc7\x0c\xff" + b"\xff" * 12,
    b"\xca\x7f\xc0\x00\x00",
    b"\x91" * 2000 + b"\xc0",
    b"\x81\xa1x" * 2000 + b"\xc0",
)
_JSON_ODDITIES = (  # deep nesting is among the findings
    b"9" * 5000,
    b"-" + b"9" * 30,
    b"1e999",
    b"1e-999",
    b"NaN",
    b'"\xff"',
    b'"\\ud800"',
    b'"\\u0000\\u001b"',
    b'{"x":1,"x":2}',
    b"[" * 3 + b"]" * 2,
    b'"',
    b"",
)


class Codec(NamedTuple):
    """How a kind of message is written, and pieces that have no place in one."""

    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    pieces: tuple[bytes, ...]


def _pieces(encoder: Callable[[Any], bytes], more: Sequence[Any], oddities: Sequence[bytes]) -> tuple[bytes, ...]:
    return (*map(encoder, [None, True, *_NUMBERS, *_FLOATS, *_TEXTS, *_SHAPES, *more]), *oddities)


MSGPACK = Codec(
    msgspec.msgpack.decode, encode, _pieces(encode, [b"", b"\0" * 17, b"x" * 16_385, {3: 1.0}], _MSGPACK_ODDITIES)
)
JSON = Codec(msgspec.json.decode, msgspec.json.encode, _pieces(msgspec.json.encode, [10**30], _JSON_ODDITIES))


# -- valid messages ------------------------------------------------------------------------------------------------


def _natural(dice: Dice) -> int:
    return dice.choice((0, 1, 3, 2**20, 2**53 + 1, 2**63 - 1, dice.randrange(1000)))


def _step(dice: Dice, *, whole: bool = False) -> Any:
    return dice.choice((None, _natural(dice), _natural(dice), 7 if whole else dice.random() * 1e3))


def _some(dice: Dice, make: Callable[[Dice], Any], most: int = 3) -> tuple[Any, ...]:
    return tuple(make(dice) for _ in range(dice.randrange(most + 1)))


def _name(dice: Dice) -> str:
    return dice.choice(("loss", "train/loss", "é😀", "x" * 256, f"m{dice.randrange(9)}"))


def _key(dice: Dice) -> KeySpec:
    fold, across = dice.choice(get_args(Reduction)), dice.choice(get_args(Reduction))
    return KeySpec(_name(dice), fold, across, dice.random() < 0.3, dice.random() < 0.3)


def schema(dice: Dice) -> list[KeySpec]:
    """Return the keys of a window, none twice."""
    return list({spec.name: spec for spec in _some(dice, _key, 4)}.values())


def window(dice: Dice) -> Window:
    """Return a window that a root can merge."""
    specs = schema(dice)
    values = [dice.choice((1.0, -2.5, 1e300, math.inf, math.nan, dice.random())) for _ in range(2 * len(specs))]
    return Window(encode(specs), struct.pack(f"<{len(values)}d", *values))


def _event(dice: Dice) -> Event:
    return Event(_natural(dice), dice.choice(("update", "written", "frequency")), _step(dice))


def failure(dice: Dice) -> Failure:
    """Return an agreed error, fit for no log."""
    kind = dice.choice(("bad_value", "protocol", "config_mismatch", "never heard of"))
    return Failure(kind, "what\x1b went wrong", (0, 2**20 - 1)[: dice.randrange(3)], _natural(dice), _step(dice))


def _rhythm(dice: Dice) -> Rhythm:
    falls = _some(dice, lambda d: (_natural(d), _natural(d)))
    return Rhythm(_step(dice), dice.choice((None, _natural(dice))), _natural(dice), _step(dice), falls)


def state(dice: Dice) -> State:
    """Return where a job's logging may stand."""
    kind: Any = dice.choice(("epoch", "step", "batch"))
    logged, updated = (_step(dice, whole=kind != "epoch") for _ in range(2))
    return State(10, 10, kind, logged, updated, dice.random() < 0.5, dice.randrange(99), "runs/é", 2, dice.randrange(9))


def _report(dice: Dice) -> Report:
    return Report(
        PROTOCOL,
        "run",
        _natural(dice),
        dice.randrange(3),
        3,
        dice.choice(("decision", "write", "closed")),
        _natural(dice),
        _step(dice),
        dice.random() < 0.5,
        _rhythm(dice),
        _some(dice, _event),
        window(dice),
        dice.choice((None, failure(dice))),
        dice.choice((b"", encode(state(dice)))),
    )


def _entry(dice: Dice) -> LogEntry:
    metrics = {spec.name: dice.choice((0.5, math.nan, -math.inf)) for spec in schema(dice)}
    return LogEntry(
        _natural(dice),
        _step(dice),
        1.5e9,
        2,
        _natural(dice),
        3,
        metrics,
        dict.fromkeys(metrics, 2),
        dict.fromkeys(metrics, (0, 2)),
        dice.random() < 0.5,
    )


def _decision(dice: Dice) -> Decision:
    entry, refusal = dice.choice((None, _entry(dice))), dice.choice((None, None, failure(dice)))
    ready, ended = dice.random() < 0.5, dice.random() < 0.5
    return Decision(
        PROTOCOL, "run", _natural(dice), ready, _natural(dice), state(dice), entry, refusal, ended, ("a\tnotice",)
    )


def _hello(dice: Dice) -> Hello:
    mode: Any = dice.choice(("exact", "on_change", "on_update"))
    write: Any = dice.choice(("auto", "explicit"))
    return Hello(1, 3, "0.1.0", Settings("train", _step(dice), mode, "epoch", write, 60.0, _natural(dice)))


def _note(dice: Dice) -> Note:
    doing: Any = dice.choice(("idle", "waiting", "failed", "left"))
    return Note(doing, _natural(dice), 5, _natural(dice), _step(dice), "node-3", 99, "pid:[1]", (2, 7), "why\x1b")


def _verdict(dice: Dice) -> Verdict:
    return Verdict(_natural(dice), dice.choice(("timeout", "lost", "failed")), (0, 7), "round 3 failed")


MAKERS: dict[str, tuple[Callable[[Dice], Any], Codec]] = {
    "hello": (_hello, MSGPACK),
    "report": (_report, MSGPACK),
    "decision": (_decision, MSGPACK),
    "state": (state, MSGPACK),
    "schema": (schema, MSGPACK),
    "note": (_note, JSON),
    "verdict": (_verdict, JSON),
}
"""For each kind of message a maker of valid ones, and how it is written."""


def made(kind: str, dice: Dice) -> bytes:
    """Return the bytes of a valid message."""
    make, codec = MAKERS[kind]
    return encode_hello(make(dice)) if kind == "hello" else codec.encode(make(dice))


# -- mutations -----------------------------------------------------------------------------------------------------


def mutated(data: bytes, dice: Dice, codec: Codec = MSGPACK) -> bytes:
    """Return `data` with some fields, and then perhaps some bytes, that its sender never wrote."""
    if dice.random() < 0.05:
        return dice.randbytes(dice.randrange(64))
    hello = data.startswith(b"logsync\0")
    body = data[16:].rstrip(b"\0") if hello else data
    tree = _parsed(body, codec) if dice.random() < 0.8 else None
    if isinstance(tree, (list, dict)):
        for _ in range(dice.choice((1, 1, 2, 4))):
            _bend(tree, dice, codec)
        body = codec.encode(tree)
        if dice.random() < 0.8:
            return _as_hello(data, body) if hello else body
    return _as_hello(data, damaged(body, dice, codec)) if hello and dice.random() < 0.5 else damaged(data, dice, codec)


def damaged(data: bytes, dice: Dice, codec: Codec = MSGPACK) -> bytes:
    """Return `data` with bits turned, bytes lost, doubled or added, or pieces of other messages in it."""
    broken = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 5))):
        at, length = dice.randrange(len(broken) + 1), dice.choice((1, 2, 8, 40))
        deed = dice.randrange(7)
        if deed == 0 and at < len(broken):
            broken[at] ^= 1 << dice.randrange(8)
        elif deed == 1:
            del broken[at:]
        elif deed == 2:
            del broken[at : at + length]
        elif deed == 3:
            broken += dice.randbytes(length)
        elif deed == 4:
            broken[at:at] = broken[at : at + length]
        elif deed == 5:
            piece = dice.choice(codec.pieces)
            broken[at : at + dice.choice((0, len(piece)))] = piece
        else:
            broken[at : at + length] = dice.randbytes(length)
    return bytes(broken)


def misplaced(data: bytes, codec: Codec, pieces: Sequence[bytes] | None = None) -> Iterator[bytes]:
    """Yield `data` with every piece in every place in turn: instead of what is there, and after the last element.

    Where all pieces are tried, lists are also grown, and what has a name gets others.
    """
    hello = data.startswith(b"logsync\0")
    tree = [codec.decode(data[16:].rstrip(b"\0") if hello else data)]
    for holder, key in list(_places(tree)):
        kept = holder[key]
        bent: list[Any] = [msgspec.Raw(piece) for piece in (codec.pieces if pieces is None else pieces)]
        if isinstance(kept, list):
            bent += [[*kept, piece] for piece in bent]
        if isinstance(kept, list) and pieces is None:
            bent += [kept * (most // len(kept) + 1) for most in (16, 64, 4096, 65_536) if kept]
        if isinstance(kept, dict) and pieces is None:
            bent += [{name: value} for name in _NAMES for value in list(kept.values())[:1]]
        for instead in bent:
            holder[key] = instead
            body = codec.encode(tree[0])
            yield _as_hello(data, body) if hello else body
        holder[key] = kept


def odd_window(dice: Dice, like: Window) -> Window:
    """Return `like` with keys or values that no rank records."""
    whim = dice.random()
    if whim < 0.1:
        specs = MSGPACK.decode(like.schema)
        return Window(encode(specs + specs[:1]), like.values + like.values[:16])
    if whim < 0.2:
        return Window(mutated(like.schema, dice), like.values)
    return Window(like.schema, _odd_floats(like.values, dice))


def odd_report(dice: Dice, like: Report) -> Report:
    """Return `like` with one field that is in its bounds and not true."""
    other = _report(dice)
    fields = ("rank", "kind", "call", "step", "rhythm", "events", "fault", "window", "window", "check_model_update")
    field = dice.choice(fields)
    value = odd_window(dice, like.window) if field == "window" else getattr(other, field)
    return msgspec.structs.replace(like, **{field: value})


def odd_decision(dice: Dice, like: Decision) -> Decision:
    """Return `like` with one field that is in its bounds and not true."""
    odd = {"failure": failure(dice), "lease": dice.choice((1000, 1001, 2**40)), "round": 9, "run": "x", "protocol": 2}
    field = dice.choice(("failure", "lease", *odd))
    return msgspec.structs.replace(like, **{field: odd[field]})


def _as_hello(data: bytes, body: bytes) -> bytes:
    return (data[:12] + struct.pack("<I", len(body)) + body).ljust(len(data), b"\0")


def _parsed(data: bytes, codec: Codec) -> Any:
    try:
        return codec.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError, TypeError):
        return None


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container of the tree with each of its keys."""
    for key in range(len(tree)) if isinstance(tree, list) else list(tree):
        yield tree, key
        if isinstance(tree[key], (list, dict)):
            yield from _places(tree[key])


def _bend(tree: Any, dice: Dice, codec: Codec) -> None:
    """Change one thing in the tree."""
    places = list(_places(tree))
    if not places:
        return
    holder, key = dice.choice(places)
    value = holder[key]
    deed = dice.randrange(10)
    if isinstance(value, bytes) and deed < 7:
        holder[key] = mutated(value, dice, codec) if len(value) % 16 or deed < 2 else _odd_floats(value, dice)
    elif deed == 0:
        del holder[key]
    elif deed == 1 and isinstance(value, list) and value:
        # Not more often: 65,537 elements take a while.
        value += value[-1:] * (dice.choice((17, 65, 4097, 65_537)) if dice.random() < 0.02 else 17)
    elif deed == 2 and isinstance(value, dict) and value and codec is MSGPACK:
        holder[key] = msgspec.Raw(_with_a_key_twice(value))
    elif deed == 3:
        other, place = dice.choice(places)
        if not isinstance(other[place], (list, dict)) and not isinstance(value, (list, dict)):
            holder[key], other[place] = other[place], value
    elif deed == 4 and isinstance(holder, list):
        holder.insert(key, msgspec.Raw(dice.choice(codec.pieces)))
    elif deed == 5 and isinstance(holder, dict):
        holder[dice.choice(_NAMES)] = holder.pop(key)
    else:
        holder[key] = msgspec.Raw(dice.choice(codec.pieces))


def _with_a_key_twice(value: dict[Any, Any]) -> bytes:
    pairs = [*value.items(), *list(value.items())[:1]]
    head = b"\xdf" + struct.pack(">I", len(pairs))
    return head + b"".join(encode(name) + encode(of) for name, of in pairs)


def _odd_floats(values: bytes, dice: Dice) -> bytes:
    """Return the values of a window with some that no training gives, or one more or less."""
    if dice.random() < 0.1:
        return dice.choice((values[:-8], values[:-16], values + bytes(8), values + bytes(16)))
    floats = list(struct.unpack(f"<{len(values) // 8}d", values))
    for index in range(len(floats)):
        if dice.random() < 0.5:
            floats[index] = dice.choice((*_FLOATS, *_FLOATS[:2] * 2, -1.7e308, 1.7e308))
    return struct.pack(f"<{len(floats)}d", *floats)
