"""Whole jobs in one thread: the real coordinator, host, rounds, ledgers and windows, on a clock and a network of ours.

A `Scenario` is plain data drawn from a seed: what the script does, and what goes wrong. `simulate` plays it, from the
first start of the job to its last, and checks the promises; `shrink` makes a scenario that breaks one small.

The network is the one of the design's request and reply: a request is idempotent per (run, round, rank), is sent again
until its reply comes, and a round that is complete is answered with the same bytes, never decided again.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, NoReturn

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import AgreedError, UnreadableReply
from logsync.coordinator.host import Host
from logsync.coordinator.messages import (
    Decision,
    Hello,
    LogEntry,
    Window,
    decode_decision,
    decode_state,
    encode_hello,
)
from logsync.coordinator.rounds import Round
from logsync.coordinator.sinks.base import RunInfo, SinkSet
from logsync.workers.window import OpenWindow, Taken
from support.lockstep import SimRank, settings

__all__ = [
    "REAL",
    "Absence",
    "Broken",
    "Fault",
    "Life",
    "Member",
    "Noise",
    "Op",
    "Parts",
    "Root",
    "Scenario",
    "draw",
    "fails",
    "shrink",
    "simulate",
]

TIMEOUT = 1000
"""By when the transport has told every survivor that a rank is gone."""

RESEND = 200
_MOST_EVENTS = 5_000
_RUNNING = frozenset(("hello", "running", "absent"))
_KEY_IDS = 20  # how many values share a metric name: two bits each, so that sums stay exact and tell a value twice


# -- scenarios ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """What the script does next, on every rank alike, or with `rank` on that one only.

    Args:
        kind: call and write as in the log; update, frequency and written are said by one rank; save is a checkpoint.
        value: the step, or the frequency.
        rank: who says it; at a call, who gives a step that is no step.
        records: the ranks that record a value just before, a bit each.
        check: check_model_update.
    """

    kind: Literal["call", "write", "update", "frequency", "written", "save"]
    value: int | None = None
    rank: int = -1
    records: int = 0
    check: bool = False


@dataclass(frozen=True)
class Fault:
    """A rank goes, `delay` after it has come to `op`.

    dies: without a word. raises: its script leaves the log. stalls: it comes back long after the timeout. killed: the
    whole job dies with it.
    """

    kind: Literal["dies", "raises", "stalls", "killed"]
    rank: int
    op: int
    delay: int = 0


@dataclass(frozen=True)
class Absence:
    """A rank makes no more calls from `op` on, and answers the others' rounds with frames of `kind`."""

    kind: Literal["closed"]
    rank: int
    op: int


@dataclass(frozen=True)
class Noise:
    """What the network does to the first copy of one request (`up`) or reply."""

    kind: Literal["lost", "doubled", "slow"]
    up: bool
    rank: int
    round: int


@dataclass(frozen=True)
class Life:
    """One start of the job."""

    world_size: int
    faults: tuple[Fault, ...] = ()
    absences: tuple[Absence, ...] = ()
    noise: tuple[Noise, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """A job from its first start to its last. `skew`: by how much a rank's epoch fraction differs from the one below.

    `jitter` seeds the length of every delay; 0 makes them all alike.
    """

    ops: tuple[Op, ...]
    lives: tuple[Life, ...]
    log_frequency: int | None = 3
    mode: str = "exact"
    frequency_type: str = "step"
    write: str = "auto"
    max_lease: int = 1000
    skew: float = 0.0
    jitter: int = 0

    @property
    def size(self) -> int:
        """How much there is to read."""
        faults = sum(1 + len(life.faults) + len(life.absences) + len(life.noise) for life in self.lives)
        return len(self.ops) + faults + sum(life.world_size for life in self.lives)

    def __str__(self) -> str:
        names = ("log_frequency", "mode", "frequency_type", "write", "max_lease", "skew", "jitter")
        lines = [", ".join(f"{name}={getattr(self, name)!r}" for name in names)]
        lines += [f"  op {number}: {_told(op)}" for number, op in enumerate(self.ops)]
        for number, life in enumerate(self.lives):
            lines.append(f"  life {number}: {life.world_size} ranks")
            lines += [f"    {_told(item)}" for item in (*life.faults, *life.absences, *life.noise)]
        return "\n".join(lines)


def _told(item: Any) -> str:
    unlike = {name: value for name, value in vars(item).items() if value != getattr(type(item), name, ...)}
    return f"{unlike.pop('kind')} " + ", ".join(f"{name}={value!r}" for name, value in unlike.items())


def draw(seed: int) -> Scenario:
    """Return the scenario of `seed`."""
    rng = random.Random(seed)
    ops = _draw_ops(rng)
    frequency_type = rng.choice(("step", "step", "batch", "epoch"))
    lives = [_draw_life(rng, len(ops), last=False) for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))]
    lives.append(_draw_life(rng, len(ops), last=True))
    return Scenario(
        ops=ops,
        lives=tuple(lives),
        log_frequency=rng.choice((1, 2, 3, 4, 7, 10, None)),
        mode=rng.choice(("exact", "exact", "on_update", "on_change")),
        frequency_type=frequency_type,
        write=rng.choice(("auto", "auto", "explicit")),
        max_lease=rng.choice((0, 1, 2, 5, 1000)),
        skew=rng.choice((0.0, 0.01, -0.01)) if frequency_type == "epoch" else 0.0,
        jitter=rng.randrange(1, 2**31),
    )


def _draw_ops(rng: random.Random) -> tuple[Op, ...]:
    step = rng.choice((0, 0, 1, 50))
    rise = rng.choice((1, 1, 1, 2, 5))
    repeats = rng.choice((1, 1, 1, 2, 4))
    saves, writes, said, recorded = (rng.choice((0.0, 0.1, 0.3)) for _ in range(4))
    rolls, bad, odd = rng.choice((0.0, 0.0, 0.05)), rng.choice((0.0, 0.0, 0.05)), rng.choice((0.0, 0.1))
    chance, bits, ops = rng.random, rng.getrandbits, []
    for call in range(rng.randrange(2, 30)):
        if chance() < said:
            kind: Any = rng.choice(("update", "update", "frequency", "written"))
            value = rng.choice((1, 2, 5, None)) if kind == "frequency" else max(0, step + rng.choice((0, 0, 1, -1, 9)))
            ops.append(Op(kind, value, rng.randrange(6)))
        if call % repeats == 0:
            step += rise
        if chance() < odd:
            step += rng.choice((1, 3, 20))
        if chance() < rolls:
            step = max(0, step - rng.randrange(1, 15))
        records = bits(6) if chance() < recorded else (63 if recorded else 0)
        culprit = rng.randrange(6) if chance() < bad else -1
        value = None if chance() < odd / 10 else step
        ops.append(Op("call", value, culprit, records, chance() < odd))
        if chance() < writes:
            ops.append(Op("write", step, -1, bits(6)))
        if chance() < saves:
            ops.append(Op("save"))
    return tuple(ops)


def _draw_life(rng: random.Random, ops: int, *, last: bool) -> Life:
    world_size = rng.choice((1, 2, 2, 3, 3, 4, 5, 6))
    faults, absences = [], []
    if rng.random() < (0.25 if last else 0.9):
        kind: Any = rng.choice(("dies", "dies", "raises", "stalls", "killed"))
        faults.append(Fault(kind, rng.randrange(world_size), rng.randrange(ops), rng.choice((0, rng.randrange(60)))))
    if rng.random() < 0.3:
        ranks = rng.sample(range(world_size), rng.randrange(1, world_size + 1))
        absences = [Absence("closed", rank, rng.randrange(ops + 1)) for rank in ranks]
    noise = [
        Noise(rng.choice(("lost", "doubled", "slow")), rng.random() < 0.5, rng.randrange(world_size), rng.randrange(12))
        for _ in range(rng.choice((0, 1, 3, 8)))
    ]
    return Life(world_size, tuple(faults), tuple(absences), tuple(noise))


# -- the ranks and the root --------------------------------------------------------------------------------------------


class Broken(AssertionError):
    """A promise was broken. `rule` says which: what a scenario is shrunk by."""

    def __init__(self, rule: str, text: str) -> None:
        super().__init__(f"{rule}: {text}")
        self.rule = rule


def _breaks(rule: str, text: str) -> NoReturn:
    raise Broken(rule, text)


class Member(SimRank):
    """A rank as `TrainingLog` has it, its waits turned into events."""

    brings_its_loaded_entry = True
    tells_its_host_of_a_loaded_state = True

    def __init__(self, rank: int, life: Life, scenario: Scenario, start: int) -> None:
        super().__init__(rank, life.world_size, max_lease=scenario.max_lease, frequency_type=scenario.frequency_type)
        self.rank = rank
        self.host: Host | None = None
        self.window = OpenWindow()
        self.taken = Taken.nothing()
        self.seq_before = 0  # on the root's rank: what the next entry would be when `taken` was taken
        self.parked = 0
        self.pc = start
        self.phase = "hello"
        self.waiting = -1  # for the reply of this round
        self.asked = "hello"
        self.frame = b""
        self.lost = False  # the transport knows that the group is lost
        self.refused = False
        self.since = 0  # when the wait began, or the rank ended
        self.answers: dict[int, object] = {}
        self.recorded: list[int] = []  # by value, the op it was recorded at
        self.fault = next((f for f in life.faults if f.rank == rank), None)
        self.absence = next((a for a in life.absences if a.rank == rank), None)

    @property
    def running(self) -> bool:
        return self.phase in _RUNNING

    def record(self, life: int) -> None:
        number = len(self.recorded)
        self.recorded.append(self.pc)
        key = f"x{life}_{number // _KEY_IDS}"
        self.window.record({key: 4.0 ** (number % _KEY_IDS)}, reduce="sum", per_rank=True)

    def answered_locally(self, step: object) -> bool:
        """Make a call; say whether the lease answers it."""
        if self.leased(step):
            return True
        if not self.parked:
            return False
        lease, self.parked = self.parked, 0
        self.release()
        self._lease = lease
        self._steps[lease] = step
        self._left = lease - 1
        return True

    def ask(self, kind: Any, step: object, *, check: bool, carries: bool) -> bytes:
        """Return the frame of a round that begins here."""
        self.parked = 0
        self.release()
        self.taken = self.window.take() if carries else Taken.nothing()
        self.seq_before = self.host.coordinator.next_seq if self.host is not None else 0
        return self._frame(kind, step, check_model_update=check, window=self.taken.message)

    def hear(self, reply: bytes) -> Decision | AgreedError | UnreadableReply:
        """Take in a reply."""
        try:
            decision = self._accept(reply)
        except (AgreedError, UnreadableReply) as error:
            self.refuse()
            return error
        if decision.entry is None:
            self.window.give_back(self.taken)
        self.taken = Taken.nothing()
        if self.host is not None and self.host.holds_entry:
            self.parked, self._lease, self._left = self._left, 0, 0
        return decision

    def refuse(self) -> None:
        """Keep what a refused frame had carried."""
        self.window.give_back(self.taken)
        self.taken = Taken.nothing()

    def lose(self) -> None:
        """Take in that no reply will come."""
        if not self.in_an_entry():
            self.window.give_back(self.taken)
        self.taken = Taken.nothing()

    def in_an_entry(self) -> bool:
        """Whether the root, in this process, has made an entry of what was taken, though its reply never came."""
        return self.host is not None and self.host.coordinator.next_seq != self.seq_before

    def load(self, state: bytes) -> None:
        self.load_state_dict({"state": state})
        if self.host is not None and self.tells_its_host_of_a_loaded_state:
            self.host.loaded(self.state, self.last_entry if self.brings_its_loaded_entry else None, self.calls)

    def release(self) -> None:
        if self.host is not None:
            self.host.release()

    def last_window(self, _: int) -> Window:
        return self.window.take().message


class Root:
    """The root's side of the network: frames one by one in, replies out."""

    def __init__(self, host: Host, world_size: int) -> None:
        self.host = host
        self.alive = True
        self.round = Round(0, world_size)
        self.frames: list[bytes] = []
        self.reply = b""

    def take(self, rank: int, number: int, frame: bytes) -> list[tuple[int, bytes]]:
        """Take in a request; return the replies that go out now, as (rank, reply)."""
        this = self.round
        if number == this.number - 1:
            return self.again(rank)
        if number < this.number:
            return []  # an old copy: its sender has gone on
        if rank not in this.missing:
            return []
        this.add(rank, frame)
        if not this.complete:
            return []
        self.frames = this.frames()
        self.reply = self.host.handle(self.frames)
        self.round = Round(number + 1, len(self.frames))
        return [(rank, self.reply) for rank in range(len(self.frames))]

    def again(self, rank: int) -> list[tuple[int, bytes]]:
        """Answer a request of the round that was decided last once more."""
        return [(rank, self.reply)]


@dataclass(frozen=True)
class Parts:
    """What a simulation is built from; mutants replace one."""

    coordinator: type[Coordinator] = Coordinator
    root: type[Root] = Root
    member: type[Member] = Member


REAL = Parts()


class File:
    """The lines of metrics.jsonl, kept over restarts as `JsonlSink` keeps them."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, LogEntry]] = []  # with the life that wrote it
        self.life = 0
        self.origin = -1  # the life whose checkpoint this one goes on from
        self.writer = -1  # the life that opened it last
        self.first_partial = False  # whether the first entry of this life is to be partial
        self.leaving = False
        self.recovered = 0
        self.leftovers: set[tuple[int, int]] = set()  # by life and seq
        self.wrong: list[str] = []  # a sink must not raise, it would be caught

    def open(self, run: RunInfo) -> None:
        if self.lines:
            keep = run.next_seq if run.resumed else 0
            cut = next((i for i, (_, entry) in enumerate(self.lines) if entry.seq >= keep), len(self.lines))
            del self.lines[cut:]
        last = run.last_entry
        if last is not None and last.seq == len(self.lines):
            self.lines.append((self.origin, last))
            self.recovered += 1
        self.writer = self.life

    def write(self, entry: LogEntry) -> None:
        expected = self.leaving or self.first_partial
        if entry.partial != expected:
            self.wrong.append(f"entry {entry.seq} of life {self.life} has partial={entry.partial}")
        self.first_partial = False
        if self.leaving:
            self.leftovers.add((self.life, entry.seq))
        self.lines.append((self.life, entry))

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class _Checkpoint:
    life: int
    op: int
    state: bytes
    missed: int


# -- the simulation ----------------------------------------------------------------------------------------------------


class _Packet(NamedTuple):
    """Which message: a request ("up") or reply, of whom, in which round, and the how manieth copy of it."""

    way: str
    rank: int
    round: int
    copy: int


class _World:
    """One life of the job."""

    def __init__(self, job: _Job, number: int, origin: _Checkpoint | None) -> None:
        scenario, life = job.scenario, job.scenario.lives[number]
        self.number = number
        self.life = life
        self.origin = origin
        self.members = [
            job.parts.member(rank, life, scenario, 0 if origin is None else origin.op + 1)
            for rank in range(life.world_size)
        ]
        coordinator = job.parts.coordinator(job.config, life.world_size, run=f"run{number}", run_dir="runs/x")
        host = Host(
            coordinator, SinkSet([job.file]), name="train", world_size=life.world_size, clock=lambda: float(job.now)
        )
        self.members[0].host = host
        self.root = job.parts.root(host, life.world_size)
        self.noise = {("up" if n.up else "down", n.rank, n.round): n.kind for n in life.noise}
        self.outcomes: dict[int, object] = {}  # by round
        self.standings: dict[int, object] = {}
        self.answers: dict[int, tuple[object, int]] = {}  # by call, with the first rank that got it
        self.saves: dict[int, dict[int, bytes]] = {}
        self.struck_at = -1

    @property
    def running(self) -> bool:
        """Whether a rank still does something."""
        # A list and not a generator: this is asked after every event.
        return not _RUNNING.isdisjoint([member.phase for member in self.members])


class _Job:
    def __init__(self, scenario: Scenario, parts: Parts) -> None:
        self.scenario = scenario
        self.parts = parts
        self.config = settings(
            scenario.log_frequency,
            mode=scenario.mode,
            frequency_type=scenario.frequency_type,
            write=scenario.write,
            max_lease=scenario.max_lease,
        )
        self.facts: Counter[str] = Counter(runs=1)
        self.now = 0
        self.queue: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self.scheduled = 0
        self.file = File()
        self.worlds: list[_World] = []
        self.saved: _Checkpoint | None = None  # the newest complete checkpoint
        self.rolled_back: set[int] = set()  # the seqs whose entries may have a lower step than the entry before

    # -- time and the network --------------------------------------------------------------------------------------

    def run(self) -> Counter[str]:
        for number in range(len(self.scenario.lives)):
            self._start(number)
            self._play(self.worlds[-1])
            self._check_life(self.worlds[-1])
        self._check_file()
        return self.facts

    def _start(self, number: int) -> None:
        world = _World(self, number, self.saved)
        self.worlds.append(world)
        self.file.life = number
        self.file.origin = self.saved.life if self.saved is not None else -1
        self.file.first_partial = self.saved is not None and self.saved.missed > 0
        self.facts["restarts"] += number > 0
        self.facts["resumed"] += self.saved is not None
        for member in world.members:
            hello = Hello(member.rank, world.life.world_size, "1", self.config)
            self._send(world, member, encode_hello(hello), "hello")

    def _play(self, world: _World) -> None:
        for _ in range(_MOST_EVENTS):
            if not world.running:
                return
            if not self.queue:
                waiting = [(m.rank, m.phase, m.waiting) for m in world.members if m.running]
                _breaks("termination", f"nothing happens any more in life {world.number}, but wait: {waiting}")
            self.now, _, act, arguments = heapq.heappop(self.queue)
            act(*arguments)
        _breaks("termination", f"life {world.number} does not end")

    def _at(self, when: int, act: Callable[..., None], *arguments: Any) -> None:
        self.scheduled += 1
        heapq.heappush(self.queue, (when, self.scheduled, act, arguments))

    def _pause(self, *what: int) -> int:
        return 1 + (hash((self.scenario.jitter, *what)) % 40 if self.scenario.jitter else 0)

    def _send(self, world: _World, member: Member, frame: bytes, asked: str) -> None:
        member.frame, member.asked, member.waiting, member.since = frame, asked, member._round, self.now
        if member.lost:
            self._at(self.now + 1, self._lose, world, member)
        else:
            self._request(world, member, member._round, frame, 0)

    def _request(self, world: _World, member: Member, number: int, frame: bytes, copy: int) -> None:
        if member.waiting != number or not member.running:
            return
        self._carry(world, _Packet("up", member.rank, number, copy), frame)
        # Sent again until the reply comes. Only what is lost needs it; without noise it would change nothing.
        if {("up", member.rank, number), ("down", member.rank, number)} & world.noise.keys():
            self._at(self.now + RESEND, self._request, world, member, number, frame, copy + 1)

    def _carry(self, world: _World, packet: _Packet, data: bytes) -> None:
        kind = world.noise.get(packet[:3]) if packet.copy == 0 else None
        if kind is not None:
            self.facts[f"{kind} messages"] += 1
        if kind == "lost":
            return
        way, rank, number, copy = packet
        arrive = self._arrive if way == "up" else self._hear
        pause = self._pause(world.number, way == "up", rank, number, copy)
        self._at(self.now + pause + (2 * RESEND if kind == "slow" else 0), arrive, world, rank, number, data)
        if kind == "doubled":
            pause = 3 * self._pause(world.number, way == "up", rank, number, -1)
            self._at(self.now + pause, arrive, world, rank, number, data)

    def _arrive(self, world: _World, rank: int, number: int, frame: bytes) -> None:
        """Bring a request to the root. One of an earlier life finds another run there, or nobody."""
        if world is not self.worlds[-1] or not world.root.alive:
            self.facts["late requests"] += 1
            return
        before, root = world.root.round.number, world.root
        self.facts["requests again"] += number < before or rank not in root.round.missing
        replies = root.take(rank, number, frame)
        if root.round.number != before:
            self._decided(decode_decision(root.reply))
        for receiver, reply in replies:
            copy = 0 if root.round.number != before else 1
            self._carry(world, _Packet("down", receiver, number, copy), reply)

    def _decided(self, decision: Decision) -> None:
        self.facts["rounds"] += 1
        self.facts["entries"] += decision.entry is not None
        self.facts["agreed errors"] += decision.failure is not None
        if any(notice.startswith("the step went back") for notice in decision.notices):
            self.facts["rollbacks"] += 1
            self.rolled_back.add(decision.entry.seq if decision.entry is not None else decision.state.next_seq)

    # -- what a rank does ------------------------------------------------------------------------------------------

    def _go_on(self, world: _World, member: Member) -> None:
        """Run a rank's script up to its next round."""
        ops, then = self.scenario.ops, self.now
        while member.phase == "running":
            op = ops[member.pc] if member.pc < len(ops) else None
            quick = op is not None and (
                op.kind not in ("call", "write", "save") or (op.kind == "call" and member._left)
            )
            if then > self.now and not quick:
                self._at(then, self._go_on, world, member)
                return
            fault = member.fault
            if fault is not None and fault.op <= member.pc:
                if then > self.now:
                    self._at(then, self._go_on, world, member)
                    return
                member.fault = None
                if not fault.delay or fault.kind == "stalls":
                    self._strike(world, member, fault)
                    return
                self._at(self.now + fault.delay, self._strike, world, member, fault)
            absence = member.absence
            if op is None or (absence is not None and absence.op <= member.pc):
                self._be_absent(world, member, "closed" if absence is None else absence.kind)
                return
            if op.records >> member.rank & 1:
                member.record(world.number)
            if self._does(world, member, op):
                return
            then += self._pause(world.number, member.rank, member.pc)
            member.pc += 1

    def _does(self, world: _World, member: Member, op: Op) -> bool:
        """Do one thing of the script; say whether it is a round, to be waited for."""
        value: object = op.value
        if op.kind in ("call", "write"):
            if op.kind == "call" and op.rank == member.rank:
                value = -1
            elif self.scenario.skew and op.value is not None:
                value = op.value * (1 + self.scenario.skew * member.rank)
            if op.kind == "call" and member.answered_locally(value):
                self._answered(world, member, answer=False)
                self.facts["leased calls"] += 1
                return False
            carries = op.kind == "write" or self.scenario.write == "auto"
            kind = "decision" if op.kind == "call" else "write"
            self._send(world, member, member.ask(kind, value, check=op.check, carries=carries), kind)
            return True
        if op.kind == "save":
            self._save(world, member)
        elif op.rank == member.rank:
            if op.kind == "update":
                member.model_updated(op.value)
            elif op.kind == "written":
                member.log_written(op.value)
            else:
                member.set_frequency(op.value)
        return False

    def _be_absent(self, world: _World, member: Member, kind: str) -> None:
        if member.phase == "running":
            member.phase = "absent"
            self.facts["early closes"] += member.pc < len(self.scenario.ops)
        self._send(world, member, member.ask(kind, None, check=False, carries=True), kind)

    def _save(self, world: _World, member: Member) -> None:
        saves = world.saves.setdefault(member.pc, {})
        saves[member.rank] = state = member.state_dict()["state"]
        if len(set(saves.values())) > 1:
            _breaks("checkpoint", f"ranks {sorted(saves)} of life {world.number} save different states")
        away = {a.rank for a in world.life.absences if a.op <= member.pc}
        if len(saves.keys() | away) == world.life.world_size:
            self.facts["checkpoints"] += 1
            self.saved = _Checkpoint(world.number, member.pc, state, decode_state(state).missed)

    def _hear(self, world: _World, rank: int, number: int, reply: bytes) -> None:
        member = world.members[rank]
        if member.waiting != number or not member.running:
            return
        member.waiting = -1
        outcome = member.hear(reply)
        self._check_outcome(world, member, number, outcome)
        if member.asked == "decision":
            answer = outcome.log_ready if isinstance(outcome, Decision) else type(outcome)
            self._answered(world, member, answer=answer)
        if member.phase == "hello":
            if isinstance(outcome, (AgreedError, UnreadableReply)):
                _breaks("connect", str(outcome))
            member.phase = "running"
            if world.origin is not None:
                member.load(world.origin.state)
            self._go_on(world, member)
        elif member.phase == "absent":
            self._absent_heard(world, member, outcome)
        else:
            member.pc += 1
            self._go_on(world, member)

    def _absent_heard(self, world: _World, member: Member, outcome: Decision | AgreedError | UnreadableReply) -> None:
        """Go on as `TrainingLog.close` does."""
        if member._finished:
            if isinstance(outcome, Decision) or member.refused:
                member.phase, member.since = "done", self.now
                if member.host is not None:
                    member.host.close()
                return
            member.refused = True
        member.release()
        self._be_absent(world, member, member.asked)

    # -- what goes wrong -------------------------------------------------------------------------------------------

    def _strike(self, world: _World, member: Member, fault: Fault) -> None:
        if not member.running or world is not self.worlds[-1]:
            return
        self.facts[fault.kind] += 1
        world.struck_at = self.now
        if fault.kind == "killed":
            for each in world.members:
                each.phase = "dead" if each.running else each.phase
            world.root.alive = False
            return
        if fault.kind == "dies":
            member.phase = "dead"
            if member.host is not None:
                world.root.alive = False
        elif fault.kind == "raises":
            self._leave(world, member)
        else:
            self._at(self.now + 3 * TIMEOUT, self._wake_up, world, member)
        for other in world.members:
            if other is not member:
                pause = self._pause(world.number, other.rank)
                told = self.now + pause * (TIMEOUT // 41 if pause % 2 else 1)  # a broken connection, or the timeout
                self._at(told, self._tell_lost, world, other)

    def _wake_up(self, world: _World, member: Member) -> None:
        member.lost = True
        self._go_on(world, member)

    def _tell_lost(self, world: _World, member: Member) -> None:
        member.lost = True
        if member.waiting >= 0:
            self._lose(world, member)

    def _lose(self, world: _World, member: Member) -> None:
        """Raise a transport error out of a rank's round; its script leaves the log."""
        if member.waiting < 0 or not member.running:
            return
        member.waiting = -1
        if member.asked == "decision":
            member.answers[member.calls] = "lost"
        began = max(world.struck_at, member.since)
        if self.now > began + TIMEOUT + 1:
            _breaks("termination", f"rank {member.rank} waited until {self.now}, {self.now - began} after a loss")
        self._leave(world, member)

    def _leave(self, world: _World, member: Member) -> None:
        member.lose()
        member.phase, member.since = "failed", self.now
        if member.host is not None:
            member.release()
            member._settle()
            self.file.leaving = True
            member.host.leave(member.rank, member.last_window, member._current, member.calls)
            self.file.leaving = False
            member.host.close()
            world.root.alive = False

    # -- the promises ----------------------------------------------------------------------------------------------

    def _answered(self, world: _World, member: Member, *, answer: object) -> None:
        """Check that no two ranks get different answers to one call."""
        call = member.calls
        member.answers[call] = answer
        first, rank = world.answers.setdefault(call, (answer, member.rank))
        if first != answer:
            text = f"call {call} of life {world.number} is answered {first} on rank {rank}, {answer} on {member.rank}"
            _breaks("agreement", text)

    def _check_outcome(
        self, world: _World, member: Member, number: int, outcome: Decision | AgreedError | UnreadableReply
    ) -> None:
        seen: object = (type(outcome), str(outcome)) if isinstance(outcome, (AgreedError, UnreadableReply)) else outcome
        if world.outcomes.setdefault(number, seen) != seen:
            _breaks("agreement", f"rank {member.rank} of life {world.number} has another outcome of round {number}")
        entry = member.last_entry.seq if member.last_entry is not None else -1
        standing = (member.state, entry, member._left + member.parked, member._finished)
        if world.standings.setdefault(number, standing) != standing:
            first = world.standings[number]
            text = f"rank {member.rank} of life {world.number} stands at {standing} after round {number}, not {first}"
            _breaks("state", text)

    def _check_life(self, world: _World) -> None:
        for member in world.members:
            self.facts["calls"] += member.calls
            if member.phase == "dead":
                continue
            # A rank that raised in its own code may have left while it waited: then that call has no outcome.
            calls = member.calls
            want = set(range(1, calls + 1))
            if not want - {calls} <= member.answers.keys() <= want or (
                member.phase == "done" and member.answers.keys() != want
            ):
                text = f"rank {member.rank} made {calls} calls and has answers to {sorted(member.answers)}"
                _breaks("answers", text)
            if member.phase == "failed" and world.struck_at < 0:
                _breaks("termination", f"rank {member.rank} of life {world.number} failed without a reason")
        if world.struck_at < 0 and any(m.refused for m in world.members):
            self.facts["refused at the end"] += 1

    def _check_file(self) -> None:
        lines = self.file.lines
        if self.file.wrong:
            _breaks("partial", "; ".join(self.file.wrong))
        seqs = [entry.seq for _, entry in lines]
        if seqs != list(range(len(seqs))):
            _breaks("seq", f"the file has the entries {seqs}")
        for (_, before), (life, entry) in pairwise(lines):
            # What a rank writes that leaves has its own step: no round could say that it went back. A log at step None
            # forgets the logs before it.
            told = (life, entry.seq) in self.file.leftovers or any(seq <= entry.seq for seq in self.rolled_back)
            if not told and before.step is not None and entry.step is not None and entry.step < before.step:
                text = f"entry {entry.seq} is at step {entry.step}, the one before at {before.step}, and nobody said so"
                _breaks("steps", text)
        if any(b.attempt < a.attempt for (_, a), (_, b) in pairwise(lines)):
            _breaks("attempt", f"attempts go back: {[e.attempt for _, e in lines]}")
        self._check_values()

    def _check_values(self) -> None:
        """Check that every value is in one entry, or excused."""
        there = _values_of(self.file.lines)
        kept = self._kept()
        last = self.worlds[-1]
        for world in self.worlds:
            for member in world.members:
                found = there.pop((world.number, member.rank), {})
                where = f"of rank {member.rank} in life {world.number}"
                twice = [number for number, times in found.items() if times != 1]
                if twice or not found.keys() <= set(range(len(member.recorded))):
                    _breaks("values", f"values {twice or sorted(found)} {where} are in the file twice or oddly")
                end = kept.get(world.number, -1)
                asked = [number for number, op in enumerate(member.recorded) if op <= end]
                if not found.keys() <= set(asked):
                    _breaks("values", f"values {sorted(found)} {where} are in the file, but were replaced")
                missing = [number for number in asked if number not in found]
                if missing and missing != asked[-len(missing) :]:
                    _breaks("values", f"values {missing} {where} are missing, and not the newest ones")
                if missing and world is last and all(m.phase == "done" for m in world.members):
                    _breaks("values", f"values {missing} {where} are missing, though all ranks closed")
                if missing and world.number in kept and world.number != max(kept):
                    self._check_excused(world.number, where)
                self.facts["values"] += len(found)
                self.facts["lost values"] += len(missing)
        if there:
            _breaks("values", f"the file has values that nobody recorded: {sorted(there)}")
        clean = all(m.phase == "done" for m in last.members)
        if clean and self.file.writer != last.number and any(m.recorded for m in last.members):
            _breaks("values", f"life {last.number} recorded and closed, and the file was never opened")
        self.facts["clean ends"] += clean
        self.facts["recovered entries"] += self.file.recovered

    def _kept(self) -> dict[int, int]:
        """Return the lives whose values the file is to have, with the last op of each that counts."""
        if self.file.writer < 0:
            return {}
        kept = {self.file.writer: len(self.scenario.ops)}
        origin = self.worlds[self.file.writer].origin
        while origin is not None:
            kept[origin.life] = origin.op
            origin = self.worlds[origin.life].origin
        return kept

    def _check_excused(self, number: int, where: str) -> None:
        """Values that a checkpoint did not hold make the first entry after it partial."""
        after = next((entry for life, entry in self.file.lines if life > number), None)
        if after is not None and not after.partial:
            _breaks("partial", f"entry {after.seq} is not marked partial, but values {where} are missing")


def _values_of(lines: list[tuple[int, LogEntry]]) -> dict[tuple[int, int], dict[int, int]]:
    """Return by (life, rank) how often each value is in the file."""
    sums: dict[tuple[str, str], float] = {}
    for _, entry in lines:
        whole: dict[str, float] = {}
        for name, value in entry.metrics.items():
            key, slash, rank = name.partition("/rank")
            if slash:
                sums[key, rank] = sums.get((key, rank), 0.0) + value
                whole[key] = whole.get(key, 0.0) + value
        if any(entry.metrics[key] != value for key, value in whole.items()):
            _breaks("values", f"entry {entry.seq} does not add up: {entry.metrics}")
    there: dict[tuple[int, int], dict[int, int]] = {}
    for (key, rank), value in sums.items():
        life, block = map(int, key[1:].split("_"))
        digits, number = int(value), int(block) * _KEY_IDS
        values = there.setdefault((life, int(rank)), {})
        while digits:
            if digits & 3:
                values[number] = digits & 3
            digits >>= 2
            number += 1
    return there


def simulate(scenario: Scenario, parts: Parts = REAL) -> Counter[str]:
    """Play `scenario` and return what it covered.

    Raises:
        Broken: a promise was broken.
    """
    return _Job(scenario, parts).run()


# -- shrinking ---------------------------------------------------------------------------------------------------------


def fails(scenario: Scenario, parts: Parts = REAL) -> Broken | None:
    """Return what breaks in `scenario`, None if nothing does."""
    try:
        simulate(scenario, parts)
    except Broken as broken:
        return broken
    except Exception as error:  # noqa: BLE001 - whatever the library lets out is a finding
        finding = Broken(type(error).__name__, str(error))
        finding.__cause__ = error
        return finding
    return None


def shrink(scenario: Scenario, parts: Parts = REAL, *, most_runs: int = 3000) -> Scenario:
    """Return a small scenario that breaks the same promise as `scenario`."""
    broken = fails(scenario, parts)
    assert broken is not None, "there is nothing to shrink"
    runs, smaller = 0, True
    while smaller:
        smaller = False
        for candidate in _simpler(scenario):
            runs += 1
            if runs > most_runs:
                return scenario
            found = fails(candidate, parts)
            if found is not None and found.rule == broken.rule:
                scenario, smaller = candidate, True
                break
    return scenario


def _simpler(scenario: Scenario) -> Iterator[Scenario]:
    lives, ops = scenario.lives, scenario.ops
    if len(lives) > 1:
        yield from (replace(scenario, lives=lives[:n] + lives[n + 1 :]) for n in range(len(lives)))
    length = len(ops)
    while length:
        for start in range(0, len(ops), length):
            yield _without_ops(scenario, start, min(start + length, len(ops)))
        length //= 2
    for number, life in enumerate(lives):
        for simpler in _simpler_lives(life):
            yield replace(scenario, lives=(*lives[:number], simpler, *lives[number + 1 :]))
    plain: dict[str, Any] = vars(Scenario((), ()))
    for name in ("jitter", "skew", "frequency_type", "mode", "write", "max_lease", "log_frequency"):
        if getattr(scenario, name) != plain[name]:
            yield replace(scenario, **{name: plain[name]})
    yield from (replace(scenario, ops=simpler) for simpler in _simpler_ops(ops))


def _simpler_ops(ops: tuple[Op, ...]) -> Iterator[tuple[Op, ...]]:
    for index, op in enumerate(ops):
        for plainer in (replace(op, records=0), replace(op, check=False), replace(op, rank=-1)):
            if plainer != op and (op.kind == "call" or op.rank == plainer.rank):
                yield (*ops[:index], plainer, *ops[index + 1 :])


def _simpler_lives(life: Life) -> Iterator[Life]:
    for name in ("faults", "absences", "noise"):
        items = getattr(life, name)
        for index in range(len(items)):
            yield replace(life, **{name: items[:index] + items[index + 1 :]})
    if life.world_size > 1:
        yield from (_without_rank(life, rank) for rank in range(life.world_size))


def _without_rank(life: Life, gone: int) -> Life:
    def left(items: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(replace(i, rank=i.rank - (i.rank > gone)) for i in items if i.rank != gone)

    return Life(life.world_size - 1, left(life.faults), left(life.absences), left(life.noise))


def _without_ops(scenario: Scenario, start: int, end: int) -> Scenario:
    def moved(items: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(replace(i, op=i.op - max(0, min(end, i.op) - start)) for i in items)

    lives = tuple(replace(life, faults=moved(life.faults), absences=moved(life.absences)) for life in scenario.lives)
    return replace(scenario, ops=scenario.ops[:start] + scenario.ops[end:], lives=lives)
