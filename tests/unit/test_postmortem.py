"""From what ranks have noted to one error that says only what is known."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from logsync.coordinator.errors import CoordinatorLost, PeerFailed, PeerLost, RoundTimeout, TransportError
from logsync.workers.transports.notes import Note, Verdict
from logsync.workers.transports.postmortem import (
    GAVE_UP,
    LastRound,
    error_of_verdict,
    has_timed_out,
    heard_of,
    judge,
    last_known,
    leavers,
)

TIMEOUT_S = 10.0
ROUND = 7


def note(
    doing: Literal["idle", "waiting", "failed", "left"], number: int = ROUND, *, step: float | None = 40, **more: Any
) -> Note:
    more = {"call": 41, "host": "node-3", "pid": 99, "pid_space": "pid:[1]", "beat": 5, **more}
    return Note(doing, number, step=step, **more)


IDLE, WAITS, FAILED = note("idle"), note("waiting"), note("failed")
GIVEN_UP = note("failed", text=GAVE_UP)
LEFT = note("left", text="KeyError: 'bad batch'")
SAW_1_DEAD = note("failed", dead=(1,))
SAW_0_DEAD = note("failed", dead=(0,))


def judged(notes: dict[int, Note], *, rank: int, waited_s: float, world_size: int = 3) -> Verdict:
    return judge(
        notes,
        rank=rank,
        world_size=world_size,
        round_number=ROUND,
        waited_s=waited_s,
        timeout_s=TIMEOUT_S,
        detail="Read error",
    )


@pytest.mark.parametrize(
    ("rank", "waited_s", "notes", "error", "ranks"),
    [
        # a rank that raised: whatever else is known, and whoever asks
        (0, 0.1, {0: FAILED, 1: LEFT, 2: WAITS}, PeerFailed, (1,)),
        (0, TIMEOUT_S, {0: GIVEN_UP, 1: LEFT, 2: IDLE}, PeerFailed, (1,)),
        (0, 0.1, {0: SAW_1_DEAD, 1: LEFT, 2: LEFT}, PeerFailed, (1, 2)),
        (2, 0.1, {0: LEFT, 1: WAITS, 2: FAILED}, PeerFailed, (0,)),
        (2, 0.1, {0: LEFT, 1: IDLE, 2: SAW_0_DEAD}, PeerFailed, (0,)),
        # a process that ended, seen at once or after the timeout
        (0, 0.1, {0: SAW_1_DEAD, 1: IDLE, 2: WAITS}, PeerLost, (1,)),
        (0, 0.1, {0: SAW_1_DEAD, 1: WAITS, 2: IDLE}, PeerLost, (1,)),
        (0, TIMEOUT_S, {0: SAW_1_DEAD, 1: IDLE, 2: WAITS}, PeerLost, (1,)),
        (0, 0.1, {0: FAILED, 1: IDLE, 2: SAW_1_DEAD}, PeerLost, (1,)),
        (1, 0.1, {0: IDLE, 1: SAW_0_DEAD, 2: WAITS}, CoordinatorLost, (0,)),
        (1, TIMEOUT_S, {0: IDLE, 1: SAW_0_DEAD, 2: GIVEN_UP}, CoordinatorLost, (0,)),
        (1, 0.1, {0: IDLE, 1: FAILED, 2: SAW_0_DEAD}, CoordinatorLost, (0,)),
        (0, 0.1, {0: note("failed", dead=(1, 2)), 1: IDLE, 2: IDLE}, PeerLost, (1, 2)),
        # the root's last reply came through to some ranks only: the others still wait for it
        (1, TIMEOUT_S, {0: IDLE, 1: GIVEN_UP, 2: note("failed", ROUND - 1)}, CoordinatorLost, (0,)),
        (2, TIMEOUT_S, {0: IDLE, 1: note("waiting", ROUND - 1), 2: GIVEN_UP}, CoordinatorLost, (0,)),
        (1, 0.1, {1: FAILED, 2: note("waiting", ROUND - 1)}, CoordinatorLost, (0,)),
        (1, TIMEOUT_S, {0: IDLE, 1: GIVEN_UP, 2: note("waiting", ROUND - 2)}, CoordinatorLost, (0, 2)),
        (1, TIMEOUT_S, {0: IDLE, 1: GIVEN_UP, 2: note("idle", ROUND - 1)}, CoordinatorLost, (0, 2)),
        (1, TIMEOUT_S, {0: WAITS, 1: GIVEN_UP, 2: note("waiting", ROUND - 1)}, RoundTimeout, (2,)),
        (0, TIMEOUT_S, {0: GIVEN_UP, 1: IDLE, 2: note("waiting", ROUND - 1)}, RoundTimeout, (1, 2)),
        # the root asks after its timeout: late
        (0, TIMEOUT_S, {0: GIVEN_UP, 1: IDLE, 2: WAITS}, RoundTimeout, (1,)),
        (0, TIMEOUT_S, {0: GIVEN_UP, 1: IDLE, 2: IDLE}, RoundTimeout, (1, 2)),
        (0, TIMEOUT_S, {0: GIVEN_UP, 2: WAITS}, RoundTimeout, (1,)),
        (0, TIMEOUT_S, {0: GIVEN_UP, 1: note("waiting", ROUND - 1), 2: FAILED}, RoundTimeout, (1,)),
        (0, TIMEOUT_S, {}, RoundTimeout, (1, 2)),
        # the root asks when its connection broke: lost
        (0, 0.1, {0: FAILED, 1: IDLE, 2: WAITS}, PeerLost, (1,)),
        (0, 0.1, {0: FAILED, 1: IDLE, 2: note("waiting", ROUND + 1)}, PeerLost, (1,)),
        # another rank, without the root's word: a root that did not come counts as lost, whatever ended the wait
        (1, TIMEOUT_S, {0: IDLE, 1: GIVEN_UP, 2: WAITS}, CoordinatorLost, (0,)),
        (1, 0.1, {0: IDLE, 1: FAILED, 2: WAITS}, CoordinatorLost, (0,)),
        (1, TIMEOUT_S, {0: WAITS, 1: GIVEN_UP, 2: IDLE}, RoundTimeout, (2,)),
        (1, 0.1, {0: WAITS, 1: FAILED, 2: IDLE}, PeerLost, (2,)),
        # no note can be read: the store is gone, and with it, most likely, the root
        (1, TIMEOUT_S, {}, CoordinatorLost, (0,)),
        (1, 0.1, {}, CoordinatorLost, (0,)),
        # nobody is missing
        (0, TIMEOUT_S, {0: GIVEN_UP, 1: WAITS, 2: WAITS}, RoundTimeout, ()),
        (0, 0.1, {0: FAILED, 1: WAITS, 2: FAILED}, PeerLost, ()),
        # it came too late itself: the others had given up
        (1, 0.1, {0: GIVEN_UP, 1: FAILED, 2: FAILED}, RoundTimeout, (1,)),
        (0, 0.1, {0: FAILED, 1: GIVEN_UP, 2: GIVEN_UP}, RoundTimeout, (0,)),
        # one of the others gave up, but another one is missing all the same
        (0, 0.1, {0: FAILED, 1: IDLE, 2: GIVEN_UP}, PeerLost, (1,)),
    ],
)
def test_what_is_known_makes_one_error_and_names_its_culprits(
    rank: int, waited_s: float, notes: dict[int, Note], error: type[TransportError], ranks: tuple[int, ...]
) -> None:
    verdict = judged(notes, rank=rank, waited_s=waited_s)
    raised = error_of_verdict(verdict)

    assert (type(raised), raised.ranks) == (error, ranks)
    assert raised.round == ROUND
    assert str(raised) == verdict.text


@pytest.mark.parametrize("waited_s", [0.1, TIMEOUT_S])
@pytest.mark.parametrize("notes", [{}, {0: WAITS, 1: IDLE, 2: GIVEN_UP}, {0: IDLE, 1: SAW_0_DEAD, 2: LEFT}])
@pytest.mark.parametrize("rank", [0, 1])
def test_who_judges_a_round_that_timed_out_is_never_the_culprit(
    rank: int, notes: dict[int, Note], waited_s: float
) -> None:
    verdict = judged(notes, rank=rank, waited_s=waited_s)

    assert rank not in verdict.ranks or "given the round up" in verdict.text


@pytest.mark.parametrize(
    ("notes", "waited_s", "parts"),
    [
        (
            {0: GIVEN_UP, 1: IDLE, 2: WAITS},
            TIMEOUT_S,
            [
                "round 7 failed: rank 0 waited 10.0 s of 10 s;",
                "rank 1 did not come: rank 1 on node-3 (pid 99) was last heard of at call 41, step 40.",
                "gloo says: Read error",
            ],
        ),
        (
            {0: SAW_1_DEAD, 1: IDLE, 2: WAITS},
            0.25,
            [
                "rank 0 lost its connection after 0.2 s; rank 1 ended: rank 1 on node-3 (pid 99) was last heard of at",
                "out-of-memory killer",
            ],
        ),
        ({0: FAILED, 2: WAITS}, 0.1, ["rank 1 not heard of in this round: no word of rank 1 is to be found"]),
        ({0: FAILED, 1: WAITS, 2: WAITS}, 0.1, ["no rank is known to be missing; the network may have broken"]),
        ({0: FAILED, 1: GIVEN_UP, 2: GIVEN_UP}, 0.1, ["it came when ranks 1, 2 had given the round up"]),
        (
            {0: FAILED, 1: LEFT, 2: LEFT},
            0.1,
            [
                "rank 1 on node-3 left the log at call 41, step 40, because its code raised KeyError: 'bad batch'",
                "(ranks 1, 2 left)",
            ],
        ),
    ],
)
def test_the_text_says_what_happened_with_numbers_and_where_to_look(
    notes: dict[int, Note], waited_s: float, parts: list[str]
) -> None:
    text = judged(notes, rank=0, waited_s=waited_s).text

    for part in parts:
        assert part in text


@pytest.mark.parametrize("world_size", [3, 4096, 20_000])
def test_a_verdict_on_a_large_world_fits_the_store(world_size: int) -> None:
    verdict = judged({0: GIVEN_UP}, rank=0, waited_s=TIMEOUT_S, world_size=world_size)

    assert verdict.ranks == tuple(range(1, world_size))[:4096]
    assert len(verdict.text) <= 2000
    assert "rank 1" in verdict.text
    assert f"rank {world_size - 1}" in verdict.text or f"and {world_size - 1 - 16} more" in verdict.text


@pytest.mark.parametrize(("waited_s", "timed_out"), [(0.0, False), (1.0, False), (8.9, False), (9.0, True), (12, True)])
def test_a_wait_that_ends_short_of_its_timeout_was_broken_off(waited_s: float, timed_out: bool) -> None:  # noqa: FBT001
    assert has_timed_out(waited_s, TIMEOUT_S) is timed_out


@pytest.mark.parametrize(
    ("found", "heard"),
    [
        (note("idle", ROUND), False),
        (note("idle", ROUND + 1), False),
        (note("waiting", ROUND - 1), False),
        (note("waiting", ROUND), True),
        (note("waiting", ROUND + 1), True),
        (note("failed", ROUND - 1), False),
        (note("failed", ROUND), True),
        (note("left", ROUND - 1), True),
    ],
)
def test_a_rank_is_heard_of_when_it_has_come_to_the_round_or_has_left(found: Note, heard: bool) -> None:  # noqa: FBT001
    assert heard_of({4: found}, ROUND) == ({4} if heard else set())
    assert leavers({4: found}) == ({4: found} if found.doing == "left" else {})


@pytest.mark.parametrize(
    ("kind", "ranks", "error"),
    [
        ("timeout", (2,), RoundTimeout),
        ("timeout", (0,), RoundTimeout),
        ("lost", (2,), PeerLost),
        ("lost", (0,), CoordinatorLost),
        ("lost", (0, 2), CoordinatorLost),
        ("lost", (), PeerLost),
        ("failed", (2,), PeerFailed),
        ("failed", (0,), PeerFailed),
    ],
)
def test_a_verdict_is_the_same_error_on_every_rank_and_the_lost_coordinator_has_its_own(
    kind: Literal["timeout", "lost", "failed"], ranks: tuple[int, ...], error: type[TransportError]
) -> None:
    raised = error_of_verdict(Verdict(ROUND, kind, ranks, "what happened"))

    assert (type(raised), str(raised), raised.ranks, raised.round) == (error, "what happened", ranks, ROUND)


def test_at_most_8_ranks_are_told_with_their_place() -> None:
    text = last_known(range(100), dict.fromkeys(range(100), IDLE))

    assert text.count("was last heard of") == 8
    assert "rank 7 on node-3" in text
    assert "rank 8" not in text


HOSTILE = ["\x1b[2J\x1b]0;owned\x07", "a\r\nrank 0 is fine\n", "\u202egnp.exe", "x" * 2000, "\x00" * 2000]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("doing", ["left", "idle", "failed"])
def test_control_characters_and_endless_text_of_a_peer_do_not_reach_the_error(
    doing: Literal["left", "idle", "failed"], text: str
) -> None:
    hostile = note(doing, host=text, text=text)
    error = error_of_verdict(judged({0: GIVEN_UP, 1: hostile, 2: WAITS}, rank=0, waited_s=TIMEOUT_S))

    assert str(error).isprintable()
    assert len(str(error)) < 2100


@pytest.mark.parametrize("text", HOSTILE)
def test_control_characters_in_a_foreign_verdict_do_not_reach_the_error(text: str) -> None:
    error = error_of_verdict(Verdict(ROUND, "lost", (1,), text))

    assert str(error).isprintable()


@pytest.mark.parametrize("dead", [(17,), (-1,), (3,), (1, 10**30)])
def test_a_peer_cannot_have_ranks_blamed_that_do_not_exist(dead: tuple[int, ...]) -> None:
    verdict = judged({0: GIVEN_UP, 1: IDLE, 2: note("failed", dead=dead)}, rank=0, waited_s=TIMEOUT_S)

    assert set(verdict.ranks) <= {0, 1, 2}


@pytest.mark.parametrize("came", [WAITS, FAILED, IDLE])
def test_a_rank_that_came_after_the_end_of_the_wait_is_late_although_it_has_come(came: Note) -> None:
    before = {0: WAITS, 1: IDLE, 2: WAITS}
    verdict = judge(
        {0: GIVEN_UP, 1: came, 2: GIVEN_UP},
        rank=0,
        world_size=3,
        round_number=ROUND,
        waited_s=TIMEOUT_S,
        timeout_s=TIMEOUT_S,
        detail="Timed out",
        before=before,
    )

    assert (verdict.kind, verdict.ranks) == ("timeout", (1,))


@pytest.mark.parametrize(
    ("told", "text"),
    [
        ({}, "rank 1 took part in round 6, the last one (call 6, step 5 on rank 0)"),
        ({1: note("idle", ROUND - 1)}, "rank 1 on node-3 (pid 99) took part in round 6, the last one"),
        ({1: IDLE}, "rank 1 on node-3 (pid 99) was last heard of at call 41, step 40"),
    ],
)
def test_a_rank_is_placed_by_its_note_or_by_the_last_round_whichever_is_newer(told: dict[int, Note], text: str) -> None:
    assert last_known([1], told, LastRound(rank=0, number=ROUND - 1, call=6, step=5)).startswith(text)
