"""Users of the log: told apart, and not told."""

from __future__ import annotations

import hashlib
import hmac

from penstock.common import user_hashes
from penstock.common.user_hashes import UserHashes


def test_a_user_has_one_hash_per_salt_and_nobody_has_none() -> None:
    hashes = UserHashes("salt")
    assert hashes("alice") == hmac.new(b"salt", b"alice", hashlib.sha256).hexdigest()[:32]
    assert hashes("alice") == hashes("alice") != hashes("bob")
    assert UserHashes("other")("alice") != hashes("alice")
    assert hashes("") == ""
    assert len(hashes("\ud800")) == 32


def test_users_that_are_remembered_are_bounded() -> None:
    hashes = UserHashes("salt")
    for number in range(user_hashes.MAX_KNOWN + 10):
        hashes(str(number))
    assert len(hashes._known) == user_hashes.MAX_KNOWN
