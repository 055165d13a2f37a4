"""Ports: who holds one, and free ones."""

import os
import socket

import pytest

from penstock.cli.ports import FreePorts, holder, trouble


@pytest.fixture
def listener() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def test_a_taken_port_names_its_holder(listener: socket.socket) -> None:
    with listener:
        port = listener.getsockname()[1]
        assert trouble("127.0.0.1", port) == f"in use by {holder(port)}"
        assert f"(pid {os.getpid()})" in holder(port)
        assert trouble("0.0.0.0", port).startswith("in use by ")
    assert trouble("127.0.0.1", port) == ""


def test_a_port_shared_by_its_holder_is_taken_all_the_same() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert trouble("127.0.0.1", listener.getsockname()[1]).startswith("in use by ")


def test_an_address_of_another_machine_is_refused() -> None:
    assert trouble("192.0.2.1", 0).startswith("cannot listen on 192.0.2.1: ")


def test_a_free_port_is_given_once() -> None:
    ports = FreePorts("127.0.0.1")
    first = ports.take()
    assert ports.take(first) != first


def test_the_preferred_port_is_given_while_it_is_free(listener: socket.socket) -> None:
    with listener:
        port = listener.getsockname()[1]
        assert FreePorts("127.0.0.1").take(port) != port
    assert FreePorts("127.0.0.1").take(port) == port


def test_ports_in_a_row_are_all_free() -> None:
    ports = FreePorts("127.0.0.1")
    first = ports.take_row(20)
    assert all(trouble("127.0.0.1", port) == "" for port in range(first, first + 20))
    assert all(ports.take(port) != port for port in range(first, first + 20))
