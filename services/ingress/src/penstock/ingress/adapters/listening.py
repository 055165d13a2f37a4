"""The shared port: every worker binds it for itself, the kernel spreads connections over them."""

from __future__ import annotations

import socket


def listening_socket(host: str, port: int) -> socket.socket:
    """A bound socket that shares its port with the other workers. Raises OSError."""
    return _bound(host, port, share=True)


def reserve_port(host: str, port: int) -> socket.socket:
    """Hold `port` (0: a free one) for the workers; the socket never listens.

    Raises:
        OSError: another program has the port, even one that shares ports: two gateways on one port
            would each get half of the clients.
    """
    _bound(host, port, share=False).close()
    return _bound(host, port, share=True)


def _bound(host: str, port: int, *, share: bool) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if share:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock
