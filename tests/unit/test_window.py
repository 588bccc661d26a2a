"""The open window: what is recorded is folded at once, all of it or nothing, wherever it lies."""

from __future__ import annotations

import enum
import gc
import itertools
import math
import random
import tracemalloc
from collections import OrderedDict, UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from logsync.coordinator.messages import MAX_NAME, RESERVED, Reduction, Window, unpack_schema, unpack_values
from logsync.coordinator.reduction import Partials
from logsync.workers.window import OpenWindow, checked_name

REDUCTIONS = get_args(Reduction)


@pytest.fixture
def window() -> OpenWindow:
    return OpenWindow()


@pytest.fixture(params=["host", "device"])
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether CPU tensors are read at once, or folded as if they lay on a GPU."""
    if request.param == "device":
        monkeypatch.setattr("logsync.workers.window.is_device_value", lambda _: True)
        monkeypatch.setattr("logsync.workers.window.quick_float", lambda _: None)
    return str(request.param)


def shares(message: Window) -> dict[str, tuple[float, float]]:
    """Each key's two numbers on the wire."""
    keys = unpack_schema(message.schema, 0)
    numbers = unpack_values(message.values, len(keys), 0)
    return {key.name: (numbers[2 * n], numbers[2 * n + 1]) for n, key in enumerate(keys)}


def metrics(window: OpenWindow) -> dict[str, float]:
    """What an entry of this window alone would show."""
    partials = Partials()
    partials.add_windows([(0, window.take().message)])
    return partials.reduce(1).metrics


# Folding


def test_a_mean_travels_as_its_weighted_sum_and_weight(window: OpenWindow) -> None:
    window.record({"loss": 2.0}, weight=3)
    window.record({"loss": 4.0}, weight=0.5)
    window.record({"loss": 99.0}, weight=0)
    window.record(loss=1)

    assert shares(window.take().message) == {"loss": (2.0 * 3 + 4.0 * 0.5 + 1, 4.5)}


@pytest.mark.parametrize(
    ("reduce", "share"), [("sum", (6.5, 3)), ("min", (-1.0, 3)), ("max", (5.0, 3)), ("last", (2.5, 3))]
)
def test_other_folds_travel_as_their_value_and_how_many_there_were(
    window: OpenWindow, reduce: Any, share: tuple[float, float]
) -> None:
    for value in (-1, 5.0, 2.5):
        window.record({"x": value}, reduce=reduce)

    assert shares(window.take().message) == {"x": share}


@pytest.mark.parametrize("reduce", ["mean", "sum", "min", "max"])
def test_nan_wins_in_any_order(reduce: Any) -> None:
    for values in itertools.permutations([1.0, math.nan, 2.0]):
        window = OpenWindow()
        for value in values:
            window.record({"x": value}, reduce=reduce)
        assert math.isnan(shares(window.take().message)["x"][0]), values


def test_values_come_as_a_mapping_as_keywords_or_both(window: OpenWindow) -> None:
    window.record({"a": 1.0}, b=2.0)
    window.record(c=3.0)
    window.record({})
    window.record()
    for mapping in (OrderedDict(d=4.0), UserDict(e=5.0), MappingProxyType({"f": 6.0})):
        for _ in range(2):
            window.record(mapping)

    assert metrics(window) == {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 5.0, "f": 6.0}


def test_options_travel_with_their_key(window: OpenWindow) -> None:
    window.record({"tokens_per_s": 5.0}, weight=2, reduce="mean", across="sum", spread=True, per_rank=True)
    window.record(plain=1.0)

    keys = unpack_schema(window.take().message.schema, 0)

    assert [(k.name, k.reduce, k.across, k.spread, k.per_rank) for k in keys] == [
        ("tokens_per_s", "mean", "sum", True, True),
        ("plain", "mean", "mean", False, False),
    ]


def test_across_is_reduce_if_not_given(window: OpenWindow) -> None:
    for reduce in REDUCTIONS:
        window.record({reduce: 1.0}, reduce=reduce)

    assert [(k.reduce, k.across) for k in unpack_schema(window.take().message.schema, 0)] == [
        (r, r) for r in REDUCTIONS
    ]


records = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from("abc"), st.floats(-1e6, 1e6) | st.integers(-1000, 1000), max_size=3),
        st.integers(0, 100) | st.floats(0, 100),
    ),
    max_size=12,
)


@given(records)
def test_a_window_is_the_weighted_mean_of_all_that_was_recorded(recorded: list[tuple[dict[str, float], float]]) -> None:
    window = OpenWindow()
    for values, weight in recorded:
        window.record(values, weight=weight)

    found = shares(window.take().message)

    assert set(found) == {name for values, _ in recorded for name in values}
    for name, (total, weight) in found.items():
        pairs = [(float(values[name]), float(w)) for values, w in recorded if name in values]
        assert weight == pytest.approx(math.fsum(w for _, w in pairs), rel=1e-12)
        assert total == pytest.approx(math.fsum(v * w for v, w in pairs), rel=1e-12, abs=1e-4)


# Everywhere alike: on the host and on a device

KINDS: list[Callable[[float], Any]] = [
    torch.tensor,
    lambda v: torch.tensor([v]),
    lambda v: torch.tensor(v, dtype=torch.float64),
    lambda v: torch.tensor(v, dtype=torch.float16),
    lambda v: torch.tensor(v, dtype=torch.bfloat16),
    lambda v: torch.tensor(int(v)),
    lambda v: torch.tensor(v, requires_grad=True) * 1.0,
    lambda v: torch.nn.Parameter(torch.tensor([v])),
    float,
    np.float32,
    np.array,
    int,
]


@pytest.mark.parametrize("options", [{"reduce": reduce} for reduce in REDUCTIONS] + [{"across": "sum", "spread": True}])
def test_a_device_gives_what_the_host_gives(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    weighted = options.get("reduce", "mean") == "mean"
    for seed in range(30):
        results = []
        for device in (False, True):
            monkeypatch.setattr("logsync.workers.window.is_device_value", lambda _, device=device: device)
            monkeypatch.setattr("logsync.workers.window.quick_float", lambda _: None)
            rng, window = random.Random(seed), OpenWindow()
            for _ in range(rng.randint(1, 8)):
                values = {
                    name: rng.choice(KINDS)(float(rng.randint(0, 100)))
                    for name in rng.sample("abcd", rng.randint(1, 4))
                }
                weight: Any = rng.choice([1, 3, 0.25, 0])
                window.record(
                    values,
                    weight=(torch.tensor(weight) if rng.random() < 0.5 else weight) if weighted else 1,
                    **options,
                )
            results.append(shares(window.take().message))

        host, on_device = results
        assert on_device.keys() == host.keys()
        for name, share in host.items():
            assert on_device[name] == pytest.approx(share, rel=1e-12), (seed, name)


@pytest.mark.parametrize("kind", KINDS, ids=range(len(KINDS)))
def test_a_value_folds_alike_when_its_key_is_new_and_when_it_is_known(kind: Callable[[float], Any]) -> None:
    window = OpenWindow()
    for _ in range(3):
        window.record({"one": kind(3.0)}, weight=2)
        window.record({"two": kind(3.0), "three": 1.0}, weight=0.5)

    assert shares(window.take().message) == {"one": (18.0, 6.0), "two": (4.5, 1.5), "three": (1.5, 1.5)}


def test_the_newest_value_is_the_last_wherever_it_lies(where: str, window: OpenWindow) -> None:
    values: list[Any] = [1.0, torch.tensor(2.0), 3.0, torch.tensor(4.0)]
    for length in range(1, 5):
        for value in values[:length]:
            window.record({"x": value, "y": 0.0}, reduce="last")
            window.record({"y": 0.0}, reduce="last")
        assert metrics(window)["x"] == length, where


def test_a_buffer_may_be_used_again_after_record(where: str, window: OpenWindow) -> None:
    buffer, weight, array = torch.zeros(1), torch.ones(()), np.zeros(1)
    for step in range(1, 5):
        buffer.fill_(step)
        array.fill(step)
        weight.fill_(step)
        window.record({"tensor": buffer, "array": array}, weight=weight)
    buffer.fill_(1000)
    array.fill(1000)
    weight.fill_(1000)

    expected = (1 + 4 + 9 + 16) / 10
    assert metrics(window) == {"tensor": expected, "array": expected}, where


def test_a_dict_of_device_tensors_is_one_stack_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logsync.workers.window.is_device_value", lambda _: True)
    monkeypatch.setattr("logsync.workers.window.quick_float", lambda _: None)
    stack, stacked = torch.stack, []

    def counted(tensors: list[torch.Tensor]) -> torch.Tensor:
        stacked.append(len(tensors))
        return stack(tensors)

    monkeypatch.setattr(torch, "stack", counted)
    values = {f"k{n}": torch.tensor(float(n)) for n in range(8)}
    window = OpenWindow()

    with monkeypatch.context() as waiting:
        for read in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__array__"):
            waiting.setattr(torch.Tensor, read, _would_wait)
        for step in range(5):
            window.record(values, weight=torch.tensor(2.0) if step % 2 else 2)

    assert stacked == [8] * 5
    assert metrics(window) == {f"k{n}": float(n) for n in range(8)}


def _would_wait(*_: object) -> None:
    msg = "this would wait for the device"
    raise AssertionError(msg)


def test_a_value_on_the_host_stays_exact_beside_a_weight_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logsync.workers.window.is_device_value", lambda _: True)
    monkeypatch.setattr("logsync.workers.window.quick_float", lambda _: None)
    window = OpenWindow()

    window.record({"lr": 0.1, "tokens": 16_777_217}, weight=torch.tensor(2.0))

    assert metrics(window) == {"lr": 0.1, "tokens": 16_777_217.0}


def test_memory_does_not_grow_with_the_steps(where: str, window: OpenWindow) -> None:
    values = {"a": 1.0, "b": torch.tensor(2.0), "c": 3}

    def record(times: int) -> None:
        for step in range(times):
            window.record(values, weight=2)
            window.record({"last": step, "tensor": torch.tensor(step)}, reduce="last")

    tracemalloc.start()
    traced = []
    for times in (300, 2000):
        record(times)
        gc.collect()
        traced.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()

    assert traced[1] - traced[0] < 2000 * 8, where  # not even a pointer for each record


# Taking and giving back


def test_what_is_taken_is_gone_and_the_next_window_starts_afresh(where: str, window: OpenWindow) -> None:
    window.record({"a": 1.0, "b": torch.tensor(2.0)})
    window.record({"low": torch.tensor(-5.0)}, reduce="min")

    assert set(shares(window.take().message)) == {"a", "b", "low"}, where
    assert window.take().message == Window()
    window.record({"low": torch.tensor(7.0)}, reduce="min")
    assert shares(window.take().message) == {"low": (7.0, 1.0)}


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_what_is_given_back_is_as_if_it_had_not_been_taken(where: str, reduce: Any) -> None:
    values: list[Any] = [3.0, torch.tensor(-4.0), 5, torch.tensor(1.5)]
    for cut in range(5):
        plain, disturbed = OpenWindow(), OpenWindow()
        taken = None
        for n, value in enumerate(values):
            if n == cut:
                taken = disturbed.take()
            for window in (plain, disturbed):
                window.record({"x": value, f"only{n}": value}, reduce=reduce)
        disturbed.give_back(taken or disturbed.take())

        assert shares(disturbed.take().message) == shares(plain.take().message), (where, cut)


def test_a_window_that_is_given_back_twice_over_is_still_whole(window: OpenWindow) -> None:
    for step in range(1, 4):
        window.record(x=float(step))
        window.give_back(window.take())

    assert shares(window.take().message) == {"x": (6.0, 3.0)}


def test_ranks_that_hold_the_same_keys_send_the_same_bytes(window: OpenWindow) -> None:
    other = OpenWindow()
    for each, value in ((window, 1.0), (other, 2.0)):
        each.record(a=value, b=value)
        each.record(c=value)

    first, second = window.take().message, other.take().message
    assert first.schema == second.schema
    assert first.values != second.values


def test_what_is_cleared_is_gone(where: str, window: OpenWindow) -> None:
    window.record({"a": 1.0, "b": torch.tensor(2.0)})

    window.clear()

    assert window.take().message == Window(), where


# What is refused: at the call, and nothing of it is recorded

BAD_VALUES: list[Any] = [
    True, "1", None, 1j, b"1", [1.0], {}, object(), np.bool_(1), np.array(["x"]), np.zeros(2), 10**400,
    torch.tensor([True]), torch.tensor(1j), torch.zeros(3), torch.zeros(0),
]  # fmt: skip
BAD_NAMES: list[Any] = [
    "", "x" * (MAX_NAME + 1), "a\nb", "\x1b[2J", "a\x00", "\ud800", "\u2028", None, 3, b"x", ("a",), *sorted(RESERVED),
]  # fmt: skip
BAD_WEIGHTS: list[Any] = [
    -1, -0.5, math.nan, math.inf, 1e301, 10**400, True, "1", None, [1], np.ones(2), np.float32("nan"),
    torch.ones(2), torch.tensor(-1.0), torch.tensor([True]),
]  # fmt: skip


def refused(window: OpenWindow, values: Any, **options: Any) -> str:
    """Record on top of something; the call must be refused and leave no trace. Returns what was said."""
    for known in ({"old": 1.0}, {"old": torch.tensor(2.0)}):
        window.record(known, weight=2)
    with pytest.raises((TypeError, ValueError)) as error:
        window.record(values, **options)

    assert type(error.value) in (TypeError, ValueError)
    assert shares(window.take().message) == {"old": (6.0, 4.0)}
    assert len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize("value", BAD_VALUES, ids=lambda v: f"{type(v).__name__}")
def test_a_bad_value_is_refused_with_its_name_and_nothing_of_the_call_is_recorded(
    where: str, window: OpenWindow, value: Any
) -> None:
    for values in ({"new": 1.0, "bad": value}, {"bad": value, "new": torch.tensor(1.0)}, {"old": 1.0, "bad": value}):
        assert "'bad'" in refused(window, values), where
    assert "'old'" in refused(window, {"new": 1.0, "old": value})


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_a_bad_name_is_refused_and_fit_for_a_log_line(window: OpenWindow, name: Any) -> None:
    assert refused(window, {"new": 1.0, name: 2.0}).isprintable()


def test_names_of_up_to_256_printable_characters_are_taken(window: OpenWindow) -> None:
    for name in ("x", "train/loss", "größe 測定 😀", "x" * MAX_NAME, "Step", "a.b-c_d:e"):
        window.record({name: 1.0})
        assert checked_name(name) == name

    assert len(metrics(window)) == 6


class Name(str):
    """Somebody's own."""

    __slots__ = ()


class Key(str, enum.Enum):
    LOSS = "train/loss"


@pytest.mark.parametrize("make", [np.str_, Name, lambda _: Key.LOSS])
def test_a_name_that_is_a_kind_of_str_is_taken_as_the_str(window: OpenWindow, make: Any) -> None:
    window.record({make("train/loss"): 1.0})
    window.record({"train/loss": 3.0})

    assert metrics(window) == {"train/loss": 2.0}


@pytest.mark.parametrize("weight", BAD_WEIGHTS, ids=repr)
def test_a_bad_weight_is_refused(window: OpenWindow, weight: Any) -> None:
    assert "weight" in refused(window, {"old": 1.0}, weight=weight)
    assert "weight" in refused(window, {"new": 1.0, "old": torch.tensor(1.0)}, weight=weight)


@pytest.mark.parametrize("weight", [2, 0, 0.5, torch.tensor(2.0)])
def test_a_weight_counts_in_a_mean_only(where: str, window: OpenWindow, weight: Any) -> None:
    for reduce in ("sum", "min", "max", "last"):
        assert "weight counts in a mean only" in refused(window, {"new": 1.0}, weight=weight, reduce=reduce), where
    window.record({"n": 1.0}, weight=1, reduce="sum")


@pytest.mark.parametrize("option", ["reduce", "across"])
@pytest.mark.parametrize("value", ["median", "", "MEAN", None, 3, ["sum"]])
def test_an_unknown_fold_is_refused_with_those_there_are(window: OpenWindow, option: str, value: Any) -> None:
    if (option, value) == ("across", None):
        return
    said = refused(window, {"old": 1.0}, **{option: value})
    assert f"{option} must be one of mean, sum, min, max, last, given {value!r}" in said


@pytest.mark.parametrize("values", [5, "loss", [("loss", 1.0)], {1.0}, ("loss", 1.0), "l"])
def test_what_is_no_mapping_is_refused(window: OpenWindow, values: Any) -> None:
    assert f"given {type(values).__name__}" in refused(window, values)


OPTIONS = [{}, {"reduce": "sum"}, {"reduce": "mean", "across": "sum"}, {"spread": True}, {"per_rank": True}]


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(OPTIONS, 2)))
def test_a_key_with_two_reductions_is_refused_now_and_in_later_windows(
    window: OpenWindow, first: dict[str, Any], second: dict[str, Any]
) -> None:
    window.record({"x": 1.0}, **first)
    window.take()

    for values in ({"x": 2.0}, {"new": 1.0, "x": 2.0}, {"x": torch.tensor(1.0)}):
        said = refused(window, values, **second)
        assert "'x' was recorded with" in said
        assert "use one, or two names" in said
    window.record({"x": 1.0}, **first)


@pytest.mark.parametrize(
    ("options", "derived"),
    [({"spread": True}, f"x/{suffix}") for suffix in ("min", "max", "std", "argmax_rank")]
    + [({"per_rank": True}, "x/rank0"), ({"per_rank": True}, "x/rank1048575")],
)
def test_a_key_that_spread_or_per_rank_would_make_is_refused_in_either_order(
    options: dict[str, Any], derived: str
) -> None:
    window = OpenWindow()
    window.record({"x": 1.0}, **options)
    window.take()
    assert f"{derived!r} would collide with what spread or per_rank makes of 'x'" in refused(window, {derived: 1.0})

    window = OpenWindow()
    window.record({derived: 1.0})
    window.take()
    assert "would collide" in refused(window, {"x": 1.0}, **options)
    assert "would collide" in refused(OpenWindow(), {"x": 1.0, derived: 1.0}, **options)


def test_names_that_only_look_alike_do_not_collide(window: OpenWindow) -> None:
    window.record({"x": 1.0}, spread=True, per_rank=True)

    for name in ("x/mean", "x/minimum", "x/ranking", "x/rank0/loss", "y/min", "min", "x/rankA"):
        window.record({name: 1.0})


def test_endless_names_are_refused_before_they_fill_the_memory(window: OpenWindow) -> None:
    window.record({f"loss/{step}": 1.0 for step in range(9_999)})
    window.take()

    said = refused(window, {"loss/1": 1.0, "loss/10000": 1.0})

    assert "at most 10000 metric names" in said
    assert "'loss/10000' would be one more" in said


@hypothesis_settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "a/min"]), st.sampled_from([1.0, 2, "bad", None, math.nan])), max_size=9
    )
)
def test_whatever_is_refused_in_between_what_was_accepted_counts(recorded: list[tuple[str, Any]]) -> None:
    window, accepted = OpenWindow(), OpenWindow()
    for name, value in recorded:
        options = {"spread": True} if name == "a" else {"across": "sum"} if name == "b" else {}
        try:
            window.record({name: value}, **options)
        except (TypeError, ValueError):
            continue
        accepted.record({name: value}, **options)

    assert repr(shares(window.take().message)) == repr(shares(accepted.take().message))


def test_a_label_stands_before_names_where_the_window_is_sent_and_counts_for_their_length() -> None:
    window = OpenWindow("rollout-3")
    window.record(reward=2.0)
    with pytest.raises(ValueError, match="at most 256 characters, 'rollout-3/' before it included"):
        window.record({"x" * 250: 1.0})

    assert [spec.name for spec in unpack_schema(window.take().message.schema, 0)] == ["rollout-3/reward"]
