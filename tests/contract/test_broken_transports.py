"""The contract finds the transports that break it: each of these has one fault, and fails the scenario for it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from logsync.workers.testing import SCENARIOS, check_transport
from logsync.workers.transports.base import Position, Root, Transport
from logsync.workers.transports.threads import ThreadTransport
from support.worlds import ThreadsWorld

Frames = Sequence[bytes | bytearray | memoryview]


class Sound:
    """Pass everything on; the classes below change one thing."""

    name = "sound"

    def __init__(self, inner: ThreadTransport) -> None:
        self.inner = inner
        self.rank = inner.rank
        self.world_size = inner.world_size

    @property
    def is_last(self) -> bool:
        return self.rank == self.world_size - 1

    def start(self, root: Root | None, position: Position | None = None) -> None:
        self.inner.start(None if root is None else self.spoilt(root), position)

    def spoilt(self, root: Root) -> Root:
        return root

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        return self.inner.exchange(frame, patient=patient)

    def close(self, reason: str | None = None) -> None:
        self.inner.close(reason)


class RunsTheRootTwice(Sound):
    def spoilt(self, root: Root) -> Root:
        runs = 0

        def twice(frames: Frames) -> bytes:
            nonlocal runs
            runs += 1
            if runs == 2:
                root(frames)
            return root(frames)

        return twice


class TurnsFramesRound(Sound):
    def spoilt(self, root: Root) -> Root:
        return lambda frames: root(frames[::-1])


class LosesARanksFrame(Sound):
    def spoilt(self, root: Root) -> Root:
        return lambda frames: root([*frames[:-1], frames[0]])


class CutsLongFrames(Sound):
    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        return super().exchange(frame[: 2**16], patient=patient)


class CutsLongReplies(Sound):
    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        reply = super().exchange(frame, patient=patient)
        return reply[: 2**16] if self.is_last else reply


class RepeatsAReply(Sound):
    last = b""

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        reply, self.last = self.last, super().exchange(frame, patient=patient)
        return reply if self.is_last and reply else self.last


class SwallowsWhatIsTooLarge(Sound):
    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        return super().exchange(frame[:1000], patient=patient)


class KeepsTheReason(Sound):
    def close(self, reason: str | None = None) -> None:  # noqa: ARG002 - that is the fault
        super().close(None)


class HasNoPatience(Sound):
    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:  # noqa: ARG002 - that is the fault
        return super().exchange(frame, patient=False)


class BlamesNobody(Sound):
    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        try:
            return super().exchange(frame, patient=patient)
        except ConnectionError as error:
            error.ranks = ()  # type: ignore[attr-defined]
            raise


class ServesOneThread(Sound):
    thread: int | None = None

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        self.thread = self.thread or threading.get_ident()
        if threading.get_ident() != self.thread:
            msg = "this connection belongs to another thread"
            raise OSError(msg)
        return super().exchange(frame, patient=patient)


class ClosesWhenNobodyWaits(Sound):
    waits = False

    def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
        self.waits = True
        try:
            return super().exchange(frame, patient=patient)
        finally:
            self.waits = False

    def close(self, reason: str | None = None) -> None:
        if not self.waits:
            super().close(reason)


BYTES = "every_rank_gets_the_same_bytes_and_the_root_runs_once_a_round"
SIZES = "frames_and_replies_grow_and_shrink"
FAULTS = [
    (RunsTheRootTwice, BYTES, "the root ran"),
    (TurnsFramesRound, BYTES, "in another order"),
    (LosesARanksFrame, BYTES, "the root saw other frames"),
    (CutsLongFrames, SIZES, "the root saw other frames"),
    (CutsLongReplies, SIZES, "ranks differ"),
    (RepeatsAReply, BYTES, "ranks differ"),
    (
        SwallowsWhatIsTooLarge,
        "a_frame_over_the_maximum_is_refused_on_all_ranks_and_the_group_goes_on",
        "nothing was raised",
    ),
    (KeepsTheReason, "a_rank_that_raises_leaves_its_reason_to_the_others", "PeerLost"),
    (HasNoPatience, "a_rank_that_has_closed_waits_for_longer_than_the_timeout", "RoundTimeout"),
    (HasNoPatience, "ranks_that_have_ended_their_epoch_wait_for_longer_than_the_timeout", "RoundTimeout"),
    (ServesOneThread, "ranks_that_end_their_epochs_early_answer_the_others_and_come_back", "belongs to another thread"),
    (ClosesWhenNobodyWaits, "a_round_that_waits_on_another_thread_is_ended_by_close", "hangs"),
    (BlamesNobody, "a_rank_that_raises_leaves_its_reason_to_the_others", "left the log"),
]


def world_of(kind: type[Sound], size: int) -> ThreadsWorld:
    class Worn(ThreadsWorld):
        def _shown(self, transport: ThreadTransport) -> Transport:
            return kind(transport)

    return Worn(size)


@pytest.mark.parametrize(("kind", "name", "complaint"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_transport_with_one_fault_fails_the_scenario_for_it(kind: type[Sound], name: str, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        SCENARIOS[name].check(world_of(kind, 3).run(name))


def test_check_transport_passes_a_world_that_keeps_the_promises() -> None:
    check_transport(lambda size: world_of(Sound, size), sizes=(2,))


def test_check_transport_names_the_scenario_and_the_size() -> None:
    with pytest.raises(AssertionError, match=f"^{BYTES} with 2 ranks: AssertionError: round 0"):
        check_transport(lambda size: world_of(TurnsFramesRound, size), sizes=(1, 2))


def test_check_transport_names_the_rank_that_raised() -> None:
    class Stumbles(Sound):
        def exchange(self, frame: bytes, *, patient: bool = False) -> bytes:
            reply = super().exchange(frame, patient=patient)
            if self.rank == 1:
                msg = "no route"
                raise OSError(msg)
            return reply

    with pytest.raises(AssertionError, match=f"{BYTES} with 3 ranks: .*rank 1 of 3 .*OSError: no route"):
        check_transport(lambda size: world_of(Stumbles, size), sizes=(1, 3))


def test_a_result_of_another_shape_is_a_broken_promise_too() -> None:
    class Forgetful(ThreadsWorld):
        def run(self, name: str) -> list[Any]:
            return [*super().run(name)[:-1], None]

    with pytest.raises(AssertionError, match=f"{BYTES} with 2 ranks"):
        check_transport(Forgetful, sizes=(2,))
