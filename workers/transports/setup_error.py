"""Why a gloo group could not be built, and what to set."""

from __future__ import annotations

import os
import socket

from logsync.coordinator.errors import CollectiveSetupError, printable

__all__ = ["setup_error"]

_OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
_STALE = (
    ". torchrun has restarted this job: its ranks find the addresses of their dead predecessors in the store that it "
    f"shares with them (pytorch issue 135712), unless it is started with {_OWN_STORE}=1"
)


def setup_error(error: Exception, timeout_s: float) -> CollectiveSetupError:
    """Return the error that a user gets for what torch or gloo has raised."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = "no address"
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in {"", "0"}
    stale = "" if not restarted or os.environ.get(_OWN_STORE) == "1" else _STALE
    where = f"interface {interface} (GLOO_SOCKET_IFNAME)" if interface else f"host name {host}, which is {address}"
    msg = (
        f"could not build the gloo group within {timeout_s:g} s, using {where}: "
        f"{printable(str(error).strip(), 400)}. Every rank must call connect(), in the same order; if the address is "
        "not one that the other nodes reach, set GLOO_SOCKET_IFNAME to the interface that is"
        f"{stale}"
    )
    return CollectiveSetupError(msg)
