"""Many ranks in one thread: the real ledgers and the real coordinator, marching call by call."""

from __future__ import annotations

from collections.abc import Sequence

from logsync.coordinator.core import Coordinator
from logsync.coordinator.messages import Decision, Hello, KeySpec, Settings, Window, encode, encode_hello, pack_values
from logsync.workers.ledger import Ledger

__all__ = ["Lockstep", "SimRank", "settings"]

_NEEDS_ROUND = "needs a round"


def settings(
    log_frequency: float | None = 10,
    *,
    mode: str = "exact",
    frequency_type: str = "step",
    write: str = "auto",
    max_lease: int = 1000,
) -> Settings:
    """Return settings as `connect` makes them."""
    return Settings("train", log_frequency, mode, frequency_type, write, 60.0, max_lease)  # type: ignore[arg-type]


class SimRank(Ledger):
    """A rank whose rounds the test drives."""

    def _due(self, step: object, check_model_update: bool) -> bool:  # noqa: ARG002, FBT001 - as the base has it
        return _NEEDS_ROUND  # type: ignore[return-value]

    def leased(self, step: object) -> bool:
        """Make a call; say whether it was answered locally, which can only be with False."""
        answer = self.log_ready(step)  # type: ignore[arg-type]
        assert answer in (False, _NEEDS_ROUND)
        return answer is False

    def set_frequency(self, value: float | None) -> None:
        self._set_frequency(value)


class Lockstep:
    """A world of ranks that call at the same time."""

    def __init__(self, world_size: int, config: Settings) -> None:
        self.config = config
        self.coordinator = Coordinator(config, world_size, run="run", run_dir="runs/x")
        self.ranks = [
            SimRank(r, world_size, max_lease=config.max_lease, frequency_type=config.frequency_type)
            for r in range(world_size)
        ]
        self.rounds = 0
        self._exchange([encode_hello(Hello(r, world_size, "1", config)) for r in range(world_size)])
        self.rounds = 0

    def call(self, steps: Sequence[object], *, check: bool = False) -> tuple[bool, bool]:
        """Make one call on every rank; return the agreed answer and whether it came from the lease."""
        local = {rank.leased(step) for rank, step in zip(self.ranks, steps, strict=True)}
        assert len(local) == 1, "some ranks need a round while others answer from their lease"
        if local.pop():
            return False, True
        frames = [
            rank._frame("decision", step, check_model_update=check, window=self._window(r))
            for r, (rank, step) in enumerate(zip(self.ranks, steps, strict=True))
        ]
        return self._exchange(frames).log_ready, False

    def write(self, steps: Sequence[object]) -> Decision:
        """Have every rank call write()."""
        return self._exchange(
            [
                rank._frame("write", step, window=self._window(r))
                for r, (rank, step) in enumerate(zip(self.ranks, steps, strict=True))
            ]
        )

    def _window(self, rank: int) -> Window:
        return Window(encode([KeySpec("x")]), pack_values([float(rank), 1.0]))

    def _exchange(self, frames: list[bytes]) -> Decision:
        self.rounds += 1
        reply, _ = self.coordinator.handle(frames, now=0.0)
        decisions = [rank._accept(reply) for rank in self.ranks]
        assert all(rank.state == self.ranks[0].state for rank in self.ranks)
        return decisions[0]
