"""Numbers as users give them: plain, numpy's, or tensors on any device. Imports neither numpy nor torch by itself."""

from __future__ import annotations

import numbers
import sys
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from logsync.workers.window import Cell

__all__ = [
    "Bank",
    "Reading",
    "Transfer",
    "begin_reading",
    "begin_reading_scalars",
    "is_device_value",
    "local_tensor",
    "plain_number",
    "quick_float",
    "read_banks",
    "read_scalars",
    "same_device",
    "single_number",
]

_EXACT = 2**53
_tensor_kind: set[type] = set()  # torch.Tensor, once there has been one


def local_tensor(name: str, value: object) -> Tensor | None:
    """Return the tensor behind `value`, or None if it is not one.

    Raises:
        TypeError: a DTensor that is not replicated, or a tensor of bools or complex numbers.
        ValueError: a tensor of more or less than one element.
    """
    torch = sys.modules.get("torch")
    if torch is None or type(value) is float or not isinstance(value, torch.Tensor):
        return None
    tensor: Any = value
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        if not all(placement.is_replicate() for placement in tensor.placements):
            msg = (
                f"{name!r} is a DTensor with placements {tensor.placements}: no rank holds all of it. Call "
                ".full_tensor() on every rank first, outside any rank-dependent `if`"
            )
            raise TypeError(msg)
        tensor = tensor.to_local()
    if tensor.numel() != 1:
        msg = f"{name!r} must have one element, given a tensor of shape {tuple(tensor.shape)}; reduce it first"
        raise ValueError(msg)
    if tensor.dtype is torch.bool or tensor.is_complex():
        msg = f"{name!r} must be a real number, given a tensor of {tensor.dtype}"
        raise TypeError(msg)
    return tensor  # type: ignore[no-any-return]


def is_device_value(tensor: Tensor) -> bool:
    """Say whether reading `tensor` would wait for a device."""
    return tensor.device.type != "cpu"


def same_device(number: float, like: Tensor) -> Tensor:
    """Return `number` as a tensor beside `like`, without waiting for the device."""
    import torch  # noqa: PLC0415 - there is a tensor, so torch is loaded

    return torch.full((), number, device=like.device, dtype=_wide(like.device))


def _wide(device: torch.device) -> torch.dtype:
    """Return what sums are kept in: MPS has no float64, so its have float32's precision until they are read."""
    import torch  # noqa: PLC0415 - there is a device, so torch is loaded

    return torch.float32 if device.type == "mps" else torch.float64


def plain_number(name: str, value: object) -> float:
    """Return `value`, a number or an array or CPU tensor of one element, as a float.

    Raises:
        TypeError: not a number; bool and str are not.
        ValueError: more than one element, or an int beyond the floats' range.
    """
    found = value
    size = getattr(value, "size", None)
    if not isinstance(value, (int, float)) and hasattr(value, "item"):
        if isinstance(size, int) and size != 1:
            msg = f"{name!r} must have one element, given {type(value).__name__} of shape {_shape(value)}; reduce it"
            raise ValueError(msg)
        found = value.item()
    if isinstance(found, bool) or not isinstance(found, (numbers.Real, Decimal)):
        shown = repr(value)
        msg = (
            f"{name!r} must be a number or a tensor of one element, given "
            f"{shown if len(shown) <= 60 else shown[:60] + '...'} ({type(value).__name__})"  # noqa: PLR2004 - fits a line
        )
        raise TypeError(msg)
    try:
        return float(found)
    except OverflowError:
        msg = f"{name!r} is beyond the range of float64: {type(value).__name__} too large"
        raise ValueError(msg) from None


def single_number(name: str, value: object) -> float:
    """Return any acceptable value as a float; waits for its device. Raises as the two functions above do."""
    tensor = local_tensor(name, value)
    return plain_number(name, value if tensor is None else tensor)


def quick_float(value: Any) -> float | None:
    """Return the usual kinds of host numbers as a float: an int, or a CPU tensor of one element.

    None for everything else, right or wrong: `local_tensor` and `plain_number` tell which. Parameters, DTensors and
    other subclasses are among the rest.
    """
    kind = type(value)
    if kind is int:
        return float(value) if -_EXACT <= value <= _EXACT else None
    if kind not in _tensor_kind:
        torch = sys.modules.get("torch")
        if torch is None or kind is not torch.Tensor:
            return None
        _tensor_kind.add(kind)
    try:
        # A step of training leaves the caches cold: each question to a tensor costs microseconds then.
        number = value.item() if value.is_cpu else None
    except RuntimeError:  # not one element
        return None
    return number if type(number) is float else None


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(getattr(value, "shape", ()))


class Bank:
    """Values on one device that are recorded together: one vector, folded by one stacked operation per record.

    Args:
        cells: where each element of the vector belongs.
        reduce: how it folds.
    """

    __slots__ = ("_reduce", "_values", "_weight", "cells", "order")

    def __init__(self, cells: tuple[Cell, ...], reduce: str) -> None:
        self.cells = cells
        self.order = 0
        self._reduce = reduce
        self._values: Tensor | None = None
        self._weight: float | Tensor = 0.0

    def fold(self, tensors: Sequence[Tensor], weight: float | Tensor, order: int) -> None:
        """Take in one value for each cell, in the current stream. `weight` counts in a mean only."""
        import torch  # noqa: PLC0415 - there are tensors, so torch is loaded

        with torch.no_grad():
            wide = _wide(tensors[0].device)
            if any(t.dtype != tensors[0].dtype for t in tensors):  # stack would promote int64 to float32
                tensors = [t.to(wide) for t in tensors]
            new = torch.stack([t if t.ndim == 0 else t.reshape(()) for t in tensors])
            if not isinstance(weight, float):
                weight = weight.reshape(()).to(device=new.device, dtype=wide)
            if self._reduce == "mean":
                if self._values is None:
                    self._values = new.to(wide).mul_(weight)
                elif isinstance(weight, float) and new.is_floating_point():
                    self._values.add_(new, alpha=weight)
                else:
                    self._values.add_(new.to(wide).mul_(weight))
                self._weight = weight + self._weight
            else:
                if self._values is None or self._reduce == "last":
                    self._values = new.to(wide, copy=True)
                elif self._reduce == "sum":
                    self._values.add_(new)
                else:
                    fold = torch.minimum if self._reduce == "min" else torch.maximum
                    self._values = fold(self._values, new.to(wide))
                self._weight += 1.0
        self.order = order

    @property
    def device(self) -> Any:
        """Where the values lie."""
        return None if self._values is None else self._values.device

    def parts(self) -> list[Tensor]:
        """Return the vectors that hold this bank, to be read with those of others in one transfer."""
        values = [] if self._values is None else [self._values]
        return values if isinstance(self._weight, float) else [*values, self._weight.reshape(1)]

    def shares(self, read: Iterator[float]) -> list[tuple[float, float]]:
        """Return (value, weight) of each cell, given what was read from `parts`."""
        values = [next(read) for _ in self.cells]
        weight = self._weight if isinstance(self._weight, float) else next(read)
        return [(value, weight) for value in values]


class Transfer(NamedTuple):
    """A vector on its way to the host."""

    values: Tensor
    event: Any  # what to wait for before `values` may be read; None where reading them waits by itself

    @classmethod
    def of(cls, values: Tensor) -> Transfer:
        """Begin it, in the current stream; never waits for a device."""
        if values.device.type != "cuda":
            return cls(values, None)
        import torch  # noqa: PLC0415 - there is a tensor, so torch is loaded

        pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        pinned.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(values.device))
        return cls(pinned, event)

    def read(self) -> list[float]:
        """Wait for it, on any thread, and return the numbers."""
        if self.event is not None:
            self.event.synchronize()
        numbers: list[float] = self.values.tolist()
        return numbers


class Reading(NamedTuple):
    """Banks of one device that are on their way to the host."""

    banks: list[Bank]
    transfer: Transfer


def begin_reading(banks: Iterable[Bank]) -> list[Reading]:
    """Begin to read banks, with one transfer per device, in the current stream. Never waits for a device."""
    by_device: dict[Any, list[Bank]] = {}
    for bank in banks:
        by_device.setdefault(bank.device, []).append(bank)
    return [_begin_reading(group) for group in by_device.values()]


def _begin_reading(group: list[Bank]) -> Reading:
    import torch  # noqa: PLC0415 - there are tensors, so torch is loaded

    return Reading(group, Transfer.of(torch.cat([part for bank in group for part in bank.parts()])))


def begin_reading_scalars(scalars: Sequence[Tensor]) -> list[tuple[list[int], Transfer]]:
    """Begin to read tensors of one element, with one transfer per device, in the current stream."""
    import torch  # noqa: PLC0415 - there are tensors, so torch is loaded

    by_device: dict[Any, list[int]] = {}
    for place, scalar in enumerate(scalars):
        by_device.setdefault(scalar.device, []).append(place)
    return [
        (places, Transfer.of(torch.stack([scalars[place].reshape(()).float() for place in places])))
        for places in by_device.values()
    ]


def read_scalars(readings: Iterable[tuple[list[int], Transfer]]) -> list[float]:
    """Return the numbers in the order in which they were given. Waits for the devices, on any thread."""
    found = {
        place: number for places, transfer in readings for place, number in zip(places, transfer.read(), strict=True)
    }
    return [found[place] for place in sorted(found)]


def read_banks(readings: Iterable[Reading]) -> Iterator[tuple[Bank, list[tuple[float, float]]]]:
    """Yield banks and (value, weight) of each of their cells. Waits for the devices, on any thread."""
    for group, transfer in readings:
        read = iter(transfer.read())
        for bank in group:
            yield bank, bank.shares(read)
