"""Users as the routing log may name them: a hash that says nothing to whoever does not know the salt."""

from __future__ import annotations

import hmac
from collections import OrderedDict

# Of the last ones; a hash costs 2 us.
MAX_KNOWN = 8192
HEX_DIGITS = 32


class UserHashes:
    """HMAC-SHA-256 of user ids under a salt, 128 bits of it in hex: the same user has the same one for as
    long as the salt stays, and a new salt makes all that was said before nobody's."""

    def __init__(self, salt: str) -> None:
        """`salt` is a secret of the deployment."""
        self._key = salt.encode()
        self._known: OrderedDict[str, str] = OrderedDict()

    def __call__(self, user: str) -> str:
        """What stands for `user`; nobody (empty) stays nobody."""
        if not user:
            return ""
        known = self._known.get(user)
        if known is None:
            known = hmac.digest(self._key, user.encode("utf-8", "surrogatepass"), "sha256").hex()[:HEX_DIGITS]
            self._known[user] = known
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return known
