"""What a simulated job does and what goes wrong in it, as plain data that is drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["EVERYONE", "Absence", "Fault", "Life", "Noise", "Op", "Scenario", "draw", "sits_out"]

_MOST_RANKS = 6
EVERYONE = 2**_MOST_RANKS - 1


@dataclass(frozen=True)
class Op:
    """What the script does next, on every rank alike, or with `rank` on that one only.

    Args:
        kind: call, write and end (of an epoch) as in the log; update, frequency and written are said by one rank; save
            is a checkpoint.
        value: the step, or the frequency.
        rank: who says it; at a call, who gives a step that is no step.
        records: the ranks that record a value just before, a bit each.
        check: check_model_update.
        ranks: at a call or write, those whose loaders come that far, a bit each. The others go to the end of the epoch
            at once, or to that of the script where no more is to come.
    """

    kind: Literal["call", "write", "end", "update", "frequency", "written", "save"]
    value: int | None = None
    rank: int = -1
    records: int = 0
    check: bool = False
    ranks: int = EVERYONE


def sits_out(op: Op, rank: int, *, out: bool) -> bool:
    """Say whether `rank` skips `op`, given whether it skipped the one before."""
    if op.kind == "end":
        return False
    return out or (op.kind in ("call", "write") and not op.ranks >> rank & 1)


@dataclass(frozen=True)
class Fault:
    """A rank goes, `delay` after it has come to `op`.

    dies: without a word. raises: its script leaves the log. stalls: it comes back long after the timeout. killed: the
    whole job dies with it.
    """

    kind: Literal["dies", "raises", "stalls", "killed"]
    rank: int
    op: int
    delay: int = 0


@dataclass(frozen=True)
class Absence:
    """A rank makes no more calls from `op` on, and answers the others' rounds with frames of `kind`."""

    kind: Literal["closed"]
    rank: int
    op: int


@dataclass(frozen=True)
class Noise:
    """What the network does to the first copy of one request (`up`) or reply."""

    kind: Literal["lost", "doubled", "slow"]
    up: bool
    rank: int
    round: int


@dataclass(frozen=True)
class Life:
    """One start of the job."""

    world_size: int
    faults: tuple[Fault, ...] = ()
    absences: tuple[Absence, ...] = ()
    noise: tuple[Noise, ...] = ()


@dataclass(frozen=True)
class Scenario:
    """A job from its first start to its last. `skew`: by how much a rank's epoch fraction differs from the one below.

    With `own_steps` a rank counts only the steps that it makes: it falls behind in an epoch that is longer for others.
    `jitter` seeds the length of every delay; 0 makes them all alike.
    """

    ops: tuple[Op, ...]
    lives: tuple[Life, ...]
    log_frequency: int | None = 3
    mode: str = "exact"
    frequency_type: str = "step"
    write: str = "auto"
    max_lease: int = 1000
    skew: float = 0.0
    own_steps: bool = False
    jitter: int = 0

    @property
    def size(self) -> int:
        """How much there is to read."""
        faults = sum(1 + len(life.faults) + len(life.absences) + len(life.noise) for life in self.lives)
        return len(self.ops) + faults + sum(life.world_size for life in self.lives)

    def __str__(self) -> str:
        names = ("log_frequency", "mode", "frequency_type", "write", "max_lease", "skew", "own_steps", "jitter")
        lines = [", ".join(f"{name}={getattr(self, name)!r}" for name in names)]
        lines += [f"  op {number}: {_told(op)}" for number, op in enumerate(self.ops)]
        for number, life in enumerate(self.lives):
            lines.append(f"  life {number}: {life.world_size} ranks")
            lines += [f"    {_told(item)}" for item in (*life.faults, *life.absences, *life.noise)]
        return "\n".join(lines)


def _told(item: Any) -> str:
    unlike = {name: value for name, value in vars(item).items() if value != getattr(type(item), name, ...)}
    return f"{unlike.pop('kind')} " + ", ".join(f"{name}={value!r}" for name, value in unlike.items())


def draw(seed: int) -> Scenario:
    """Return the scenario of `seed`."""
    rng = random.Random(seed)
    ops = _with_epochs(rng, _draw_ops(rng))
    frequency_type = rng.choice(("step", "step", "batch", "epoch"))
    lives = [_draw_life(rng, len(ops), last=False) for _ in range(rng.choice((0, 0, 0, 1, 1, 2)))]
    lives.append(_draw_life(rng, len(ops), last=True))
    return Scenario(
        ops=ops,
        lives=tuple(lives),
        log_frequency=rng.choice((1, 2, 3, 4, 7, 10, None)),
        mode=rng.choice(("exact", "exact", "on_update", "on_change")),
        frequency_type=frequency_type,
        write=rng.choice(("auto", "auto", "explicit")),
        max_lease=rng.choice((0, 1, 2, 5, 1000)),
        skew=rng.choice((0.0, 0.01, -0.01)) if frequency_type == "epoch" else 0.0,
        own_steps=rng.random() < 0.3,
        jitter=rng.randrange(1, 2**31),
    )


def _draw_ops(rng: random.Random) -> list[Op]:
    step = rng.choice((0, 0, 1, 50))
    rise = rng.choice((1, 1, 1, 2, 5))
    repeats = rng.choice((1, 1, 1, 2, 4))
    saves, writes, said, recorded = (rng.choice((0.0, 0.1, 0.3)) for _ in range(4))
    rolls, bad, odd = rng.choice((0.0, 0.0, 0.05)), rng.choice((0.0, 0.0, 0.05)), rng.choice((0.0, 0.1))
    chance, bits, ops = rng.random, rng.getrandbits, []
    for call in range(rng.randrange(2, 30)):
        if chance() < said:
            ops.append(_draw_said(rng, step))
        if call % repeats == 0:
            step += rise
        if chance() < odd:
            step += rng.choice((1, 3, 20))
        if chance() < rolls:
            step = max(0, step - rng.randrange(1, 15))
        records = bits(_MOST_RANKS) if chance() < recorded else (EVERYONE if recorded else 0)
        culprit = rng.randrange(_MOST_RANKS) if chance() < bad else -1
        value = None if chance() < odd / 10 else step
        ops.append(Op("call", value, culprit, records, chance() < odd))
        if chance() < writes:
            ops.append(Op("write", step, -1, bits(_MOST_RANKS)))
        if chance() < saves:
            ops.append(Op("save"))
    return ops


def _draw_said(rng: random.Random, step: int, records: int = 0) -> Op:
    kind: Any = rng.choice(("update", "update", "frequency", "written"))
    value = rng.choice((1, 2, 5, None)) if kind == "frequency" else max(0, step + rng.choice((0, 0, 1, -1, 9)))
    return Op(kind, value, rng.randrange(_MOST_RANKS), records)


def _with_epochs(rng: random.Random, ops: list[Op]) -> tuple[Op, ...]:
    """Cut a script into epochs of different lengths on different ranks, some of them empty.

    What stands between an end and the next call is done by ranks that have ended, while others have not.
    """
    ends = sorted(rng.choices(range(len(ops) + 1), k=rng.choice((0, 0, 1, 2, 2, 4))))
    if not ends:
        return tuple(ops)
    after = rng.choice((0.0, 0.3, 0.6))
    cut: list[Op] = []
    for start, end in zip((0, *ends), (*ends, len(ops)), strict=True):
        cut += _uneven(rng, ops[start:end])
        if end == len(ops) and rng.random() < 0.5:  # the last epoch's end may be left to the close
            break
        cut.append(Op("end", records=rng.choice((0, rng.getrandbits(_MOST_RANKS)))))
        step = next((op.value or 0 for op in reversed(cut) if op.kind == "call"), 0)
        while rng.random() < after:
            records = rng.getrandbits(_MOST_RANKS)
            cut.append(rng.choice((Op("save", records=records), _draw_said(rng, step, records))))
    return tuple(cut)


def _uneven(rng: random.Random, epoch: list[Op]) -> list[Op]:
    """Let each rank make only so many of the calls, the last of which may be given a bad step."""
    calls = sum(op.kind in ("call", "write") for op in epoch)
    lengths = [calls] * _MOST_RANKS
    if rng.random() < 0.8:
        lengths = [rng.choice((0, calls, rng.randint(0, calls), max(0, calls - 1))) for _ in lengths]
    bad = rng.random() < 0.25
    uneven, made = [], 0
    for op in epoch:
        if op.kind in ("call", "write"):
            longer = [rank for rank, length in enumerate(lengths) if length > made]
            made += 1
            culprit = rng.choice(longer[:2]) if bad and op.kind == "call" and made == calls and longer else op.rank
            uneven.append(replace(op, ranks=sum(1 << rank for rank in longer), rank=culprit))
        else:
            uneven.append(op)
    return uneven


def _draw_life(rng: random.Random, ops: int, *, last: bool) -> Life:
    world_size = rng.choice((1, 2, 2, 3, 3, 4, 5, _MOST_RANKS))
    faults, absences = [], []
    if rng.random() < (0.25 if last else 0.9):
        kind: Any = rng.choice(("dies", "dies", "raises", "stalls", "killed"))
        faults.append(Fault(kind, rng.randrange(world_size), rng.randrange(ops), rng.choice((0, rng.randrange(60)))))
    if rng.random() < 0.3:
        ranks = rng.sample(range(world_size), rng.randrange(1, world_size + 1))
        absences = [Absence("closed", rank, rng.randrange(ops + 1)) for rank in ranks]
    noise = [
        Noise(rng.choice(("lost", "doubled", "slow")), rng.random() < 0.5, rng.randrange(world_size), rng.randrange(12))
        for _ in range(rng.choice((0, 1, 3, 8)))
    ]
    return Life(world_size, tuple(faults), tuple(absences), tuple(noise))
