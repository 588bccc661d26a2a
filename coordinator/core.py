"""One round: all ranks' frames in, one reply and what was logged out.

Pure: no clock, thread, file or environment; the same frames give the same bytes. It owns the job's only
`FrequencyManager`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from logsync.coordinator.errors import (
    AgreedError,
    BadType,
    BadValue,
    ConfigError,
    CoordinatorFailed,
    FrameTooLarge,
    LogsyncError,
    ProtocolError,
    RoundMismatch,
    StateMismatch,
    Step,
    agreed_error,
)
from logsync.coordinator.followers import Followed, kept, merge, remembered
from logsync.coordinator.frequency import FrequencyManager, checked_frequency, checked_step, log_ready
from logsync.coordinator.lease import Cadence, due_step
from logsync.coordinator.messages import (
    MAX_CALL,
    MAX_FRAME,
    MAX_PATH,
    PROTOCOL,
    Decision,
    Event,
    Failure,
    LogEntry,
    NewEpoch,
    Report,
    Rhythm,
    Settings,
    State,
    Waits,
    Window,
    decode_state,
    encode,
    failure_of,
)
from logsync.coordinator.reduction import Partials
from logsync.coordinator.rounds import check_hellos, read_hellos, read_reports, step_mismatch
from logsync.coordinator.waits import waits_of

__all__ = ["Coordinator", "misfit"]

_PATIENCE = 100
"""Rounds that wait for a model update in mode on_update before a notice says so."""


_STANDING = (
    "next_seq",
    "entries_made",
    "first_seq",
    "run_dir",
    "run_id",
    "attempt",
    "restores",
    "_counting",
    "_last_call",
    "_entry_call",
    "_missed",
    "_unanswered",
    "_waits_from",
    "_hosts",
    "_followed",
    "_merged",
)
_CALLS = ("decision", "write")  # what a rank's user called; the other kinds come from ranks that call nothing
_Moment = tuple[dict[str, Any], dict[str, Any], tuple[Rhythm, ...], dict[int, int]]


class _Over(NamedTuple):
    """Whether a round ends the run or an epoch of it, and the calls of the rank that made most."""

    run: bool = False
    epoch: bool = False
    call: int = 0


_GOES_ON = _Over()


def _over(reports: list[Report]) -> _Over:
    kinds = {r.kind for r in reports}
    return _Over(kinds == {"closed"}, "ended" in kinds and kinds.isdisjoint(_CALLS), max(r.call for r in reports))


def misfit(state: State, frequency_type: str) -> str:
    """Return why a log that counts in `frequency_type` cannot go on from `state`; empty if it can."""
    if state.frequency_type != frequency_type:
        return f"the state counts in frequency type {state.frequency_type!r}, this log in {frequency_type!r}"
    largest = max(state.next_seq, state.attempt, state.missed)
    if largest > MAX_CALL:
        return f"the state has a count that no log could have: {largest}"
    try:
        checked_frequency(state.log_frequency, frequency_type)
        for step in (state.last_log_step, state.last_model_update_step):
            checked_step(step, frequency_type)
    except (TypeError, ValueError) as error:
        return f"the state has what no log could have: {error}"
    return ""


class Coordinator:
    """The root's side of one log: decides, merges, and remembers where the job stands.

    Args:
        settings: rank 0's; the others' are compared with them in the first round.
        world_size: how many frames a round has.
        run: what tells this log's frames from those of another run.
        run_dir: where the files of the log go.
        keep_run_dir: the user chose `run_dir`, so a state that is loaded does not change it.
        attempt: which start of the job this is.
        refusal: why rank 0 cannot log as it was told to; all ranks raise it when they connect.

    Attributes:
        frequency_manager: the one authority on when a log is due.
        run_dir, run_id, attempt, next_seq: as in `State`; a load changes them.
        entries_made: how many entries this start of the job has made; unlike `next_seq`, a load leaves it alone.
        restores: how often a state was loaded.
        first_seq: the `seq` that the loaded state goes on with; what is stored from there on is to be replaced.
        refused_for: the kind of error by which the last round failed; None if it was accepted.

    Raises:
        ValueError: `run_dir` is too long for a frame, or not UTF-8.
    """

    def __init__(
        self,
        settings: Settings,
        world_size: int,
        *,
        run: str,
        run_dir: str,
        keep_run_dir: bool = False,
        attempt: int = 0,
        refusal: str = "",
    ) -> None:
        self.frequency_manager = FrequencyManager(settings.log_frequency, settings.mode, settings.frequency_type)
        if len(run_dir.encode()) > MAX_PATH:
            msg = f"run_dir has {len(run_dir.encode())} bytes, {MAX_PATH} are the most"
            raise ValueError(msg)
        self.run_dir = run_dir
        self.run_id = run
        self.attempt = attempt
        self.next_seq = 0
        self.entries_made = 0
        self.restores = 0
        self.first_seq = 0
        self.refused_for: type[LogsyncError] | None = None
        self._settings = settings
        self._refusal = refusal
        self._world_size = world_size
        self._members = range(world_size)  # whose frames make a round
        self._run = run
        self._keep_run_dir = keep_run_dir
        self._round = 0
        self._cadence = Cadence()
        self._counting = 0
        self._steps: dict[int, int] = {}  # every rank's step at the last decision, where ranks' steps are compared
        self._last_call = 0  # the counting rank's at the last round
        self._entry_call = 0  # the call up to which everything is in an entry
        self._missed = 0  # calls of earlier starts that are in no entry and in no window
        self._unanswered = 0  # rounds in a row that only waited for an update
        self._hosts: dict[int, str] = {}
        self._followed: tuple[Followed, ...] = ()  # followers' windows that wait for an entry
        self._merged: dict[str, int] = {}  # see `remembered`
        self._round_times = (0.0, 0.0)  # of the last round and of this one
        self._waits_from: float | None = None  # when the round before the last entry's was
        self._first_of_epoch = -1  # the round after the one that ended an epoch

    def handle(
        self, frames: Sequence[bytes | bytearray | memoryview], now: float = 0.0
    ) -> tuple[bytes, tuple[LogEntry, ...]]:
        """Decide one round.

        Args:
            frames: one per rank, by rank.
            now: Unix seconds, for the entry.

        Returns:
            The reply, and the entries that were logged. It never raises: what goes wrong travels on the
            reply, and then nothing has
            changed.
        """
        number = self._round
        self._round += 1
        self._round_times = (self._round_times[1], now)
        moment = self._moment()
        self.refused_for = None
        over = _GOES_ON
        try:
            if number == 0:
                check_hellos(read_hellos(frames, self._world_size), self._world_size)
                if self._refusal:
                    raise ConfigError(self._refusal)  # noqa: TRY301 - as what is found in the hellos
                decision = self._decision(number)
            else:
                reports = read_reports(frames, self._run, number, self._world_size, self._members)
                over = _over(reports)
                decision = self._decide(number, reports, now)
                if moment[0]["_followed"] and len(encode(decision)) > MAX_FRAME:
                    self._return_to(moment)
                    self._followed = ()
                    decision = self._decide(number, reports, now)
                    said = (*decision.notices[:63], "what followers recorded is left out: the reply would be too large")
                    decision = msgspec.structs.replace(decision, notices=said)
            reply = _encoded(decision)
        except (AgreedError, ConfigError) as error:
            return self._rejected(moment, number, error, over), ()
        except Exception as error:  # noqa: BLE001 - a failing root must reach every rank, or they wait for ever
            text = f"the coordinator failed in round {number}: {type(error).__name__}: {error}"
            return self._rejected(moment, number, CoordinatorFailed(text), over), ()
        return reply, () if decision.entry is None else (decision.entry,)

    @property
    def merged(self) -> Mapping[str, int]:
        """The number of each follower's last window that is in an entry; not changed afterwards."""
        return self._merged

    def follow(self, windows: Sequence[Followed]) -> list[Followed]:
        """Keep followers' windows for the next entry; return those that there is no room for."""
        self._followed, refused = kept(self._followed, windows, self._merged)
        return refused

    def _rejected(self, moment: _Moment, number: int, error: LogsyncError, over: _Over) -> bytes:
        steps = self._steps
        self._return_to(moment)
        self.refused_for = type(error)
        if isinstance(error, RoundMismatch):
            self._steps = steps  # told once, and the norm from now on
        return encode(self._decision(number, failure=failure_of(error), over=over))

    def _decide(self, number: int, reports: list[Report], now: float) -> Decision:
        over = _over(reports)
        active = [r for r in reports if r.kind in _CALLS]
        absent = len(active) < len(reports)
        # At the end of all, or of an epoch, the rank that came furthest says where the run stands.
        counting = active[0] if active else max(reports, key=lambda r: r.call)
        active = active or reports
        kind = counting.kind
        named = {r.rank: r.host for r in reports if r.host}  # the first time only
        if named:
            self._hosts = self._hosts | named
        _check_faults(reports)
        _check_numbers(reports, whole=not self.frequency_manager.is_epoch_frequency_manager)
        self._restore(active, counting)
        self._check_steps(active, counting)

        notices: list[str] = []
        self._last_call = counting.call
        self._cadence.observe(counting.rhythm)
        self._fold(reports, counting, notices)

        manager = self.frequency_manager
        ready = kind == "decision" and manager.log_ready(counting.step, counting.check_model_update)
        self._count_waiting(counting, notices, ready=ready)
        writes = kind == "write" or (ready and self._settings.write == "auto")
        entry = None
        alone = ready and self._detached and not writes  # nobody is told to compute and write
        if alone:
            manager.log_written(counting.step)
        if writes or alone or over.run:
            partials = Partials()
            partials.add_windows((r.rank, r.window) for r in reports)
            if writes or partials or self._followed:
                # What is left at the end may follow a write() at a later step: an entry's step never goes back.
                last = manager.last_log_step if over.run else None
                step = counting.step if last is None or counting.step is None else max(counting.step, last)
                since = None if self._detached else self._waits_from
                waits = (
                    None
                    if since is None
                    else waits_of(active, self._hosts, self._round_times[0] - since, self._world_size)
                )
                entry = self._entry(partials, step, counting.call, now, waits, notices)
        if kind not in _CALLS:
            return self._decision(number, entry=entry, over=over, notices=notices)
        lease = 0
        if writes or alone or not ready:
            least = min((r.rhythm.current for r in active if r.rhythm.current is not None), default=None)
            lease = self._cadence.lease(counting.rhythm.current, due_step(manager, least), self._settings.max_lease)
        ranks = tuple(r.rank for r in active[:16]) if absent else ()
        return self._decision(number, ready=ready, lease=lease, entry=entry, notices=notices, active=ranks)

    def _decision(
        self,
        number: int,
        *,
        ready: bool = False,
        lease: int = 0,
        entry: LogEntry | None = None,
        failure: Failure | None = None,
        over: _Over = _GOES_ON,
        notices: Sequence[str] = (),
        active: tuple[int, ...] = (),
    ) -> Decision:
        new_epoch = None
        if over.epoch:
            new_epoch = NewEpoch(over.call, max(0, over.call - self._entry_call) + self._missed)
            self._cadence.clear()
            self._steps.clear()
            # What ranks did between the epochs is nobody's wait, nor is that they come back at different times.
            self._waits_from = None
            self._first_of_epoch = number + 1
        return Decision(
            protocol=PROTOCOL,
            run=self._run,
            round=number,
            log_ready=ready,
            lease=lease,
            state=self._state(),
            entry=entry,
            failure=failure,
            finished=over.run,
            notices=tuple(notices[:64]),
            new_epoch=new_epoch,
            active=active,
        )

    def _state(self) -> State:
        manager = self.frequency_manager
        return State(
            manager.log_frequency,
            self._settings.log_frequency,
            manager.frequency_type,
            manager.last_log_step,
            manager.last_model_update_step,
            manager.updated_since_log,
            self.next_seq,
            self.run_dir,
            self.attempt,
            run_id=self.run_id,
        )

    @property
    def next_round(self) -> int:
        """The number of the next round."""
        return self._round

    @property
    def _detached(self) -> bool:
        return len(self._members) < self._world_size

    def detach(self, rank: int, number: int) -> None:
        """Go on with `rank` alone after the group was lost: the next round is `number`, all entries are partial."""
        self._members = range(rank, rank + 1)
        self._round = number

    @classmethod
    def alone(
        cls, settings: Settings, world_size: int, rank: int, *, run: str, number: int, state: State, entry_call: int
    ) -> Coordinator:
        """Return a coordinator of `rank` alone, which goes on from the state of the last reply.

        Args:
            number: of its first round.
            entry_call: the call up to which everything is in an entry.
        """
        coordinator = cls(settings, world_size, run=run, run_dir=state.run_dir, attempt=state.attempt)
        coordinator._take_over(state)
        coordinator._entry_call = entry_call
        coordinator.detach(rank, number)
        return coordinator

    def leftover(self, rank: int, window: Window, step: Step, call: int, now: float) -> LogEntry | None:
        """Make a last, partial entry of one rank's window, when the others cannot be asked any more.

        Returns None if the window is empty.
        """
        partials = Partials()
        partials.add_windows([(rank, window)])
        if not partials:
            return None
        self._missed = max(1, self._missed)
        return self._entry(partials, step, call, now)

    def _entry(  # noqa: PLR0917 - one thing after the other
        self,
        partials: Partials,
        step: Step,
        call: int,
        now: float,
        waits: Waits | None = None,
        notices: list[str] | None = None,
    ) -> LogEntry:
        """Reduce what was recorded up to `call`, and what followers sent, to an entry and mark it written at `step`."""
        if self._followed:
            merged = merge(partials, self._followed, self._world_size, [] if notices is None else notices)
            self._merged, self._followed = remembered(self._merged, self._followed), ()
        else:
            merged = partials.reduce(self._world_size)
        entry = LogEntry(
            seq=self.next_seq,
            step=step,
            time=now,
            attempt=self.attempt,
            calls=max(0, call - self._entry_call),
            world_size=self._world_size,
            metrics=merged.metrics,
            ranks=merged.ranks,
            nan_ranks=merged.nan_ranks,
            partial=self._missed > 0 or self._detached,
            waits=waits,
        )
        self.frequency_manager.log_written(step)
        self.next_seq += 1
        self.entries_made += 1
        self._entry_call = call
        self._missed = 0
        self._waits_from = None if self._round == self._first_of_epoch + 1 else self._round_times[0]
        return entry

    def _check_steps(self, active: list[Report], counting: Report) -> None:
        """Compare how ranks' steps lie to each other with how they lay at the last decision.

        Call numbers cannot show a skipped call, since each rank counts its own. A new distance is reported once and
        is the norm from then on, so that a rank which has caught up is not refused for ever.
        """
        if counting.rank != self._counting:
            self._counting = counting.rank
            self._cadence.clear()
            self._steps.clear()
        if counting.kind != "decision" or self.frequency_manager.is_epoch_frequency_manager:
            return
        before = self._steps
        self._steps = now = {r.rank: r.step for r in active if isinstance(r.step, int)}
        if counting.rank not in before or counting.rank not in now:
            return
        ours_then, ours = before[counting.rank], now[counting.rank]
        moved = [r for r, s in now.items() if r in before and s - ours != before[r] - ours_then]
        if moved:
            raise step_mismatch(moved, before, now, active)

    def _fold(self, reports: list[Report], counting: Report, notices: list[str]) -> None:
        """Bring the frequency manager up to date: settings, then everything that ranks reported, in order of calls."""
        self._fold_settings(reports, notices)
        manager = self.frequency_manager
        timeline: list[tuple[int, int, int, Event | Step]] = []
        marked: dict[int, int] = {}  # by call, the lowest rank that marked a log as written
        for report in reports:
            for index, event in enumerate(report.events):
                if event.kind == "frequency" or (
                    event.kind == "written" and marked.setdefault(event.call, report.rank) != report.rank
                ):
                    continue
                # A reset beats updates of earlier calls; any rank's update beats a reset of its own call.
                reset = event.kind == "update" and event.value is None
                timeline.append((event.call, -1 if reset else report.rank, index, event))
        # Where the counting rank's step lay after it went back, and where it is now: a log may be marked ahead of it.
        falls = [*counting.rhythm.falls]
        if counting.kind in _CALLS and counting.step is not None:
            falls.append((counting.call, counting.step))
        timeline += [(call, self._world_size, index, step) for index, (call, step) in enumerate(falls)]
        fell_from: Step = None
        for _, _, _, happened in sorted(timeline, key=lambda item: item[:3]):
            if not isinstance(happened, Event):
                last = manager.last_log_step
                if self._roll_back(happened) and fell_from is None:
                    fell_from = last
            elif happened.kind == "written":
                manager.log_written(happened.value)
            else:
                step, last = happened.value, manager.last_model_update_step
                manager.model_updated(step if step is None or last is None else max(step, last))
        if fell_from is not None:
            notices.append(
                f"the step went back behind the last log at step {fell_from}: counting starts again from step "
                f"{manager.last_log_step}. If the run was resumed from a checkpoint, load_state_dict() keeps the "
                "cadence and the log file in order"
            )

    def _fold_settings(self, reports: list[Report], notices: list[str]) -> None:
        said = [(e.call, r.rank, e.value) for r in reports for e in r.events if e.kind == "frequency"]
        if not said:
            return
        newest = max(call for call, _, _ in said)
        choices = [(rank, value) for call, rank, value in said if call == newest]
        rank, chosen = choices[0]
        self.frequency_manager.log_frequency = chosen
        others = [(r, v) for r, v in choices if v != chosen]
        if others:
            notices.append(
                f"log_frequency was set to {chosen} on rank {rank} and to {others[0][1]} on rank {others[0][0]} "
                f"at call {newest}; {chosen} is taken, the lowest rank's"
            )

    def _roll_back(self, step: Step) -> bool:
        """Count from `step` if it lies behind the last log; say whether it does."""
        manager = self.frequency_manager
        last = manager.last_log_step
        if last is None or step is None or step >= last:
            return False
        manager.log_written(step)
        manager.model_updated(None)
        self._cadence.clear()
        return True

    def _count_waiting(self, counting: Report, notices: list[str], *, ready: bool) -> None:
        """Say once when rounds are made at every call only because no update comes."""
        manager = self.frequency_manager
        waiting = (
            not ready
            and counting.kind == "decision"
            and manager.mode == "on_update"
            and log_ready(counting.step, manager.last_log_step, manager.log_frequency)
        )
        self._unanswered = self._unanswered + 1 if waiting else 0
        if self._unanswered == _PATIENCE:
            notices.append(
                f"a log has been due for {_PATIENCE} calls (last log at step {manager.last_log_step}), but mode "
                "'on_update' waits for model_updated(), which no rank has called since; until then every call "
                "communicates"
            )

    def _restore(self, active: list[Report], counting: Report) -> None:
        """Take over the state that ranks have loaded since the last round."""
        if not any(r.restore for r in active):
            return
        ours = counting.restore
        others = tuple(r.rank for r in active if r.restore != ours)
        if others:
            lacking = [r.rank for r in active if not r.restore]
            what = f"ranks {lacking[:16]} loaded none" if lacking else f"ranks {list(others[:16])} loaded another one"
            msg = (
                f"load_state_dict() must be called with the same state on every rank, but {what} "
                f"(compared with rank {counting.rank})"
            )
            raise StateMismatch(msg, ranks=tuple(lacking) or others)
        state = decode_state(ours)
        problem = misfit(state, self.frequency_manager.frequency_type)
        if problem:
            raise StateMismatch(problem)
        self.load(state, counting.restored_at)

    def load(self, state: State, call: int) -> None:
        """Go on from the state of a checkpoint, after `call` calls in this start of the job."""
        self._take_over(state)
        self.first_seq = state.next_seq
        self.run_id = state.run_id or self.run_id
        if not self._keep_run_dir:
            self.run_dir = state.run_dir
        self.attempt = max(self.attempt, state.attempt + 1)
        self.restores += 1
        self._missed = state.missed
        self._entry_call = call
        self._cadence.clear()
        self._steps.clear()

    def _take_over(self, state: State) -> None:
        manager = self.frequency_manager
        if state.configured == self._settings.log_frequency:
            manager.log_frequency = state.log_frequency  # else the user asks for a new one, which wins
        manager.last_log_step = state.last_log_step
        manager.last_model_update_step = state.last_model_update_step
        manager.updated_since_log = state.updated_since_log
        self.next_seq = state.next_seq

    def _moment(self) -> _Moment:
        """Return everything that a failed round must leave as it was."""
        return (
            {name: getattr(self, name) for name in _STANDING},
            dict(vars(self.frequency_manager)),
            self._cadence.snapshot(),
            dict(self._steps),
        )

    def _return_to(self, moment: _Moment) -> None:
        standing, manager, rhythms, steps = moment
        vars(self).update(standing)
        vars(self.frequency_manager).update(manager)
        self._cadence.restore(rhythms)
        self._steps = steps


def _encoded(decision: Decision) -> bytes:
    reply = encode(decision)
    if len(reply) > MAX_FRAME:
        msg = f"the reply has {len(reply)} bytes, {MAX_FRAME} are the most; record fewer metrics per log"
        raise FrameTooLarge(msg, round=decision.round)
    return reply


def _check_numbers(reports: list[Report], *, whole: bool) -> None:
    """Refuse what no ledger sends: fractions where steps are counted, a frequency of 0."""
    for report in reports:
        given = [report.step, report.rhythm.rise, report.rhythm.current, *(e.value for e in report.events)]
        given += [step for _, step in report.rhythm.falls]
        if (whole and any(isinstance(number, float) for number in given)) or any(
            event.kind == "frequency" and event.value == 0 for event in report.events
        ):
            msg = f"rank {report.rank} sent a step or frequency that this log cannot have"
            raise ProtocolError(msg, ranks=(report.rank,), call=report.call)


def _check_faults(reports: list[Report]) -> None:
    """Raise on all ranks what one rank's step was refused for."""
    for report in reports:
        if report.fault is not None:
            fault = report.fault
            error = agreed_error(fault.kind)
            msg = f"rank {report.rank}, call {fault.call}: {fault.text}"
            raise (error if error in (BadType, BadValue) else BadValue)(msg, ranks=(report.rank,), call=fault.call)
