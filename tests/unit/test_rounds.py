"""Exactly one frame per rank per round; everything else is named."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from logsync.coordinator.errors import ConfigMismatch, ProtocolError, RoundMismatch
from logsync.coordinator.messages import PROTOCOL, Hello, Report, Rhythm, Settings, encode, encode_hello
from logsync.coordinator.rounds import Round, check_hellos, read_hellos, read_reports
from support.lockstep import settings

# Frames as they come in


def test_a_round_is_complete_when_every_rank_is_in_whatever_their_order() -> None:
    this = Round(7, 3)
    missing = []
    for rank in (2, 0, 1):
        missing.append((this.missing, this.complete))
        this.add(rank, b"%d" % rank)

    assert missing == [((0, 1, 2), False), ((0, 1), False), ((1,), False)]
    assert (this.missing, this.complete) == ((), True)
    assert this.frames() == [b"0", b"1", b"2"]


def test_an_empty_frame_is_a_frame() -> None:
    this = Round(7, 1)
    this.add(0, b"")

    assert this.complete


def test_a_second_frame_of_a_rank_is_refused_and_the_first_kept() -> None:
    this = Round(7, 2)
    this.add(1, b"first")

    with pytest.raises(ProtocolError, match="rank 1 sent two frames for round 7") as refused:
        this.add(1, b"second")
    this.add(0, b"")

    assert (refused.value.ranks, refused.value.round) == ((1,), 7)
    assert this.frames() == [b"", b"first"]


@pytest.mark.parametrize("rank", [-1, 2, 10**9])
def test_a_rank_from_outside_is_refused(rank: int) -> None:
    this = Round(7, 2)

    with pytest.raises(ProtocolError, match=f"from rank {rank}, but the world has 2 ranks"):
        this.add(rank, b"")
    assert this.missing == (0, 1)


def test_an_incomplete_round_gives_no_frames() -> None:
    this = Round(7, 3)
    this.add(1, b"")

    with pytest.raises(RuntimeError, match=r"round 7 lacks ranks \[0, 2\]"):
        this.frames()


# Hellos


def hellos(world_size: int, config: Settings | None = None) -> list[Hello]:
    return [Hello(rank, world_size, "0.1.0", config or settings(50)) for rank in range(world_size)]


def test_equal_hellos_pass() -> None:
    check_hellos(read_hellos([encode_hello(hello) for hello in hellos(3)], 3), 3)


def test_a_rank_that_introduces_itself_as_another_is_named() -> None:
    swapped = [encode_hello(hello) for hello in reversed(hellos(2))]

    with pytest.raises(ProtocolError, match="rank 0 introduced itself as rank 1") as refused:
        read_hellos(swapped, 2)
    assert refused.value.ranks == (0,)


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("name", "val", "'train' on rank 0, but rank 1: 'val'"),
        ("log_frequency", 51, "50 on rank 0, but rank 1: 51"),
        ("log_frequency", None, "50 on rank 0, but rank 1: None"),
        ("log_frequency", 50.0, "50 on rank 0, but rank 1: 50.0"),
        ("mode", "on_update", "'exact' on rank 0, but rank 1: 'on_update'"),
        ("frequency_type", "batch", "'step' on rank 0, but rank 1: 'batch'"),
        ("write", "explicit", "'auto' on rank 0, but rank 1: 'explicit'"),
        ("timeout", 61.0, "60.0 on rank 0, but rank 1: 61.0"),
        ("max_lease", 3, "1000 on rank 0, but rank 1: 3"),
        ("on_failure", "detach", "'raise' on rank 0, but rank 1: 'detach'"),
    ],
)
def test_a_setting_that_differs_is_named_with_ranks_and_values(field: str, value: Any, shown: str) -> None:
    ours = hellos(3)
    ours[1] = msgspec.structs.replace(ours[1], settings=msgspec.structs.replace(ours[1].settings, **{field: value}))

    with pytest.raises(ConfigMismatch, match=f"^{field} is {shown}; every rank must call connect") as refused:
        check_hellos(ours, 3)
    assert refused.value.ranks == (1,)


def test_every_setting_is_compared() -> None:
    compared = {"name", "log_frequency", "mode", "frequency_type", "write", "timeout", "max_lease", "on_failure"}

    assert set(Settings.__struct_fields__) == compared  # a new one needs a row above


@pytest.mark.parametrize(("field", "value"), [("version", "0.2.0"), ("world_size", 4)])
def test_another_version_or_world_is_named(field: str, value: Any) -> None:
    ours = hellos(3)
    ours[2] = msgspec.structs.replace(ours[2], **{field: value})

    with pytest.raises(ConfigMismatch, match=f"^{field} is .* on rank 0, but rank 2: {value!r}") as refused:
        check_hellos(ours, 3)
    assert refused.value.ranks == (2,)


def test_a_world_that_is_not_the_transports_is_refused_even_if_ranks_agree_on_it() -> None:
    with pytest.raises(ConfigMismatch, match="world_size"):
        check_hellos(hellos(3), 2)


def test_of_many_ranks_that_differ_eight_are_shown_and_all_are_named() -> None:
    ours = hellos(1000)
    for rank in range(1, 1000):
        ours[rank] = msgspec.structs.replace(ours[rank], version="9")

    with pytest.raises(ConfigMismatch, match="rank 8: '9' and 991 more") as refused:
        check_hellos(ours, 1000)
    assert refused.value.ranks == tuple(range(1, 1000))


# Reports


def reports(world_size: int, **changes: Any) -> list[Report]:
    return [
        Report(
            **{
                "protocol": PROTOCOL,
                "run": "run",
                "round": 7,
                "rank": rank,
                "world_size": world_size,
                "kind": "decision",
                "call": 12,
                "step": 11,
                "check_model_update": False,
                "rhythm": Rhythm(),
                **changes,
            }
        )
        for rank in range(world_size)
    ]


def read(sent: list[Report]) -> list[Report]:
    return read_reports([encode(report) for report in sent], "run", 7, len(sent))


def test_reports_in_place_come_back_as_they_were_sent() -> None:
    assert read(reports(3)) == reports(3)
    assert read(reports(3, kind="write")) == reports(3, kind="write")


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("protocol", PROTOCOL + 1, f"protocol {PROTOCOL + 1} instead of {PROTOCOL}"),
        ("run", "other", "run 'other' instead of 'run'"),
        ("round", 6, "round 6 instead of 7"),
        ("rank", 0, "rank 0 instead of 1"),
        ("world_size", 4, "world size 4 instead of 3"),
    ],
)
def test_a_frame_from_elsewhere_is_refused_with_what_is_wrong(field: str, value: Any, said: str) -> None:
    sent = reports(3)
    sent[1] = msgspec.structs.replace(sent[1], **{field: value})

    with pytest.raises(ProtocolError, match=f"the frame of rank 1 in round 7 is out of place: {said}$") as refused:
        read(sent)
    assert (refused.value.ranks, refused.value.round) == ((1,), 7)


def test_everything_that_is_out_of_place_is_named_and_fit_for_a_log_line() -> None:
    sent = reports(2)
    sent[1] = msgspec.structs.replace(sent[1], run="\x1b[2J\n", round=0)

    with pytest.raises(ProtocolError, match=r"run .* instead of 'run', round 0 instead of 7$") as refused:
        read(sent)
    assert str(refused.value).isprintable()


def test_a_frame_that_cannot_be_read_names_its_rank() -> None:
    frames = [encode(report) for report in reports(3)]
    frames[2] = b"\xc1"

    with pytest.raises(ProtocolError, match="rank 2") as refused:
        read_reports(frames, "run", 7, 3)
    assert refused.value.ranks == (2,)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_too_few_or_too_many_frames_are_refused(count: int) -> None:
    with pytest.raises(ProtocolError, match=f"round 7 has {count} frames for 3 ranks"):
        read_reports([encode(report) for report in reports(count)], "run", 7, 3)


@pytest.mark.parametrize(
    ("kinds", "named", "text"),
    [
        ("dwd", (1,), r"rank 1 called write\(\).* where rank 0 called log_ready\(\)"),
        ("dww", (0,), r"rank 0 called log_ready\(\).* where rank 1 called write\(\)"),
        ("cdwww", (1,), r"rank 1 called log_ready\(\).* where rank 2 called write\(\)"),
        ("ddwwd", (2, 3), r"rank 2 called write\(\)"),
    ],
)
def test_two_kinds_of_call_in_one_round_are_a_mismatch_that_names_the_few(
    kinds: str, named: tuple[int, ...], text: str
) -> None:
    words = {"d": "decision", "w": "write", "c": "closed"}
    sent = [msgspec.structs.replace(r, kind=words[k]) for r, k in zip(reports(len(kinds)), kinds, strict=True)]

    with pytest.raises(RoundMismatch, match=text) as refused:
        read(sent)
    assert (refused.value.ranks, refused.value.call, refused.value.step, refused.value.round) == (named, 12, 11, 7)


@pytest.mark.parametrize("kinds", ["ddd", "www", "ccc", "cdd", "wcw"])
def test_ranks_that_closed_go_with_any_kind(kinds: str) -> None:
    words = {"d": "decision", "w": "write", "c": "closed"}
    sent = [msgspec.structs.replace(r, kind=words[k]) for r, k in zip(reports(3), kinds, strict=True)]

    assert read(sent) == sent
