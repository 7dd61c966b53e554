"""Loopback addresses of a node's own: no two nodes on one machine hand out the same ones."""

from __future__ import annotations

import ipaddress
import random
import socket
from collections.abc import Iterator

LOCK_PORT = 47_999
NETWORKS = 128, 255
"""The second numbers of the networks, the last excluded. Those below are of tests that name an address themselves."""
TRIES = 500


class Loopback:
    """127.x.0.0/16 with a random x that nobody else has: .0.1 up for pods, .128.1 up for Services.

    A listening socket on the last address of the network, which is also the node's, holds it until `close`.
    """

    def __init__(self) -> None:
        for _ in range(TRIES):
            network = f"127.{random.randrange(*NETWORKS)}"
            try:
                self._lock = socket.create_server((f"{network}.255.254", LOCK_PORT))
            except OSError:
                continue
            self.node_ip = f"{network}.255.254"
            self._pods = _addresses(f"{network}.0.0/17")
            self._services = _addresses(f"{network}.128.0/18")
            return
        raise RuntimeError(f"no network 127.x.0.0/16 of {TRIES} tried is free: are there that many nodes here?")

    def pod(self) -> str:
        """An address no pod has had."""
        return next(self._pods)

    def service(self) -> str:
        """An address no Service has had."""
        return next(self._services)

    def close(self) -> None:
        """Gives the network back."""
        self._lock.close()


def _addresses(network: str) -> Iterator[str]:
    # Some programs take addresses that end in .0 or .255 for those of a network.
    return (str(each) for each in ipaddress.ip_network(network).hosts() if int(each) & 0xFF not in (0, 255))
