"""What must hold for bytes from outside: a message within its bounds or the agreed error, and a root that goes on."""

from __future__ import annotations

import contextlib
import copy
import random
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import LogsyncError, ProtocolError, ReductionMismatch
from logsync.coordinator.messages import (
    Decision,
    Hello,
    LogEntry,
    decode_decision,
    decode_hello,
    decode_report,
    decode_state,
    encode,
    encode_hello,
    failure_of,
    unpack_schema,
)
from logsync.coordinator.reduction import Partials
from logsync.workers.transports import notes
from logsync.workers.transports.notes import Note, Verdict
from support.bounds import assert_within_bounds
from support.lockstep import SimRank, settings
from support.mutants import MAKERS, made, mutated, odd_decision, odd_report, odd_window, state, window

__all__ = [
    "DECODERS",
    "Twins",
    "check_decoded",
    "check_reply",
    "check_rounds",
    "check_state",
    "check_windows",
    "frugal",
    "telling",
    "tracing",
]

Dice = random.Random

# -- decoders --------------------------------------------------------------------------------------------------------

DECODERS: dict[str, Callable[[bytes], Any]] = {
    "hello": lambda data: decode_hello(data, 1),
    "report": lambda data: decode_report(data, 1),
    "decision": decode_decision,
    "state": decode_state,
    "schema": lambda data: unpack_schema(data, 1),
    "note": lambda data: notes._decoded(data, Note),
    "verdict": lambda data: notes._decoded(data, Verdict),
}
"""A decoder for each kind of message; what it cannot read it refuses, by a ProtocolError or by None."""


def check_decoded(kind: str, data: bytes) -> bool:
    """Decode `data`; assert that it is refused, or a message within its bounds. Says whether it was taken."""
    with telling(data), frugal(len(data)):
        try:
            message = DECODERS[kind](data)
        except ProtocolError as error:
            _assert_fit_for_a_log(error)
            message = None
        if message is None:
            return False
        assert_within_bounds(message)
        again = encode_hello(message) if kind == "hello" else MAKERS[kind][1].encode(message)
        assert repr(DECODERS[kind](again)) == repr(message)
        return True


@contextlib.contextmanager
def telling(*data: bytes | bytearray | memoryview) -> Iterator[None]:
    """Let what fails inside say by which bytes."""
    try:
        yield
    except Exception as error:
        shown = " ".join(bytes(one).hex() or "-" for one in data)
        msg = f"{type(error).__name__}: {error}\nthe bytes: {shown}"
        raise AssertionError(msg) from error


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Have every check inside look at the memory that it takes, which makes it slow."""
    global _traces  # noqa: PLW0603 - checks are passed around by name, without options
    _traces = True
    try:
        yield
    finally:
        _traces = False


_traces = False


@contextlib.contextmanager
def frugal(size: int) -> Iterator[None]:
    """Assert, where memory is traced, that what is inside takes little more than `size` bytes need."""
    if not _traces:
        yield
        return
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20 + 64 * size, f"{peak} bytes of memory for {size} bytes"


def _assert_fit_for_a_log(error: Exception, most: int = 1000) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < most


def check_windows(dice: Dice) -> None:
    """Reduce hostile windows: they are refused, or make an entry within its bounds."""
    size, alike = dice.randrange(1, 5), window(dice)
    windows = []
    for rank in range(size):
        whole = alike if dice.random() < 0.9 else window(dice)
        windows.append((rank, odd_window(dice, whole) if dice.random() < 0.5 else whole))
    pieces = [piece for _, one in windows for piece in (one.schema, one.values)]
    with telling(*pieces), frugal(sum(map(len, pieces))):
        partials = Partials()
        try:
            partials.add_windows(windows)
            merged = partials.reduce(size)
        except (ProtocolError, ReductionMismatch) as error:
            _assert_fit_for_the_wire(error, size)
        else:
            assert_within_bounds(LogEntry(0, 1, 1.0, 0, 1, size, *merged))
            for rank, one in windows:
                names = [spec.name for spec in unpack_schema(one.schema, rank)]
                assert len(set(names)) == len(names)


def _assert_fit_for_the_wire(error: LogsyncError, world_size: int) -> None:
    sent = failure_of(error)
    assert_within_bounds(sent)
    assert sent.text.isprintable()
    assert set(sent.ranks) <= set(range(world_size))


# -- a root that hears what it should not ----------------------------------------------------------------------------


class Twins:
    """Two roots of one world, one of which also hears hostile frames. Afterwards the two must not differ."""

    def __init__(self, dice: Dice) -> None:
        self._dice = dice
        size, unit = dice.choice((1, 2, 3)), dice.choice(("epoch", "step", "batch"))
        self.config = settings(
            dice.choice((1, 3, 10, None)),
            mode=dice.choice(("exact", "on_change", "on_update")),
            frequency_type=unit,
            write=dice.choice(("auto", "explicit")),
        )
        self.root, self._twin = (Coordinator(self.config, size, run="run", run_dir="runs/x") for _ in range(2))
        self.ranks = [SimRank(rank, size, max_lease=1000, frequency_type=unit) for rank in range(size)]
        self._step = 0
        self._frames = [encode_hello(Hello(rank, size, "1", self.config)) for rank in range(size)]

    def introduce(self, *, hostile: bool = False) -> None:
        """Make the first round."""
        if hostile:
            self._heard(self._bent(self._frames))
        else:
            self.accept(self._both(self._frames))

    def honest(self) -> Decision:
        """Make a round and assert that both roots answer it alike."""
        reply = self._both(self.frames())
        self.accept(reply)
        return decode_decision(reply)

    def hostile(self) -> None:
        """Make a round with frames that no honest rank sends."""
        self.accept(self._heard(self._bent(self.frames())))

    def frames(self) -> list[bytes]:
        """Return what honest ranks send next."""
        dice = self._dice
        self._step = max(0, self._step + dice.choice((0, 1, 1, 1, 2, 9, -3)))
        kind = dice.choice(("decision", "decision", "decision", "write"))
        shared, loaded = window(dice), state(dice)
        loads = loaded.frequency_type == self.config.frequency_type and dice.random() < 0.3
        for rank in self.ranks:
            if loads:
                rank.load_state_dict({"state": encode(loaded)})
            if dice.random() < 0.4:
                dice.choice((rank.model_updated, rank.log_written, rank.set_frequency))(dice.choice((None, 2, 5)))
        checked = dice.random() < 0.1
        self._frames = [
            rank._frame(kind, self._step, check_model_update=checked, window=shared)  # type: ignore[arg-type]
            for rank in self.ranks
        ]
        return self._frames

    def accept(self, reply: bytes) -> None:
        """Let all ranks hear the reply."""
        for rank in self.ranks:
            with contextlib.suppress(LogsyncError):
                rank._accept(reply)

    def _both(self, frames: Sequence[bytes]) -> bytes:
        with telling(*frames):
            reply, entries = self.root.handle(frames, 1.0)
            self._assert_twin_says(frames, reply, entries)
            return reply

    def _assert_twin_says(self, frames: Sequence[bytes], reply: bytes, entries: Sequence[LogEntry]) -> None:
        again, logged = self._twin.handle(frames, 1.0)
        assert again == reply, "the roots differ after hostile rounds"
        assert encode(logged) == encode(entries)  # bits: NaN is not equal to itself

    def _heard(self, frames: Sequence[bytes]) -> bytes:
        """Let one root hear the frames; the other hears them only if they pass for an honest round."""
        with telling(*frames):
            before = _standing(self.root)
            with frugal(sum(map(len, frames))):
                reply, entries = self.root.handle(frames, 1.0)
            decision = decode_decision(reply)
            assert_within_bounds(decision)
            if decision.failure is None:
                self._assert_in_place(frames, decision.round)
                self._assert_twin_says(frames, reply, entries)
                return reply
            text = decision.failure.text
            assert text.isprintable()
            assert decision.failure.kind != "coordinator_failed", text
            assert entries == ()
            assert _standing(self.root) == before
        self._twin._round += 1
        # A distance of steps that was refused once is the norm from then on.
        self._twin._steps = dict(self.root._steps)
        return reply

    def _assert_in_place(self, frames: Sequence[bytes], number: int) -> None:
        assert len(frames) == len(self.ranks)
        for rank, frame in enumerate(frames):
            if number:
                report = decode_report(frame, rank)
                assert (report.rank, report.round, report.run) == (rank, number, "run")
                assert report.world_size == len(self.ranks)
            else:
                assert decode_hello(frame, rank).rank == rank

    def _bent(self, frames: list[bytes]) -> list[Any]:
        dice, bent = self._dice, list(frames)
        for rank in range(len(bent)):
            whim = dice.random()
            if whim < 0.4:
                bent[rank] = mutated(bent[rank], dice)
            elif whim < 0.7 and not frames[rank].startswith(b"logsync"):
                bent[rank] = encode(odd_report(dice, decode_report(frames[rank], rank)))
        deed = dice.randrange(24)
        if deed == 0 and len(bent) > 1:
            bent.pop()
        elif deed == 1:
            bent.append(dice.choice((b"", frames[0])))
        elif deed == 2:
            bent.reverse()
        elif deed == 3:
            bent[-1] = made(dice.choice(("report", "hello", "decision")), dice)
        return [dice.choice((bytes, bytearray, memoryview))(frame) for frame in bent]


def _standing(root: Coordinator) -> dict[str, Any]:
    """Return everything that a round which was refused must leave as it was."""
    found = dict(vars(root))
    # The round's number and time go on; a distance of steps is refused once; what it was refused for is told.
    del found["_round"], found["_round_times"], found["_steps"], found["refused_for"]
    found["_cadence"] = root._cadence.snapshot()
    found["frequency_manager"] = dict(vars(root.frequency_manager))
    return found


def check_rounds(dice: Dice) -> None:
    """Make hostile rounds among honest ones."""
    twins = Twins(dice)
    if dice.random() < 0.1:
        twins.introduce(hostile=True)
        return
    twins.introduce()
    for _ in range(dice.randrange(1, 5)):
        twins.hostile()
        twins.honest()


# -- ranks that hear what they should not ----------------------------------------------------------------------------


def _memory(rank: SimRank) -> dict[str, Any]:
    return {slot: copy.copy(getattr(rank, slot)) for kind in type(rank).__mro__ for slot in _slots(kind)}


def _slots(kind: type) -> Sequence[str]:
    return getattr(kind, "__slots__", ())


# The frame is spent, whatever the reply was.
_FORGOTTEN = {"_round", "_sent_events", "_fault", "_finished", "_active", "_epoch_over"}


def check_reply(dice: Dice) -> None:
    """Give one rank a hostile reply: it takes a decision within its bounds, or changes nothing and goes on."""
    world = Twins(dice)
    world.introduce()
    for _ in range(dice.randrange(3)):
        world.honest()
    honest, _ = world.root.handle(world.frames(), 1.0)
    world._twin.handle(world._frames, 1.0)
    victim, before = world.ranks[-1], _memory(world.ranks[-1])
    lies = dice.random() < 0.5
    reply = encode(odd_decision(dice, decode_decision(honest))) if lies else mutated(honest, dice)
    with telling(reply):
        for rank in world.ranks[:-1]:
            with contextlib.suppress(LogsyncError):
                rank._accept(honest)
        try:
            with frugal(len(reply)):
                decision = victim._accept(reply)
        except LogsyncError as error:
            _assert_fit_for_a_log(error, 4500)
            after = _memory(victim)
            assert {slot for slot in before if repr(before[slot]) != repr(after[slot])} <= _FORGOTTEN
        else:
            assert_within_bounds(decision)
            assert decision.failure is None
            assert decision.round == before["_round"]
            assert victim._lease == victim._left == decision.lease <= 1000
            assert victim.state is decision.state
            return
        if victim._round == before["_round"]:
            return  # a reply that cannot be read is the end of the log: see the whole log below
        failure = world.honest().failure
        assert failure is None or failure.kind not in ("protocol", "coordinator_failed"), failure


def check_state(dice: Dice) -> None:
    """Load a hostile checkpoint: it is refused and nothing changes, or what follows from it can be sent and saved."""
    world = Twins(dice)
    world.introduce()
    rank, before = world.ranks[0], _memory(world.ranks[0])
    data = mutated(encode(state(dice)), dice)
    given: Any = dice.choice(({"state": data}, {"state": data}, {"state": data}, {"state": str(data)}, data, {}))
    with telling(data):
        try:
            with frugal(len(data)):
                rank.load_state_dict(given)
        except ValueError as error:
            _assert_fit_for_a_log(error)
            assert repr(_memory(rank)) == repr(before)
            return
        assert check_decoded("state", rank.state_dict()["state"])
        assert check_decoded("report", rank._frame("decision", 1))
