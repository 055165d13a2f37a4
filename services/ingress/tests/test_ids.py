"""Ids count on, in hexadecimal."""

from penstock.ingress.ids import Ids


def test_ids_are_the_numbers_from_one_on_in_hexadecimal() -> None:
    ids = Ids("lab-1.")
    for number in range(1, 3 * 4096 + 2):
        assert ids.next() == f"lab-1.{number:x}"
