"""What a simulated job is made of: ranks as `TrainingLog` has them, the root's side of the network, and the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import AgreedError, UnreadableReply
from logsync.coordinator.host import Host
from logsync.coordinator.messages import Decision, LogEntry, Window
from logsync.coordinator.rounds import Round
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.isolation import SinkSet
from logsync.workers.window import OpenWindow, Taken
from support.lockstep import SimRank
from support.simulation.scenarios import Life, Scenario

__all__ = ["KEY_IDS", "REAL", "REFUSALS", "RUNNING", "File", "Inline", "Member", "Parts", "Refused", "Root"]

KEY_IDS = 20
"""How many values share a metric name: two bits each, so that sums stay exact and tell a value twice."""

RUNNING = frozenset(("hello", "running", "closing"))

Refused: TypeAlias = AgreedError | UnreadableReply
REFUSALS = (AgreedError, UnreadableReply)


class Member(SimRank):
    """A rank as `TrainingLog` has it, its waits turned into events.

    From the end of its epoch until it comes back it is away: it answers rounds, while its script goes on to what needs
    one.
    """

    brings_its_loaded_entry = True
    tells_its_host_of_a_loaded_state = True
    ends_though_it_was_refused = True
    closes_though_it_was_refused = True

    def __init__(self, rank: int, life: Life, scenario: Scenario, start: int) -> None:
        super().__init__(rank, life.world_size, max_lease=scenario.max_lease, frequency_type=scenario.frequency_type)
        self.rank = rank
        self.host: Host | None = None
        self.window = OpenWindow()
        self.taken = Taken.nothing()
        self.made_before = 0  # on the root's rank: how many entries there were when `taken` was taken
        self.parked = 0
        self.pc = start
        self.phase = "hello"
        self.out = False  # its loader has no more: it goes to the epoch's end
        self.skipped = 0  # calls that only others made
        self.place = start  # the op that it is at, or the first that it skipped on the way there
        self.away = False
        self.over = False  # while it is away: all have ended the epoch
        self.refusal: Refused | None = None  # what it is to raise when it comes back
        self.blocked = False  # its script waits for the end of the epoch
        self.stopped = False  # as a process is that got SIGSTOP
        self.waiting = -1  # for the reply of this round
        self.asked = "hello"
        self.frame = b""
        self.lost = False  # the transport knows that the group is lost
        self.broken = False  # it was lost while this rank was away, and its script does not know yet
        self.refused = False
        self.since = 0  # when the wait began, or the rank ended
        self.called: list[int] = []  # the ops at which it called log_ready
        self.uncounted = 0  # of those, the ones that had no number since the error of an epoch's end came first
        self.answers: dict[int, object] = {}  # by op
        self.recorded: list[int] = []  # by value, the place it was recorded at
        self.beside: set[int] = set()  # values that belong to no call: a checkpoint does not say that it lacks them
        self.fault = next((f for f in life.faults if f.rank == rank), None)
        self.absence = next((a for a in life.absences if a.rank == rank), None)

    @property
    def running(self) -> bool:
        """Whether it still does something."""
        return self.phase in RUNNING

    def step_on(self) -> None:
        """Come to the next op of the script."""
        self.pc += 1
        self.place = self.pc

    def record(self, life: int, *, beside: bool) -> None:
        """Record a value that is told from all others; `beside`: no call follows it."""
        number = len(self.recorded)
        if beside:
            self.beside.add(number)
        self.recorded.append(self.place)
        key = f"x{life}_{number // KEY_IDS}"
        self.window.record({key: 4.0 ** (number % KEY_IDS)}, reduce="sum", per_rank=True)

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
        self.made_before = self.entries_made()
        return self._frame(kind, step, check_model_update=check, window=self.taken.message)

    def hear(self, reply: bytes) -> Decision | Refused:
        """Take in a reply."""
        try:
            decision = self._accept(reply)
        except REFUSALS as error:
            self.refuse()
            return error
        if decision.entry is None:
            self.window.give_back(self.taken)
        self.taken = Taken.nothing()
        if self.host is not None and self.host.holds_entry:
            self.parked, self._lease, self._left = self._left, 0, 0
        return decision

    def end_epoch(self) -> None:
        self.parked = 0
        self.release()
        self._settle()
        self.taken = self.window.take()
        self.away, self.over = True, False

    def answer_absent(self) -> bytes:
        """Return the next frame of a rank that is away."""
        self.made_before = self.entries_made()
        return self._frame("ended", window=self.taken.message)

    def hear_absent(self, reply: bytes) -> Decision | Refused:
        """Take in the reply to it."""
        try:
            decision = self._accept(reply, ended=True)
        except REFUSALS as error:
            self.over = self._epoch_over
            self.refusal = error if self.over else None
            return error
        if decision.entry is not None:
            self.taken = Taken.nothing()
        self.release()
        self.over = self._epoch_over
        return decision

    def come_back(self) -> Refused | None:
        """Go on after the end of the epoch; return what the script's next call is to raise."""
        self.away = self.over = False
        self.window.give_back(self.taken)
        self.taken = Taken.nothing()
        refusal, self.refusal = self.refusal, None
        return refusal

    def refuse(self) -> None:
        """Keep what a refused frame had carried."""
        self.window.give_back(self.taken)
        self.taken = Taken.nothing()

    def lose(self) -> None:
        """Take in that no reply will come."""
        if not self.in_an_entry():
            self.window.give_back(self.taken)
        self.taken = Taken.nothing()

    def entries_made(self) -> int:
        return self.host.coordinator.entries_made if self.host is not None else 0

    def in_an_entry(self) -> bool:
        """Whether the root, in this process, has made an entry of what was taken, though its reply never came."""
        return self.entries_made() != self.made_before

    def load(self, state: bytes) -> None:
        self.load_state_dict({"state": state})
        if self.host is not None and self.tells_its_host_of_a_loaded_state:
            self.host.loaded(self.state, self.last_entry if self.brings_its_loaded_entry else None, self.calls)

    def release(self) -> None:
        if self.host is not None:
            self.host.release()

    def last_window(self, _: int) -> Window:
        self.lose()
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


class Inline(SinkSet):
    """One sink, called at once and without a thread: a simulation is the same each time."""

    def __init__(self, sink: File) -> None:
        super().__init__([])
        self._file = sink
        self._is_open = False

    def prepare(self, run: RunInfo) -> None:
        self._run = run
        self._is_open = run.resumed
        if run.resumed:
            self._file.open(run)

    def write(self, entry: LogEntry) -> None:
        assert self._run is not None
        if not self._is_open:
            self._file.open(self._run)
        self._is_open = True
        self._file.write(entry)


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
            keep = run.next_seq if run.resumed and not self._is_anothers(run) else 0
            cut = next((i for i, (_, entry) in enumerate(self.lines) if entry.seq >= keep), len(self.lines))
            del self.lines[cut:]
        last = run.last_entry
        if last is not None and last.seq == len(self.lines):
            self.lines.append((self.origin, last))
            self.recovered += 1
        self.writer = self.life

    def _is_anothers(self, run: RunInfo) -> bool:
        """Say whether what is here is of a run before, which this one was to set aside; see `JsonlSink`."""
        last = run.last_entry
        return last is not None and last.seq == 0 and self.lines[0][1].time != last.time

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
