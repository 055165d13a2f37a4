"""Errors that services share; each is a fact with attributes, its message is built from them."""

from __future__ import annotations


class PenstockError(Exception):
    """Base of everything raised on purpose."""


class SpoolFault(PenstockError):
    """The spool of routing events cannot be written or read."""


class BusError(PenstockError):
    """The bus did not do what was asked."""


class BusUnavailable(BusError):
    """Not connected, or nobody listens on `subject`."""

    def __init__(self, subject: str, cause: str) -> None:
        self.subject = subject
        super().__init__(f"{subject}: {cause}")


class BusTimeout(BusError):
    """No answer within the deadline."""

    def __init__(self, subject: str, deadline_s: float) -> None:
        self.subject, self.deadline_s = subject, deadline_s
        super().__init__(f"{subject}: no answer within {deadline_s * 1000:.0f} ms")


class MessageTooLarge(BusError):
    """A message over its subject's bound; names the bound instead of surfacing as a timeout."""

    def __init__(self, subject: str, size_bytes: int, limit_bytes: int) -> None:
        self.subject, self.size_bytes, self.limit_bytes = subject, size_bytes, limit_bytes
        super().__init__(f"{subject}: message of {size_bytes} bytes is over the limit of {limit_bytes}")


class RevisionConflict(BusError):
    """A write expected another revision than the bucket holds."""

    def __init__(self, key: str, expected: int) -> None:
        self.key, self.expected = key, expected
        super().__init__(f"{key}: revision is not {expected} any more")
