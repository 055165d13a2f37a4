"""The screen never holds up who writes to it."""

import os
import threading

from penstock.cli.screen import Screen


def read_all(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as pipe:
        return pipe.read().decode()


def test_lines_come_out_in_order() -> None:
    reader, writer = os.pipe()
    screen = Screen(writer, on_closed=lambda: None)
    for number in range(100):
        screen.write(f"line {number}")
    screen.close(10)
    os.close(writer)
    assert read_all(reader).splitlines() == [f"line {number}" for number in range(100)]


def test_a_reader_that_stands_still_costs_lines_and_not_time() -> None:
    reader, writer = os.pipe()
    screen = Screen(writer, on_closed=lambda: None, max_lines=10)
    for _ in range(1000):
        screen.write("x" * 1000)
    text: list[str] = []
    drain = threading.Thread(target=lambda: text.append(read_all(reader)))
    drain.start()
    screen.write("last, or dropped as well")
    screen.close(10)
    os.close(writer)
    drain.join(10)
    assert "lines dropped" in text[0]
    assert text[0].count("x" * 1000) < 1000


def test_a_reader_that_left_is_reported_once_and_writing_goes_on_silently() -> None:
    reader, writer = os.pipe()
    left = threading.Event()
    screen = Screen(writer, on_closed=left.set)
    os.close(reader)
    screen.write("nobody reads this")
    assert left.wait(10)
    screen.write("nor this")
    screen.close(10)
    os.close(writer)
