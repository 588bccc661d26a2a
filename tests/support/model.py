"""A world of two or three ranks, the real coordinator, rounds and ledgers in it, for `explore`.

A `State` is what all ranks, the root and the network hold, as one value that can be hashed. What one rank or the root
does depends on its own part of the state alone, so it is computed once and looked up after that.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, Literal, NamedTuple

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import AgreedError, UnreadableReply
from logsync.coordinator.messages import Hello, KeySpec, Window, encode, encode_hello, pack_values
from logsync.coordinator.rounds import Round
from logsync.workers.ledger import Ledger
from support.explorer import Violation
from support.lockstep import SimRank, settings
from support.simulation.scenarios import Op, sits_out

__all__ = ["Desk", "Model", "Root"]

_SCHEMA = encode([KeySpec("x", "sum", "sum", per_rank=True)])
_LISTS = ("_steps", "_falls", "_events")
_UNUSED = ("_last_entry", "_hooked", "_stamped", "_unsure")  # nobody watches an optimizer here
_KEPT = tuple(name for name in Ledger.__slots__ if name not in (*_UNUSED, *_LISTS))
_ENDED = frozenset(("done", "failed", "dead"))

Frozen = tuple[Hashable, ...]
_SKIPPED = "skipped"
# Kept in another way; no frame names a host here, and nobody follows.
_APART = ("frequency_manager", "_cadence", "_steps", "_hosts", "_merged")
_SAID = ("update", "frequency")


class Granted(NamedTuple):
    """What a reply left a rank with: `shared` with all ranks, `own` with those that the round was the same for."""

    round: int
    shared: Hashable
    who: str
    own: Hashable


class Rank(NamedTuple):
    """One rank: its ledger, how far its script is, and what it has recorded, a bit for each act.

    `answers` has an item for each act that is behind it: at a call what it was told, and the number of the call.
    `taken` is what the frame that is under way carries. `granted` is what the last reply left it with. `early`: it left
    the script before its end. `away`: it has ended its epoch, "over" once all have; `refusal` is what it is to raise
    then.
    """

    ledger: Frozen
    phase: Literal["running", "absent", "done", "failed", "dead"] = "running"
    waiting: int = -1
    asked: str = ""
    answers: tuple[Hashable, ...] = ()
    recorded: int = 0
    window: int = 0
    taken: int = 0
    granted: Granted | None = None
    refused: bool = False
    early: bool = False
    away: Literal["", "away", "over"] = ""
    refusal: Hashable = None


class Root(NamedTuple):
    """The root: the coordinator, the open round, the last one's frames and reply, and what is in entries, by rank."""

    coordinator: Frozen
    number: int
    frames: tuple[bytes | None, ...]
    decided: tuple[bytes, ...] = ()
    reply: bytes = b""
    entries: int = 0
    logged: tuple[int, ...] = ()
    alive: bool = True


class Message(NamedTuple):
    """A request on its way up, or a reply on its way down."""

    way: Literal["up", "down"]
    rank: int
    number: int
    data: bytes


class State(NamedTuple):
    ranks: tuple[Rank, ...]
    root: Root
    messages: tuple[Message, ...]
    copies: int
    deaths: int
    absences: int


class Desk:
    """What the root does with a request of the round that it decided last; mutants do otherwise."""

    def again(self, model: Model, root: Root) -> Root:  # noqa: ARG002 - mutants decide
        """Return the root as it is when it answers once more."""
        return root


class Model:
    """A world whose ranks run one script.

    Args:
        acts: the script: calls, writes, ends of epochs, updates and frequencies.
        copies, deaths, absences: how many messages the network may double, how many ranks may die, and how many may
            leave the script before its end.
    """

    def __init__(
        self,
        world_size: int,
        acts: tuple[Op, ...],
        *,
        log_frequency: int | None = 2,
        mode: str = "exact",
        write: str = "auto",
        max_lease: int = 3,
        copies: int = 1,
        deaths: int = 1,
        absences: int = 1,
        coordinator: type[Coordinator] = Coordinator,
        desk: Desk | None = None,
        member: type[SimRank] = SimRank,
    ) -> None:
        self.world_size = world_size
        self.acts = acts
        self._write = write
        self._budgets = (copies, deaths, absences)
        self._desk = desk or Desk()
        config = settings(log_frequency, mode=mode, write=write, max_lease=max_lease)
        self._coordinator = coordinator(config, world_size, run="run", run_dir="runs/x")
        self._ledgers = [
            member(r, world_size, max_lease=max_lease, frequency_type=config.frequency_type) for r in range(world_size)
        ]
        hellos = [encode_hello(Hello(r, world_size, "1", config)) for r in range(world_size)]
        reply, _ = self._coordinator.handle(hellos)
        for ledger in self._ledgers:
            ledger._accept(reply)
        self._first = Root(self._freeze_coordinator(), 1, (None,) * world_size, logged=(0,) * world_size)
        self._memory: dict[Hashable, Any] = {}

    def start(self) -> State:
        """Return the state in which all ranks have just connected."""
        ranks = tuple(Rank(_freeze(ledger)) for ledger in self._ledgers)
        return State(ranks, self._first, (), *self._budgets)

    # -- actions ---------------------------------------------------------------------------------------------------

    def actions(self, state: State) -> Iterator[tuple[str, bool, State]]:
        """Yield every action that is possible: in words, whether it is bound to come, and the state it leads to."""
        mourning = any(rank.phase == "dead" for rank in state.ranks)
        for number, rank in enumerate(state.ranks):
            if rank.phase not in _ENDED:
                yield from self._rank_actions(state, number, mourning=mourning)
        for index, message in enumerate(state.messages):
            if index and message == state.messages[index - 1]:
                continue
            rest = (*state.messages[:index], *state.messages[index + 1 :])
            told = f"round {message.number} {message.way}, rank {message.rank}"
            yield f"{told} arrives", True, self._arrived(state._replace(messages=rest), message)
            if state.copies:
                doubled = tuple(sorted((*state.messages, message)))
                yield f"{told} is doubled", False, state._replace(messages=doubled, copies=state.copies - 1)

    def _rank_actions(self, state: State, number: int, *, mourning: bool) -> Iterator[tuple[str, bool, State]]:
        rank = state.ranks[number]
        acts_left = rank.phase == "running" and len(rank.answers) < len(self.acts)
        if rank.waiting < 0:
            yield f"rank {number} goes on", True, self._moved(state, number, "go")
            if state.absences and acts_left and rank.away != "away":
                left = state._replace(absences=state.absences - 1)
                yield f"rank {number} makes no more calls", False, self._moved(left, number, "leave")
        elif mourning:
            yield f"rank {number} gives up", True, self._ended(state, number, "failed")
        if rank.away == "away" and acts_left and self.acts[len(rank.answers)].kind in _SAID:
            yield f"rank {number} goes on while it is away", True, self._moved(state, number, "say")
        if state.deaths:
            yield f"rank {number} dies", False, self._ended(state._replace(deaths=state.deaths - 1), number, "dead")

    def _moved(self, state: State, number: int, how: str) -> State:
        rank, frame = self._remembered("move", number, state.ranks[number], how)
        if frame is None:
            return _with_rank(state, number, rank)
        message = Message("up", number, rank.waiting, frame)
        return _with_rank(state, number, rank)._replace(messages=tuple(sorted((*state.messages, message))))

    def _ended(self, state: State, number: int, phase: Literal["failed", "dead"]) -> State:
        rank = state.ranks[number]
        called = phase != "dead" and rank.asked in ("decision", "write")
        answers = (*rank.answers, "lost") if called else rank.answers
        state = _with_rank(state, number, rank._replace(phase=phase, waiting=-1, answers=answers))
        return state if number else state._replace(root=state.root._replace(alive=False))

    def _arrived(self, state: State, message: Message) -> State:
        if message.way == "down":
            rank = state.ranks[message.rank]
            if rank.waiting != message.number or rank.phase in _ENDED:
                return state
            return _with_rank(state, message.rank, self._remembered("hear", message.rank, rank, message.data))
        if not state.root.alive:
            return state
        root, receivers = self._remembered("take", message.rank, state.root, message)
        replies = [Message("down", receiver, message.number, root.reply) for receiver in receivers]
        return state._replace(root=root, messages=tuple(sorted((*state.messages, *replies))))

    def _remembered(self, what: str, number: int, part: Rank | Root, given: Hashable) -> Any:
        key = (what, number, part, given)
        if key not in self._memory:
            self._memory[key] = getattr(self, f"_{what}")(number, part, given)
        return self._memory[key]

    # -- what a rank does, from its own state alone ----------------------------------------------------------------

    def _move(self, number: int, rank: Rank, how: str) -> tuple[Rank, bytes | None]:
        ledger = self._ledgers[number]
        _thaw(ledger, rank.ledger)
        if rank.away == "away" and how == "go":
            return self._asking(ledger, rank, "ended", None)
        if rank.phase == "running" and how != "leave":
            rank = self._past_what_it_skips(number, rank)
            if len(rank.answers) < len(self.acts):
                return self._act(ledger, number, rank)
        rank = _back(rank)._replace(phase="absent", early=rank.early or how == "leave")
        return self._asking(ledger, rank, "closed", None)

    def _act(self, ledger: SimRank, number: int, rank: Rank) -> tuple[Rank, bytes | None]:
        """Do what is next in the script; a call first raises what the end of an epoch was refused for."""
        answers = rank.answers
        act = self.acts[len(answers)]
        if act.kind in _SAID:
            if act.rank == number:
                _say(ledger, act)
            return rank._replace(ledger=_freeze(ledger), answers=(*answers, None)), None
        refusal, rank = rank.refusal, _back(rank)
        if act.kind == "end":
            ledger._settle()
            rank = rank._replace(away="away", taken=rank.window, window=0, answers=(*answers, None))
            return self._asking(ledger, rank, "ended", None)
        recorded = 1 << len(answers)
        rank = rank._replace(recorded=rank.recorded | recorded, window=rank.window | recorded)
        answer: Hashable = refusal
        if refusal is None:
            if act.kind == "write":
                return self._asking(ledger, rank, "write", act.value)
            step = -1 if act.rank == number else act.value
            if not ledger.leased(step):
                return self._asking(ledger, rank, "decision", step)
            answer = False
        return rank._replace(ledger=_freeze(ledger), answers=(*answers, (answer, ledger.calls))), None

    def _past_what_it_skips(self, number: int, rank: Rank) -> Rank:
        answers, out = rank.answers, False
        while len(answers) < len(self.acts) and (out := sits_out(self.acts[len(answers)], number, out=out)):
            answers = (*answers, _SKIPPED)
        return rank._replace(answers=answers)

    def _asking(self, ledger: SimRank, rank: Rank, kind: Any, step: int | None) -> tuple[Rank, bytes]:
        if kind != "ended":  # then it goes on with what it had when it ended
            taken = rank.window if kind != "decision" or self._write == "auto" else 0
            rank = rank._replace(taken=taken, window=rank.window & ~taken)
        window = Window(_SCHEMA, pack_values([float(rank.taken), 1.0])) if rank.taken else Window()
        waiting = ledger._round
        frame = ledger._frame(kind, step, window=window)
        return rank._replace(ledger=_freeze(ledger), waiting=waiting, asked=kind), frame

    def _hear(self, number: int, rank: Rank, reply: bytes) -> Rank:
        ledger = self._ledgers[number]
        _thaw(ledger, rank.ledger)
        refusal, seq, ready = None, None, False
        try:
            decision = ledger._accept(reply, ended=bool(rank.away))
        except (AgreedError, UnreadableReply) as error:
            refusal = (type(error).__name__, str(error))
        else:
            seq, ready = decision.entry and decision.entry.seq, decision.log_ready
        shared = (ledger._state, refusal, seq, ready, ledger._finished, ledger._epoch_over)
        own = (ledger._left, ledger.calls, ledger._entry_call)
        rank = rank._replace(
            ledger=_freeze(ledger), waiting=-1, granted=Granted(ledger._round, shared, rank.asked, own)
        )
        if rank.away:
            over = ledger._epoch_over
            if over and ledger._left:
                msg = f"rank {number} comes back with a lease of {ledger._left} calls"
                raise Violation(msg)
            taken = rank.taken if seq is None else 0
            return rank._replace(away="over" if over else "away", refusal=refusal if over else None, taken=taken)
        rank = rank._replace(window=rank.window | rank.taken if seq is None else rank.window, taken=0)
        if rank.phase == "running":
            answer: Hashable = refusal or (seq if rank.asked == "write" else ready)
            return rank._replace(answers=(*rank.answers, (answer, ledger.calls)))
        if not ledger._finished:
            return rank
        if refusal is not None and not rank.refused:
            return rank._replace(refused=True)  # the round is made once more, as TrainingLog.close does
        return rank._replace(phase="done")

    # -- what the root does ----------------------------------------------------------------------------------------

    def _take(self, number: int, root: Root, message: Message) -> tuple[Root, tuple[int, ...]]:
        """Take in a request; return the root, and the ranks that its last reply goes to now."""
        if message.number == root.number - 1:
            return self._desk.again(self, root), (number,)
        if message.number < root.number or root.frames[number] is not None:
            return root, ()
        this = Round(root.number, self.world_size)
        for rank, frame in enumerate(root.frames):
            if frame is not None:
                this.add(rank, frame)
        this.add(number, message.data)
        if not this.complete:
            frames = tuple(message.data if rank == number else frame for rank, frame in enumerate(root.frames))
            return root._replace(frames=frames), ()
        decided = self.decide(root, this.frames())
        return decided._replace(number=root.number + 1, frames=(None,) * self.world_size), tuple(range(self.world_size))

    def decide(self, root: Root, frames: list[bytes]) -> Root:
        """Have the coordinator decide a round."""
        self._thaw_coordinator(root.coordinator)
        reply, entries = self._coordinator.handle(frames)
        logged, count = root.logged, root.entries
        for entry in entries:
            if entry.seq != count:
                msg = f"entry {entry.seq} is the {count + 1}. that was made"
                raise Violation(msg)
            count += 1
            new = [int(entry.metrics.get(f"x/rank{rank}", 0)) for rank in range(self.world_size)]
            if any(before & values for before, values in zip(logged, new, strict=True)):
                msg = f"entry {entry.seq} has values that are in an earlier one: {entry.metrics}"
                raise Violation(msg)
            logged = tuple(before | values for before, values in zip(logged, new, strict=True))
        coordinator = self._freeze_coordinator()
        return root._replace(coordinator=coordinator, decided=tuple(frames), reply=reply, entries=count, logged=logged)

    def _freeze_coordinator(self) -> Frozen:
        coordinator = self._coordinator
        held = {n: v for n, v in vars(coordinator).items() if n not in _APART}
        return (
            tuple(held.items()),
            tuple(vars(coordinator.frequency_manager).items()),
            coordinator._cadence.snapshot(),
            tuple(coordinator._steps.items()),
        )

    def _thaw_coordinator(self, frozen: Frozen) -> None:
        held, manager, rhythms, steps = frozen
        coordinator: Any = self._coordinator
        vars(coordinator).update(held)
        vars(coordinator.frequency_manager).update(manager)
        coordinator._cadence.restore(rhythms)
        coordinator._steps = dict(steps)  # type: ignore[call-overload]

    # -- the promises ----------------------------------------------------------------------------------------------

    def check(self, state: State) -> None:
        """Check what holds in every state.

        Raises:
            Violation: it does not.
        """
        first, *others = state.ranks
        for number, other in enumerate(others, 1):
            for earlier in (first, *others[: number - 1]):
                _check_agreement(earlier, other)

    def check_end(self, state: State) -> None:
        """Check what holds where nothing has to happen any more.

        Raises:
            Violation: it does not.
        """
        for number, rank in enumerate(state.ranks):
            if rank.phase not in _ENDED:
                msg = f"rank {number} waits for round {rank.waiting} for ever"
                raise Violation(msg)
            if rank.phase == "done" and not rank.early and len(rank.answers) < len(self.acts):
                msg = f"rank {number} has {len(rank.answers)} answers to {len(self.acts)} acts"
                raise Violation(msg)
        if all(rank.phase == "done" for rank in state.ranks):
            recorded = tuple(rank.recorded for rank in state.ranks)
            if recorded != state.root.logged:
                msg = f"ranks recorded {recorded} and entries have {state.root.logged}, a bit for each act"
                raise Violation(msg)


def _with_rank(state: State, number: int, rank: Rank) -> State:
    return state._replace(ranks=(*state.ranks[:number], rank, *state.ranks[number + 1 :]))


def _check_agreement(one: Rank, other: Rank) -> None:
    for act, answers in enumerate(zip(one.answers, other.answers, strict=False)):
        if answers[0] != answers[1] and {"lost", _SKIPPED}.isdisjoint(answers):
            msg = f"act {act} has two answers: {answers}"
            raise Violation(msg)
    ours, theirs = one.granted, other.granted
    if ours is None or theirs is None or ours.round != theirs.round:
        return
    # Those that still call are at the same place after every round, those that had ended when all have.
    alike = ours.who == theirs.who and (ours.who in ("decision", "write") or "over" == one.away == other.away)
    if ours.shared != theirs.shared or (alike and ours.own != theirs.own):
        msg = f"after one round ranks stand at {ours} and {theirs}"
        raise Violation(msg)


def _back(rank: Rank) -> Rank:
    """Return a rank as it goes on after the end of an epoch, if it had ended one."""
    return rank._replace(away="", refusal=None, window=rank.window | rank.taken, taken=0) if rank.away else rank


def _say(ledger: SimRank, act: Op) -> None:
    if act.kind == "update":
        ledger.model_updated(act.value)
    else:
        ledger.set_frequency(act.value)


def _freeze(ledger: Ledger) -> Frozen:
    # What is left in _steps of earlier leases would tell states apart that are the same.
    left, lease = ledger._left, ledger._lease
    steps = tuple(step if left < place <= lease else None for place, step in enumerate(ledger._steps))
    return (*(getattr(ledger, name) for name in _KEPT), steps, tuple(ledger._falls), tuple(ledger._events))


def _thaw(ledger: Ledger, frozen: Frozen) -> None:
    for name, value in zip(_KEPT, frozen, strict=False):
        setattr(ledger, name, value)
    for name, value in zip(_LISTS, frozen[len(_KEPT) :], strict=True):
        setattr(ledger, name, list(value))  # type: ignore[call-overload]
    ledger._last_entry = None
