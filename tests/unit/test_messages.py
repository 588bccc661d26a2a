"""What goes over the wire: exact both ways, and bounded; anything else is a ProtocolError and nothing worse."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from logsync.coordinator.errors import ProtocolError
from logsync.coordinator.messages import (
    HELLO_SIZE,
    INT64_MAX,
    MAX_CALL,
    MAX_FRAME,
    MAX_NAME,
    MAX_WAIT_S,
    PROTOCOL,
    Decision,
    Event,
    Failure,
    Hello,
    KeySpec,
    LogEntry,
    NewEpoch,
    Reduction,
    Report,
    Rhythm,
    Settings,
    State,
    Waits,
    Window,
    decode_decision,
    decode_hello,
    decode_report,
    decode_state,
    encode,
    encode_hello,
    pack_values,
    unpack_schema,
    unpack_values,
)

naturals = st.integers(0, 2**20) | st.integers(0, INT64_MAX) | st.sampled_from([2**53 + 1, INT64_MAX])
ranks = st.integers(0, 2**20 - 1)
worlds = st.integers(1, 2**20)
steps = st.none() | naturals | st.floats(0, allow_nan=False, allow_infinity=False)
names = st.text(min_size=1, max_size=MAX_NAME)
metrics = st.dictionaries(names, st.floats(), max_size=4)
reductions = st.sampled_from(get_args(Reduction))
types = st.sampled_from(["epoch", "step", "batch"])

keys = st.builds(KeySpec, names, reductions, reductions, st.booleans(), st.booleans())
windows = st.builds(Window, st.binary(max_size=50), st.binary(max_size=50))
falls = st.lists(st.tuples(naturals, steps.filter(lambda step: step is not None)), max_size=3).map(tuple)
rhythms = st.builds(Rhythm, steps, st.none() | naturals, naturals, steps, falls)
events = st.builds(Event, naturals, st.sampled_from(["update", "written", "frequency"]), steps)
few_ranks = st.lists(ranks, max_size=16).map(tuple)
failures = st.builds(Failure, st.text(max_size=32), st.text(max_size=99), few_ranks, st.none() | naturals, steps)
counts = st.integers(0, 2**62)
calls = st.integers(0, MAX_CALL)
seconds = st.floats(0, MAX_WAIT_S)
waits = st.builds(
    Waits, ranks, seconds, seconds, seconds, st.text(max_size=128), steps.filter(lambda step: step is not None), ranks
)
entries = st.builds(
    LogEntry,
    naturals,
    steps,
    st.floats(0, 1e11),
    naturals,
    naturals,
    worlds,
    metrics,
    st.dictionaries(names, naturals, max_size=3),
    st.dictionaries(names, few_ranks, max_size=3),
    st.booleans(),
    st.none() | waits,
)
states = st.builds(
    State,
    steps,
    steps,
    types,
    steps,
    steps,
    st.booleans(),
    counts,
    st.text(max_size=99),
    counts,
    counts,
    st.text(max_size=32),
    st.none() | entries,
)
reports = st.builds(
    Report,
    naturals,
    st.text(max_size=32),
    naturals,
    ranks,
    worlds,
    st.sampled_from(["decision", "write", "ended", "closed"]),
    calls,
    steps,
    st.booleans(),
    rhythms,
    st.lists(events, max_size=4).map(tuple),
    windows,
    st.none() | failures,
    st.binary(max_size=99),
    st.none() | seconds,
    st.text(max_size=64),
    calls,
)
decisions = st.builds(
    Decision,
    naturals,
    st.text(max_size=32),
    naturals,
    st.booleans(),
    naturals,
    states,
    st.none() | entries,
    st.none() | failures,
    st.booleans(),
    st.lists(st.text(max_size=99), max_size=3).map(tuple),
    st.none() | st.builds(NewEpoch, counts, counts),
    few_ranks,
)
settings = st.builds(
    Settings,
    st.text(min_size=1, max_size=128),
    steps,
    st.sampled_from(["exact", "on_change", "on_update"]),
    types,
    st.sampled_from(["auto", "explicit"]),
    st.floats(1e-9, 1e12),
    naturals,
)
hellos = st.builds(Hello, ranks, worlds, st.text(max_size=64), settings)

REPORT = Report(PROTOCOL, "run", 7, 1, 3, "decision", 12, 11, False, Rhythm(), (Event(3, "update", 1),))  # noqa: FBT003
STATE = State(10, 10, "step", 5, None, True, 3, "runs/x", 0)  # noqa: FBT003
ENTRY = LogEntry(3, 10, 1.5, 0, 10, 2, {"loss": 0.5}, {"loss": 1}, {"loss": (0, 1)})
DECISION = Decision(PROTOCOL, "run", 7, True, 9, STATE, ENTRY, None, False, ("careful",))  # noqa: FBT003
HELLO = Hello(1, 3, "0.1.0", Settings("train", 10, "exact", "step", "auto", 60.0, 1000))

DECODERS: dict[str, Callable[[bytes], object]] = {
    "report": lambda data: decode_report(data, 1),
    "decision": decode_decision,
    "state": decode_state,
    "hello": lambda data: decode_hello(data, 1),
    "schema": lambda data: unpack_schema(data, 1),
    "values": lambda data: unpack_values(data, 3, 1),
}
VALID = {
    "report": encode(REPORT),
    "decision": encode(DECISION),
    "state": encode(STATE),
    "hello": encode_hello(HELLO),
    "schema": encode([KeySpec("loss"), KeySpec("n", "sum", "sum")]),
    "values": pack_values([1.0] * 6),
}


# Both ways


@given(st.one_of(*(st.tuples(st.just(kind), of) for kind, of in
                   (("report", reports), ("decision", decisions), ("state", states)))))  # fmt: skip
def test_a_message_comes_back_as_it_was_sent(sent: tuple[str, msgspec.Struct]) -> None:
    kind, message = sent
    data = encode(message)

    for form in (data, bytearray(data), memoryview(data)):
        came = DECODERS[kind](form)  # type: ignore[arg-type]
        assert repr(came) == repr(message)  # types too: 5 is not 5.0
        assert encode(came) == data  # bits too: NaN is not equal to itself


@given(st.lists(keys, max_size=5))
def test_keys_come_back_as_they_were_sent(sent: list[KeySpec]) -> None:
    assert unpack_schema(encode(sent), 0) == tuple(sent)
    assert unpack_schema(b"", 0) == ()


@given(st.lists(st.floats(), max_size=20).map(lambda values: values[: len(values) // 2 * 2]))
def test_values_are_exact_to_the_bit(sent: list[float]) -> None:
    came = unpack_values(pack_values(sent), len(sent) // 2, 0)

    assert [struct.pack("<d", value) for value in came] == [struct.pack("<d", value) for value in sent]


@pytest.mark.parametrize("step", [0, 2**24 + 1, 2**53 + 1, INT64_MAX, 0.1, 5e-324, 1.7976931348623157e308, 5.0])
def test_steps_are_exact(step: float) -> None:
    came = decode_report(encode(msgspec.structs.replace(REPORT, step=step)), 1).step

    assert came == step
    assert type(came) is type(step)


# Bounds

BAD_STEPS = [math.nan, math.inf, -math.inf, -1, -0.5, 2**63, 2**64 - 1, True, "5", b"5", [5], {}]
TOO_MANY = tuple(Event(1, "update", 1) for _ in range(65_537))
WAITS = {"slowest": 1, "least_s": 0.1, "most_s": 0.5, "interval_s": 2.0, "host": "node-1", "lag": 0, "behind": 0}
BAD_WAITS: dict[str, list[Any]] = {
    "slowest": [-1, 2**20, None],
    "least_s": [-1.0, math.nan, None],
    "most_s": [-1.0, math.inf, "1"],
    "interval_s": [-1.0, math.nan, None],
    "host": [None, "x" * 129, b"x"],
    "lag": [-1, -0.5, math.inf, math.nan],
    "behind": [-1, 2**20, None],
}
BAD_ENTRY: dict[str, list[Any]] = {
    "seq": [-1, None],
    "step": BAD_STEPS,
    "time": [None, "now"],
    "world_size": [0, 2**20 + 1],
    "metrics": [None, {"": 1.0}, {"x" * (MAX_NAME + 33): 1.0}, {"x": "1"}, {"x": None}, {3: 1.0}],
    "ranks": [{"x": -1}, {"x": None}],
    "nan_ranks": [{"x": [0] * 17}, {"x": [-1]}, {"x": 3}],
    "partial": [None, 1],
    "waits": [3, [], {}, *({**WAITS, name: bad} for name in BAD_WAITS for bad in BAD_WAITS[name])],
}
BAD_FIELDS: list[tuple[Any, str, list[Any]]] = [
    (REPORT, "protocol", [-1, 2**63, "1", None, 1.0]),
    (REPORT, "run", ["x" * 33, b"run", None]),
    (REPORT, "round", [-1, 2**64 - 1, 0.5, None]),
    (REPORT, "rank", [-1, 2**20, "0", None]),
    (REPORT, "world_size", [0, -1, 2**20 + 1, None]),
    (REPORT, "kind", ["", "hello", 3, None]),
    (REPORT, "call", [-1, 2**61 + 1, 2**63, 1.5, None]),
    (REPORT, "step", BAD_STEPS),
    (REPORT, "check_model_update", [0, 1, None, "yes"]),
    (REPORT, "rhythm", [None, 3, [math.nan], [-1], [None, -1], [None, None, None], {"rise": 1},
                        [1, 1, 0, 1, [[1, None]]], [1, 1, 0, 1, [[-1, 1]]], [1, 1, 0, 1, [[1, 1]] * 65]]),
    (REPORT, "events", [None, 3, [[1, "update"]], [[1, "erase", 1]], [[-1, "update", 1]], TOO_MANY]
                       + [[[1, "update", bad]] for bad in BAD_STEPS]),
    (REPORT, "window", [None, [3], ["text"], [b"", "text"]]),
    (REPORT, "fault", [3, "no", ["x" * 33, "no"], ["bad_value", "x" * 4097], ["bad_value", "no", list(range(65))],
                       ["bad_value", "no", [-1]], ["bad_value", "no", [], -1], ["bad_value", "no", [], 1, math.nan]]),
    (REPORT, "restore", [None, "text", b"x" * 16_385]),
    (REPORT, "waited_s", [-1e-9, math.nan, math.inf, -math.inf, MAX_WAIT_S * 1.01, 2**63, "1", [1.0], b"1"]),
    (REPORT, "host", [None, "x" * 65, b"x", 3]),
    (REPORT, "restored_at", [-1, 2**61 + 1, 1.5, None]),
    (STATE, "log_frequency", BAD_STEPS),
    (STATE, "frequency_type", ["", "steps", None, 3]),
    (STATE, "last_log_step", BAD_STEPS),
    (STATE, "updated_since_log", [None, 1]),
    (STATE, "next_seq", [-1, 2**63, None, 0.5]),
    (STATE, "run_dir", [None, b"x", "x" * 4097]),
    (STATE, "attempt", [-1, None]),
    (STATE, "missed", [-1, None]),
    (DECISION, "log_ready", [None, 1, "yes"]),
    (DECISION, "lease", [-1, None, 2**63]),
    (DECISION, "state", [None, []]),
    (DECISION, "failure", [["x" * 33, "no"], 3]),
    (DECISION, "notices", [None, ["x" * 4097], [3], ["x"] * 65]),
    (DECISION, "entry", [{**msgspec.to_builtins(ENTRY), name: bad} for name in BAD_ENTRY for bad in BAD_ENTRY[name]]),
]  # fmt: skip


@pytest.mark.parametrize(("message", "field", "values"), BAD_FIELDS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_field_out_of_its_bounds_is_refused(message: msgspec.Struct, field: str, values: list[Any]) -> None:
    decode = DECODERS[type(message).__name__.lower()]
    index = message.__struct_fields__.index(field)
    for value in values:
        fields = [getattr(message, name) for name in message.__struct_fields__]
        fields[index] = value
        assert _refusal(decode, encode(fields)), f"{field} = {value!r:.80} was taken"


@pytest.mark.parametrize(
    "key",
    [
        ["", "sum"],
        ["x" * (MAX_NAME + 1)],
        ["x", "median"],
        ["x", "sum", "first"],
        ["x", "sum", "sum", 1],
        [3],
        "x",
        None,
    ],
)
def test_a_key_out_of_its_bounds_is_refused(key: object) -> None:
    with pytest.raises(ProtocolError, match="what rank 5 sent is not a message"):
        unpack_schema(encode([key]), 5)


def test_too_many_keys_are_refused() -> None:
    with pytest.raises(ProtocolError):
        unpack_schema(encode([KeySpec("x")] * 65_537), 5)


@pytest.mark.parametrize("size", [0, 1, 47, 49, 64])
def test_values_of_another_number_of_keys_are_refused(size: int) -> None:
    with pytest.raises(
        ProtocolError, match=f"window of rank 5 has {size} bytes for 3 keys; 48 were expected"
    ) as refused:
        unpack_values(bytes(size), 3, 5)
    assert refused.value.ranks == (5,)


@pytest.mark.parametrize("kind", ["report", "decision", "state", "schema"])
def test_a_message_over_the_maximum_is_refused_unread(kind: str) -> None:
    with pytest.raises(ProtocolError, match=f"has {MAX_FRAME + 1} bytes, {MAX_FRAME} are the most"):
        DECODERS[kind](b"\x90" * (MAX_FRAME + 1))


# Garbage


@pytest.mark.parametrize("kind", DECODERS)
@given(data=st.binary(max_size=200))
def test_garbage_is_a_protocol_error_and_nothing_worse(kind: str, data: bytes) -> None:
    _decoded_or_refused(kind, data)
    if kind == "hello":
        _decoded_or_refused(kind, VALID[kind][:16] + data)


@pytest.mark.parametrize("kind", DECODERS)
@given(st.lists(st.tuples(st.integers(0, 250), st.integers(0, 6), st.binary(max_size=6)), min_size=1, max_size=4))
@hypothesis_settings(max_examples=200)
def test_a_damaged_message_is_a_protocol_error_and_nothing_worse(
    kind: str, damages: list[tuple[int, int, bytes]]
) -> None:
    damaged = bytearray(VALID[kind])
    for where, length, replacement in damages:
        start = where % len(VALID[kind])
        damaged[start : start + length] = replacement

    _decoded_or_refused(kind, bytes(damaged))


@pytest.mark.parametrize("kind", DECODERS)
def test_a_message_cut_off_anywhere_is_a_protocol_error(kind: str) -> None:
    whole = VALID[kind].rstrip(b"\0") if kind == "hello" else VALID[kind]
    for length in range(1, len(whole)):
        with pytest.raises(ProtocolError):
            DECODERS[kind](whole[:length])


def _decoded_or_refused(kind: str, data: bytes) -> None:
    said = _refusal(DECODERS[kind], data)

    assert said.isprintable()
    assert len(said) < 1000


def _refusal(decode: Callable[[bytes], object], data: bytes) -> str:
    """What a ProtocolError says of `data`; "" if it was taken."""
    try:
        decode(data)
    except ProtocolError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["report", "decision", "state", "schema"])
def test_nesting_without_end_is_a_protocol_error(kind: str) -> None:
    for opener in (b"\x91", b"\x81\xa1x"):
        with pytest.raises(ProtocolError):
            DECODERS[kind](opener * 1_000_000)


@pytest.mark.parametrize("kind", ["report", "decision", "state", "schema"])
@pytest.mark.parametrize(
    "head", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]
)
def test_a_length_that_is_only_claimed_costs_no_memory(kind: str, head: bytes) -> None:
    tracemalloc.start()
    try:
        for data in (head, head + VALID[kind], VALID[kind][:3] + head):
            with pytest.raises(ProtocolError):
                DECODERS[kind](data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 2**20


def test_an_error_names_the_sender_and_the_first_byte() -> None:
    with pytest.raises(ProtocolError, match=r"what rank 5 sent .* \(first byte 80\)") as refused:
        decode_report(b"\x80", 5)  # pickle starts like this
    assert refused.value.ranks == (5,)
    with pytest.raises(ProtocolError, match=r"what the coordinator sent .* \(first byte none\)"):
        decode_decision(b"")


# Hellos


@given(hellos)
def test_a_hello_comes_back_as_it_was_sent_and_has_one_size(hello: Hello) -> None:
    data = encode_hello(hello)

    assert len(data) == HELLO_SIZE
    for form in (data, bytearray(data), memoryview(data)):
        assert repr(decode_hello(form, 1)) == repr(hello)


def test_the_longest_settings_fit_a_hello() -> None:
    longest = Settings("😀" * 128, INT64_MAX, "on_change", "epoch", "explicit", 1e300, INT64_MAX)

    assert len(encode_hello(Hello(2**20 - 1, 2**20, "😀" * 64, longest))) == HELLO_SIZE


def test_what_a_hello_starts_with_is_frozen_for_ever() -> None:
    head = struct.unpack("<8sII", encode_hello(HELLO)[:16])

    assert HELLO_SIZE == 1024 - 16
    assert head == (b"logsync\0", PROTOCOL, len(encode(HELLO)))


def test_another_version_is_told_by_its_number_whatever_follows() -> None:
    other = struct.pack("<8sII", b"logsync\0", PROTOCOL + 41, 10**9) + b"\xc1" * 100

    with pytest.raises(ProtocolError, match=f"rank 5 speaks protocol {PROTOCOL + 41} and rank 0 speaks {PROTOCOL};"):
        decode_hello(other, 5)


@pytest.mark.parametrize("data", [b"", b"logsync", b"GET / HTTP/1.1\r\n" * 9, b"\0" * HELLO_SIZE, b"logsync\0" + b"\1"])
def test_what_is_no_hello_is_refused_with_its_first_bytes(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="rank 5 did not introduce itself as logsync") as refused:
        decode_hello(data, 5)

    assert refused.value.ranks == (5,)
    assert repr(data[:4])[2:-1] in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("length", [0, 5, 10**9, 2**32 - 1])
def test_a_hello_that_lies_about_its_length_is_refused(length: int) -> None:
    data = encode_hello(HELLO)

    with pytest.raises(ProtocolError):
        decode_hello(data[:12] + struct.pack("<I", length) + data[16:], 1)
