"""A connection whose other side is gone is dead soon, though nothing is sent on it."""

from __future__ import annotations

import socket

import pytest

from runtime.kube.listwatch import ListWatchPolicy
from runtime.sockets import KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_PROBES, UNANSWERED_MS, kept_alive


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_the_kernel_probes_silent_connections(family: socket.AddressFamily):
    with kept_alive((family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("::1", 80))) as made:
        assert made.family == family
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        options = {
            "TCP_KEEPINTVL": KEEPALIVE_INTERVAL,
            "TCP_KEEPCNT": KEEPALIVE_PROBES,
            "TCP_USER_TIMEOUT": UNANSWERED_MS,
        }
        if hasattr(socket, "TCP_KEEPIDLE"):
            options["TCP_KEEPIDLE"] = KEEPALIVE_IDLE
        for name, value in options.items():
            if hasattr(socket, name):
                assert made.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) == value
    assert KEEPALIVE_IDLE + KEEPALIVE_INTERVAL * KEEPALIVE_PROBES < 20


def test_a_routers_watch_is_known_to_be_dead_within_twenty_seconds():
    policy = ListWatchPolicy()
    assert policy.longest_watch + policy.slack + policy.retry.first < 20
