"""Accounts and users of a NATS server that others run (compose, Kubernetes), in its configuration format.

What each user may do comes from `penstock.common.permissions`; the passwords stay outside: the server takes
them from its environment. `make docs` writes the file into the folder of the manifests.
"""

from __future__ import annotations

import json
import re

from penstock.common.permissions import GRANTS, accounts

PASSWORD_VARIABLE = "PENSTOCK_NATS_PASSWORD_{}"
_HEAD = """\
# Written by `make docs` from the subjects that the services declare; change the code instead.
# Passwords come from the server's environment. One that NATS would take for a number (only digits, or
# digits and an ending such as k, m, e5) does not work: begin them with a letter.
"""
_PLACE = re.compile(r'"password": "@(\w+)@"')


def variable_of(user: str) -> str:
    """The environment variable of the server that holds the password of `user`."""
    return PASSWORD_VARIABLE.format(user.upper())


def accounts_config() -> str:
    """The file that a server's configuration includes."""
    table = accounts({user: f"@{user}@" for user in GRANTS})
    text = json.dumps({"accounts": table}, indent=2)
    # Only outside of quotes is a variable a variable.
    text = _PLACE.sub(lambda found: f'"password": ${variable_of(found[1])}', text)
    return _HEAD + text.removeprefix("{\n").removesuffix("\n}") + "\n"
