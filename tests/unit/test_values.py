"""Numbers as users give them, and values that are folded on their device."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from logsync.coordinator.messages import KeySpec
from logsync.workers.values import Bank, begin_reading, local_tensor, plain_number, read_banks, same_device
from logsync.workers.window import Cell

# Plain numbers


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3.0),
        (-2.5, -2.5),
        (2**53 + 1, float(2**53 + 1)),
        (math.inf, math.inf),
        (Fraction(1, 4), 0.25),
        (Decimal("0.1"), 0.1),
        (np.float16(0.5), 0.5),
        (np.float32(0.1), 0.10000000149011612),
        (np.float64(0.1), 0.1),
        (np.longdouble(0.25), 0.25),
        (np.int8(-3), -3.0),
        (np.uint64(2**63), 2.0**63),
        (np.array(7), 7.0),
        (np.array([7.5]), 7.5),
        (np.array([[7]]), 7.0),
        (torch.tensor(0.1), 0.10000000149011612),
        (torch.tensor(0.1, dtype=torch.float64), 0.1),
        (torch.tensor([1.5], dtype=torch.float16), 1.5),
        (torch.tensor([[1.5]], dtype=torch.bfloat16), 1.5),
        (torch.tensor(2**24 + 1), float(2**24 + 1)),
        (torch.tensor(3, dtype=torch.uint8), 3.0),
        (torch.tensor(2.0, requires_grad=True), 2.0),
        (torch.nn.Parameter(torch.tensor([2.0])), 2.0),
    ],
    ids=repr,
)
def test_a_number_of_any_library_is_its_float(value: object, expected: float) -> None:
    found = plain_number("x", value)

    assert found == expected
    assert type(found) is float


def test_nan_is_a_number() -> None:
    for value in (math.nan, np.float32("nan"), torch.tensor(math.nan), Decimal("nan")):
        assert math.isnan(plain_number("x", value))


@pytest.mark.parametrize(
    "value",
    [True, False, np.bool_(1), None, "1", b"1", 1j, np.complex64(1), np.str_("1"), [1.0], {"x": 1}, ...,
     np.array([True]), np.array("1"), np.array(None), np.array([1j]), np.datetime64(1, "s"), len],
    ids=repr,
)  # fmt: skip
def test_what_is_no_number_is_a_type_error_that_names_the_metric_and_the_type(value: object) -> None:
    with pytest.raises(TypeError, match=r"'train/loss' must be a number .*, given .*") as refused:
        plain_number("train/loss", value)
    assert type(value).__name__ in str(refused.value)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.zeros(2), r"must have one element, given ndarray of shape \(2,\)"),
        (np.zeros((1, 0)), r"must have one element, given ndarray of shape \(1, 0\)"),
        (10**400, "beyond the range of float64"),
        (-(10**5000), "beyond the range of float64"),
        (Fraction(10**400), "beyond the range of float64"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_too_many_elements_or_digits_are_a_value_error(value: object, text: str) -> None:
    with pytest.raises(ValueError, match=f"'train/loss' .*{text}"):
        plain_number("train/loss", value)


# Tensors


def test_what_is_no_tensor_is_none() -> None:
    assert [local_tensor("x", value) for value in (1.0, 1, np.float32(1), np.zeros(3), "1", None)] == [None] * 6


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_tensor_of_one_element_is_taken_whatever_its_shape(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape)

    assert local_tensor("x", tensor) is tensor


@pytest.mark.parametrize("shape", [(0,), (2,), (1, 3)])
def test_a_tensor_of_more_or_less_is_refused_with_its_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="'train/loss' must have one element, given a tensor of shape") as refused:
        local_tensor("train/loss", torch.zeros(shape))
    assert str(shape) in str(refused.value)


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_a_tensor_of_bools_or_complex_numbers_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"'train/loss' must be a real number, given a tensor of {dtype}"):
        local_tensor("train/loss", torch.zeros((), dtype=dtype))


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_of_a_replicated_dtensor_the_local_value_counts(mesh: Any) -> None:
    tensor = local_tensor("x", DTensor.from_local(torch.tensor([2.5]), mesh, [Replicate()]))

    assert tensor is not None
    assert not isinstance(tensor, DTensor)
    assert plain_number("x", tensor) == 2.5


@pytest.mark.parametrize("placement", [Shard(0), Partial()], ids=repr)
def test_a_dtensor_that_no_rank_holds_whole_is_refused_with_the_way_out(mesh: Any, placement: Any) -> None:
    with pytest.raises(TypeError, match=r"'x' is a DTensor.*\.full_tensor\(\) on every rank first"):
        local_tensor("x", DTensor.from_local(torch.tensor([2.5]), mesh, [placement]))


@pytest.mark.parametrize("number", [0.1, 16_777_217.0, 1e300, math.nan])
def test_a_number_beside_a_tensor_is_exact(number: float) -> None:
    beside = same_device(number, torch.tensor(1.0))

    assert repr(beside.item()) == repr(number)
    assert beside.shape == ()


def test_the_module_imports_neither_numpy_nor_torch() -> None:
    script = (
        "import sys\n"
        "from logsync.workers.window import OpenWindow\n"
        "window = OpenWindow()\n"
        "window.record(a=1.0, b=2)\n"
        "assert window.take().message.values\n"
        "print(*{name.partition('.')[0] for name in sys.modules} & {'numpy', 'torch', 'ray'})"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)

    assert ran.stdout.strip() == ""


# Banks: on a CPU here, but by the same operations as on a GPU


def read(bank: Bank) -> list[tuple[float, float]]:
    ((same, shares),) = read_banks(begin_reading([bank]))
    assert same is bank
    return shares


def bank_of(keys: int, reduce: str) -> Bank:
    return Bank(tuple(Cell(KeySpec(f"k{n}", reduce, reduce)) for n in range(keys)), reduce)  # type: ignore[arg-type]


VALUES = [[1.5, -2.0, 3.0], [0.1, 1e10, -3.0], [7.0, 0.0, 1e-10], [-1.5, 4.0, 3.0]]
FOLDS: dict[str, Callable[[list[float]], float]] = {
    "sum": math.fsum,
    "min": min,
    "max": max,
    "last": lambda values: values[-1],
}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
)
@pytest.mark.parametrize("reduce", ["mean", *FOLDS])
def test_a_bank_folds_in_float64_whatever_the_values_are(reduce: str, dtype: torch.dtype) -> None:
    rows = [torch.tensor([abs(v) % 200 for v in row]).to(dtype) for row in VALUES]
    weights = [1.0, 2.5, 0.0, 0.1] if reduce == "mean" else [1.0] * 4
    bank = bank_of(3, reduce)

    for order, (row, weight) in enumerate(zip(rows, weights, strict=True), start=1):
        bank.fold(list(row.unbind()), weight, order)

    for (value, count), column in zip(read(bank), zip(*(row.tolist() for row in rows), strict=True), strict=True):
        if reduce == "mean":
            assert value == pytest.approx(math.fsum(v * w for v, w in zip(column, weights, strict=True)), rel=1e-15)
            assert count == pytest.approx(3.6, rel=1e-15)
        else:
            assert value == pytest.approx(FOLDS[reduce](list(column)), rel=1e-15)
            assert count == 4.0
    assert bank.order == 4


@pytest.mark.parametrize(
    "tensors",
    [
        [torch.tensor(0.5), torch.tensor(2**24 + 1)],
        [torch.tensor(0.5, dtype=torch.float16), torch.tensor(70_001)],
        [torch.tensor(0.5, dtype=torch.bfloat16), torch.tensor(0.0999755859375, dtype=torch.float16)],
        [torch.tensor(2.0**60), torch.tensor(2.0**60 + 2**8, dtype=torch.float64)],
    ],
    ids=lambda tensors: " ".join(str(tensor.dtype) for tensor in tensors),
)
def test_values_of_several_types_in_one_record_stay_exact(tensors: list[torch.Tensor]) -> None:
    for reduce in ("mean", *FOLDS):
        bank = bank_of(len(tensors), reduce)

        bank.fold(tensors, 1.0, 1)

        assert [value for value, _ in read(bank)] == [tensor.item() for tensor in tensors], reduce


def test_a_weight_on_the_device_counts_like_a_number() -> None:
    plain, device = bank_of(2, "mean"), bank_of(2, "mean")
    for order, weight in enumerate([2.0, 0.5, 3.0, 0.0]):
        row = list(torch.tensor([order + 0.1, -order], dtype=torch.float64).unbind())
        plain.fold(row, weight, order)
        device.fold(row, torch.tensor([weight]), order)

    assert read(device) == read(plain)


@pytest.mark.parametrize("first", [0, 1])
def test_weights_on_and_off_the_device_add_up(first: int) -> None:
    weights: list[Any] = [2.0, torch.tensor(3)]
    bank = bank_of(1, "mean")
    for order in (first, 1 - first):
        bank.fold([torch.tensor(10.0)], weights[order], order)

    assert read(bank) == [(50.0, 5.0)]


@pytest.mark.parametrize("reduce", ["min", "max"])
def test_nan_wins_on_the_device_too(reduce: str) -> None:
    for values in itertools.permutations([1.0, math.nan, 2.0]):
        bank = bank_of(1, reduce)
        for order, value in enumerate(values):
            bank.fold([torch.tensor(value)], 1.0, order)

        assert math.isnan(read(bank)[0][0])


def test_a_bank_holds_no_graph_and_does_not_touch_what_it_was_given() -> None:
    tensor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    other = torch.tensor([3.0], dtype=torch.float64)
    bank = bank_of(2, "mean")

    for order in range(3):
        bank.fold([tensor * 1.0, other], 5.0, order)

    assert not any(part.requires_grad for part in bank.parts())
    assert (tensor.item(), other.item()) == (2.0, 3.0)
    assert read(bank) == [(30.0, 15.0), (45.0, 15.0)]


def test_all_banks_of_a_device_are_read_by_one_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    banks = [bank_of(n, "mean") for n in (1, 3, 2)]
    for number, bank in enumerate(banks):
        bank.fold([torch.tensor(10.0 * number + n) for n in range(len(bank.cells))], torch.tensor(2.0), 1)
    transfers: list[torch.Tensor] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        transfers.append(tensor)
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)

    shares = dict(read_banks(begin_reading(banks)))

    assert len(transfers) == 1
    assert shares[banks[1]] == [(20.0, 2.0), (22.0, 2.0), (24.0, 2.0)]
    assert shares[banks[2]] == [(40.0, 2.0), (42.0, 2.0)]
