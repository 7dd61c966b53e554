"""Sockets.

Covers: listening on every address of a machine with and without IPv6, reserving a port,
inheriting a socket, and the kernel's options
for silent connections. Not covered: that the kernel keeps its word about probes.
"""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest

from runtime.sockets import (
    KEEPALIVE_IDLE,
    KEEPALIVE_INTERVAL,
    KEEPALIVE_PROBES,
    UNANSWERED_MS,
    PortTakenError,
    inherited,
    kept_alive,
    listen,
    reserve,
    url_of,
)


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


def test_only_a_listening_socket_can_be_inherited() -> None:
    with socket.socket() as plain, pytest.raises(OSError, match="not a listening socket"):
        inherited(plain.fileno())


def reached(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def test_every_address_is_that_of_both_families():
    with listen("::", 0) as listener:
        port = listener.getsockname()[1]
        assert reached("127.0.0.1", port)
        with listen("0.0.0.0", 0) as other:
            assert other.family == socket.AF_INET
        if listener.family == socket.AF_INET6:
            assert reached("::1", port)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, None])
def test_without_ipv6_every_address_is_that_of_ipv4(number: int | None, monkeypatch: pytest.MonkeyPatch):
    create = socket.create_server

    def refuse(address: tuple[str, int], *, family: int, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(number, "no IPv6 here")
        return create(address, family=family, **options)

    monkeypatch.setattr(socket, "create_server", refuse)
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: number is not None)
    with listen("::", 0) as listener:
        assert listener.family == socket.AF_INET
        assert reached("127.0.0.1", listener.getsockname()[1])


def test_a_port_that_is_taken_is_no_reason_to_take_ipv4_alone():
    with listen("::", 0) as listener, pytest.raises(PortTakenError, match="taken by another process"):
        listen("::", listener.getsockname()[1])


def test_a_port_that_is_taken_is_named_with_the_flag_that_chooses_another():
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(PortTakenError, match=rf"port {port} on 127\.0\.0\.1 is taken.* choose another with --port"):
            listen("127.0.0.1", port, "--port")


def test_a_reserved_port_is_nobody_elses_and_open_to_a_program_that_shares_it() -> None:
    with reserve("127.0.0.1", 0) as reserved:
        port = reserved.getsockname()[1]
        assert not reached("127.0.0.1", port), "it does not listen"
        for take in (listen, reserve):
            with pytest.raises(PortTakenError, match=r"choose another with --port"):
                take("127.0.0.1", port, "--port")
        with socket.socket() as sharing:
            sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sharing.bind(("127.0.0.1", port))
            sharing.listen()
            assert reached("127.0.0.1", port)
            with pytest.raises(PortTakenError):
                reserve("127.0.0.1", port)
        with pytest.raises(PortTakenError):
            listen("127.0.0.1", port)
    listen("127.0.0.1", port).close()


def test_the_url_of_a_listener():
    with listen("127.0.0.1", 0) as listener:
        assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"
