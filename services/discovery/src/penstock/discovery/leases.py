"""Who may write a source's records: one replica at a time, by a key that it keeps moving.

No clocks are compared across machines: a replica takes over when it has itself watched the counter
stand still for the whole takeover time, over a watch that was alive.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from penstock.common.bus import Entry
from penstock.common.codec import DecodeError, decode_record, encode_record
from penstock.common.model import ShortName
from penstock.common.subjects import token

LEASE_PREFIX = "lease."
# A holder that has not been confirmed for this part of the takeover time stops writing, so that it is
# silent before another one begins.
SAFE_PART = 0.8


class LeaseRecord(msgspec.Struct, frozen=True):
    """The lease as it stands in the bucket. `reads` says whether the holder can read the source."""

    holder: ShortName
    incarnation: ShortName
    counter: int
    reads: bool = True


@dataclass(frozen=True)
class Bid:
    """A write that takes or renews the lease: `value` if the key is still at revision `expected`."""

    value: bytes
    expected: int


def lease_key(source: str) -> str:
    """Key of a source's lease."""
    return LEASE_PREFIX + token(source)


class Lease:
    """What one replica knows of a source's lease. Times are seconds of its own monotonic clock."""

    def __init__(self, holder: str, incarnation: str, renew_s: float, takeover_s: float) -> None:
        self._holder, self._incarnation = holder, incarnation
        self._renew_s, self._takeover_s = renew_s, takeover_s
        self._owner: LeaseRecord | None = None
        self._counter = 0
        self._moved_at = 0.0
        self._blind_since: float | None = None
        self._confirmed_at: float | None = None
        self._watched = False
        self._released = False
        self.revision = 0

    @property
    def mine(self) -> bool:
        """Whether the last known record is this replica's."""
        return not self._released and self._owner is not None and self._is_own(self._owner)

    @property
    def holder(self) -> str:
        """Id of the replica that holds it, as far as is known; empty if nobody does."""
        return self._owner.holder if self._owner else ""

    @property
    def theirs(self) -> bool:
        """Whether the last known record is another replica's, dead or alive."""
        return self._owner is not None and not self._is_own(self._owner)

    def may_write(self, now: float) -> bool:
        """Whether this replica is the writer, confirmed recently enough to be the only one."""
        return (
            self.mine
            and self._confirmed_at is not None
            and now - self._confirmed_at < self._takeover_s * SAFE_PART
        )

    def see(self, entry: Entry | None, now: float, *, listed: bool = False) -> None:
        """The watch shows the key; `listed` in a complete listing, which overrides what was known and
        gives a silent holder its full grace again."""
        self._watched = True
        if listed or entry is None:
            self.revision, self._owner, self._moved_at = 0, None, now
        if entry is not None and entry.revision > self.revision:
            self.revision, self._owner, self._moved_at = entry.revision, _decode(entry), now
        if self._owner is None or self._owner.reads:
            self._blind_since = None
        elif self._blind_since is None or listed:
            self._blind_since = now

    def pause(self) -> None:
        """The watch is lost: nothing is known of others, and what is ours stays ours until contradicted."""
        self._watched = False

    def release(self) -> int:
        """Give it up for good; the revision at which to delete the key, 0 if it is not held."""
        revision = self.revision if self.mine else 0
        self._released = True
        return revision

    def bid(self, now: float, *, reads: bool = True) -> Bid | None:
        """The write that is due, if any. `reads`: this replica can read the source. One that can takes over
        from one that cannot; one that cannot lets others go first when a holder stands still."""
        if not self._watched or self._released:
            return None
        if self.mine:
            due = self._confirmed_at is None or now - self._confirmed_at >= self._renew_s
        else:
            patience_s = self._takeover_s if reads else 2 * self._takeover_s
            blind = reads and self._blind_since is not None and now - self._blind_since >= self._takeover_s
            due = self._owner is None or blind or now - self._moved_at >= patience_s
        if not due:
            return None
        record = LeaseRecord(self._holder, self._incarnation, self._counter + 1, reads)
        return Bid(encode_record(record), self.revision)

    def won(self, bid: Bid, revision: int, sent_at: float) -> None:
        """The bus stored `bid`, sent at `sent_at`."""
        self._confirmed_at = sent_at
        self._counter += 1
        if revision > self.revision:
            self.revision, self._owner = revision, _decode(Entry(bid.value, revision))

    def _is_own(self, record: LeaseRecord) -> bool:
        return (record.holder, record.incarnation) == (self._holder, self._incarnation)


def _decode(entry: Entry) -> LeaseRecord:
    try:
        return decode_record(LeaseRecord, entry.value)
    except DecodeError:
        # Somebody's, and nobody can renew it: it is taken over like that of a dead replica.
        return LeaseRecord("unreadable", "", 0)
