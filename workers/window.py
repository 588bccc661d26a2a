"""The open window: what one rank has recorded since the last entry, as partials.

Host numbers are folded at once. Values on a device are folded there, in the stream that is current, and read only
when a frame is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, cast

import msgspec

from logsync.coordinator.messages import MAX_NAME, RESERVED, KeySpec, Reduction, Window, encode, pack_values
from logsync.coordinator.reduction import SPREAD
from logsync.workers.values import (
    Bank,
    begin_reading,
    is_device_value,
    local_tensor,
    plain_number,
    quick_float,
    read_banks,
    same_device,
)

__all__ = ["OpenWindow", "Taken", "checked_name"]

_REDUCTIONS = ("mean", "sum", "min", "max", "last")
_MAX_KEYS = 10_000
_MAX_WEIGHT = 1e300  # times a value, sums stay floats


class Share(NamedTuple):
    """A key's folded value, the weight behind it (otherwise how many values), and when its newest came."""

    value: float
    weight: float
    order: int


class Cell:
    """What was recorded for one key, folded."""

    __slots__ = ("order", "spec", "used", "value", "weight")

    def __init__(self, spec: KeySpec) -> None:
        self.spec = spec
        self.value = 0.0
        self.weight = 0.0
        self.order = 0
        self.used = False

    def fold(self, value: float, weight: float, order: int) -> None:
        """Take in one value."""
        if self.spec.reduce == "mean":
            self.join(value * weight, weight, order)
        else:
            self.join(value, 1.0, order)

    def join(self, value: float, weight: float, order: int) -> None:
        """Take in what is folded already; NaN wins over any other minimum or maximum."""
        reduce = self.spec.reduce
        if reduce in ("mean", "sum"):
            self.value += value
        elif not self.used or (reduce == "last" and order >= self.order):
            self.value = value
        elif reduce != "last" and not math.isnan(self.value):
            pick = min if reduce == "min" else max
            self.value = value if math.isnan(value) else pick(self.value, value)
        self.weight += weight
        self.order = max(self.order, order)
        self.used = True

    def take(self) -> Share:
        """Return what is folded and start afresh."""
        share = Share(self.value, self.weight, self.order)
        self.value = self.weight = 0.0
        self.order = 0
        self.used = False
        return share


class Taken(NamedTuple):
    """What a frame took out of the window: `message` travels, `shares` are given back if it was not accepted."""

    shares: list[tuple[Cell, Share]]
    message: Window

    @classmethod
    def nothing(cls) -> Taken:
        """Return the window of a frame that carries none."""
        return cls([], Window())


class OpenWindow:
    """Fold what is recorded until a frame takes it.

    Args:
        label: stands before every name, with a slash between, where the window is sent.
    """

    def __init__(self, label: str = "") -> None:
        self._prefix = f"{label}/" if label else ""
        self._cells: dict[str, Cell] = {}
        self._plain: dict[str, Cell] = {}  # those of `_cells` that are a weighted mean and nothing else
        self._banks: dict[tuple[Any, ...], Bank] = {}
        self._derived: dict[str, str] = {}
        self._order = 0
        self._schema: tuple[list[Cell], bytes] = ([], b"")  # the cells of the last message, and their specs' bytes

    def record(
        self,
        values: Mapping[str, Any] | None = None,
        /,
        *,
        weight: Any = 1,
        reduce: Reduction = "mean",
        across: Reduction | None = None,
        spread: bool = False,
        per_rank: bool = False,
        **named: Any,
    ) -> None:
        """Fold values into the window at once. Never communicates and never waits for a device.

        Sums are kept in float64; those on an MPS device, which has none, in float32 until a frame is built.

        Args:
            values: metric names to numbers or tensors of one element, on any device; may also be given as keywords.
            weight: how much the values count in a weighted mean, such as the samples or tokens behind them: a
                number of at least 0, or a tensor of one element.
            reduce: how the calls of a window fold on one rank: mean, sum, min, max or last. Only a mean is weighted.
            across: how the ranks fold: the same words, last being the lowest rank's. `reduce` if not given. Tokens
                per second are `reduce="mean", across="sum"`. The mean of means is the weighted mean of all values;
                the mean of anything else counts every rank once.
            spread: add <name>/min, /max, /std and /argmax_rank of the ranks' own values.
            per_rank: add every rank's own value as <name>/rank<r>.

        Raises:
            TypeError: a value is not a number, or is a DTensor that is not replicated.
            ValueError: a tensor of many elements, a bad name or weight, or a key used with two reductions.
                After either, nothing of this call is recorded, and what was recorded before is kept.
        """
        if values is None:
            values = named
        elif named:
            values = {**values, **named}
        if (
            across is None
            and reduce == "mean"
            and not spread
            and not per_rank
            # By type: a tensor's comparison would wait for its device, and an int's with a float is slow.
            and (0 < weight <= 1_000_000_000 if type(weight) is int else _is_weight(weight))  # noqa: PLR2004
        ):
            try:
                if len(values) == 1:
                    for name in values:
                        value = values[name]
                        if type(value) is float or (value := quick_float(value)) is not None:
                            cell = self._plain[name]
                            cell.value += value * weight
                            cell.weight += weight
                            return
                else:
                    cells = [self._plain[name] for name in values]
                    numbers: list[Any] = [v if type(v) is float else quick_float(v) for v in values.values()]
                    if None not in numbers:
                        for cell, value in zip(cells, numbers):  # noqa: B905 - the lengths are those of `values`
                            cell.value += value * weight
                            cell.weight += weight
                        return
            except (AttributeError, KeyError, TypeError):
                pass  # a new key, or no mapping: said below
        self._record(values, weight, _checked_options(reduce, across, spread, per_rank))

    def _record(self, values: object, weight: object, options: tuple[Reduction, Reduction, bool, bool]) -> None:
        """Check everything, then fold everything."""
        if not isinstance(values, Mapping):
            msg = f"record() takes a mapping of names to values, given {type(values).__name__}"
            raise TypeError(msg)
        weighed = _checked_weight(weight, options[0])
        cells: dict[str, Cell] = {}
        host: list[tuple[Cell, float]] = []
        device: dict[Any, list[tuple[Cell, Any]]] = {}
        for given, value in values.items():
            name = checked_name(given)
            cell = self._cells.get(name) or Cell(KeySpec(name, *options))
            self._check_spec(cell, options)
            cells[name] = cell
            tensor = local_tensor(name, value)
            if tensor is not None and is_device_value(tensor):
                device.setdefault(tensor.device, []).append((cell, tensor))
            else:
                host.append((cell, plain_number(name, value if tensor is None else tensor)))
        self._register(cells)
        self._order += 1
        if not isinstance(weighed, float):  # a weight on a device takes host values there
            for cell, number in host:
                device.setdefault(weighed.device, []).append((cell, same_device(number, weighed)))
            host = []
        for cell, number in host:
            cell.fold(number, weighed, self._order)
        for where, pairs in device.items():
            self._bank(where, pairs).fold([tensor for _, tensor in pairs], weighed, self._order)

    def mean_with_spread(self, name: str) -> Cell:
        """Return the cell of a mean with spread, for a caller that adds to its `value` and `weight` by itself.

        Raises:
            TypeError, ValueError: as `record` does for a bad name, or one that is used otherwise.
        """
        options: tuple[Reduction, Reduction, bool, bool] = ("mean", "mean", True, False)
        name = checked_name(name)
        cell = self._cells.get(name) or Cell(KeySpec(name, *options))
        self._check_spec(cell, options)
        self._register({name: cell})
        return cell

    def take(self) -> Taken:
        """Empty the window into a message. Waits for the devices that hold values of it."""
        return self.take_later()()

    def take_later(self) -> Callable[[], Taken]:
        """Empty the window without waiting for a device.

        Returns:
            What waits for the devices and makes the message; to be called once, from any thread, before the next
            `take` or `take_later`.
        """
        banks = begin_reading(self._banks.values())
        self._banks.clear()
        shares = {c: c.take() for c in self._cells.values() if c.used or c.weight}
        order = list(self._cells.values()) if banks else []  # others may be added meanwhile

        def taken() -> Taken:
            for bank, values in read_banks(banks):
                for cell, (value, weight) in zip(bank.cells, values, strict=True):
                    shares[cell] = _joined(cell.spec, shares.get(cell), Share(value, weight, bank.order))
            return self._message({c: shares[c] for c in order if c in shares} if banks else shares)

        return taken

    def _message(self, shares: dict[Cell, Share]) -> Taken:
        if not shares:
            return Taken.nothing()
        used = list(shares)
        if used != self._schema[0]:
            specs = [c.spec for c in used]
            if self._prefix:
                specs = [msgspec.structs.replace(spec, name=self._prefix + spec.name) for spec in specs]
            self._schema = (used, encode(specs))
        values = [number for share in shares.values() for number in (share.value, share.weight)]
        return Taken(list(shares.items()), Window(self._schema[1], pack_values(values)))

    def give_back(self, taken: Taken) -> None:
        """Undo a `take` whose frame was not accepted, beside what was recorded since."""
        for cell, share in taken.shares:
            cell.join(*share)

    def clear(self) -> None:
        """Drop everything that is recorded and not taken."""
        self._banks.clear()
        for cell in self._cells.values():
            cell.take()

    def _bank(self, device: object, pairs: list[tuple[Cell, Any]]) -> Bank:
        cells = tuple(cell for cell, _ in pairs)
        key = (device, *map(id, cells))
        bank = self._banks.get(key)
        if bank is None:
            bank = self._banks[key] = Bank(cells, cells[0].spec.reduce)
        return bank

    def _check_spec(self, cell: Cell, options: tuple[Reduction, Reduction, bool, bool]) -> None:
        spec = cell.spec
        if (spec.reduce, spec.across, spec.spread, spec.per_rank) != options:
            msg = (
                f"metric {spec.name!r} was recorded with reduce={spec.reduce!r}, across={spec.across!r}, "
                f"spread={spec.spread}, per_rank={spec.per_rank} before, and now with {options}; use one, or two names"
            )
            raise ValueError(msg)

    def _register(self, cells: dict[str, Cell]) -> None:
        """Make room for new keys; all or none."""
        new = {name: cell for name, cell in cells.items() if name not in self._cells}
        if not new:
            return
        if len(self._cells) + len(new) > _MAX_KEYS:
            msg = (
                f"a log has at most {_MAX_KEYS} metric names, {next(iter(new))!r} would be one more; "
                "a name should not contain a step or a sample's number"
            )
            raise ValueError(msg)
        for name in new:
            if len(self._prefix) + len(name) > MAX_NAME:
                msg = (
                    f"a metric's name has at most {MAX_NAME} characters, {self._prefix!r} before it included: {name!r}"
                )
                raise ValueError(msg)
        derived = {made: name for name, cell in new.items() for made in _derived_names(cell.spec)}
        makers = {**self._derived, **derived}
        for name in (*self._cells, *new):
            maker = makers.get(name) or makers.get(_per_rank_stem(name))
            if maker is not None and (name in new or maker in new):
                msg = f"metric {name!r} would collide with what spread or per_rank makes of {maker!r}; rename one"
                raise ValueError(msg)
        self._derived.update(derived)
        self._cells.update(new)
        self._plain.update({n: c for n, c in new.items() if c.spec == KeySpec(n)})


def _joined(spec: KeySpec, first: Share | None, second: Share) -> Share:
    """Return what two shares of one metric come to."""
    cell = Cell(spec)
    if first is not None:
        cell.join(*first)
    cell.join(*second)
    return cell.take()


def _is_weight(weight: object) -> bool:
    return type(weight) is float and 0.0 < weight <= _MAX_WEIGHT


def checked_name(name: object) -> str:
    """Return `name` if it can name a metric.

    Raises:
        TypeError: not a str.
        ValueError: empty, too long, with control characters, or a word that the log's files use themselves.
    """
    if not isinstance(name, str):
        msg = f"a metric's name must be a str, given {name!r} ({type(name).__name__})"
        raise TypeError(msg)
    if not name or len(name) > MAX_NAME or not name.isprintable():
        msg = f"a metric's name must be 1 to {MAX_NAME} printable characters, given {name[:80]!r}"
        raise ValueError(msg)
    if name in RESERVED:
        msg = f"{name!r} cannot name a metric: the log's files use {', '.join(sorted(RESERVED))} themselves"
        raise ValueError(msg)
    return str.__str__(name)  # of a subclass, such as numpy.str_, the plain str


def _derived_names(spec: KeySpec) -> Iterable[str]:
    if spec.spread:
        yield from (f"{spec.name}/{suffix}" for suffix in SPREAD)
    if spec.per_rank:
        yield f"{spec.name}/rank"


def _per_rank_stem(name: str) -> str:
    """Return "<x>/rank" of "<x>/rank12", so that all of them are found by one look-up."""
    stem = name.rstrip("0123456789")
    return stem if stem != name else ""


def _checked_options(
    reduce: object, across: object, spread: object, per_rank: object
) -> tuple[Reduction, Reduction, bool, bool]:
    if across is None:
        across = reduce
    for option, value in (("reduce", reduce), ("across", across)):
        if value not in _REDUCTIONS:
            msg = f"{option} must be one of {', '.join(_REDUCTIONS)}, given {value!r}"
            raise ValueError(msg)
    return cast("Reduction", reduce), cast("Reduction", across), bool(spread), bool(per_rank)


def _checked_weight(weight: object, reduce: Reduction) -> Any:
    """Return the weight as a float, or as a tensor if it lies on a device."""
    tensor = local_tensor("weight", weight)
    if tensor is not None and is_device_value(tensor):
        number = None
    else:
        number = plain_number("weight", weight if tensor is None else tensor)
        if not 0 <= number <= _MAX_WEIGHT:
            msg = f"weight must be a number from 0 to {_MAX_WEIGHT:g}, given {number}"
            raise ValueError(msg)
    if reduce != "mean" and number != 1:
        msg = f"weight counts in a mean only; reduce={reduce!r} takes none"
        raise ValueError(msg)
    return tensor if number is None else number
