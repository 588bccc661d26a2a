"""Which optional libraries are there, found by importing each in a process of its own."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from typing import NamedTuple

from logsync.coordinator.errors import printable

__all__ = ["MODULES", "Extra", "provided", "try_extras"]

MODULES = {
    "torch": "torch",
    "ray": "ray",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "prometheus": "prometheus_client",
    "plot": "plotly",
    "accelerate": "accelerate",
    "huggingface": "transformers",
    "lightning": "lightning",
}
"""What has to be importable for each extra."""

_MISSING = 3
# In another process: a broken library may end it, and a sound one takes seconds and stays.
_IMPORT = (
    "import importlib, importlib.util, sys\n"
    "sys.path.remove('')\n"  # a folder of that name here, such as wandb's own, is no library
    "spec = importlib.util.find_spec(sys.argv[1])\n"
    f"if spec is None or spec.origin is None: sys.exit({_MISSING})\n"
    "print(getattr(importlib.import_module(sys.argv[1]), '__version__', ''))\n"
)


class Extra(NamedTuple):
    """What became of importing an extra: there, its version; else `missing`, or broken for the reason `error`."""

    name: str
    version: str = ""
    missing: bool = False
    error: str = ""


def provided() -> list[str]:
    """Return the extras of the installed logsync that a library stands for; all, if it is not installed."""
    try:
        known = metadata("logsync").get_all("Provides-Extra") or []
    except PackageNotFoundError:  # run from a checkout
        return list(MODULES)
    return [name for name in MODULES if name in known]


def try_extras(names: list[str], timeout_s: float = 60.0) -> list[Extra]:
    """Import what each of `names` stands for, side by side."""
    jobs = {
        name: subprocess.Popen(  # noqa: S603 - this interpreter, and names from above
            [sys.executable, "-c", _IMPORT, MODULES[name]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for name in names
    }
    try:
        return [_outcome(name, job, timeout_s) for name, job in jobs.items()]
    finally:
        for job in jobs.values():
            with contextlib.suppress(OSError):
                job.kill()


def _outcome(name: str, job: subprocess.Popen[str], timeout_s: float) -> Extra:
    try:
        said, complained = job.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        job.kill()
        job.communicate()
        return Extra(name, error=f"importing {MODULES[name]} did not end within {timeout_s:g} s")
    if job.returncode == _MISSING:
        return Extra(name, missing=True)
    if job.returncode:
        last = (complained.strip().splitlines() or [f"it ended with {job.returncode}"])[-1]
        return Extra(name, error=printable(last, 300))
    return Extra(name, version=printable((said.strip().splitlines() or [""])[-1], 50))
