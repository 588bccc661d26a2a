"""Model updates as the optimizers themselves tell of them, by their step hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from logsync.workers.values import is_device_value

__all__ = ["Watch"]

Note = Callable[[Any], None]


class Watch:
    """Tells `note` of each step of the optimizers that are added, and keeps none of them alive.

    Args:
        note: a bound method, held weakly. It is given None for a step that changed the model, or a tensor on a device
            that is 0 if the step did.
    """

    def __init__(self, note: Note) -> None:
        self._note = weakref.WeakMethod(note)
        self._watched: weakref.WeakKeyDictionary[Any, Callable[[], None]] = weakref.WeakKeyDictionary()

    def add(self, *optimizers: Any) -> None:
        """Watch all of them, or none; one that is watched already stays so.

        Raises:
            TypeError: one is no optimizer.
        """
        if not optimizers:
            msg = "watch_optimizer() takes one optimizer or more"
            raise TypeError(msg)
        for target, is_engine in [_target(given) for given in optimizers]:
            if target not in self._watched:
                self._watched[target] = self._wrap(target) if is_engine else self._hook(target)

    def end(self) -> None:
        """Watch nothing any more."""
        for undo in list(self._watched.values()):
            undo()
        self._watched.clear()

    def _hook(self, optimizer: Any) -> Callable[[], None]:
        weak = self._note

        def after_step(stepped: Any, _args: object, _kwargs: object) -> None:
            note = weak()
            if note is None:
                return
            # A gradient scaler leaves it to fused optimizers to skip the step; others it does not call at all.
            found_inf = getattr(stepped, "found_inf", None)
            if found_inf is None:
                note(None)
            elif is_device_value(found_inf):
                note(found_inf)
            elif not found_inf.item():
                note(None)

        remove: Callable[[], None] = optimizer.register_step_post_hook(after_step).remove
        return remove

    def _wrap(self, engine: Any) -> Callable[[], None]:
        """Watch an engine that has no hooks but says afterwards whether its step was applied."""
        own = vars(engine).get("step")
        engine.step = _Told(engine.step, weakref.WeakMethod(engine.was_step_applied), self._note, own)
        reference = weakref.ref(engine)  # what undoes it must not keep the engine alive

        def undo() -> None:
            watched = reference()
            told = None if watched is None else vars(watched).get("step")
            if watched is None or not isinstance(told, _Told):  # gone, or somebody else's by now
                return
            if told.own is None:
                del watched.step
            else:
                watched.step = told.own

        return undo


class _Told:
    """An engine's step that tells of itself."""

    def __init__(self, step: Callable[..., Any], applied: Any, note: Any, own: Any) -> None:
        self.own = own  # what the engine itself had in place of its class's step
        self._step = step
        self._applied = applied
        self._note = note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self._step(*args, **kwargs)
        note, was_applied = self._note(), self._applied()
        if note is not None and was_applied is not None and was_applied():
            note(None)
        return result


def _target(given: Any) -> tuple[Any, bool]:
    """Return what to watch, and whether it is an engine without hooks."""
    for candidate in _candidates(given):
        # Accelerate's optimizer is one by its type, but was never initialised as one.
        if callable(getattr(candidate, "register_step_post_hook", None)) and hasattr(
            candidate, "_optimizer_step_post_hooks"
        ):
            return candidate, False
        if callable(getattr(candidate, "was_step_applied", None)) and callable(getattr(candidate, "step", None)):
            return candidate, True
    msg = (
        "watch_optimizer() takes torch.optim optimizers, what wraps one as its .optimizer or .optim, or an engine "
        f"with step() and was_step_applied(); given {type(given).__name__}"
    )
    raise TypeError(msg)


def _candidates(given: Any) -> Iterator[Any]:
    """Yield `given` and what it wraps; an engine itself comes before its optimizer."""
    seen: set[int] = set()
    while given is not None and id(given) not in seen:
        seen.add(id(given))
        yield given
        given = getattr(given, "optimizer", None) or getattr(given, "optim", None)
