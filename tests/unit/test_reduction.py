"""What everybody's values add up to, against numpy over all ranks' data."""

from __future__ import annotations

import itertools
import math
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logsync.coordinator.errors import ProtocolError, ReductionMismatch
from logsync.coordinator.messages import KeySpec, Reduction, Window, encode, pack_values
from logsync.coordinator.reduction import Merged, Partials

Values = Sequence[tuple[float, float]]
"""What one rank recorded for one key: (value, weight) of each call."""

REDUCTIONS = get_args(Reduction)


def share(values: Values, reduce: str) -> tuple[float, float]:
    """Fold one rank's values as a frame carries them: for a mean (weighted sum, weight), otherwise (value, count)."""
    numbers = [v for v, _ in values]
    if reduce == "mean":
        return math.fsum(v * w for v, w in values), math.fsum(w for _, w in values)
    fold: dict[str, Callable[[list[float]], float]] = {
        "sum": math.fsum,
        "min": min,
        "max": max,
        "last": lambda v: v[-1],
    }
    return fold[reduce](numbers), float(len(numbers))


def window(recorded: dict[str, Values], reduce: str = "mean", across: str | None = None, **options: bool) -> Window:
    keys: list[KeySpec] = [KeySpec(name, reduce, across or reduce, **options) for name in recorded]  # type: ignore[arg-type]
    return Window(encode(keys), pack_values([n for values in recorded.values() for n in share(values, reduce)]))


def partials(*windows: tuple[int, Window]) -> Partials:
    made = Partials()
    made.add_windows(windows)
    return made


def merged(ranks: Sequence[Values], world_size: int | None = None, **options: Any) -> Merged:
    """Merge one key, "x", of ranks 0, 1, ...; a rank with no values does not hold it."""
    windows = [(rank, window({"x": values}, **options)) for rank, values in enumerate(ranks) if values]
    return partials(*windows).reduce(world_size or len(ranks))


def value(ranks: Sequence[Values], **options: Any) -> float:
    return merged(ranks, **options).metrics["x"]


numbers = st.floats(-1e12, 1e12)
weights = st.just(0.0) | st.floats(1e-3, 1e6)
data = st.lists(st.lists(st.tuples(numbers, weights), max_size=5), min_size=1, max_size=6).filter(any)


# Against numpy


def close(expected: float, scale: float) -> Any:
    return pytest.approx(expected, rel=1e-12, abs=1e-12 * scale)


@given(data)
def test_a_mean_is_weighted_over_all_values_of_all_ranks(ranks: list[Values]) -> None:
    flat = np.array([pair for values in ranks for pair in values])
    if not flat[:, 1].sum():
        assert math.isnan(value(ranks))
        return

    assert value(ranks) == close(np.average(flat[:, 0], weights=flat[:, 1]), np.abs(flat[:, 0]).max())


@given(data)
def test_sum_min_max_and_last_are_those_of_all_values(ranks: list[Values]) -> None:
    flat = np.array([v for values in ranks for v, _ in values])

    assert value(ranks, reduce="sum") == close(flat.sum(), np.abs(flat).sum())
    assert value(ranks, reduce="min") == flat.min()
    assert value(ranks, reduce="max") == flat.max()
    assert value(ranks, reduce="last") == next(values[-1][0] for values in ranks if values)


RANKS: list[Values] = [[(1.0, 1.0), (7.0, 3.0)], [(-2.0, 2.0)], [(5.0, 0.5), (4.0, 0.5), (9.0, 1.0)]]
ACROSS: dict[str, Callable[[Any], float]] = {
    "mean": np.mean,
    "sum": np.sum,
    "min": np.min,
    "max": np.max,
    "last": lambda own: float(own[0]),  # the lowest rank's
}


def own_values(reduce: str) -> list[float]:
    """Each rank's folded value, by numpy."""
    own = []
    for values in RANKS:
        numbers, weights = np.array(values).T
        own.append(float(np.average(numbers, weights=weights) if reduce == "mean" else share(values, reduce)[0]))
    return own


@pytest.mark.parametrize(("reduce", "across"), list(itertools.product(REDUCTIONS, REDUCTIONS)))
def test_every_pair_of_folds_is_first_over_calls_then_over_ranks(reduce: str, across: str) -> None:
    expected = ACROSS[across](own_values(reduce))
    if reduce == across == "mean":
        expected = np.average([v for values in RANKS for v, _ in values], weights=[w for r in RANKS for _, w in r])

    result = merged(RANKS, reduce=reduce, across=across)
    assert result.metrics == {"x": pytest.approx(expected, rel=1e-15)}
    assert (result.ranks, result.nan_ranks) == ({}, {})


def test_tokens_per_second_add_up_over_ranks() -> None:
    steps = [(1000, 0.5), (500, 0.25)], [(900, 0.3), (900, 0.6)]  # tokens, seconds
    ranks = [[(tokens / seconds, seconds) for tokens, seconds in rank] for rank in steps]

    assert value(ranks, reduce="mean", across="sum") == pytest.approx(1500 / 0.75 + 1800 / 0.9)


def test_a_weight_of_zero_counts_for_nothing() -> None:
    assert value([[(5.0, 2.0), (99.0, 0.0)], [(77.0, 0.0)]]) == 5.0
    for across in ("sum", "min", "max", "last", "mean"):
        assert value([[(77.0, 0.0)], [(5.0, 2.0)]], reduce="mean", across=across) == 5.0


@pytest.mark.parametrize("across", REDUCTIONS)
def test_where_all_weights_are_zero_the_mean_is_nan(across: str) -> None:
    result = merged([[(5.0, 0.0)], [(7.0, 0.0)]], reduce="mean", across=across, spread=True, per_rank=True)

    assert math.isnan(result.metrics["x"])
    assert "x" in result.nan_ranks


# Which ranks


def test_a_key_of_some_ranks_merges_over_those_and_says_how_many() -> None:
    result = partials(
        (0, window({"all": [(1.0, 1.0)], "two": [(1.0, 1.0)]})),
        (1, window({"all": [(2.0, 1.0)]})),
        (2, window({"two": [(4.0, 2.0)], "all": [(6.0, 1.0)]})),
        (3, Window()),
    ).reduce(3)

    assert result.metrics == {"all": 3.0, "two": 3.0}
    assert result.ranks == {"two": 2}


def test_of_an_idle_rank_every_key_lacks_one() -> None:
    for options in ({"reduce": "mean"}, {"reduce": "sum"}, {"reduce": "mean", "spread": True}):
        assert merged([[(1.0, 1.0)], [], [(2.0, 1.0)]], **options).ranks == {"x": 2}


def test_without_windows_there_is_nothing() -> None:
    nothing = partials((0, Window()), (1, Window()))

    assert not nothing
    assert nothing.reduce(2) == ({}, {}, {})


# What is not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_a_value_that_is_not_finite_stays_visible_and_names_its_ranks(reduce: str, bad: float) -> None:
    result = merged([[(1.0, 1.0)], [(2.0, 1.0), (bad, 1.0)], [(3.0, 1.0)], [(bad, 1.0)]], reduce=reduce)

    assert repr(result.metrics["x"]) == repr(bad)
    assert result.nan_ranks == {"x": (1, 3)}


@pytest.mark.parametrize("across", ["min", "max", "sum", "mean"])
@pytest.mark.parametrize("holder", [0, 1, 2])
def test_one_nan_wins_whatever_rank_has_it(across: str, holder: int) -> None:
    ranks: list[Values] = [[(math.nan if rank == holder else float(rank), 1.0)] for rank in range(3)]
    result = merged(ranks, reduce="sum", across=across)

    assert math.isnan(result.metrics["x"])
    assert result.nan_ranks == {"x": (holder,)}


def test_infinities_of_both_signs_are_nan_and_name_both() -> None:
    result = merged([[(math.inf, 1.0)], [(1.0, 1.0)], [(-math.inf, 1.0)]])

    assert math.isnan(result.metrics["x"])
    assert result.nan_ranks == {"x": (0, 2)}


def test_an_infinity_that_does_not_win_names_nobody() -> None:
    result = merged([[(math.inf, 1.0)], [(1.0, 1.0)]], reduce="min")

    assert (result.metrics, result.nan_ranks) == ({"x": 1.0}, {})


def test_of_many_ranks_the_lowest_sixteen_are_named() -> None:
    ranks: list[Values] = [[(math.nan if 3 <= rank < 30 else 1.0, 1.0)] for rank in range(40)]

    assert merged(ranks).nan_ranks == {"x": tuple(range(3, 19))}


def test_a_rank_without_a_value_of_its_own_is_not_named_for_anothers_nan() -> None:
    assert merged([[(5.0, 0.0)], [(math.nan, 1.0)]]).nan_ranks == {"x": (1,)}


def test_a_sum_beyond_the_floats_is_infinite() -> None:
    for sign in (1, -1):
        assert value([[(sign * 1.7e308, 1.0)], [(sign * 1.7e308, 1.0)]], reduce="sum") == sign * math.inf


# Spread and each rank's own


@given(st.lists(numbers, min_size=1, max_size=8))
def test_spread_is_numpys_over_the_ranks_own_values(own: list[float]) -> None:
    result = merged([[(v, 1.0)] for v in own], spread=True).metrics

    assert (result["x/min"], result["x/max"]) == (np.min(own), np.max(own))
    assert result["x/std"] == close(float(np.std(own)), float(np.abs(own).max()))
    assert result["x/argmax_rank"] == np.argmax(own)  # of equal ones the lowest
    assert set(result) == {"x", "x/min", "x/max", "x/std", "x/argmax_rank"}


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_spread_and_per_rank_are_of_what_each_rank_folded(reduce: str) -> None:
    own = own_values(reduce)
    result = merged(RANKS, reduce=reduce, spread=True, per_rank=True).metrics

    assert result["x"] == value(RANKS, reduce=reduce)
    assert [result[f"x/rank{rank}"] for rank in range(3)] == pytest.approx(own)
    assert result["x/min"] == pytest.approx(min(own))
    assert result["x/std"] == pytest.approx(np.std(own))
    assert result["x/argmax_rank"] == np.argmax(own)


def test_per_rank_has_the_ranks_that_hold_the_key_and_have_a_value() -> None:
    result = merged([[(1.0, 1.0)], [], [(2.0, 0.0)], [(3.0, 1.0)]], per_rank=True, spread=True).metrics

    assert {k: v for k, v in result.items() if "rank" in k} == {"x/rank0": 1.0, "x/rank3": 3.0, "x/argmax_rank": 3.0}
    assert (result["x/min"], result["x/max"], result["x/std"]) == (1.0, 3.0, 1.0)


def test_the_spread_over_a_nan_is_nan_and_points_to_its_rank() -> None:
    result = merged([[(1.0, 1.0)], [(5.0, 1.0)], [(math.nan, 1.0)], [(math.nan, 1.0)]], spread=True)

    for key in ("x", "x/min", "x/max", "x/std"):
        assert math.isnan(result.metrics[key])
        assert result.nan_ranks[key] == (2, 3)
    assert result.metrics["x/argmax_rank"] == 2
    assert "x/argmax_rank" not in result.nan_ranks


def test_the_spread_over_an_infinity_names_its_rank() -> None:
    result = merged([[(1.0, 1.0)], [(math.inf, 1.0)]], spread=True)

    assert (result.metrics["x/min"], result.metrics["x/max"], result.metrics["x/argmax_rank"]) == (1.0, math.inf, 1)
    assert math.isnan(result.metrics["x/std"])
    assert result.nan_ranks == {"x": (1,), "x/max": (1,), "x/std": (1,)}


# Merging

small = st.floats(-1e290, 1e290).map(lambda v: v + 0.0)  # no -0.0: it equals 0.0
specs = [KeySpec(f"{r}-{a}", r, a, True, True) for r in REDUCTIONS for a in REDUCTIONS]  # noqa: FBT003
columns = st.lists(
    st.lists(st.tuples(small | st.sampled_from([math.nan, math.inf, -math.inf]), weights), min_size=25, max_size=25),
    min_size=1,
    max_size=5,
)


def windows_of(ranks: list[list[tuple[float, float]]], rng: random.Random) -> list[tuple[int, Window]]:
    """Every rank holds keys of its own, in an order of its own."""
    windows = []
    for rank, column in enumerate(ranks):
        held = rng.sample(list(zip(specs, column, strict=True)), rng.randint(1, 25))
        windows.append((rank, Window(encode([s for s, _ in held]), pack_values([n for _, pair in held for n in pair]))))
    return windows


def bits(result: Merged) -> Any:
    return {k: struct.pack("<d", v) for k, v in result.metrics.items()}, result.ranks, result.nan_ranks


@given(columns, st.randoms(use_true_random=False))
def test_the_result_is_the_same_to_the_bit_whatever_the_order_and_grouping_of_ranks(
    ranks: list[list[tuple[float, float]]], rng: random.Random
) -> None:
    windows = windows_of(ranks, rng)
    straight = partials(*windows).reduce(9)

    for _ in range(3):
        shuffled = rng.sample(windows, len(windows))
        cut = sorted(rng.choices(range(len(windows) + 1), k=2))
        a, b, c = (partials(*part) for part in (shuffled[: cut[0]], shuffled[cut[0] : cut[1]], shuffled[cut[1] :]))
        ab, bc = Partials(), Partials()
        ab.merge(a)
        ab.merge(b)
        ab.merge(c)  # (a b) c
        b.merge(c)
        a.merge(b)  # a (b c)
        bc.merge(a)
        bc.merge(Partials())  # the identity, on both sides
        for grouped in (ab, a, bc):
            assert bits(grouped.reduce(9)) == bits(straight)


def test_a_sum_that_overflows_on_the_way_does_not_depend_on_the_order_of_ranks() -> None:
    sums = [(rank, window({"x": [(v, 1.0)]}, "sum")) for rank, v in enumerate([1e308, 1e308, -1e308, -1e308])]

    assert len({partials(*order).reduce(4).metrics["x"] for order in itertools.permutations(sums)}) == 1


def test_rounding_does_not_add_up_over_many_ranks() -> None:
    assert value([[(0.1, 1.0)]] * 10_000, reduce="sum") == 1000.0


# What does not fit together


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (
            {"reduce": "mean"},
            {"reduce": "sum"},
            "reduce='mean', across='mean' on rank 1 .* reduce='sum', across='sum' on rank 3",
        ),
        ({"reduce": "mean"}, {"reduce": "mean", "across": "sum"}, "across='mean' on rank 1 .* across='sum' on rank 3"),
        ({"spread": True}, {}, "spread=True on rank 1 .* on rank 3"),
        ({}, {"per_rank": True}, "on rank 1 .* per_rank=True on rank 3"),
    ],
)
def test_a_key_with_two_reductions_is_an_error_that_names_the_key_the_ranks_and_both(
    one: dict[str, Any], other: dict[str, Any], said: str
) -> None:
    fine = (0, window({"y": [(1.0, 1.0)]}))
    first, second = (1, window({"x": [(1.0, 1.0)]}, **one)), (3, window({"x": [(1.0, 1.0)]}, **other))

    for order in itertools.permutations([fine, first, second]):
        with pytest.raises(ReductionMismatch, match=f"'x' is recorded with .*{said}") as refused:
            partials(*order)
        assert refused.value.ranks == (1, 3)


@pytest.mark.parametrize("bad", [Window(b"?"), Window(b"\xc1", b"x" * 16), Window(b"", b"x" * 16)])
def test_a_window_that_cannot_be_read_names_its_rank(bad: Window) -> None:
    with pytest.raises(ProtocolError) as refused:
        partials((0, window({"x": [(1.0, 1.0)]})), (4, bad))
    assert refused.value.ranks == (4,)


def test_a_window_with_too_few_values_names_its_rank_and_not_that_of_its_likes() -> None:
    whole = window({"x": [(1.0, 1.0)]})

    with pytest.raises(ProtocolError) as refused:
        partials((0, whole), (4, Window(whole.schema, whole.values[:-1])), (5, whole))
    assert refused.value.ranks == (4,)


def test_a_key_twice_in_one_window_is_refused() -> None:
    twice = Window(encode([KeySpec("x"), KeySpec("x")]), pack_values([1.0, 1.0, 3.0, 1.0]))

    with pytest.raises(ProtocolError):
        partials((0, twice))


def test_a_key_that_is_what_another_ranks_spread_makes_is_not_overwritten_in_silence() -> None:
    spread = (0, window({"x": [(1.0, 1.0)]}, spread=True))
    plain = (1, window({"x/max": [(50.0, 1.0)]}))

    with pytest.raises(ReductionMismatch):
        partials(spread, plain).reduce(2)
