"""One rank's side of the rounds, without any I/O: the lease, the steps, what its user said, and the last reply."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from logsync.coordinator.core import misfit
from logsync.coordinator.errors import BadType, BadValue, ProtocolError, Step, UnreadableReply
from logsync.coordinator.frequency import LogStepType, checked_frequency, checked_step
from logsync.coordinator.messages import (
    INT64_MAX,
    MAX_FALLS,
    PROTOCOL,
    Decision,
    Event,
    Failure,
    LogEntry,
    NewEpoch,
    Report,
    ReportKind,
    Rhythm,
    State,
    Window,
    decode_decision,
    decode_state,
    encode,
    error_of,
    failure_of,
)
from logsync.workers.values import begin_reading_scalars, read_scalars

__all__ = ["Ledger", "Unsure", "counted_step", "with_updates"]


_MOST_EVENTS = 1000


def counted_step(step: object, frequency_type: str) -> LogStepType:
    """Return `step` as `checked_step` does, refusing ints that no frame can carry (over 2**63 - 1)."""
    if type(step) is int and 0 <= step <= INT64_MAX:
        return step
    number = checked_step(step, frequency_type)
    if isinstance(number, int) and number > INT64_MAX:
        msg = f"log step must be at most 2**63 - 1, given an int of {number.bit_length()} bits"
        raise ValueError(msg)
    return number


class Ledger:
    """Count calls, answer those under a lease, and build and read the messages of a round.

    Subclasses say in `_due` what happens at a call that needs a round.

    Args:
        rank, world_size: as on the transport.
        max_lease: the longest lease there can be, in calls.
        frequency_type: what steps count.
    """

    # Slots, because a leased call costs little more than its attribute accesses.
    __slots__ = (
        "_active",
        "_calls",
        "_current",
        "_entry_call",
        "_epoch_over",
        "_events",
        "_falls",
        "_fault",
        "_finished",
        "_frequency_type",
        "_gap",
        "_hooked",
        "_last_entry",
        "_lease",
        "_left",
        "_previous",
        "_rank",
        "_restore",
        "_restored_at",
        "_rise",
        "_round",
        "_run",
        "_sent_events",
        "_since",
        "_skipped",
        "_stamped",
        "_state",
        "_steps",
        "_unsure",
        "_world_size",
    )

    def __init__(self, rank: int, world_size: int, *, max_lease: int, frequency_type: str) -> None:
        self._rank = rank
        self._world_size = world_size
        self._frequency_type = frequency_type
        self._run = ""
        self._round = 0
        self._state: State | None = None
        self._last_entry: LogEntry | None = None

        # A leased call writes its step to _steps[_left] and counts _left down to 0.
        self._left = 0
        self._lease = 0
        self._steps: list[object] = [None] * (max_lease + 1)
        self._calls = 0  # calls before the lease
        self._skipped = 0  # of those, calls that only other ranks made: epochs begin with the same number everywhere
        self._entry_call = 0

        # How the step moves, over all calls; see Rhythm. The first call counts as a change, which errs to short leases.
        self._previous: Step = None
        self._current: Step = None  # the last call's step
        self._since = 0
        self._rise: Step = None
        self._gap: int | None = None
        self._falls: list[tuple[int, int | float]] = []

        self._events: list[Event] = []
        self._sent_events = 0
        self._hooked: list[tuple[int, Any]] = []  # updates that wait for their call's step; see note_update
        self._stamped: dict[int, Step] = {}  # the steps of those calls, once they are known
        self._unsure: Unsure | None = None  # updates of this frame that only a device knows of
        self._fault: Failure | None = None
        self._restore = b""
        self._restored_at = 0
        self._finished = False
        self._epoch_over = False  # whether the last reply ended an epoch
        self._active: tuple[int, ...] = ()  # ranks that still made calls at the last reply, if some did not

    @property
    def calls(self) -> int:
        """The number of the last call: how many this rank has made, and what it lacked in epochs it ended early."""
        return self._calls + self._lease - self._left

    def position(self) -> tuple[int, Step]:
        """Return the number and step of the last call, for messages; may be asked from any thread."""
        calls, left = self.calls, self._left
        step = self._steps[left + 1] if left < self._lease else self._current
        return calls, step if isinstance(step, (int, float)) and not isinstance(step, bool) else None

    @property
    def state(self) -> State:
        """Where the job's logging stood at the last reply."""
        if self._state is None:
            msg = "no reply has come yet"
            raise RuntimeError(msg)
        return self._state

    @property
    def last_entry(self) -> LogEntry | None:
        """The newest entry, the same on every rank, without what `annotate` added; None before the first."""
        return self._last_entry

    def log_ready(self, current_log_step: LogStepType, check_model_update: bool = False) -> bool:  # noqa: FBT001, FBT002 - the signature of FrequencyManager
        """Say whether a log is due at `current_log_step`, with the same answer on every rank.

        Call it once per iteration on every rank. Most calls are answered locally; the rest wait for the slowest
        rank, at most `timeout` seconds. With `write="auto"` a True means that the entry is merged and written.

        Args:
            current_log_step: where this rank is, in units of `frequency_type`. Rank 0's decides.
            check_model_update: ask for the rule of mode on_change at this call. Rank 0's counts, and only in a round.

        Raises:
            BadType, BadValue: a rank's step is no step; the error names the rank, and all ranks get it.
            RoundMismatch: a rank called once more or less than the others.
            RoundTimeout, PeerLost, CoordinatorLost: a rank did not come; the group is lost.
        """
        left = self._left
        if left:
            self._steps[left] = current_log_step
            self._left = left - 1
            return False
        return self._due(current_log_step, check_model_update)

    def _due(self, step: object, check_model_update: bool) -> bool:  # noqa: FBT001 - called from the hot path
        raise NotImplementedError

    # -- what the user said ------------------------------------------------------------------------------------

    def model_updated(self, step: LogStepType = None) -> None:
        """Note that the model changed at `step`; None forgets all updates. Any rank's update counts.

        Never communicates: it reaches the root with this rank's next frame. The last update is the largest since
        the last reset.

        Raises:
            TypeError, ValueError: `step` is not a step.
        """
        value = counted_step(step, self._frequency_type)
        call = self.calls + 1
        events, sent = self._events, self._sent_events
        if value is None:
            events[sent:] = [e for e in events[sent:] if e.kind != "update"]
            self._hooked.clear()
        else:
            while len(events) > sent and (newest := events[-1]).kind == "update" and newest.value is not None:
                if newest.value > value:
                    if newest.call == call:
                        return  # the larger one of the two counts, and it is there
                    break
                events.pop()  # earlier and not larger: it cannot matter any more
        events.append(Event(call, "update", value))
        if len(events) - sent > _MOST_EVENTS:
            events[sent:] = _thinned(events[sent:])

    def note_update(self, skipped: Any = None) -> None:
        """Note that the model changed before the next call, and at that call's step.

        Args:
            skipped: a tensor on a device that is not 0 if it did not change after all; None if it is certain.
        """
        call, hooked = self.calls + 1, self._hooked
        if hooked and hooked[-1] == (call, None):
            return
        if skipped is None:
            while hooked and hooked[-1][0] == call:
                hooked.pop()  # one is enough
        hooked.append((call, skipped))

    def log_written(self, step: LogStepType = None) -> None:
        """Note that a log was written at `step`; None forgets all logs. The step just decided needs no note.

        Never communicates: it reaches the root with this rank's next frame.

        Raises:
            TypeError, ValueError: `step` is not a step.
        """
        value = counted_step(step, self._frequency_type)
        pending = any(e.kind == "written" for e in self._events)
        if not pending and value is not None and value == self.state.last_log_step:
            return
        # Of this rank's marks that are still to be sent only the last one can matter.
        sent = self._sent_events
        self._events[sent:] = [e for e in self._events[sent:] if e.kind != "written"]
        self._events.append(Event(self.calls + 1, "written", value))

    def _set_frequency(self, log_frequency: object) -> None:
        value = checked_frequency(log_frequency, self._frequency_type)
        if isinstance(value, int) and value > INT64_MAX:
            msg = f"log frequency must be at most 2**63 - 1, given an int of {value.bit_length()} bits"
            raise ValueError(msg)
        kept = [e for e in self._events[self._sent_events :] if e.kind != "frequency"]
        self._events[self._sent_events :] = [*kept, Event(self.calls + 1, "frequency", value)]

    # -- rounds ------------------------------------------------------------------------------------------------

    def _frame(
        self,
        kind: ReportKind,
        step: object = None,
        *,
        check_model_update: bool = False,
        window: Window | None = None,
        waited_s: float | None = None,
        host: str = "",
    ) -> bytes:
        """End the lease, count the call if it is one, and return this rank's frame for the next round."""
        report = self._report(
            kind, step, check_model_update=check_model_update, window=window, waited_s=waited_s, host=host
        )
        if self._unsure is not None:
            unsure, self._unsure = self._unsure, None
            self._add_updates(unsure.applied())
            report = msgspec.structs.replace(report, events=tuple(self._events))
        return encode(report)

    def _report(
        self,
        kind: ReportKind,
        step: object = None,
        *,
        check_model_update: bool = False,
        window: Window | None = None,
        waited_s: float | None = None,
        host: str = "",
    ) -> Report:
        """Do so, and return the frame as a message, without the updates that only a device knows of: see `_unsure`."""
        self._settle()
        if kind == "decision":
            self._track((step,))
        counted = self._checked(step, self._calls) if kind == "write" else self._current
        if self._stamped:
            self._take_hooked()
        self._sent_events = len(self._events)
        return Report(
            protocol=PROTOCOL,
            run=self._run,
            round=self._round,
            rank=self._rank,
            world_size=self._world_size,
            kind=kind,
            call=self._calls,
            step=counted,
            check_model_update=bool(check_model_update),
            rhythm=Rhythm(self._rise, self._gap, self._since, self._current, tuple(self._falls)),
            events=tuple(self._events),
            window=window or Window(),
            fault=self._fault,
            restore=self._restore,
            waited_s=waited_s,
            host=host,
            restored_at=self._restored_at,
        )

    def _take_hooked(self) -> None:
        """Turn the updates whose step is known into events, or keep them in `_unsure`."""
        stamped, self._stamped = self._stamped, {}
        known = [(call, stamped[call], skipped) for call, skipped in self._hooked if call in stamped]
        self._hooked = [hooked for hooked in self._hooked if hooked[0] not in stamped]
        self._add_updates([(call, step) for call, step, skipped in known if skipped is None])
        unsure = [update for update in known if update[2] is not None]
        self._unsure = Unsure(unsure) if unsure else None

    def _add_updates(self, updates: Sequence[tuple[int, Step]]) -> None:
        self._events = with_updates(self._events, updates)
        self._sent_events = len(self._events)

    def _settle(self) -> None:
        """End the lease and take in the calls that were made under it."""
        leased = self._steps[self._left + 1 : self._lease + 1]
        self._lease = self._left = 0
        if leased:
            leased.reverse()
            self._track(leased)

    def _accept(self, reply: bytes, *, ended: bool = False) -> Decision:
        """Take over what the root decided.

        Args:
            ended: this rank makes no more calls in this epoch: it takes no lease, and where the epoch is over its
                calls go on from the number that the reply gives.

        Raises:
            LogsyncError: the agreed error that came instead; what this rank has recorded and said is kept.
            UnreadableReply: this is no reply, or not one for this round; what the others were told is not known here.
        """
        try:
            decision = decode_decision(reply)
        except ProtocolError as error:
            raise UnreadableReply(str(error), round=self._round) from error
        if not self._run:
            self._round = decision.round  # the first one: where others go on already, it says how far they are
        number, self._round = self._round, self._round + 1
        sent, self._sent_events = self._sent_events, 0
        self._fault = None
        if decision.round != number or decision.protocol != PROTOCOL or (self._run and decision.run != self._run):
            msg = f"the reply is for round {decision.round} of run {decision.run!r}, not {number} of {self._run!r}"
            raise UnreadableReply(msg, round=number)
        self._finished = decision.finished
        self._active = decision.active
        self._epoch_over = decision.new_epoch is not None
        if decision.failure is not None and ended:
            self._enter(decision.new_epoch)
        if decision.failure is not None:
            raise error_of(decision.failure, number)
        if decision.lease >= len(self._steps):
            msg = f"the reply grants a lease of {decision.lease} calls, {len(self._steps) - 1} are the most"
            raise UnreadableReply(msg, round=number)
        self._run = decision.run
        self._state = decision.state
        del self._events[:sent]
        self._rise = self._gap = None
        self._falls = []
        self._restore, self._restored_at = b"", 0
        if decision.entry is not None:
            self._last_entry = decision.entry
            self._entry_call = self._calls
        if ended:
            self._enter(decision.new_epoch)
        else:
            self._lease = self._left = decision.lease
        return decision

    def _enter(self, epoch: NewEpoch | None) -> None:
        if epoch is not None:
            self._skipped += epoch.call - self._calls
            self._calls, self._entry_call = epoch.call, epoch.call - epoch.missed

    def _track(self, steps: Iterable[object]) -> None:
        """Count one call for each of `steps` and note how the step moved."""
        call, previous, since = self._calls, self._previous, self._since
        step: Step = None
        wanted = {hooked for hooked, _ in self._hooked}
        for raw in steps:
            call += 1
            step = raw if type(raw) is int and 0 <= raw <= INT64_MAX else self._checked(raw, call)
            if step is None or step == previous:
                since += 1
            else:
                if previous is None or step < previous:
                    self._fell(call, step)
                if previous is not None:
                    if self._gap is None or since + 1 < self._gap:
                        self._gap = since + 1
                    if step > previous and (self._rise is None or step - previous > self._rise):
                        self._rise = step - previous
                since = 0
                previous = step
            if call in wanted:
                self._stamped[call] = previous if step is None else step
        self._calls, self._previous, self._since, self._current = call, previous, since, step

    def _fell(self, call: int, step: int | float) -> None:
        """Note that the step went back; of too many places, those count that went back furthest."""
        if len(self._falls) >= MAX_FALLS:
            self._falls = [fall for fall in self._falls if fall[1] < step]
        if len(self._falls) < MAX_FALLS:
            self._falls.append((call, step))

    def _checked(self, step: object, call: int) -> Step:
        """Return `step`, or None if it is refused: then it is this round's fault, unless there is one already."""
        try:
            return counted_step(step, self._frequency_type)
        except (TypeError, ValueError) as error:
            self._refuse(error, call)
            return None

    def _refuse(self, error: Exception, call: int) -> None:
        """Let the next frame carry `error`, so that every rank raises it."""
        if self._fault is None:
            kind = BadType if isinstance(error, TypeError) else BadValue
            self._fault = failure_of(kind(str(error), call=call))

    # -- state -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, bytes]:
        """Return where the log stands, as one bytes value that is equal on all ranks at the same call.

        Never communicates. What is recorded but not logged yet is not in it: taken in the body of
        `if log.log_ready(step):` or after `write`, it is exact; otherwise the first entry after a load covers only
        the calls since the checkpoint, and is marked partial.
        """
        missed = self.calls - self._entry_call
        # Without the waits, which may be long, and with which no state would be like another run's.
        entry = None if self._last_entry is None else msgspec.structs.replace(self._last_entry, waits=None)
        return {"state": encode(msgspec.structs.replace(self.state, missed=missed, entry=entry))}

    def load_state_dict(self, state_dict: Mapping[str, bytes]) -> None:
        """Go on where `state_dict` was taken, at any world size; call it on every rank, with the same state.

        Never communicates. The next call is a round; the log's files are cut back to the state there. What was
        recorded and not logged is dropped.

        Raises:
            ValueError: this is not a state of logsync, or of another frequency type.
            LogsyncError: this log makes no further rounds: its group was lost, or it is closed.
        """
        data = state_dict.get("state") if isinstance(state_dict, Mapping) else None
        if not isinstance(data, bytes):
            msg = "load_state_dict() takes what state_dict() returned: {'state': bytes}"
            raise ValueError(msg)  # noqa: TRY004 - one error for everything that is not a state
        try:
            state = decode_state(data)
        except ProtocolError as error:
            msg = f"this is not a state of logsync: {error}"
            raise ValueError(msg) from error
        if problem := misfit(state, self._frequency_type):
            raise ValueError(problem)
        self._calls = self.calls
        self._lease = self._left = 0
        self._entry_call = self._calls - state.missed
        self._previous = self._current = self._rise = self._gap = None
        self._falls = []
        self._since = 0
        self._events.clear()
        self._hooked.clear()
        self._stamped.clear()
        self._fault = None
        self._last_entry = state.entry
        state = msgspec.structs.replace(state, entry=None)  # which rank 0 has from the same checkpoint
        self._restore, self._restored_at = encode(state), self._calls
        now = self.state
        if state.configured != now.configured:  # the root will keep what the user asks for in this start
            state = msgspec.structs.replace(state, log_frequency=now.log_frequency, configured=now.configured)
        self._state = state


class Unsure:
    """Updates that were maybe skipped: call, step and a tensor on a device that is not 0 if it was.

    The tensors are copied to the host at once, in the current stream; `applied` waits for that, on any thread.
    """

    def __init__(self, updates: Sequence[tuple[int, Step, Any]]) -> None:
        self._places = [(call, step) for call, step, _ in updates]
        self._readings = begin_reading_scalars([skipped for _, _, skipped in updates])

    def applied(self) -> list[tuple[int, Step]]:
        """Return call and step of those that were not skipped."""
        skipped = read_scalars(self._readings)
        return [place for place, found in zip(self._places, skipped, strict=True) if not found]


def with_updates(events: Sequence[Event], updates: Sequence[tuple[int, Step]]) -> list[Event]:
    """Return `events` and, after others of their calls, those updates that can matter; both in order of calls."""
    new: list[Event] = []
    for call, step in updates:
        value = 0 if step is None else step
        while new and (new[-1].value or 0) <= value:
            new.pop()  # earlier and not larger
        new.append(Event(call, "update", value))
    merged = sorted([*events, *new], key=lambda event: event.call) if new else list(events)
    return _thinned(merged) if len(merged) > _MOST_EVENTS else merged


def _thinned(events: list[Event]) -> list[Event]:
    """Drop every second update of a fall: its first is the largest, others matter only if another rank resets.

    What else was said stays, and so does the first update after it.
    """
    kept: list[Event] = []
    run = 0
    for event in events:
        run = run + 1 if event.kind == "update" and event.value is not None else 0
        if run % 2 != 0 or run == 0:
            kept.append(event)
    return kept
