"""Leases: a lifetime on log time, and the keys that end with it.

Log time is the greatest time stamped into a command that concerns leases. A deadline is kept in it,
and a lease ends by an entry in the log (LEASE_EXPIRE, proposed by the runtime), never by a clock: so
all nodes end it at the same revision. A lease is advisory: it may end while its holder believes in it,
so a holder compares the create revision of its key in each transaction (fencing).

Rows: lease -> u64 ttl_ms, u64 deadline_ns. Attachments: lease, key -> nothing. Log time -> u64 ns.
"""

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import NamedTuple

from aspenfs import errors
from aspenfs.kv import keys
from aspenfs.kv.state import Effect, State, internal
from aspenfs.kv.types import prefix_end

_ROW = Struct("<QQ")
_TIME = Struct("<Q")
_LEASES_END = prefix_end(keys.LEASE)
NOTHING = b""


class Lease(NamedTuple):
    lease: int
    ttl_ms: int
    deadline_ns: int


def log_time(state: State) -> int:
    """The greatest time of the lease commands so far, ns."""
    row = state.get(keys.LOG_TIME)
    return _TIME.unpack(row.value)[0] if row is not None else 0


def advanced(state: State, index: int, time_ns: int) -> tuple[int, list[Effect]]:
    """Log time after a command stamped `time_ns`, and the effect that keeps it."""
    now = log_time(state)
    if time_ns <= now:
        return now, []
    return time_ns, [(keys.LOG_TIME, internal(index, _TIME.pack(time_ns)))]


def find(state: State, lease: int) -> Lease | None:
    row = state.get(keys.lease_key(lease))
    return Lease(lease, *_ROW.unpack(row.value)) if row is not None else None


def require(state: State, lease: int) -> Lease:
    found = find(state, lease)
    if found is None:
        raise errors.LeaseNotFound(f"lease {lease}")
    return found


def everyone(state: State) -> Iterator[Lease]:
    """Every lease, by id."""
    for key, row in state.items(keys.LEASE, _LEASES_END):
        yield Lease(int.from_bytes(key[len(keys.LEASE) :], "big"), *_ROW.unpack(row.value))


def attached(state: State, lease: int) -> Iterator[bytes]:
    """The keys that hang on `lease`, in order."""
    prefix = keys.attached_prefix(lease)
    for key, _ in state.items(prefix, prefix_end(prefix)):
        yield key[len(prefix) :]


def written(index: int, lease: Lease) -> Effect:
    return keys.lease_key(lease.lease), internal(index, _ROW.pack(lease.ttl_ms, lease.deadline_ns))


def moved(index: int, key: bytes, old: int, new: int) -> Sequence[Effect]:
    """The attachments that change when `key` goes from lease `old` to `new` (0 = none)."""
    effects: list[Effect] = []
    if old != new:
        if old:
            effects.append((keys.attached_prefix(old) + key, None))
        if new:
            effects.append((keys.attached_prefix(new) + key, internal(index, NOTHING)))
    return effects
