"""Is a log due at this step.

The public API of `llmcompressor.metrics.utils`, name for name, with three differences: frequency type "batch" works,
mode "on_update" exists, and comparisons are exact (see `cadence_reached`).
"""

from __future__ import annotations

import math
import numbers
from fractions import Fraction
from typing import Any, Literal, cast

__all__ = [
    "FrequencyManager",
    "FrequencyType",
    "LogStepType",
    "LoggingModeType",
    "cadence_reached",
    "checked_frequency",
    "checked_step",
    "earliest",
    "log_ready",
]

LogStepType = int | float | None
LoggingModeType = Literal["on_change", "exact", "on_update"]
FrequencyType = Literal["epoch", "step", "batch"]

_MODES = ("exact", "on_change", "on_update")
_FREQUENCY_TYPES = ("epoch", "step", "batch")


class FrequencyManager:
    """Decide when a log is due.

    Modes:
        exact: every `log_frequency`, whatever the model did.
        on_change: **a quiet-period rule: a model that is updated at every step logs once and then never again.** Due
            when the cadence is reached, the last update is not older than the last log, and `log_frequency` has
            passed since that update. Kept as llm-compressor defines it; most people want `on_update`.
        on_update: due when the cadence is reached and an update was reported since the last log, or nothing was
            logged yet. An update is an event: one that is reported after the log at the same step counts for the
            next log.

    Frequency types: "epoch" takes int and float; "step" (optimizer steps) and "batch" (micro-batches) take int only.

    Attributes:
        frequency_type: what steps count: "epoch", "step" or "batch".
        last_log_step: the step of the last `log_written`, or None.
        last_model_update_step: the step of the last `model_updated`, or None.

    Raises:
        TypeError: a frequency or step that is not a number of the type's kind (bool and str are not).
        ValueError: a frequency that is not positive, a negative step, NaN, infinity, or an unknown mode or type.
    """

    def __init__(
        self,
        log_frequency: LogStepType = None,
        mode: LoggingModeType = "exact",
        frequency_type: FrequencyType = "epoch",
    ) -> None:
        self._mode = cast("LoggingModeType", _checked_choice("mode", mode, _MODES))
        self.frequency_type = cast("FrequencyType", _checked_choice("frequency_type", frequency_type, _FREQUENCY_TYPES))
        self._log_frequency = checked_frequency(log_frequency, self.frequency_type)
        self.last_log_step: LogStepType = None
        self.last_model_update_step: LogStepType = None
        self._updated_since_log = False

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(log_frequency={self._log_frequency!r}, mode={self._mode!r}, "
            f"frequency_type={self.frequency_type!r})"
        )

    @property
    def mode(self) -> LoggingModeType:
        """The logging mode: "exact", "on_change" or "on_update"."""
        return self._mode

    @property
    def log_frequency(self) -> LogStepType:
        """How much of the frequency type lies between two logs; None never logs. A rejected write keeps the old one."""
        return self._log_frequency

    @log_frequency.setter
    def log_frequency(self, log_frequency: LogStepType) -> None:
        self._log_frequency = checked_frequency(log_frequency, self.frequency_type)

    @property
    def is_epoch_frequency_manager(self) -> bool:
        """Whether steps are epochs."""
        return self.frequency_type == "epoch"

    @property
    def is_optim_frequency_manager(self) -> bool:
        """Whether steps are optimizer steps."""
        return self.frequency_type == "step"

    @property
    def updated_since_log(self) -> bool:
        """Whether an update was reported after the last log and not reset since."""
        return self._updated_since_log

    @updated_since_log.setter
    def updated_since_log(self, value: bool) -> None:
        self._updated_since_log = value

    def log_ready(self, current_log_step: LogStepType, check_model_update: bool = False) -> bool:  # noqa: FBT001, FBT002 - the source's signature
        """Say whether a log is due at `current_log_step`; None stands for "now, whatever the cadence".

        Args:
            current_log_step: where the run is, in units of the frequency type.
            check_model_update: ask for `on_change`'s rule at this call, whatever the mode.
        """
        current = checked_step(current_log_step, self.frequency_type)
        ready = _ready(
            current,
            self.last_log_step,
            self._log_frequency,
            self.last_model_update_step,
            check_model_update=check_model_update or self._mode == "on_change",
        )
        if ready and self._mode == "on_update":
            return self.last_log_step is None or self._updated_since_log
        return ready

    def log_written(self, step: LogStepType = None) -> None:
        """Note that a log was written at `step`, which may lie behind the last one; None forgets all logs."""
        self.last_log_step = checked_step(step, self.frequency_type)
        self._updated_since_log = False

    def model_updated(self, step: LogStepType = None) -> None:
        """Note that the model changed at `step`, which may lie behind the last one; None forgets all updates."""
        self.last_model_update_step = checked_step(step, self.frequency_type)
        self._updated_since_log = step is not None


def log_ready(
    current_log_step: LogStepType,
    last_log_step: LogStepType,
    log_frequency: LogStepType,
    last_model_update_step: LogStepType = None,
    check_model_update: bool = False,  # noqa: FBT001, FBT002 - the source's signature
) -> bool:
    """Say whether a log is due, from the values given: the stateless form of `FrequencyManager.log_ready`.

    Steps of any kind are taken, int or float. With `check_model_update` the quiet-period rule of mode `on_change` is
    added: see there.
    """
    return _ready(
        checked_step(current_log_step, "epoch"),
        checked_step(last_log_step, "epoch"),
        checked_frequency(log_frequency, "epoch"),
        checked_step(last_model_update_step, "epoch"),
        check_model_update=check_model_update,
    )


def _ready(
    current: LogStepType,
    last_log: LogStepType,
    frequency: LogStepType,
    last_update: LogStepType,
    *,
    check_model_update: bool,
) -> bool:
    if frequency is None:
        return False
    if current is None or last_log is None:
        return True
    if not cadence_reached(current, last_log, frequency):
        return False
    if not check_model_update or last_update is None:
        return True
    return last_update >= last_log and cadence_reached(current, last_update, frequency)


def cadence_reached(current: int | float, last: int | float, frequency: int | float) -> bool:
    """Say whether `current` lies at least `frequency` after `last`: integers exactly, floats within rounding.

    The source rounds `last + frequency` to four decimals. That loses beats for a frequency of 1/16384 epoch, is
    always true under 0.00005, and is wrong for integers past 2**53. Here 0.1 + 0.2 reaches 0.3 by a tolerance that
    is relative to the numbers at hand; on multiples of 1e-4 the two agree.
    """
    try:
        due = last + frequency
        if current >= due:
            return True
        if type(current) is int and type(due) is int:
            return False
        return due - current <= _tolerance(current, due, frequency)
    except OverflowError:  # an int beyond the floats' range, together with a float
        return Fraction(current) >= Fraction(last) + Fraction(frequency)


def earliest(last: int | float, frequency: int | float) -> int | float:
    """Return the least step at which `cadence_reached(step, last, frequency)` can hold."""
    due = last + frequency
    if type(due) is int:
        return due
    return due - _tolerance(due, due, frequency)


def _tolerance(current: int | float, due: int | float, frequency: int | float) -> float:
    # Never half of a ten-thousandth or more: there it would differ from the source's rounding.
    relative = min(1e-6 * frequency, 4.9e-5)
    return min(relative + 8 * math.ulp(max(abs(current), abs(due))), frequency / 2)


def checked_step(step: object, frequency_type: str) -> LogStepType:
    """Return `step` as a plain int, float or None.

    numpy scalars and tensors of one element are converted exactly. Reading a tensor on a device waits for it.

    Raises:
        TypeError: not a number of the kind that `frequency_type` counts in.
        ValueError: negative, NaN or infinite.
    """
    if type(step) is int and step >= 0:
        return step
    if step is None:
        return None
    number = _plain_number("log step", step, frequency_type)
    if number < 0:
        msg = f"log step must be greater than or equal to 0, given {_shown(number)}"
        raise ValueError(msg)
    return number


def checked_frequency(log_frequency: object, frequency_type: str) -> LogStepType:
    """Return `log_frequency` as a plain int, float or None; raise as `checked_step` does, and for 0."""
    if log_frequency is None:
        return None
    number = _plain_number("log frequency", log_frequency, frequency_type)
    if number <= 0:
        msg = f"log frequency must be greater than 0, given {_shown(number)}"
        raise ValueError(msg)
    return number


def _plain_number(what: str, value: object, frequency_type: str) -> int | float:
    number = _unwrapped(value)
    whole_only = frequency_type != "epoch"
    if isinstance(number, bool) or not isinstance(number, int if whole_only else (int, float)):
        accepted = "an int or None" if whole_only else "an int, a float or None"
        msg = f"{what} must be {accepted} for frequency type {frequency_type!r}, given {_described(value)}"
        raise TypeError(msg)
    if isinstance(number, int):
        return int(number)
    if not math.isfinite(number):
        msg = f"{what} must be finite, given {number}"
        raise ValueError(msg)
    return float(number)


def _unwrapped(value: object) -> object:
    """Turn numpy scalars and tensors of one element into Python numbers, without importing either library."""
    if isinstance(value, (int, float, str, bytes)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    item: Any = getattr(value, "item", None)
    if item is None or getattr(value, "ndim", None) != 0:
        return value
    try:
        number = item()
    except (TypeError, ValueError, RuntimeError):
        return value
    # numpy's longdouble has no Python counterpart: its item() is itself.
    return float(number) if isinstance(number, numbers.Real) and not isinstance(number, (int, float)) else number


def _checked_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    accepted = ", ".join(repr(c) for c in choices)
    if not isinstance(value, str):
        msg = f"{name} must be one of {accepted}, given {_described(value)}"
        raise TypeError(msg)
    chosen = value.strip().lower()
    if chosen not in choices:
        msg = f"{name} must be one of {accepted}, given {value!r}"
        raise ValueError(msg)
    return chosen


def _shown(number: int | float) -> str:
    """Return the number for a message; an int of a million digits does not belong in one."""
    if isinstance(number, int) and number.bit_length() > 256:  # noqa: PLR2004 - longer than any step that means something
        return f"an int of {number.bit_length()} bits"
    return str(number)


def _described(value: object) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} of shape {tuple(shape)}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:60] + '...'} ({type(value).__name__})"  # noqa: PLR2004 - a line's worth
