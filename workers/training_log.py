"""The log as a training script sees it: the only place that orders rounds."""

from __future__ import annotations

import atexit
import copy
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Literal

import msgspec

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import (
    AgreedError,
    ConfigError,
    ForkedProcess,
    FrameTooLarge,
    LogClosed,
    LogsyncError,
    RoundInterrupted,
    TransportError,
    UnreadableReply,
    printable,
)
from logsync.coordinator.frequency import LogStepType
from logsync.coordinator.host import Host
from logsync.coordinator.messages import (
    MAX_WAIT_S,
    Decision,
    Hello,
    LogEntry,
    Settings,
    Window,
    decode_state,
    encode,
    encode_hello,
)
from logsync.workers import termination
from logsync.workers.absence import Absence
from logsync.workers.hosting import Hosting
from logsync.workers.ledger import with_updates
from logsync.workers.optimizers import Watch
from logsync.workers.overlap import Flight, Outcome, Overlap
from logsync.workers.surface import Stats, Surface
from logsync.workers.timer import Timer, Timers
from logsync.workers.transports.base import Transport
from logsync.workers.transports.local import LocalTransport
from logsync.workers.transports.notes import ranks_text
from logsync.workers.values import single_number
from logsync.workers.window import OpenWindow, Taken, checked_name

__all__ = ["Stats", "TrainingLog", "open_logs"]

_logger = logging.getLogger(__name__)

_DEVICE_S = 2.0  # how long an exit waits for what a device still has to hand over
_VOICES = 16  # how many ranks may warn of the same, where they cannot know of each other

_open_logs: set[TrainingLog] = set()


class TrainingLog(Surface):
    """One log of a job, on one rank; made by `connect`. Use it as a context manager, from one thread.

    The surface of `FrequencyManager` is here, agreed across ranks: `log_ready`, `model_updated`, `log_written`,
    `log_frequency` and the rest show what the last reply said. `record` is `OpenWindow.record`.
    """

    def __init__(
        self,
        transport: Transport,
        settings: Settings,
        host: Hosting | None,
        *,
        given_run_dir: str | None = None,
        warn_after_s: float = 60.0,
    ) -> None:
        super().__init__(
            transport.rank,
            transport.world_size,
            max_lease=settings.max_lease,
            frequency_type=settings.frequency_type,
        )
        self.given_run_dir = given_run_dir
        """The folder that the user chose, None if rank 0 did."""
        self._settings = settings
        self._warn_after_s = warn_after_s
        self._transport: Transport = transport
        self._host = host
        self._window = OpenWindow()
        self.record: Callable[..., None] = self._window.record
        self._timers = Timers(self._window)
        self._pid = os.getpid()
        self._detached = False
        self._unusable: LogsyncError | None = None  # why no further round can be made
        self._complete = False  # the last round was made
        self._doubtful: tuple[int, Taken] | None = None  # see _exchange: what an interrupted round had taken
        self._absence: Absence | None = None  # from end_epoch() to the end of the epoch on all ranks
        self._left_open = Taken.nothing()  # what this rank had recorded when it ended its epoch
        self._lock = threading.RLock()  # while it is absent, a thread of its own sends what the user says
        self._parked = 0  # a lease set aside until the next call: it hands over the open entry first
        self._overlap = Overlap()
        self._optimizers = Watch(self.note_update)
        self._flight: Flight | None = None  # the round that log_step() has begun
        self._owed: LogsyncError | None = None  # what became of it, for the next call
        self._rounds = 0
        self._bytes_sent = 0
        self._wait_s = 0.0
        self._waited_s: float | None = None  # in the rounds since the last entry, that one's included
        self._host_name = ascii(socket.gethostname())[1:-1][:64]  # until the root has it

    # -- rounds ------------------------------------------------------------------------------------------------

    def model_updated(self, step: LogStepType = None) -> None:  # noqa: D102 - as the base says
        with self._lock:
            super().model_updated(step)

    def log_written(self, step: LogStepType = None) -> None:  # noqa: D102 - as the base says
        with self._lock:
            super().log_written(step)

    def watch_optimizer(self, *optimizers: Any) -> None:
        """Have `model_updated` follow from the optimizers' own steps, at the step of the next call.

        Steps that a gradient scaler skips, because gradients are not finite, are no updates; where only the device
        knows of that (fused optimizers under `torch.amp.GradScaler`), it is read with the next frame and nothing waits
        for the device meanwhile. An update of any optimizer, on any rank, counts. Watching ends with the log, and
        neither keeps the other alive; nothing of it is in the optimizer's state.

        Args:
            optimizers: torch's, Accelerate's, what wraps one as its `.optimizer` or `.optim`, or engines that have
                `step()` and `was_step_applied()`, as DeepSpeed's have. One that is watched already stays so.

        Raises:
            TypeError: one is none of these; then none is watched.
            LogClosed: the log is closed.
        """
        if self not in _open_logs:
            msg = "watch_optimizer() after the log was closed"
            raise LogClosed(msg)
        self._optimizers.add(*optimizers)

    def state_dict(self) -> dict[str, bytes]:  # noqa: D102 - as the base says
        with self._lock:
            state = super().state_dict()
            if self._absence is None or self._epoch_over:
                return state
            # The others go on, and this rank does not know how far: what they record is in no entry of this state.
            found = decode_state(state["state"])
            return {"state": encode(msgspec.structs.replace(found, missed=max(1, found.missed)))}

    def load_state_dict(self, state_dict: Mapping[str, bytes]) -> None:  # noqa: D102 - as the base says
        self._collect()
        self._come_back()
        if self._unusable is not None:
            raise copy.copy(self._unusable)
        super().load_state_dict(state_dict)
        if self._host is not None:
            self._host.loaded(self.state, self._last_entry, self.calls)
        self._window.clear()
        self._doubtful = None
        self._parked = 0

    def write(self, step: LogStepType, values: Mapping[str, Any] | None = None) -> LogEntry:
        """Merge and write everything recorded since the last entry, whatever the cadence.

        Every rank calls it at the same place: after an evaluation, at the last step, before a checkpoint. It marks
        `step` as logged.

        Args:
            step: where the run is; rank 0's counts.
            values: recorded first, as by `record`.

        Returns:
            The entry, the same on every rank.

        Raises:
            BadType, BadValue: a rank's step or values are not acceptable; all ranks get the error.
            RoundMismatch: another rank called `log_ready` here.
            RoundTimeout, PeerLost, CoordinatorLost: a rank did not come; the group is lost.
        """
        self._begin()
        if values is not None:
            try:
                self.record(values)
            except (TypeError, ValueError) as error:
                self._refuse(error, self.calls)
        entry = self._make_round("write", step).entry
        if entry is None:
            msg = "the reply to write() has no entry"
            self._unusable = UnreadableReply(msg, round=self._round - 1)
            raise copy.copy(self._unusable)
        return entry

    def annotate(self, values: Mapping[str, Any]) -> None:
        """Add root-side values that need no merging, such as a learning rate, to the entry just made.

        Call it right after `log_ready` returned True or after `write`; it never communicates. On other ranks than
        the coordinator's it does nothing. `last_entry` does not show these values: it is the same everywhere.

        Raises:
            TypeError, ValueError: a value is no number, or a name is bad or merged already.
        """
        self._collect()
        if self._host is not None and self._absence is not None:
            _logger.warning("annotate(%s) came after end_epoch(), and was dropped", ", ".join(map(str, values)))
        elif self._host is not None:
            self._host.annotate({checked_name(name): single_number(name, value) for name, value in values.items()})

    def log_hyperparams(self, values: Mapping[str, object]) -> None:
        """Keep the run's settings with the destinations that have a place for them; once per run is enough.

        Rank 0's are taken; on other ranks it does nothing. It never communicates and never waits. What JSON has no
        word for becomes its text.

        Raises:
            TypeError: not a mapping with text as keys.
        """
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            msg = f"log_hyperparams() takes a mapping of names to values, given {printable(repr(values), 100)}"
            raise TypeError(msg)
        if self._host is not None:
            self._host.log_hyperparams(values)

    def timer(self, name: str) -> Timer:
        """Return a context manager, or decorator, that records the seconds of a section as metric `time_s/<name>`.

        The entry has the mean over all sections of the window, and /min, /max, /std and /argmax_rank of the ranks'
        own means. **Time sections without a collective:** in one with a collective, such as a backward pass under
        DDP, all ranks wait for the slowest, so it takes equally long everywhere. On a GPU it is the host's time.

        A section that raises counts. Timers may be nested; one inside itself counts its inner seconds twice. Never
        communicates.

        Raises:
            TypeError, ValueError: `name` cannot name a metric, or `time_s/<name>` is recorded with other reductions.
            LogClosed: the log is closed.
        """
        return self._timers[name]

    def log_step(
        self, step: LogStepType, values: Mapping[str, Any] | None = None, /, *, weight: Any = 1, **named: Any
    ) -> None:
        """Record values and make a call, in one line, without waiting for the round.

        It does what `record` and `log_ready` do, and logs at the same calls; but where a round is due, that runs on
        the log's thread while the training goes on. Its outcome is taken at the next call of `log_ready`, `log_step`,
        `write`, `end_epoch` or `close`, which waits for what is left of the round and raises its error, if there is
        one; that call is then not counted, on any rank. Properties such as `last_entry` wait for it, too, so that they
        are the same on every rank, and leave the error to the next call.

        The values of a device tensor are copied to the host in its own stream, and waited for on the log's thread.

        Args:
            step: where this rank is, in units of `frequency_type`. Rank 0's decides.
            values, weight, named: as `record` takes them, for a mean.

        Raises:
            TypeError, ValueError: a value cannot be recorded; the call counts all the same, as the others' does.
            LogsyncError: what the round before has come to; see `log_ready`.
            ConfigError: the log has `write="explicit"`, where whoever calls must hear whether to compute and write.
        """
        if self._settings.write == "explicit":
            msg = 'log_step() does not tell whether a log is due; with write="explicit" call log_ready() and write()'
            raise ConfigError(msg)
        try:
            if values is None:
                values = named
            elif named:
                values = {**values, **named}
            if values or not isinstance(values, Mapping):
                self.record(values, weight=weight)
        finally:
            left = self._left
            if left:
                self._steps[left] = step
                self._left = left - 1
            else:
                self._take_off(step)

    def _take_off(self, step: object) -> None:
        self._collect()
        if self._goes_on_with_lease(step):
            return
        self._begin()
        report = self._report("decision", step, waited_s=self._waited_s, host=self._host_name)
        unsure, self._unsure = self._unsure, None
        flight = Flight(report, self._window.take_later(), unsure, self._transport, self._entries_made())
        self._flight = flight
        self._overlap.begin(flight)

    def _collect(self) -> None:
        """Wait for the round that is under way, if there is one, and take over its outcome; its error stays owed."""
        flight = self._flight
        if flight is None or os.getpid() != self._pid:
            return
        started = time.perf_counter()
        outcome = self._overlap.wait()  # what a signal's handler raises here leaves everything as it is
        self._flight = None
        self._wait_s += time.perf_counter() - started
        try:
            decision = self._accept(self._landed(outcome, flight))
        except LogsyncError as error:
            self._keep(error, flight.made, flight.taken)
            self._events = with_updates(self._events, flight.updates)  # to be sent again
            self._owed = error
            return
        except Exception as error:  # noqa: BLE001 - a device that failed, say; told at the next call
            self._interrupted(error, flight.made, flight.taken)
            return
        self._rounds += 1
        self._bytes_sent += len(flight.frame)
        self._conclude(decision, flight.taken, flight.waited_s)
        self._parked, self._lease, self._left = self._left or self._parked, 0, 0

    def _landed(self, outcome: Outcome, flight: Flight) -> bytes:
        if outcome.error is None:
            return outcome.reply
        if isinstance(outcome.error, TransportError):
            return self._without_the_others(outcome.error, flight.frame)
        raise outcome.error

    def _due(self, step: object, check_model_update: bool) -> bool:  # noqa: FBT001 - as the base has it
        self._collect()
        if self._goes_on_with_lease(step):
            return False
        self._begin()
        ready = self._make_round("decision", step, check_model_update=check_model_update).log_ready
        return ready and not self._detached

    def _goes_on_with_lease(self, step: object) -> bool:
        """Answer a call under the lease that was set aside, if there is one."""
        if not self._parked or self._unusable is not None or self._owed is not None:
            return False
        lease, self._parked = self._parked, 0
        self._begin()
        self._lease = self._left = lease
        self._steps[lease] = step
        self._left = lease - 1
        return True

    def _begin(self) -> None:
        """Refuse what cannot make a round, and hand over the entry that `annotate` could still add to."""
        termination.wait_if_ending()
        self._collect()
        if self._owed is not None:
            owed, self._owed = self._owed, None
            raise owed
        if self._unusable is not None:
            raise copy.copy(self._unusable)
        if os.getpid() != self._pid:
            msg = (
                f"process {os.getpid()} was forked from {self._pid}, whose log this is; only the process that called "
                "connect() may log. In data loader workers, return the values and record them in the training loop"
            )
            raise ForkedProcess(msg)
        self._come_back()
        self._parked = 0
        if self._host is not None:
            self._host.release()

    def _begin_in_any_case(self) -> AgreedError | None:
        """Begin what must be done although an epoch's end was refused, or others wait for it; return the refusal."""
        try:
            self._begin()
        except AgreedError as error:
            self._begin()
            return error
        return None

    def _make_round(
        self,
        kind: Literal["decision", "write", "closed"],
        step: object = None,
        *,
        check_model_update: bool = False,
    ) -> Decision:
        carries = kind != "decision" or self._settings.write == "auto" or self._detached
        taken = self._window.take() if carries else Taken.nothing()
        frame = self._frame(
            kind,
            step,
            check_model_update=check_model_update,
            window=taken.message,
            waited_s=self._waited_s,
            host=self._host_name,
        )
        waited_before = self._wait_s
        made = self._entries_made()
        try:
            decision = self._accept(self._exchange(frame, patient=kind == "closed"))
        except LogsyncError as error:
            self._keep(error, made, taken)
            raise
        except BaseException as error:
            self._interrupted(error, made, taken)
            raise
        # Nobody waits for a rank that has closed and answers in the background, and it for nobody.
        self._conclude(decision, taken, None if kind == "closed" else self._wait_s - waited_before)
        return decision

    def _keep(self, error: LogsyncError, made: int, taken: Taken) -> None:
        """Keep what a round that ended by `error` had taken."""
        if isinstance(error, UnreadableReply):
            self._unusable = error
        if self._host is not None and isinstance(error, TransportError):
            self._doubtful = (made, taken)  # the root may have decided before the reply was lost
        else:
            self._window.give_back(taken)

    def _interrupted(self, error: BaseException, made: int, taken: Taken) -> None:
        self._doubtful = (made, taken)  # whether the root took it is not known before the end
        self._unusable = RoundInterrupted(
            f"round {self._round} was left half done by {type(error).__name__}; its outcome is not known here, "
            "so this log makes no further rounds"
        )

    def _conclude(self, decision: Decision, taken: Taken, waited_s: float | None) -> None:
        """Do what follows from a reply that was accepted; `waited_s` is None where nobody waits for this rank."""
        self._host_name = ""
        since = 0.0 if decision.entry is not None or self._waited_s is None else self._waited_s
        self._waited_s = None if waited_s is None else min(since + waited_s, MAX_WAIT_S)
        if decision.entry is None:
            self._window.give_back(taken)
        self._tell(decision)
        if self._host is not None and self._host.holds_entry:
            self._parked, self._lease, self._left = self._left, 0, 0

    def _entries_made(self) -> int:
        return self._host.entries_made if self._host is not None else 0

    def _tell(self, decision: Decision) -> None:
        for notice in decision.notices:
            _logger.log(logging.WARNING if self.is_coordinator else logging.DEBUG, "%s", printable(notice, 1000))

    def end_epoch(self) -> None:
        """Say that this rank makes no more calls in this epoch; the others may have more batches, and go on.

        Call it on every rank at the end of every epoch where loaders may be of different lengths. It does not wait:
        the rounds of the others are answered on a thread, also while this rank is in a collective of the training. The
        next `log_ready`, `write`, `load_state_dict`, `close` or `end_epoch` waits until every rank has ended the epoch
        or closed. Then call numbers agree again, and no rank has a lease.

        Under DDP's Join call it inside the `with Join(...)` block, after the loop, and everything that waits, `close`
        too, after the block: at its end a rank without batches takes part in the training collectives of those that
        go on. An end told after the block comes too late for a round that is due meanwhile: the others wait in it for
        this rank, and this rank in Join for their next step, until `timeout`. A call inside the block that waits is
        missed in their collectives, and nothing ends that wait but the training's own timeout.

        What is recorded and not logged by then goes into the others' next entry, or else into the next epoch's first.
        Meanwhile `log_ready` answers are those of the lowest rank that still makes calls, and so steps have to mean the
        same on every rank: a rank that counts its own batches falls behind the others' last log, which is told as a
        step that went back. `state_dict` does not wait
        either: it tells what this rank has heard of. For an exact checkpoint at the end of an epoch call `write`
        first.

        Raises:
            TransportError: a rank was lost before, or in an earlier epoch's end that had not been waited for.
            AgreedError: what the ranks said at that earlier end does not fit together. This one is said all the same.
        """
        refused = self._begin_in_any_case()
        self._settle()
        self._left_open = self._window.take()
        self._waited_s = None
        self._doubtful = (self._entries_made(), self._left_open)
        self._absence = Absence(self._answer_absent)
        self._absence.start()
        if refused is not None:
            raise refused

    def _answer_absent(self) -> bool:
        """Answer one round of the others, on the absence's thread; say whether the epoch is over."""
        with self._lock:
            self._epoch_over = False  # until a reply says so; the transport itself may refuse a frame
            frame = self._frame("ended", window=self._left_open.message)
        self._doubtful = (self._entries_made(), self._left_open)
        try:
            reply = self._exchange(frame, patient=True)
            with self._lock:
                decision = self._accept(reply, ended=True)
        except UnreadableReply as error:
            self._unusable = error
            raise
        except AgreedError as error:
            if self._epoch_over:
                raise
            if self._is_too_large(error):
                self._left_open = Taken.nothing()
            # Otherwise it is a mistake of those that made a call here: they have the error.
            return False
        if decision.entry is not None:
            self._left_open = Taken.nothing()
        self._tell(decision)
        if self._host is not None:
            self._host.release()
        return self._epoch_over

    def _come_back(self) -> None:
        """Wait until all have ended the epoch, if this rank has.

        Raises:
            TransportError: a rank was lost meanwhile.
            AgreedError: what the ranks said at the end of the epoch does not fit together.
        """
        absence = self._absence
        if absence is None:
            return
        try:
            self._wait_s += absence.wait(self._warn_after_s, self._warn_of_the_wait)
        except Exception as error:
            if self._unusable is None and not isinstance(error, LogsyncError):
                self._unusable = RoundInterrupted(
                    f"round {self._round} was left half done by {type(error).__name__} on this log's thread; its "
                    "outcome is not known here, so this log makes no further rounds"
                )
            self._end_absence()
            raise
        self._end_absence()

    def _end_absence(self) -> None:
        self._absence = None
        if self._unusable is None:
            self._doubtful = None
            self._window.give_back(self._left_open)
            self._left_open = Taken.nothing()

    def _warn_of_the_wait(self, waited_s: float) -> None:
        # A reply that counts this rank among the callers, or counts nobody, is older than the end of its epoch.
        told = self._rank not in self._active and bool(self._active)
        # One voice: that of the lowest rank that waits. Before any round has told who that is, a few may speak: the
        # others may be stuck in a collective of the training, for good.
        if set(range(self._rank)) <= set(self._active) if told else self._rank < _VOICES:
            _logger.warning(
                "rank %d has ended its epoch and waits since %.0f s for %s: every rank calls end_epoch() as often as "
                "the others, or closes its log",
                self._rank,
                waited_s,
                f"{ranks_text(self._active)} and maybe others" if told else "others to end theirs",
            )

    def _is_too_large(self, error: AgreedError) -> bool:
        """Say whether no round can take this rank's window: then the others would wait for this rank for ever."""
        if not isinstance(error, FrameTooLarge) or self._rank not in error.ranks:
            return False
        _logger.error("the last window of rank %d is dropped: %s", self._rank, error)
        return True

    def _exchange(self, frame: bytes, *, patient: bool) -> bytes:
        started = time.perf_counter()
        try:
            reply = self._transport.exchange(frame, patient=patient)
        except TransportError as error:
            reply = self._without_the_others(error, frame)
        self._rounds += 1
        self._bytes_sent += len(frame)
        if self._absence is None:
            self._wait_s += time.perf_counter() - started
        return reply

    def _without_the_others(self, error: TransportError, frame: bytes) -> bytes:
        """Return what answers a frame whose round was lost with the group, or raise `error`."""
        if self._settings.on_failure == "raise" or self not in _open_logs:
            if self._unusable is None:
                self._unusable = error
            raise error
        return self._detach(error, frame)

    def _detach(self, error: TransportError, frame: bytes) -> bytes:
        """Go on alone, and return the reply to the frame of the round that was lost."""
        self._detached = True
        what = "rank 0 goes on logging its own values, marked partial" if self.is_coordinator else "it logs no more"
        _logger.error(
            "rank %d has lost the others and trains on (on_failure='detach'); log_ready() is False from now on, and "
            "%s. The reason: %s",
            self._rank,
            what,
            error,
        )
        self._transport.close()
        self._transport = LocalTransport()
        if self._host is not None:
            root, reply = self._host.go_on_here(self._alone, self._rank, self._round)
            self._transport.start(root)
            if reply is not None:
                return reply
        else:
            coordinator = self._alone()
            self._transport.start(lambda frames: coordinator.handle(frames, time.time())[0])
        return self._transport.exchange(frame)

    def _alone(self) -> Coordinator:
        return Coordinator.alone(
            self._settings,
            self._world_size,
            self._rank,
            run=self._run,
            number=self._round,
            state=self.state,
            entry_call=self._entry_call,
        )

    # -- beginning and end -------------------------------------------------------------------------------------

    def _open(self, version: str) -> None:
        """Introduce this rank to the others; collective.

        Raises:
            ConfigMismatch: ranks gave `connect` different settings.
            CollectiveSetupError: the group could not be built.
        """
        hello = encode_hello(Hello(self._rank, self._world_size, version, self._settings))
        try:
            self._transport.start(self._host.handle if self._host is not None else None, self.position)
            # As at the end of an epoch: where this process takes the place of one that was lost, the reply says from
            # what number on it counts.
            self._accept(self._exchange(hello, patient=False), ended=True)
        except BaseException:
            self._let_go()
            raise
        self._rounds = self._bytes_sent = 0
        self._wait_s = 0.0
        _open_logs.add(self)
        if isinstance(self._host, Host):
            termination.flush_at_sigterm(self._host)

    def __enter__(self) -> TrainingLog:  # noqa: PYI034 - typing.Self needs Python 3.11
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            # A rank that goes because another one was lost is no reason for the rest.
            first_line = str(error).strip().split("\n")[0]
            lost = isinstance(error, TransportError) and not isinstance(error, UnreadableReply)
            self._leave(None if lost else f"{kind.__name__}: {first_line}")

    def close(self) -> None:
        """End the log: wait until every rank has closed, write what is recorded, flush the sinks.

        Until the others have come, this rank goes on answering their rounds. A second call does nothing.

        Raises:
            TransportError: a rank was lost meanwhile. What this process could write is written.
            ReductionMismatch: the last windows cannot be merged.
            AgreedError: what the ranks said at the end of an epoch does not fit together. Everything is written.
        """
        if self not in _open_logs:
            return
        try:
            refused_before = self._begin_in_any_case()
            self._answer_until_finished()
            if refused_before is not None:
                raise refused_before
        finally:
            self._leave()

    def _answer_until_finished(self) -> None:
        refused: AgreedError | None = None
        while True:
            try:
                self._make_round("closed")
            except AgreedError as error:
                # Before the end it is the others' mistake: they have the error, and this rank nothing to do with it.
                # At the end all ranks have it. The round is made once more: a bad step is told and forgotten.
                if self._finished:
                    if refused is not None:
                        raise
                    refused = error
                elif self._is_too_large(error):
                    self._window.clear()
            else:
                if self._finished:
                    self._complete = True
                    if refused is not None:
                        raise refused
                    return
            if self._host is not None:
                self._host.release()

    def _leave(self, reason: str | None = None) -> None:
        """End the log without waiting for anybody; the coordinator writes what it has."""
        if self not in _open_logs:
            return
        if os.getpid() != self._pid:
            _open_logs.discard(self)
            return
        termination.wait_if_ending()
        _open_logs.discard(self)
        if self._flight is not None and self._flight.is_built.wait(_DEVICE_S):
            self._doubtful = (self._flight.made, self._flight.taken)
        if self._host is not None and not self._complete:
            try:
                with self._lock:
                    self._settle()
                self._host.leave(self._rank, self._last_window, self._current, self.calls)
            except Exception:
                _logger.exception("could not write the last window of rank %d", self._rank)
        self._let_go(reason)

    def _last_window(self, entries_made: int) -> Window:
        """Return what is recorded and in no entry; what an interrupted round took is in one if one was made since."""
        if self._doubtful is not None:
            made, taken = self._doubtful
            if made == entries_made:
                self._window.give_back(taken)
        return self._window.take().message

    def _let_go(self, reason: str | None = None) -> None:
        if self._unusable is None:
            self._unusable = LogClosed("the log is closed")
        with self._lock:
            self._settle()
        self._parked = 0
        self.record = _refuse_to_record
        self._timers.close()
        self._optimizers.end()
        self._overlap.end()
        self._transport.close(reason)  # first: the others are waiting, the sinks are not
        if self._host is not None:
            self._host.close()
        if isinstance(self._host, Host):
            termination.let_go(self._host)


def open_logs() -> tuple[TrainingLog, ...]:
    """Return the logs of this process that are not closed."""
    return tuple(_open_logs)


def _refuse_to_record(*_: object, **__: object) -> None:
    msg = "record() after the log was closed"
    raise LogClosed(msg)


@atexit.register
def _leave_all() -> None:
    """Write and flush what logs still hold whose `close` was forgotten; never waits for other ranks."""
    for log in list(_open_logs):
        if os.getpid() == log._pid:  # noqa: SLF001 - a forked child must not touch its parent's files
            _logger.warning(
                "log %r was not closed: its last window has rank %d's values only. Use `with connect(...) as log:`",
                log.name,
                log.rank,
            )
        log._leave()  # noqa: SLF001
