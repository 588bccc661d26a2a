"""Every error that logsync raises.

    LogsyncError
    ├── ConfigError (ValueError)        a setting or the surroundings make no sense; nothing was started
    │   ├── LaunchError                 the launcher's environment does not fit the transport
    │   └── ConfigMismatch              ranks connected with different settings
    ├── CollectiveSetupError            the gloo group could not be built
    ├── AgreedError                     decided at the root, raised on every rank; the group goes on
    │   ├── RoundMismatch               a rank called once more or less than the others, or a different method
    │   ├── StateMismatch               ranks loaded different states, or only some of them loaded one
    │   ├── ReductionMismatch           ranks use one key with two reductions
    │   ├── BadValue (ValueError)       a rank gave a step or value that is out of range
    │   ├── BadType (TypeError)         a rank gave a step or value that is not a number
    │   ├── FrameTooLarge               a rank's window does not fit a frame
    │   ├── ProtocolError               a frame is corrupt, or from another version, run, round or world
    │   └── CoordinatorFailed           the coordinator itself raised
    ├── TransportError                  the group is lost; every later call raises too
    │   ├── RoundTimeout (TimeoutError)
    │   ├── PeerLost (ConnectionError)
    │   │   └── PeerFailed          a rank's own code raised, and it left the log
    │   ├── CoordinatorLost (ConnectionError)
    │   └── UnreadableReply             this rank cannot read the outcome of a round
    ├── RoundInterrupted                this rank left a round half done (a signal, Ctrl-C)
    ├── ForkedProcess                   a forked child used its parent's log
    └── LogClosed                       a call after close()

An agreed error is the same on all ranks, so a handler for it may do the same thing everywhere. A transport error
is only known to this rank: others see theirs within the timeout.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AgreedError",
    "BadType",
    "BadValue",
    "CollectiveSetupError",
    "ConfigError",
    "ConfigMismatch",
    "CoordinatorFailed",
    "CoordinatorLost",
    "ForkedProcess",
    "FrameTooLarge",
    "LaunchError",
    "LogClosed",
    "LogsyncError",
    "PeerFailed",
    "PeerLost",
    "ProtocolError",
    "ReductionMismatch",
    "RoundInterrupted",
    "RoundMismatch",
    "RoundTimeout",
    "StateMismatch",
    "TransportError",
    "UnreadableReply",
    "agreed_error",
    "kind_of",
    "printable",
]

Step = int | float | None


class LogsyncError(Exception):
    """The root of the tree.

    Attributes:
        ranks: the ranks that the error is about, lowest first; empty where it is about none.
        call: the number of the call on those ranks (the first is 1), where known.
        step: the step given to that call, where known.
        round: the round's number, where known.
    """

    def __init__(
        self,
        message: str,
        *,
        ranks: tuple[int, ...] = (),
        call: int | None = None,
        step: Step = None,
        round: int | None = None,  # noqa: A002 - the frame's field is called so
    ) -> None:
        super().__init__(message)
        self.ranks = ranks
        self.call = call
        self.step = step
        self.round = round

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the typed fields when a process pool or a launcher pickles the error."""
        fields = {"ranks": self.ranks, "call": self.call, "step": self.step, "round": self.round}
        return _rebuild, (type(self), str(self), fields)


class ConfigError(LogsyncError, ValueError):
    """A setting, or what surrounds the process, makes no sense; nothing was started."""


class LaunchError(ConfigError):
    """The launcher's environment variables do not fit the transport, or are only half there."""


class ConfigMismatch(ConfigError):
    """Ranks connected with different settings; the text names the field, the ranks and the values."""


class CollectiveSetupError(LogsyncError):
    """The gloo group could not be built; the text names the address and the variable to set."""


class AgreedError(LogsyncError):
    """Decided at the root and raised on every rank alike; windows are kept and the group goes on."""


class RoundMismatch(AgreedError):
    """A rank called once more or less than the others, or another method at the same place."""


class StateMismatch(AgreedError):
    """Ranks loaded different states, or only some of them loaded one."""


class ReductionMismatch(AgreedError):
    """Two ranks recorded one key with two reductions."""


class BadValue(AgreedError, ValueError):
    """A rank gave a step, or a value to `write`, that is a number but out of range."""


class BadType(AgreedError, TypeError):
    """A rank gave a step, or a value to `write`, that is not a number of the kind asked for."""


class FrameTooLarge(AgreedError):
    """A rank's window does not fit the largest frame that the transport carries."""


class ProtocolError(AgreedError):
    """A frame is corrupt, or comes from another version, run, round or world."""


class CoordinatorFailed(AgreedError):
    """The coordinator raised while it decided; the text carries its exception's first line."""


class TransportError(LogsyncError):
    """The group is lost: this call and every later one raise."""


class RoundTimeout(TransportError, TimeoutError):
    """A rank did not come to the round within the timeout."""


class PeerLost(TransportError, ConnectionError):
    """A connection to another rank broke: its process ended or its network did."""


class PeerFailed(PeerLost):
    """A rank left the log because its own code raised; the text says where, and its exception's first line."""


class CoordinatorLost(TransportError, ConnectionError):
    """The coordinator's process, rank 0, ended or left the group."""


class UnreadableReply(TransportError):
    """What came as the coordinator's reply is none, or is one of another round: this rank does not know its outcome."""


class RoundInterrupted(LogsyncError):
    """This rank left an earlier round half done, because a signal's handler raised in it."""


class ForkedProcess(LogsyncError):
    """A forked child used the log of its parent."""


class LogClosed(LogsyncError):
    """A call after `close()`."""


_ON_THE_WIRE: dict[str, type[LogsyncError]] = {
    "config": ConfigError,
    "config_mismatch": ConfigMismatch,
    "round_mismatch": RoundMismatch,
    "state_mismatch": StateMismatch,
    "reduction_mismatch": ReductionMismatch,
    "bad_value": BadValue,
    "bad_type": BadType,
    "frame_too_large": FrameTooLarge,
    "protocol": ProtocolError,
    "coordinator_failed": CoordinatorFailed,
}
_KINDS = {cls: kind for kind, cls in _ON_THE_WIRE.items()}


def agreed_error(kind: str) -> type[LogsyncError]:
    """Return the class behind a kind that came over the wire; an unknown kind is the common base."""
    return _ON_THE_WIRE.get(kind, AgreedError)


def kind_of(error: LogsyncError) -> str:
    """Return the word that stands for `error`'s class on the wire."""
    return _KINDS.get(type(error), "agreed")


def printable(text: str, limit: int = 500) -> str:
    """Return `text` with control characters escaped, cut to `limit` characters and a few: fit for a log line.

    What comes from a peer goes through here before it is printed, written or put into an error.
    """
    shown = text[:limit]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
    if len(shown) <= limit and len(text) <= limit:
        return shown
    return f"{shown[:limit]}... ({len(text)} characters)"


def _rebuild(cls: type[LogsyncError], message: str, fields: dict[str, Any]) -> LogsyncError:
    return cls(message, **fields)
