"""The store's own keys: where history, leases, retries and the compaction mark live.

They share the one ordered keyspace with everything else, under the prefix 0x00 that no user key may
have, so that a snapshot, a state hash and a replay cover them without further ado. Belongs here: how
such a key is built and taken apart (byte by byte in `docs/design/store.md`). Not here: what is stored
under it (`history.py`, `leases.py`, `once.py`).
"""

from aspenfs import errors

INTERNAL_END = USER_START = b"\x01"  # internal keys are below it, all others at or above

LOG_TIME = b"\x00t"
COMPACTED = b"\x00c"
LEASE = b"\x00l"
ATTACHED = b"\x00a"
CLIENT = b"\x00d"
CLIENT_AT = b"\x00e"
VERSION_OF = b"\x00h"
CHANGED_AT = b"\x00r"

HISTORY_KEYSPACES = frozenset((b"k/", b"c/", b"t/"))  # every version is kept until compaction

_END_OF_KEY = b"\x00\x00"


def number(value: int) -> bytes:
    """Eight bytes whose byte order is the order of the numbers."""
    return value.to_bytes(8, "big")


def lease_key(lease: int) -> bytes:
    return LEASE + lease.to_bytes(8, "big")


def attached_prefix(lease: int) -> bytes:
    """What comes before each key that hangs on `lease`."""
    return ATTACHED + lease.to_bytes(8, "big")


def versions_prefix(key: bytes) -> bytes:
    """What comes before the revision in the history keys of `key`.

    A zero byte is escaped as 00 ff and the key ends with 00 00: so the order of user keys is kept,
    and the versions of a key are never mixed with those of a longer one.
    """
    return VERSION_OF + key.replace(b"\x00", b"\x00\xff") + _END_OF_KEY


def version_key(key: bytes, revision: int) -> bytes:
    return VERSION_OF + key.replace(b"\x00", b"\x00\xff") + _END_OF_KEY + revision.to_bytes(8, "big")


def split_version_key(stored: bytes) -> tuple[bytes, int]:
    """The user key and the revision of a history key."""
    if not stored.startswith(VERSION_OF) or stored[-10:-8] != _END_OF_KEY:
        raise errors.Corrupt("state", 0, f"not a history key: {stored!r}", "run `aspen check`")
    return stored[2:-10].replace(b"\x00\xff", b"\x00"), int.from_bytes(stored[-8:], "big")


def changed_key(revision: int) -> bytes:
    return CHANGED_AT + revision.to_bytes(8, "big")


def keyspace_with_history(start: bytes, end: bytes) -> bool:
    """Whether all of [start, end) lies in one keyspace whose versions are kept."""
    space = start[:2]
    return space in HISTORY_KEYSPACES and b"" != end <= space[:1] + b"0"  # '0' follows '/'
