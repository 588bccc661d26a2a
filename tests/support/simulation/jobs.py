"""Plays a scenario, from the first start of the job to its last, on a clock and a network of ours."""

from __future__ import annotations

import functools
from collections import Counter

from logsync.coordinator.host import Host
from logsync.coordinator.messages import Decision, Hello, decode_state, encode_hello
from support.lockstep import settings
from support.simulation.network import Clock, Network
from support.simulation.parts import REAL, REFUSALS, RUNNING, File, Inline, Member, Parts, Refused
from support.simulation.promises import Broken, Checkpoint, Played, Watch, breaks, check_file
from support.simulation.scenarios import Fault, Op, Scenario, sits_out

__all__ = ["fails", "simulate"]

TIMEOUT = 1000
"""By when the transport has told every survivor that a rank is gone."""

_MOST_EVENTS = 5_000
_AHEAD = 100  # so that no rank that counts its own steps comes below 0
_ROUNDS = ("call", "write", "end")  # what waits until an epoch that this rank has ended is over


def simulate(scenario: Scenario, parts: Parts = REAL) -> Counter[str]:
    """Play `scenario` and return what it covered.

    Raises:
        Broken: a promise was broken.
    """
    return _Job(scenario, parts).run()


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


class _World:
    """One life of the job."""

    def __init__(self, job: _Job, number: int, origin: Checkpoint | None) -> None:
        scenario, life = job.scenario, job.scenario.lives[number]
        self.number = number
        self.life = life
        self.origin = origin
        self.first_op = 0 if origin is None else origin.op + 1
        self.members = [job.parts.member(rank, life, scenario, self.first_op) for rank in range(life.world_size)]
        coordinator = job.parts.coordinator(job.config, life.world_size, run=f"run{number}", run_dir="runs/x")
        host = Host(
            coordinator,
            Inline(job.file),
            name="train",
            world_size=life.world_size,
            clock=lambda: float(job.now),
        )
        self.members[0].host = host
        self.root = job.parts.root(host, life.world_size)
        self.network = Network(
            job.clock,
            self.root,
            life.noise,
            job.facts,
            key=number,
            hear=functools.partial(job.hear, self),
            decided=functools.partial(job.decided, self),
        )
        self.watch = Watch(number, bad_steps=any(op.kind == "call" and op.rank >= 0 for op in scenario.ops))
        entry = decode_state(origin.state).entry if origin is not None else None
        self.logged_at = entry.step if entry is not None else None  # the step of the last entry
        self.struck_at = -1

    @property
    def running(self) -> bool:
        """Whether a rank still does something."""
        # A list and not a generator: this is asked after every event.
        return not RUNNING.isdisjoint([member.phase for member in self.members])


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
        self.clock = Clock(scenario.jitter)
        self.file = File()
        self.worlds: list[_World] = []
        self.saved: Checkpoint | None = None  # the newest complete one
        self.rolled_back: set[int] = set()  # the seqs whose entries may have a lower step than the entry before

    @property
    def now(self) -> int:
        return self.clock.now

    def run(self) -> Counter[str]:
        for number in range(len(self.scenario.lives)):
            self._start(number)
            world = self.worlds[-1]
            self._play(world)
            world.watch.ended(world.members, struck=world.struck_at >= 0)
            self.facts["calls"] += sum(len(member.called) for member in world.members)
            self.facts["refused at the end"] += world.struck_at < 0 and any(m.refused for m in world.members)
        self.facts += check_file(
            self.file, [Played(w.number, w.members, w.origin) for w in self.worlds], self.rolled_back
        )
        return self.facts

    # -- time and the network --------------------------------------------------------------------------------------

    def _start(self, number: int) -> None:
        if self.worlds:
            self.worlds[-1].network.down = True
        world = _World(self, number, self.saved)
        self.worlds.append(world)
        self.file.life = number
        self.file.origin = self.saved.life if self.saved is not None else -1
        self.file.first_partial = self.saved is not None and self.saved.missed > 0
        self.facts["restarts"] += number > 0
        self.facts["resumed"] += self.saved is not None
        self.facts["resumed inexactly"] += self.saved is not None and not self.saved.exact
        for member in world.members:
            hello = Hello(member.rank, world.life.world_size, "1", self.config)
            self._send(world, member, encode_hello(hello), "hello")

    def _play(self, world: _World) -> None:
        for _ in range(_MOST_EVENTS):
            if not world.running:
                return
            if not self.clock.tick():
                waiting = [(m.rank, m.phase, m.waiting) for m in world.members if m.running]
                breaks("termination", f"nothing happens any more in life {world.number}, but wait: {waiting}")
        breaks("termination", f"life {world.number} does not end")

    def _send(self, world: _World, member: Member, frame: bytes, asked: str) -> None:
        member.frame, member.asked, member.waiting, member.since = frame, asked, member._round, self.now
        if member.lost:
            self.clock.at(self.now + 1, self._lose, world, member)
        else:
            world.network.request(member, member._round, frame)

    def decided(self, world: _World, decision: Decision) -> None:
        """Take in what the root has decided, before anybody hears of it."""
        self.facts["rounds"] += 1
        self.facts["entries"] += decision.entry is not None
        self.facts["agreed errors"] += decision.failure is not None
        self.facts["rounds with ranks away"] += bool(decision.active)
        if decision.new_epoch is not None:
            self.facts["epochs ended"] += 1
            self.facts["ends refused"] += decision.failure is not None
            self.facts["ends with a closed rank"] += any(m.phase == "closing" for m in world.members)
            self.facts["ends with different call numbers"] += len({m.calls for m in world.members if m.away}) > 1
        rolled_back = any(notice.startswith("the step went back") for notice in decision.notices)
        self.facts["rollbacks"] += rolled_back
        if rolled_back or self._is_marked_back(world, decision):
            self.rolled_back.add(decision.entry.seq if decision.entry is not None else decision.state.next_seq)
        if decision.entry is not None:
            world.logged_at = decision.entry.step
        asked = {member.asked for member in world.members}
        if "ended" in asked <= {"ended", "closed"} and decision.new_epoch is None:
            breaks(
                "ends", f"round {decision.round} of life {world.number} is not the end, though all have ended or closed"
            )

    def _is_marked_back(self, world: _World, decision: Decision) -> bool:
        """Say whether a log was marked as written behind the last one, by a rank that said so."""
        last, logged = decision.state.last_log_step, world.logged_at
        marked = any(op.kind == "written" for op in self.scenario.ops)
        return marked and last is not None and logged is not None and last < logged

    # -- what a rank does ------------------------------------------------------------------------------------------

    def _go_on(self, world: _World, member: Member, *, resumed: bool = False) -> None:
        """Run a rank's script up to its next round; `resumed` in mid-call, where it had waited for an epoch's end."""
        ops, then = self.scenario.ops, self.now
        while member.phase == "running":
            op = ops[member.pc] if member.pc < len(ops) else None
            if op is not None:
                member.out = sits_out(op, member.rank, out=member.out)
                if member.out:
                    member.skipped += op.kind == "call"
                    member.pc += 1
                    continue
            if then > self.now and not self._is_quick(member, op):
                self.clock.at(then, self._go_on, world, member)
                return
            if self._meets_a_fault(world, member):
                return
            absence = member.absence
            if op is None or (absence is not None and absence.op <= member.pc):
                self._close(world, member)
                return
            if op.records >> member.rank & 1 and not resumed:
                member.record(world.number, beside=op.kind not in ("call", "write"))
            resumed = False
            if self._does(world, member, op):
                return
            then += self.clock.pause(world.number, member.rank, member.pc)
            member.step_on()

    def _is_quick(self, member: Member, op: Op | None) -> bool:
        """Say whether an op is done at once, since it concerns nobody else for now."""
        if op is None or member.away or (member.fault is not None and member.fault.op <= member.pc):
            return False
        return op.kind in ("update", "written", "frequency") or (op.kind == "call" and member._left > 0)

    def _meets_a_fault(self, world: _World, member: Member) -> bool:
        """Let happen what happens to a rank where it is; say whether it does not go on."""
        fault = member.fault
        if fault is None or fault.op > member.pc:
            return False
        member.fault = None
        if fault.delay and fault.kind != "stalls":
            self.clock.at(self.now + fault.delay, self._strike, world, member, fault)
            return False
        self._strike(world, member, fault)
        return True

    def _does(self, world: _World, member: Member, op: Op) -> bool:
        """Do one thing of the script; say whether that has to be waited for."""
        if op.kind in _ROUNDS:
            if member.away and not self._comes_back(world, member):
                return True
            refusal = member.come_back() if member.away else None
            if op.kind == "end":
                self._end(world, member, refusal)
                return False
            if refusal is None:
                return self._calls(world, member, op)
            if op.kind == "call":
                member.called.append(member.pc)
                member.uncounted += 1
                world.watch.answered(member, type(refusal))
        elif op.kind == "save":
            self._save(world, member)
        elif op.rank == member.rank:
            self.facts["said while away"] += member.away and not member.over
            if op.kind == "update":
                member.model_updated(op.value)
            elif op.kind == "written":
                member.log_written(op.value)
            else:
                member.set_frequency(op.value)
        return False

    def _calls(self, world: _World, member: Member, op: Op) -> bool:
        """Make a call or a write; say whether it is a round."""
        value: object = op.value
        if op.kind == "call":
            member.called.append(member.pc)
            if op.rank == member.rank:
                value = -1
        if value == op.value and op.value is not None:
            value = op.value + _AHEAD - member.skipped if self.scenario.own_steps else op.value
            value *= 1 + self.scenario.skew * member.rank if self.scenario.skew else 1
        if op.kind == "call" and member.answered_locally(value):
            world.watch.answered(member, False)  # noqa: FBT003 - an answer
            self.facts["leased calls"] += 1
            return False
        carries = op.kind == "write" or self.scenario.write == "auto"
        kind = "decision" if op.kind == "call" else "write"
        self._send(world, member, member.ask(kind, value, check=op.check, carries=carries), kind)
        return True

    def _end(self, world: _World, member: Member, refusal: Refused | None) -> None:
        """End an epoch, as `TrainingLog.end_epoch` does."""
        self.facts["empty epochs"] += self._is_empty(world, member)
        if refusal is None or member.ends_though_it_was_refused:
            member.end_epoch()
            self._send(world, member, member.answer_absent(), "ended")

    def _is_empty(self, world: _World, member: Member) -> bool:
        ends = [pc for pc in range(world.first_op, member.pc) if self.scenario.ops[pc].kind == "end"]
        return not any(op >= (ends[-1] if ends else world.first_op) for op in member.called)

    def _comes_back(self, world: _World, member: Member) -> bool:
        """Say whether the wait for the end of an epoch is over; if not, it goes on when it is."""
        if member.broken:
            self._leave(world, member)
        elif not member.over:
            member.blocked = True
        return member.over and member.running

    def _close(self, world: _World, member: Member) -> None:
        """Do as `TrainingLog.close` does."""
        if member.away:
            if not self._comes_back(world, member):
                return
            if member.come_back() is not None and not member.closes_though_it_was_refused:
                world.struck_at = self.now
                self._leave(world, member)
                return
        member.phase = "closing"
        self.facts["early closes"] += member.pc < len(self.scenario.ops)
        self._answer_closed(world, member)

    def _answer_closed(self, world: _World, member: Member) -> None:
        self._send(world, member, member.ask("closed", None, check=False, carries=True), "closed")

    def _save(self, world: _World, member: Member) -> None:
        state = member.state_dict()["state"]
        exact = not member.away or member.over
        saves = world.watch.saved(member, state, exact=exact)
        self.facts["saved while away"] += not exact
        gone = {a.rank for a in world.life.absences if a.op <= member.pc}
        gone |= {rank for rank in range(world.life.world_size) if self._sits_out(world, rank, member.pc)}
        if len(saves.keys() | gone) == world.life.world_size:
            self.facts["checkpoints"] += 1
            chosen = sorted(saves)[self.clock.pause(world.number, member.pc) % len(saves)]
            state = saves[chosen]
            exact = len(set(saves.values())) == 1 and exact
            self.saved = Checkpoint(world.number, member.pc, state, decode_state(state).missed, exact)

    def _sits_out(self, world: _World, rank: int, op: int) -> bool:
        out = False
        for number in range(world.first_op, op + 1):
            out = sits_out(self.scenario.ops[number], rank, out=out)
        return out

    def hear(self, world: _World, rank: int, number: int, reply: bytes) -> None:
        """Bring a reply to a rank."""
        member = world.members[rank]
        if member.waiting != number or not member.running or member.stopped:
            return
        member.waiting = -1
        outcome = member.hear_absent(reply) if member.away else member.hear(reply)
        world.watch.heard(member, number, outcome)
        if member.asked == "decision":
            world.watch.answered(member, outcome.log_ready if isinstance(outcome, Decision) else type(outcome))
        if member.away:
            self._away_heard(world, member)
        elif member.phase == "hello":
            if isinstance(outcome, REFUSALS):
                breaks("connect", str(outcome))
            member.phase = "running"
            if world.origin is not None:
                member.load(world.origin.state)
            self._go_on(world, member)
        elif member.phase == "closing":
            self._closed_heard(world, member, outcome)
        else:
            member.step_on()
            self._go_on(world, member)

    def _away_heard(self, world: _World, member: Member) -> None:
        if not member.over:
            self._send(world, member, member.answer_absent(), "ended")
        elif member.blocked:
            member.blocked = False
            self._go_on(world, member, resumed=True)

    def _closed_heard(self, world: _World, member: Member, outcome: Decision | Refused) -> None:
        if member._finished:
            if isinstance(outcome, Decision) or member.refused:
                member.phase, member.since = "done", self.now
                if member.host is not None:
                    member.host.close()
                return
            member.refused = True
        member.release()
        self._answer_closed(world, member)

    # -- what goes wrong -------------------------------------------------------------------------------------------

    def _strike(self, world: _World, member: Member, fault: Fault) -> None:
        if not member.running or world is not self.worlds[-1]:
            return
        self.facts[fault.kind] += 1
        self.facts[f"{fault.kind} while away"] += member.away and not member.over
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
            member.stopped = True
            self.clock.at(self.now + 3 * TIMEOUT, self._wake_up, world, member)
        for other in world.members:
            if other is not member:
                pause = self.clock.pause(world.number, other.rank)
                told = self.now + pause * (TIMEOUT // 41 if pause % 2 else 1)  # a broken connection, or the timeout
                self.clock.at(told, self._tell_lost, world, other)

    def _wake_up(self, world: _World, member: Member) -> None:
        if not member.running:
            return
        member.stopped, member.lost, member.since = False, True, self.now
        self._lose(world, member)
        self._go_on(world, member)

    def _tell_lost(self, world: _World, member: Member) -> None:
        member.lost = True
        if member.waiting >= 0:
            self._lose(world, member)

    def _lose(self, world: _World, member: Member) -> None:
        """Raise a transport error out of a rank's round; its script leaves the log, when it comes to know of it."""
        if member.waiting < 0 or not member.running or member.stopped:
            return
        member.waiting = -1
        if member.asked == "decision":
            member.answers[member.pc] = "lost"
        began = max(world.struck_at, member.since)
        if self.now > began + TIMEOUT + 1:
            breaks(
                "termination",
                f"rank {member.rank} waited until {self.now}, {self.now - began} after a loss",
            )
        if member.away and not member.blocked:
            member.broken = True
        else:
            self._leave(world, member)

    def _leave(self, world: _World, member: Member) -> None:
        member.phase, member.since = "failed", self.now
        if member.host is not None:
            member.release()
            member._settle()
            self.file.leaving = True
            member.host.leave(member.rank, member.last_window, member._current, member.calls)
            self.file.leaving = False
            member.host.close()
            world.root.alive = False
