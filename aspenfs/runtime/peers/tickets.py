"""Join tickets: the text that lets one new node in, and the rows by which the cluster knows it.

Belongs here: the text, its secret and the secret's hash, rows and what a transaction does with them. Not
here: who hands tickets in (`join.py`) and takes them (`admission.py`).

Text: `aspen1-` and base64url without padding of: msgpack array, then 4 bytes of its SHA-256, against typing
errors. The array: cluster id, cluster name, addresses of members, SHA-256 of the CA's public key, secret,
expiry (s since the epoch). The cluster keeps only a hash of the secret, so that who reads the store
(a backup, a member) cannot make a ticket of it:

    c/ticket/<hash, 32 bytes>  ->  msgpack map {expires_ns, created_ns, node, born, key}

`node` is 0 until the ticket is used; then the row says by whom. So a node that did not get the answer may ask
again with the same ticket and key, and nobody else can. A row is deleted TICKET_KEPT_S after its expiry.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple, Protocol

import msgpack

from aspenfs.errors import InvalidArgument, TicketMalformed
from aspenfs.kv.types import (
    EQUAL,
    Compare,
    Operation,
    Record,
    absent,
    compare_mod_revision,
    delete,
    prefix_end,
    put,
)
from aspenfs.limits import PEER_ADDRESSES_MAX, TICKET_KEPT_S, TICKET_TTL_S_MAX, TICKETS_MAX, TXN_OPS_MAX
from aspenfs.runtime import identity
from aspenfs.runtime.peers import addresses as peer_addresses
from aspenfs.runtime.peers.ca import FINGERPRINT_BYTES
from aspenfs.seams import Entropy

PREFIX: Final = b"c/ticket/"
PREFIX_END: Final = prefix_end(PREFIX)
TEXT_PREFIX: Final = "aspen1-"
SECRET_BYTES: Final = 20  # 160 bits: guessing is hopeless even at the speed of the hash

_CHECKSUM_BYTES = 4
_TEXT_MAX = 4096
_NS_PER_S = 1_000_000_000
_ADVICE = "make a new one with `aspen ticket create` on a node of the cluster"


class Reader(Protocol):
    """What is needed of the store."""

    def get(self, key: bytes) -> Record | None: ...

    def range(self, start: bytes, end: bytes) -> list[tuple[bytes, Record]]: ...


class Ticket(NamedTuple):
    cluster_id: bytes
    cluster_name: str
    addresses: tuple[str, ...]  # of members, where the joiner may ask
    fingerprint: bytes  # of the CA that signs for them
    secret: bytes
    expires_s: int  # since the epoch

    def encode(self) -> str:
        packed = msgpack.packb(tuple(self))
        return TEXT_PREFIX + base64.urlsafe_b64encode(packed + _checksum(packed)).rstrip(b"=").decode("ascii")

    @property
    def hash(self) -> bytes:
        return secret_hash(self.cluster_id, self.secret)


def secret_hash(cluster_id: bytes, secret: bytes) -> bytes:
    return hashlib.sha256(b"aspenfs join ticket\0" + cluster_id + secret).digest()


def new(cluster_id: bytes, cluster_name: str, addresses: Sequence[str], fingerprint: bytes, ttl_s: int,
        now_ns: int, entropy: Entropy) -> Ticket:  # fmt: skip
    """A ticket that the cluster does not know yet: see `create`. InvalidArgument."""
    if not 0 < ttl_s <= TICKET_TTL_S_MAX:
        raise InvalidArgument(f"a ticket is good for 1 s to {TICKET_TTL_S_MAX // 86_400} days")
    peer_addresses.parse_all(addresses)
    expires_s = now_ns // _NS_PER_S + ttl_s
    secret = entropy.random_bytes(SECRET_BYTES)
    return Ticket(cluster_id, cluster_name, tuple(addresses), fingerprint, secret, expires_s)


def decode(text: str) -> Ticket:
    """TicketMalformed says what is wrong with the text."""
    words = "".join(text.split())  # a terminal or a mail may have broken the line
    if not words.startswith(TEXT_PREFIX):
        raise TicketMalformed(f"a join ticket begins with {TEXT_PREFIX}: copy all of it")
    body = words[len(TEXT_PREFIX):]
    try:
        if len(body) > _TEXT_MAX:
            raise ValueError("too long")
        data = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raise TicketMalformed("the join ticket is damaged: copy it again, all of it") from None
    packed, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if _checksum(packed) != checksum:
        raise TicketMalformed("the join ticket is damaged or cut off: copy it again, all of it")
    try:
        return _checked(msgpack.unpackb(packed, use_list=False, max_array_len=16, max_map_len=0))
    except (ValueError, TypeError, InvalidArgument, msgpack.exceptions.UnpackException) as error:
        raise TicketMalformed(f"not a join ticket of this release ({error}): {_ADVICE}") from None


def _checked(value: Any) -> Ticket:
    cluster_id, cluster_name, addresses, fingerprint, secret, expires_s = value
    if not (type(cluster_id) is bytes and len(cluster_id) == identity.CLUSTER_ID_BYTES
            and type(fingerprint) is bytes and len(fingerprint) == FINGERPRINT_BYTES
            and type(secret) is bytes and len(secret) == SECRET_BYTES and type(cluster_name) is str
            and type(expires_s) is int and 0 < expires_s < 1 << 40 and type(addresses) is tuple
            and all(type(address) is str for address in addresses)
            and len(addresses) <= PEER_ADDRESSES_MAX):  # fmt: skip
        raise ValueError("a field of it is no such thing")
    identity.check_name(cluster_name)
    peer_addresses.parse_all(addresses)
    return Ticket(cluster_id, cluster_name, addresses, fingerprint, secret, expires_s)


def _checksum(packed: bytes) -> bytes:
    return hashlib.sha256(packed).digest()[:_CHECKSUM_BYTES]


# --- what the cluster knows ---


class Known(NamedTuple):
    """A ticket's row. `node` 0: not used yet."""

    expires_ns: int
    created_ns: int
    node: int = 0  # that joined with it
    born: bytes = b""  # its birth mark
    key: bytes = b""  # and the fingerprint of its key


def key_of(ticket_hash: bytes) -> bytes:
    return PREFIX + ticket_hash


def pack(known: Known) -> bytes:
    packed: bytes = msgpack.packb(known._asdict())
    return packed


def unpack(value: bytes) -> Known:
    """Fields that a later release added are not looked at."""
    fields = msgpack.unpackb(value)
    return Known(**{name: fields[name] for name in Known._fields})


def find(store: Reader, ticket_hash: bytes) -> tuple[Known, int] | None:
    """The row and its mod revision."""
    record = store.get(key_of(ticket_hash))
    return (unpack(record.value), record.mod_revision) if record is not None else None


def all_known(store: Reader) -> Iterator[tuple[bytes, Known]]:
    """Hash and row of every ticket."""
    for key, record in store.range(PREFIX, PREFIX_END):
        yield key[len(PREFIX):], unpack(record.value)


Transaction = tuple[list[Compare], list[Operation]]


def create(store: Reader, ticket: Ticket, now_ns: int) -> Transaction:
    """Makes the ticket known, and deletes rows that nobody will ask for. InvalidArgument: too many."""
    outdated, open_tickets = [], 0
    for ticket_hash, known in all_known(store):
        if known.expires_ns + TICKET_KEPT_S * _NS_PER_S < now_ns:
            outdated.append(delete(key_of(ticket_hash)))
        elif known.expires_ns > now_ns and not known.node:
            open_tickets += 1
    if open_tickets >= TICKETS_MAX:
        raise InvalidArgument(f"{open_tickets} tickets are open: withdraw some before you make another one")
    key = key_of(ticket.hash)
    known = Known(ticket.expires_s * _NS_PER_S, now_ns)
    return [absent(key)], [put(key, pack(known)), *outdated[:TXN_OPS_MAX // 2]]


def withdraw(ticket_hash: bytes) -> Operation:
    return delete(key_of(ticket_hash))


def use(ticket_hash: bytes, known: Known, mod_revision: int, *, node: int, born: bytes,
        key: bytes) -> Transaction:  # fmt: skip
    """The ticket is used by this node, if it is still what `find` found; of two that try, one succeeds."""
    row = key_of(ticket_hash)
    used = known._replace(node=node, born=born, key=key)
    return [compare_mod_revision(row, EQUAL, mod_revision)], [put(row, pack(used))]
