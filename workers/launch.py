"""Read the surroundings once: which launcher, which rank, which transport."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from logsync.coordinator.errors import ConfigError, LaunchError
from logsync.workers.transports.base import Following, Transport
from logsync.workers.transports.local import LocalTransport
from logsync.workers.transports.nodes import SHAPES

__all__ = ["Launched", "choose_following", "choose_transport", "launched", "own_rank", "restart_count"]

_logger = logging.getLogger(__name__)

# launcher: the variables of rank and world size
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS"),
}


class Launched(NamedTuple):
    """What a launcher's environment says of this process."""

    launcher: str
    rank: int
    world_size: int


def launched(environ: Mapping[str, str] = os.environ) -> Launched | None:
    """Return what the launcher says, None if there is none.

    Raises:
        LaunchError: a launcher's variables are half there, or are not numbers that fit each other.
    """
    for launcher, (rank_name, size_name) in _LAUNCHERS.items():
        rank, size = environ.get(rank_name), environ.get(size_name)
        if rank is None and size is None:
            continue
        if rank is None or size is None:
            if launcher == "Slurm" and (size == "1" or rank == "0"):
                continue  # an allocation's shell, or a batch script's: nothing was launched
            there, missing = (rank_name, size_name) if size is None else (size_name, rank_name)
            msg = (
                f"{there}={environ[there]} is set, but {missing} is missing: that is half of what {launcher} sets. "
                f"Start the script with {_START[launcher]}, set {missing}, or pass transport='local' to log this "
                "process alone"
            )
            raise LaunchError(msg)
        try:
            found = Launched(launcher, int(rank), int(size))
        except ValueError:
            found = Launched(launcher, -1, 0)
        if not 0 <= found.rank < found.world_size:
            msg = f"{rank_name}={rank!r} and {size_name}={size!r} do not name a rank of a world"
            raise LaunchError(msg)
        return found
    return None


_START = {"torchrun": "torchrun", "Open MPI": "mpirun", "Slurm": "srun"}


def restart_count(environ: Mapping[str, str] = os.environ) -> int:
    """Return how often the launcher has restarted the job; 0 if it does not say."""
    text = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0  # noqa: PLR2004 - no job restarts so often


def own_rank(environ: Mapping[str, str] = os.environ) -> Launched | None:
    """Return who this process is as far as can be told now, None if nothing says; never raises, never imports torch.

    An initialised torch.distributed (then `launcher` is "torch.distributed") knows better than the environment:
    processes that were spawned from one have its variables, and ranks of their own.
    """
    try:
        distributed = _initialized_torch()
        if distributed is not None:
            return Launched("torch.distributed", distributed.get_rank(), distributed.get_world_size())
        return launched(environ)
    except (AttributeError, RuntimeError, ValueError):  # half imported, just destroyed, or half an environment
        return None


def choose_transport(
    transport: object,
    *,
    timeout_s: float,
    warn_after_s: float,
    rank: int | None,
    world_size: int | None,
    process_group: object | None,
    environ: Mapping[str, str] = os.environ,
) -> Transport:
    """Return the transport that `connect` asked for, not started yet.

    Raises:
        ConfigError: it is not known, or `rank` and `world_size` are not what it finds.
        LaunchError: the surroundings do not fit it.
    """
    chosen = _chosen(transport, timeout_s, warn_after_s, process_group, environ, given=(rank, world_size))
    for name, given, found in (("rank", rank, chosen.rank), ("world_size", world_size, chosen.world_size)):
        if given is not None and given != found:
            msg = f"{name}={given!r} was given, but this process has {name} {found} on transport {chosen.name!r}"
            raise ConfigError(msg)
    return chosen


def _chosen(
    transport: object,
    timeout_s: float,
    warn_after_s: float,
    process_group: object | None,
    environ: Mapping[str, str],
    *,
    given: tuple[int | None, int | None],
) -> Transport:
    if not isinstance(transport, str):
        if isinstance(transport, type) or not all(
            hasattr(transport, member) for member in ("name", "rank", "world_size", "start", "exchange", "close")
        ):
            msg = f"transport must be 'auto', 'local', 'collective', 'ray' or a Transport, given {transport!r}"
            raise ConfigError(msg)
        if process_group is not None:
            msg = "a process_group was given together with a Transport, which has its own ranks"
            raise ConfigError(msg)
        return cast("Transport", transport)
    name, _, shape = transport.strip().lower().partition(":")
    if name not in ("auto", "local", "collective", "ray"):
        msg = f"transport must be 'auto', 'local', 'collective', 'ray' or a Transport, given {transport!r}"
        raise ConfigError(msg)
    if shape not in ("", *(SHAPES if name == "collective" else ())):
        msg = f"there is 'collective:tree' and 'collective:flat', but no such option as in transport={transport!r}"
        raise ConfigError(msg)
    if process_group is not None and name in ("local", "ray"):
        msg = f"a process_group was given together with transport={name!r}"
        raise ConfigError(msg)
    if name == "collective" or process_group is not None or (name == "auto" and _initialized_torch() is not None):
        return _collective(timeout_s, warn_after_s, process_group, shape or "auto")
    if name == "ray" or (name == "auto" and _in_ray_train()):
        return _ray(*given)
    if name == "auto":
        _refuse_lonely_rank(environ)
        _logger.info(
            "single-node fallback: torch.distributed is not initialised and no launcher started more than one rank, "
            "so this process logs alone"
        )
    return LocalTransport()


def _initialized_torch() -> Any:
    """Return torch.distributed if a process group is initialised. If torch is not imported, none can be."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def _collective(timeout_s: float, warn_after_s: float, process_group: object | None, shape: str) -> Transport:
    if _initialized_torch() is None:
        msg = (
            "transport='collective' needs an initialised process group: call "
            "torch.distributed.init_process_group() before connect()"
        )
        raise LaunchError(msg)
    from logsync.workers.transports.collective import CollectiveTransport  # noqa: PLC0415 - it loads torch

    return CollectiveTransport(timeout_s=timeout_s, warn_after_s=warn_after_s, process_group=process_group, shape=shape)


def _in_ray_train() -> bool:
    """Say whether this process is a worker of Ray Train. If that is not imported, it is none."""
    if "ray.train" not in sys.modules:
        return False
    from logsync.workers.transports.ray_actor import train_context  # noqa: PLC0415 - it loads ray

    return train_context() is not None


def _ray(rank: int | None, world_size: int | None) -> Transport:
    transport: Transport = _ray_module().RayTransport(rank, world_size)
    return transport


def choose_following(
    transport: object, name: str, *, rank: int | None, world_size: int | None, process_group: object | None
) -> Following:
    """Return a follower's way to the log of that name.

    Raises:
        ConfigError: only `transport="ray"` has followers, and they have no rank.
        LaunchError: Ray is not installed, or this process belongs to no Ray job.
    """
    if not isinstance(transport, str) or transport.strip().lower() != "ray":
        msg = f"lockstep=False needs transport='ray', given {transport!r}: elsewhere all ranks march together"
        raise ConfigError(msg)
    given = {"rank": rank, "world_size": world_size, "process_group": process_group}
    for option, value in given.items():
        if value is not None:
            msg = f"{option}={value!r} was given together with lockstep=False: a follower is none of the ranks"
            raise ConfigError(msg)
    following: Following = _ray_module().follow(name)
    return following


def _ray_module() -> Any:
    try:
        from logsync.workers.transports import ray_actor  # noqa: PLC0415 - it loads ray
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        msg = "transport='ray' needs Ray, which is not installed: pip install 'logsync[ray]'"
        raise LaunchError(msg) from error
    return ray_actor


def _refuse_lonely_rank(environ: Mapping[str, str]) -> None:
    found = launched(environ)
    if found is None or found.world_size == 1:
        return
    msg = (
        f"{found.launcher} started this process as rank {found.rank} of {found.world_size}, but torch.distributed has "
        "no process group. Call torch.distributed.init_process_group() before connect() to log together, or pass "
        "transport='local' to log each process alone"
    )
    raise LaunchError(msg)
