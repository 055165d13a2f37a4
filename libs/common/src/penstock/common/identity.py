"""Names of processes: an id that lasts, an incarnation that does not."""

from __future__ import annotations

import secrets
from dataclasses import dataclass


@dataclass(frozen=True)
class Identity:
    """Who writes: `id` names the process, `incarnation` this run of it."""

    service: str
    id: str
    incarnation: str

    @property
    def writer(self) -> str:
        """As it stands in the routing log."""
        return f"{self.service}/{self.id}"


def new_identity(service: str, instance_id: str = "") -> Identity:
    """A fresh incarnation, under `instance_id` or a random id."""
    return Identity(service, instance_id or secrets.token_hex(4), secrets.token_hex(4))
