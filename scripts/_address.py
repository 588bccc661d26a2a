"""Print the interface, and this machine's IPv4 address on it, by which it reaches HOST; nothing if it cannot tell.

    python scripts/_address.py HOST

For torchrun_node.sh: a machine's own name often stands for 127.0.1.1, where no other node finds it. Nothing is sent.
Linux only.
"""

from __future__ import annotations

import fcntl
import socket
import struct
import sys

_SIOCGIFADDR = 0x8915
_ANYWHERE = "192.0.2.1"  # RFC 5737: belongs to nobody, so the default route leads there


def main() -> None:
    address = source_of(sys.argv[1])
    if address is None or address.startswith("127."):
        # HOST is this machine by a name of its own.
        address = source_of(_ANYWHERE)
    for _, interface in socket.if_nameindex():
        if address is not None and address == address_of(interface):
            print(interface, address)
            return


def source_of(host: str) -> str | None:
    """Return the address that packets for `host` would come from."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:  # no such host, or no way to it
            return None
        name: tuple[str, int] = probe.getsockname()
        return name[0]


def address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:  # it has none
            return None
        return socket.inet_ntoa(answer[20:24])


if __name__ == "__main__":
    main()
