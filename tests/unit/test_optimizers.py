"""watch_optimizer: updates as the optimizers make them, against a FrequencyManager that is told by hand."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from logsync.coordinator.errors import LogClosed
from logsync.coordinator.frequency import FrequencyManager
from logsync.workers import TrainingLog, connect
from support.thread_job import Job

pytestmark = pytest.mark.timeout(60)

Make = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "sgd": lambda of: torch.optim.SGD(of, lr=0.1),
    "adam": lambda of: torch.optim.Adam(of, lr=0.1),
    "fused adam": lambda of: torch.optim.Adam(of, lr=0.1, fused=True),
    "fused sgd": lambda of: torch.optim.SGD(of, lr=0.1, fused=True),
}


def weights() -> torch.Tensor:
    return nn.Parameter(torch.ones(3))


def stepped(optimizer: Any, *parameters: torch.Tensor) -> None:
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("mode", ["exact", "on_change", "on_update"])
@pytest.mark.parametrize("call", ["log_ready", "log_step"])
def test_logs_come_where_a_manager_that_is_told_of_every_update_by_hand_says_so(mode: str, call: str) -> None:
    for seed in range(6):
        dice = random.Random(f"{mode} {seed}")
        frequency, micro = dice.choice([1, 4, 9]), dice.choice([1, 2, 4])
        updates = {(rank, at) for rank in range(3) for at in range(80) if dice.random() < dice.choice([0.02, 0.3])}
        manager = FrequencyManager(frequency, mode, "batch")  # type: ignore[arg-type]
        due = []
        for at in range(80):
            if any((rank, at) in updates for rank in range(3)):
                manager.model_updated(at)
            if manager.log_ready(at):
                manager.log_written(at)
                due.append(at)

        job = Job(3, frequency, mode=mode, frequency_type="batch", max_lease=dice.choice([0, 1000]))

        def train(log: TrainingLog) -> None:
            parameter = weights()
            optimizer = torch.optim.SGD([parameter], lr=0.1)
            log.watch_optimizer(optimizer)
            for at in range(80):
                if (log.rank, at) in updates:  # noqa: B023 - called below, in this round of the loop
                    for _ in range(micro):  # noqa: B023
                        stepped(optimizer, parameter)
                getattr(log, call)(at)

        assert job.play(train) == [None] * 3
        assert [entry.step for entry in job.entries] == due, f"seed {seed}"
        assert len(due) >= 1


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_is_an_update_at_the_step_of_the_next_call(name: str) -> None:
    parameter = weights()
    optimizer = MAKERS[name]([parameter])
    with connect(1, sinks=[]) as log:
        log.watch_optimizer(optimizer)
        log.log_ready(0)
        assert log.last_model_update_step is None
        for step in (1, 2):
            stepped(optimizer, parameter)
            log.log_ready(step)
            assert log.last_model_update_step == step
        log.log_ready(3)
        assert log.last_model_update_step == 2


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("call", ["log_ready", "log_step"])
@pytest.mark.parametrize("name", MAKERS)
def test_steps_that_a_gradient_scaler_skips_are_no_updates(
    name: str, call: str, monkeypatch: pytest.MonkeyPatch, *, on_device: bool
) -> None:
    # The flag lies on a CPU here, and is read by the same operations as on a GPU.
    monkeypatch.setattr("logsync.workers.optimizers.is_device_value", lambda _: on_device)
    parameter = weights()
    optimizer = MAKERS[name]([parameter])
    scaler = GradScaler("cpu", init_scale=2.0)
    seen = []
    with connect(1, sinks=[]) as log:
        log.watch_optimizer(optimizer)
        for step in range(6):
            optimizer.zero_grad()
            before = parameter.detach().clone()
            loss = parameter.sum() * (float("inf") if step in (0, 2, 3) else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, parameter) == (step in (0, 2, 3))
            getattr(log, call)(step)
            seen.append(log.last_model_update_step)

    assert seen == [None, 1, 1, 1, 4, 5]


def test_an_update_under_a_lease_has_its_own_calls_step() -> None:
    parameter = weights()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with connect(10, sinks=[]) as log:
        log.watch_optimizer(optimizer)
        for step in range(21):
            if step == 14:
                stepped(optimizer, parameter)
            log.log_ready(step)
        assert log.last_log_step == 20
        assert log.last_model_update_step == 14


def test_a_reset_forgets_the_updates_before_it_and_not_those_after_it() -> None:
    parameter = weights()
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with connect(1, sinks=[]) as log:
        log.watch_optimizer(optimizer)
        log.log_ready(0)
        stepped(optimizer, parameter)
        log.model_updated(None)
        log.log_ready(1)
        assert log.last_model_update_step is None
        log.model_updated(None)
        stepped(optimizer, parameter)
        log.log_ready(2)
        assert log.last_model_update_step == 2


def test_several_optimizers_count_each_and_lbfgs_with_its_closure_does_too() -> None:
    one, other, third = weights(), weights(), weights()
    first, second = torch.optim.SGD([one], lr=0.1), torch.optim.Adam([other])
    lbfgs = torch.optim.LBFGS([third])

    def closure() -> torch.Tensor:
        lbfgs.zero_grad()
        loss = third.square().sum()
        loss.backward()
        return loss

    with connect(1, sinks=[]) as log:
        log.watch_optimizer(first, second, lbfgs)
        log.watch_optimizer(first)
        steps: list[Callable[[], Any]] = [
            lambda: stepped(first, one),
            lambda: None,
            lambda: stepped(second, other),
            lambda: lbfgs.step(closure),
        ]
        seen = []
        for step, act in enumerate(steps):
            act()
            log.log_ready(step)
            seen.append(log.last_model_update_step)

    assert seen == [0, 0, 2, 3]
    assert len(first._optimizer_step_post_hooks) == 0


class Engine:
    """What an engine without hooks looks like. DeepSpeed's is one, but too large to be installed for this test."""

    def __init__(self) -> None:
        self.applied = True
        self.optimizer = object()

    def step(self, scale: int = 1) -> int:
        return 7 * scale

    def was_step_applied(self) -> bool:
        return self.applied


class Wrapper:
    """What holds an optimizer, such as Accelerate's or a scheduler's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def test_wrapped_optimizers_and_engines_are_watched_and_left_as_they_were() -> None:
    parameter = weights()
    optimizer, engine = torch.optim.SGD([parameter], lr=0.1), Engine()
    with connect(1, sinks=[]) as log:
        log.watch_optimizer(Wrapper(Wrapper(optimizer)), engine)
        stepped(optimizer, parameter)
        log.log_ready(0)
        assert log.last_model_update_step == 0
        assert engine.step(scale=2) == 14
        log.log_ready(1)
        assert log.last_model_update_step == 1
        engine.applied = False
        engine.step()
        log.log_ready(2)
        assert log.last_model_update_step == 1
    assert "step" not in vars(engine)
    assert len(optimizer._optimizer_step_post_hooks) == 0


@pytest.mark.parametrize("wrong", [None, 3, "adam", nn.Linear(1, 1), torch.optim.SGD])
def test_what_is_no_optimizer_is_refused_and_none_is_watched(wrong: object) -> None:
    optimizer = torch.optim.SGD([weights()], lr=0.1)
    with connect(1, sinks=[]) as log:
        with pytest.raises(TypeError, match=r"takes torch\.optim optimizers.*given"):
            log.watch_optimizer(optimizer, wrong)
        with pytest.raises(TypeError, match="one optimizer or more"):
            log.watch_optimizer()
        assert len(optimizer._optimizer_step_post_hooks) == 0
    with pytest.raises(LogClosed):
        log.watch_optimizer(optimizer)


def test_an_optimizers_state_copies_and_pickles_know_nothing_of_it() -> None:
    parameter = weights()
    optimizer = torch.optim.Adam([parameter])
    with connect(1, sinks=[]) as log:
        log.watch_optimizer(optimizer)
        stepped(optimizer, parameter)
        assert b"logsync" not in pickle.dumps(optimizer)
        copied = copy.deepcopy(optimizer)
        copied.load_state_dict(optimizer.state_dict())
        log.log_ready(0)
        stepped(copied, *copied.param_groups[0]["params"])
        log.log_ready(1)
        assert log.last_model_update_step == 0


def test_neither_keeps_the_other_alive() -> None:
    parameter = weights()
    with connect(1, sinks=[]) as log:
        for made in (torch.optim.SGD([parameter], lr=0.1), Engine()):
            log.watch_optimizer(made)
            gone = weakref.ref(made)
            del made
        gc.collect()
        assert gone() is None
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    dropped = connect(1, sinks=[])
    dropped.watch_optimizer(optimizer)
    dropped.close()
    forgotten = weakref.ref(dropped)
    del dropped, log
    gc.collect()
    assert forgotten() is None
    stepped(optimizer, parameter)
