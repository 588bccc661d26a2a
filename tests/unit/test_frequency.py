"""Is a log due at this step: the rules of FrequencyManager, row by row."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from logsync.coordinator.frequency import FrequencyManager, cadence_reached, earliest, log_ready

Number = int | float | None
TYPES = ("epoch", "step", "batch")
MODES = ("exact", "on_change", "on_update")


def manager_at(frequency: Number, last_log: Number, last_update: Number, **options: Any) -> FrequencyManager:
    manager = FrequencyManager(frequency, **options)
    manager.log_written(last_log)
    manager.model_updated(last_update)
    return manager


# When a log is due

CADENCE = [
    # frequency, last log, current, ready
    (None, None, None, False),
    (None, None, 0, False),
    (None, 5, None, False),
    (None, 5, 10**9, False),
    (10, None, 0, True),
    (10, None, None, True),
    (10, 5, None, True),
    (10, 5, 3, False),
    (10, 5, 14, False),
    (10, 5, 15, True),
    (10, 5, 400, True),
    (1, 0, 0, False),
    (1, 0, 1, True),
]
FRACTIONS = [
    (0.5, 1.0, 1.49, False),
    (0.5, 1.0, 1.5, True),
    (0.5, 1, 2, True),
    (1, 0, 0.9999, False),
    (1, 0.5, 1, False),
    (2, 0.5, 2.5, True),
]


@pytest.mark.parametrize("frequency_type", TYPES)
@pytest.mark.parametrize(("frequency", "last", "current", "ready"), CADENCE)
def test_exact_is_ready_when_the_frequency_has_passed_since_the_last_log(
    frequency: Number, last: Number, current: Number, frequency_type: Any, *, ready: bool
) -> None:
    manager = manager_at(frequency, last, None, frequency_type=frequency_type)

    assert manager.log_ready(current) is ready
    assert log_ready(current, last, frequency) is ready


@pytest.mark.parametrize(("frequency", "last", "current", "ready"), FRACTIONS)
def test_epochs_may_be_fractions(frequency: Number, last: Number, current: Number, *, ready: bool) -> None:
    assert manager_at(frequency, last, None).log_ready(current) is ready
    assert log_ready(current, last, frequency) is ready


@pytest.mark.parametrize(
    ("frequency", "last_log", "last_update", "current", "ready"),
    [
        (None, 20, 25, 99, False),
        (10, 20, None, 29, False),
        (10, 20, None, 30, True),  # nothing is known of updates
        (10, 20, 19, 30, False),  # the update is older than the log
        (10, 20, 19, 99, False),
        (10, 20, 20, 29, False),
        (10, 20, 20, 30, True),
        (10, 20, 25, 30, False),  # not quiet for long enough
        (10, 20, 25, 34, False),
        (10, 20, 25, 35, True),
        (10, None, 25, 26, True),
        (10, 20, 25, None, True),
    ],
)
def test_on_change_also_needs_a_newer_update_and_as_long_a_quiet_period(
    frequency: Number, last_log: Number, last_update: Number, current: Number, *, ready: bool
) -> None:
    for frequency_type in TYPES:
        for mode, check in (("on_change", False), ("on_change", True), ("exact", True)):
            manager = manager_at(frequency, last_log, last_update, mode=mode, frequency_type=frequency_type)
            assert manager.log_ready(current, check_model_update=check) is ready, (frequency_type, mode, check)

    assert log_ready(current, last_log, frequency, last_update, check_model_update=True) is ready


def test_without_the_check_updates_do_not_matter_to_exact() -> None:
    assert manager_at(10, 20, 3, mode="exact").log_ready(30)
    assert log_ready(30, 20, 10, last_model_update_step=3)


def test_on_change_logs_a_model_that_is_updated_at_every_step_once_and_then_never() -> None:
    manager = FrequencyManager(10, mode="on_change", frequency_type="step")
    logged = []
    for step in range(500):
        manager.model_updated(step)
        if manager.log_ready(step):
            manager.log_written(step)
            logged.append(step)

    assert logged == [0]


@pytest.mark.parametrize(
    ("history", "current", "ready"),
    [
        ([], 0, True),  # nothing was logged yet
        ([("update", 5)], 0, True),
        ([("log", 0)], 10, False),
        ([("log", 0)], None, False),
        ([("log", 0), ("update", 3)], 9, False),
        ([("log", 0), ("update", 3)], 10, True),
        ([("log", 0), ("update", 3)], None, True),
        ([("log", 0), ("update", 0)], 10, True),  # after the log, at the same step
        ([("update", 0), ("log", 0)], 10, False),  # before it
        ([("log", 20), ("update", 3)], 30, True),  # an event, not a comparison of steps
        ([("log", 0), ("update", 9)], 10, True),  # no quiet period
        ([("log", 0), ("update", 3), ("log", 10)], 20, False),
        ([("log", 0), ("update", 3), ("update", None)], 10, False),  # reset: not updated
        ([("log", 0), ("update", None), ("update", 3)], 10, True),
        ([("update", 3), ("log", 5), ("log", None)], 0, True),
    ],
)
def test_on_update_needs_an_update_reported_since_the_last_log(
    history: list[tuple[str, Number]], current: Number, *, ready: bool
) -> None:
    for frequency_type in TYPES:
        manager = FrequencyManager(10, "on_update", frequency_type)  # type: ignore[arg-type]
        for what, step in history:
            (manager.log_written if what == "log" else manager.model_updated)(step)

        assert manager.log_ready(current) is ready, frequency_type


@pytest.mark.parametrize("every", [1, 2, 3])
def test_on_update_logs_as_soon_as_both_the_frequency_has_passed_and_an_update_came(every: int) -> None:
    for updates in itertools.product([False, True], repeat=8):
        manager = FrequencyManager(every, mode="on_update", frequency_type="step")
        last, updated = None, False
        for step, update in enumerate(updates):
            if update:
                manager.model_updated(step)
            updated = updated or update
            expected = last is None or (updated and step >= last + every)
            assert manager.log_ready(step) is expected, (updates, step)
            if expected:
                manager.log_written(step)
                last, updated = step, False


def test_asking_changes_nothing() -> None:
    for mode in MODES:
        manager = manager_at(10, 20, 21, mode=mode)
        before = dict(vars(manager))

        assert [manager.log_ready(31) for _ in range(3)] == [True] * 3
        assert vars(manager) == before


# What was written and updated


@pytest.mark.parametrize(
    ("write", "attribute"), [("log_written", "last_log_step"), ("model_updated", "last_model_update_step")]
)
def test_steps_are_overwritten_may_go_backwards_and_are_reset_by_none(write: str, attribute: str) -> None:
    manager = FrequencyManager(10)
    assert getattr(manager, attribute) is None

    for step in (20, 5, 7.5, 0, None, 3):
        getattr(manager, write)(step)
        assert getattr(manager, attribute) == step
    getattr(manager, write)()
    assert getattr(manager, attribute) is None


def test_defaults_and_properties_are_those_of_the_source() -> None:
    manager = FrequencyManager()

    assert (manager.log_frequency, manager.mode, manager.frequency_type) == (None, "exact", "epoch")
    kinds = [FrequencyManager(1, frequency_type=t) for t in TYPES]  # type: ignore[arg-type]
    assert [m.is_epoch_frequency_manager for m in kinds] == [True, False, False]
    assert [m.is_optim_frequency_manager for m in kinds] == [False, True, False]


# What is accepted and what is refused


@pytest.mark.parametrize("text", ["{}", "  {}\n", "\t{}"])
def test_modes_and_types_are_stripped_and_lower_cased(text: str) -> None:
    for mode, frequency_type in itertools.product(MODES, TYPES):
        for change in (str.lower, str.upper, str.title):
            written: Any = [text.format(change(word)) for word in (mode, frequency_type)]
            manager = FrequencyManager(1, *written)
            assert (manager.mode, manager.frequency_type) == (mode, frequency_type)


@pytest.mark.parametrize("option", ["mode", "frequency_type"])
@pytest.mark.parametrize(
    ("value", "error"),
    [("", ValueError), ("steps", ValueError), ("on change", ValueError), (None, TypeError), (3, TypeError)],
)
def test_another_mode_or_type_is_refused_with_those_there_are(
    option: str, value: object, error: type[Exception]
) -> None:
    with pytest.raises(error, match=rf"{option} must be one of 'e.*given {value!r}"):
        FrequencyManager(1, **{option: value})  # type: ignore[arg-type]


def _set_frequency(manager: FrequencyManager, value: Any) -> None:
    manager.log_frequency = value


TakesStep = Callable[[FrequencyManager, Any], object]
TAKES_STEP: dict[str, TakesStep] = {
    "log_ready": lambda m, v: m.log_ready(v),
    "log_written": lambda m, v: m.log_written(v),
    "model_updated": lambda m, v: m.model_updated(v),
}
TAKES_FREQUENCY: dict[str, TakesStep] = {
    "constructor": lambda m, v: FrequencyManager(v, frequency_type=m.frequency_type),
    "property": _set_frequency,
}
STATELESS: dict[str, Callable[[Any], object]] = {
    "current": lambda v: log_ready(v, 5, 10),
    "last_log": lambda v: log_ready(5, v, 10),
    "frequency": lambda v: log_ready(5, 5, v),
    "last_update": lambda v: log_ready(5, 5, 10, v),
}
YES = True
NO_NUMBER = [YES, not YES, "3", b"3", 3j, [3], {}, ..., np.bool_(YES), torch.tensor(YES), np.array([3]),
             torch.tensor([3]), np.str_("3"), np.array(None), torch.tensor(3j), np.datetime64(3, "s")]  # fmt: skip
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan"), torch.tensor(math.inf)]


@pytest.mark.parametrize("where", [*TAKES_STEP, *TAKES_FREQUENCY])
@pytest.mark.parametrize("frequency_type", TYPES)
@pytest.mark.parametrize("value", NO_NUMBER, ids=repr)
def test_what_is_no_number_is_refused_with_what_was_given_and_what_is_accepted(
    where: str, frequency_type: Literal["epoch", "step", "batch"], value: object
) -> None:
    accepted = "an int, a float or None" if frequency_type == "epoch" else "an int or None"
    manager = FrequencyManager(10, frequency_type=frequency_type)

    with pytest.raises(TypeError, match=rf"log (step|frequency) must be {accepted}.*given .+") as refused:
        ({**TAKES_STEP, **TAKES_FREQUENCY})[where](manager, value)

    assert type(value).__name__ in str(refused.value)


@pytest.mark.parametrize("where", STATELESS)
@pytest.mark.parametrize("value", [*NO_NUMBER, *NOT_FINITE, -1, -0.5], ids=repr)
def test_the_stateless_form_refuses_the_same(where: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"must be .* given "):
        STATELESS[where](value)


@pytest.mark.parametrize("where", [*TAKES_STEP, *TAKES_FREQUENCY])
def test_nan_and_infinity_are_refused(where: str) -> None:
    for value in NOT_FINITE:
        with pytest.raises(ValueError, match=r"must be finite, given -?(nan|inf)"):
            ({**TAKES_STEP, **TAKES_FREQUENCY})[where](FrequencyManager(10), value)


@pytest.mark.parametrize("where", [*TAKES_STEP, *TAKES_FREQUENCY])
@pytest.mark.parametrize("frequency_type", ["step", "batch"])
@pytest.mark.parametrize("value", [2.0, 0.5, math.nan, np.float64(2), torch.tensor(2.0)], ids=repr)
def test_steps_and_batches_are_counted_in_ints_only(where: str, frequency_type: Any, value: object) -> None:
    manager = FrequencyManager(10, frequency_type=frequency_type)

    with pytest.raises(TypeError, match=rf"must be an int or None for frequency type '{frequency_type}', given"):
        ({**TAKES_STEP, **TAKES_FREQUENCY})[where](manager, value)


@pytest.mark.parametrize("where", TAKES_STEP)
@pytest.mark.parametrize(
    ("value", "shown"), [(-1, "-1"), (-0.5, "-0.5"), (np.int8(-7), "-7"), (-(10**30), str(-(10**30)))]
)
def test_a_negative_step_is_refused_in_the_words_of_the_source(where: str, value: object, shown: str) -> None:
    with pytest.raises(ValueError, match=f"must be greater than or equal to 0, given {shown}$"):
        TAKES_STEP[where](FrequencyManager(10), value)


@pytest.mark.parametrize("where", TAKES_FREQUENCY)
@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0"), (-3, "-3"), (0.0, "0.0"), (-0.5, "-0.5"), (torch.tensor(0), "0")]
)
def test_a_frequency_of_zero_or_less_is_refused_in_the_words_of_the_source(
    where: str, value: object, shown: str
) -> None:
    with pytest.raises(ValueError, match=f"must be greater than 0, given {shown}$"):
        TAKES_FREQUENCY[where](FrequencyManager(10), value)


@pytest.mark.parametrize("value", [0, -1, True, "5", 2.5, math.nan])
def test_a_rejected_frequency_keeps_the_old_one(value: Any) -> None:
    manager = FrequencyManager(7, frequency_type="step")

    with pytest.raises((TypeError, ValueError)):
        manager.log_frequency = value

    assert manager.log_frequency == 7


def test_a_rejected_step_keeps_what_was_there() -> None:
    manager = manager_at(7, 3, 4, mode="on_update")
    before = dict(vars(manager))

    for write in TAKES_STEP.values():
        for value in (-1, "5", math.nan):
            with pytest.raises((TypeError, ValueError)):
                write(manager, value)

    assert vars(manager) == before


def test_a_frequency_can_be_changed_and_taken_away() -> None:
    manager = manager_at(10, 5, None)

    manager.log_frequency = 3
    assert manager.log_ready(8)
    manager.log_frequency = None
    assert not manager.log_ready(8)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int8(5), 5),
        (np.int64(2**53 + 1), 2**53 + 1),
        (np.uint64(2**64 - 1), 2**64 - 1),
        (np.array(2**53 + 1), 2**53 + 1),
        (torch.tensor(2**53 + 1), 2**53 + 1),
        (torch.tensor(5, dtype=torch.uint8), 5),
        (np.float16(0.1), 0.0999755859375),
        (np.float32(0.1), 0.10000000149011612),
        (np.float64(0.1), 0.1),
        (np.longdouble(0.5), 0.5),
        (np.array(0.25), 0.25),
        (torch.tensor(0.1), 0.10000000149011612),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor(1.5, dtype=torch.bfloat16), 1.5),
        (torch.tensor(1.5, requires_grad=True), 1.5),
    ],
    ids=repr,
)
def test_numpy_scalars_and_0d_tensors_are_converted_exactly(value: Any, expected: float) -> None:
    manager = FrequencyManager(value)
    manager.log_written(value)
    manager.model_updated(value)

    for number in (manager.log_frequency, manager.last_log_step, manager.last_model_update_step):
        assert number == expected
        assert type(number) is type(expected)
    assert not manager.log_ready(value)
    if isinstance(expected, int):
        assert FrequencyManager(value, frequency_type="step").log_frequency == expected


def test_the_module_needs_neither_numpy_nor_torch() -> None:
    script = (
        "import sys; from logsync.coordinator.frequency import FrequencyManager as F; m = F(10); m.log_written(3)\n"
        "assert m.log_ready(13)\n"
        "try: m.log_ready([3])\n"
        "except TypeError: pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & {'numpy', 'torch', 'ray'})"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)

    assert ran.stdout.strip() == ""


# Rounding


def rule_of_the_source(current: float, last: float, frequency: float) -> bool:
    return current >= float(format(last + frequency, ".4f"))


@given(st.integers(0, 10**8), st.integers(1, 10**7), st.integers(-3, 3) | st.integers(-(10**7), 10**7))
@example(0, 10**6, -1)
def test_on_multiples_of_a_ten_thousandth_the_source_agrees(last: int, frequency: int, off: int) -> None:
    current = max(0, last + frequency + off)
    numbers = current / 10_000, last / 10_000, frequency / 10_000

    assert cadence_reached(*numbers) is rule_of_the_source(*numbers)
    assert cadence_reached(*numbers) is (current >= last + frequency)


@pytest.mark.parametrize(("last", "frequency", "current"), [(0.1, 0.2, 0.3), (0.7, 0.1, 0.8), (1.1, 2.2, 3.3)])
def test_decimals_that_add_up_on_paper_are_reached(last: float, frequency: float, current: float) -> None:
    assert log_ready(current, last, frequency)
    assert not log_ready(current - 1e-4, last, frequency)


@pytest.mark.parametrize("calls_per_beat", [1, 3])
def test_a_frequency_of_1_in_16384_loses_no_beat_and_adds_none(calls_per_beat: int) -> None:
    manager = FrequencyManager(1 / 16384)
    beats = 100_000
    late = []
    for call in range(beats * calls_per_beat):
        ready = manager.log_ready(call / calls_per_beat / 16384)
        if ready:
            manager.log_written(call / calls_per_beat / 16384)
        if ready is not (call % calls_per_beat == 0):
            late.append(call)

    assert late == []


def test_a_frequency_under_the_fourth_decimal_does_not_fire_at_every_call() -> None:
    for start in (0.0, 3.0, 1000.0):
        manager = manager_at(0.00001, start, None)
        assert [n for n in range(1, 21) if manager.log_ready(start + n * 1e-6)] == list(range(10, 21))


def test_ints_are_exact_whatever_their_size() -> None:
    for last in (2**53, 2**60, 2**63 - 2, 10**400):
        for frequency in (1, 2, 2**54 + 1):
            assert not log_ready(last + frequency - 1, last, frequency)
            assert log_ready(last + frequency, last, frequency)


def test_an_int_beyond_the_floats_mixes_with_a_float() -> None:
    assert log_ready(10**400, 0.5, 1)
    assert not log_ready(0.5, 10**400, 1)
    assert not log_ready(3, 0.5, 10**400)


positive = st.floats(1e-12, 1e12) | st.integers(1, 10**12)
steps = st.just(0) | positive


@given(steps, positive, steps)
def test_no_step_before_the_earliest_is_ready(last: float, frequency: float, current: float) -> None:
    due = earliest(last, frequency)

    assert due <= last + frequency
    for step in (current, due, math.nextafter(due, 0), due - frequency / 4):
        if step >= 0 and cadence_reached(step, last, frequency):
            assert step >= math.nextafter(math.nextafter(due, 0), 0)


@given(steps, positive, st.floats(0, 1))
def test_the_tolerance_is_never_more_than_half_a_beat(last: float, frequency: float, share: float) -> None:
    current = last + frequency * share / 2.0001

    assert not cadence_reached(current, last, frequency) or current >= last + frequency / 2
