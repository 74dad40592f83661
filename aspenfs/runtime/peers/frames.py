"""The language between nodes: frames, greetings, requests, errors. In prose: `docs/design/peers.md`.

Belongs here: bytes to values and back, both ends alike, and refusing what is not allowed. Not here:
sockets (`stream.py`), who says what when (`links.py`, `server.py`).

A frame is a big-endian u32 length, a type byte, and msgpack. Decoding raises ProtocolError and nothing
else, whatever the bytes are; arrays come out as tuples.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

import msgpack

from aspenfs import errors
from aspenfs.limits import (
    PEER_ADDRESS_BYTES_MAX,
    PEER_ADDRESSES_MAX,
    PEER_FORMER_LIVES_MAX,
    PEER_FRAME_BYTES_MAX,
    PEER_GREETING_BYTES_MAX,
    PEER_ITEMS_MAX,
    PEER_REQUEST_BYTES_MAX,
)
from aspenfs.runtime.control_protocol import decode_error, encode_error
from aspenfs.runtime.identity import CLUSTER_ID_BYTES, INCARNATION_MAX

MAGIC: Final = "aspen-peer"
VERSION: Final = 1
HEADER_BYTES: Final = 5  # of which the length counts the last, the type

_GREETING_ITEMS_MAX = 64
_NUMBER_MAX = (1 << 64) - 1
_KIND_BYTES_MAX = 64
_ARRAY32 = b"\xdd"


class Type(IntEnum):
    HELLO = 1  # who connects: the first frame
    WELCOME = 2  # the answer to it
    REFUSED = 3  # an error; the last frame of a connection
    MESSAGES = 4  # Raft messages
    REQUEST = 5
    ANSWER = 6
    FAILURE = 7
    CANCEL = 8  # nobody waits for that request any more
    PING = 9
    PONG = 10
    AUTHORITIES = 11  # of one without a certificate: which CAs are here?
    JOIN = 12  # of one without a certificate: let me in
    ADMITTED = 13


class LinkKind(IntEnum):
    MESSAGES = 1  # Raft messages and small requests: nothing in it is ever long
    BULK = 2


class Hello(NamedTuple):
    link: LinkKind
    cluster_id: bytes
    node_id: int
    incarnation: int
    process: int  # drawn at each start: tells two processes of one incarnation apart
    addresses: tuple[str, ...] = ()  # HOST:PORT where it is found in this life; of late only
    former: tuple[int, ...] = ()  # `process` of the lives before, the last one first; of late only


class Welcome(NamedTuple):
    incarnation: int
    process: int
    former: tuple[int, ...] = ()


class Request(NamedTuple):
    number: int
    kind: str
    body: Any


# --- encoding ---


def encode(kind: Type, value: Any) -> bytes:
    """One frame. TooLarge; InvalidArgument for what msgpack cannot carry."""
    payload = pack(value)
    if len(payload) >= PEER_FRAME_BYTES_MAX:
        raise errors.TooLarge(f"a frame of {len(payload)} bytes; the most is {PEER_FRAME_BYTES_MAX}")
    return b"%b%c%b" % ((len(payload) + 1).to_bytes(4, "big"), kind, payload)


def pack(value: Any) -> bytes:
    try:
        packed: bytes = msgpack.packb(value, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise errors.InvalidArgument(f"a value cannot be packed: {error}") from None
    return packed


def encode_messages(messages: Sequence[bytes]) -> bytes:
    """The frame of messages that are packed already, in order."""
    payload = b"".join(messages)
    head = (len(payload) + 6).to_bytes(4, "big"), Type.MESSAGES, _ARRAY32, len(messages).to_bytes(4, "big")
    return b"%b%c%b%b%b" % (*head, payload)


Parts = tuple[bytes, ...]  # of one frame, in order: what is large is not copied to put a head before it


def encode_request(number: int, kind: str, body: Any) -> Parts:
    return _parts(Type.REQUEST, (number, kind, body), kind)


def encode_answer(number: int, kind: str, body: Any) -> Parts:
    return _parts(Type.ANSWER, (number, body), kind)


def _parts(kind: Type, value: Any, name: str) -> Parts:
    payload = pack(value)
    if len(payload) > PEER_REQUEST_BYTES_MAX + 128:  # its number and kind are not counted
        what = f"{kind.name.lower()} {name}"
        raise errors.TooLarge(f"a {what} of {len(payload)} bytes; the most is {PEER_REQUEST_BYTES_MAX}")
    return b"%b%c" % ((len(payload) + 1).to_bytes(4, "big"), kind), payload


def encode_failure(number: int, error: errors.AspenError) -> Parts:
    return (encode(Type.FAILURE, (number, encode_error(error))),)


def encode_refusal(error: errors.AspenError) -> bytes:
    return encode(Type.REFUSED, encode_error(error))


def encode_hello(hello: Hello) -> bytes:
    return encode(Type.HELLO, (MAGIC, (VERSION,), *hello))


def encode_welcome(welcome: Welcome) -> bytes:
    return encode(Type.WELCOME, (VERSION, *welcome))


def encode_question() -> bytes:
    """Of one who does not know the CAs yet."""
    return encode(Type.AUTHORITIES, (MAGIC, (VERSION,)))


class Join(NamedTuple):
    cluster_id: bytes
    secret: bytes  # of the ticket
    request: bytes  # for a certificate, DER
    born: bytes
    name: str
    addresses: tuple[str, ...]
    promote: bool


def encode_join(join: Join) -> bytes:
    return encode(Type.JOIN, (MAGIC, (VERSION,), *join))


class Admitted(NamedTuple):
    """What a new node gets."""

    node: int
    cluster_name: str
    certificate: bytes  # DER
    bundle: tuple[bytes, ...]  # DER
    members: tuple[tuple[int, tuple[str, ...], bytes], ...]  # id, addresses and birth mark of each


def encode_admitted(admitted: Admitted) -> bytes:
    return encode(Type.ADMITTED, (VERSION, *admitted))


def encode_authorities(cluster_id: bytes, bundle: Iterable[bytes]) -> bytes:
    return encode(Type.AUTHORITIES, (VERSION, cluster_id, tuple(bundle)))


# --- decoding ---


def split(frame: memoryview) -> tuple[int, memoryview]:
    """Type (which may be none of `Type`) and payload of a frame without its length."""
    return frame[0], frame[1:]


def unpack(payload: memoryview | bytes, items_max: int = PEER_ITEMS_MAX) -> Any:
    """The bound on arrays and maps holds level by level: a short frame cannot announce, level within
    level, arrays that would fill the memory before their first element is read."""
    items_max = min(items_max, len(payload))  # each has a byte at least
    try:
        return msgpack.unpackb(payload, raw=False, use_list=False, strict_map_key=True,
                               max_array_len=items_max, max_map_len=items_max, max_ext_len=0)  # fmt: skip
    except (ValueError, msgpack.exceptions.UnpackException) as error:  # UnicodeDecodeError is a ValueError
        raise errors.ProtocolError(f"not msgpack that is allowed here: {error}") from None


def unpack_greeting(payload: memoryview | bytes) -> Any:
    """Of one who has not shown who it is."""
    if len(payload) > PEER_GREETING_BYTES_MAX:
        raise errors.ProtocolError(f"{len(payload)} bytes where {PEER_GREETING_BYTES_MAX} are allowed")
    return unpack(payload, _GREETING_ITEMS_MAX)


def decode_hello(payload: memoryview) -> Hello:
    """NotSupported if no version is shared."""
    (link, cluster_id, node_id, incarnation, process), more = _after_magic(payload, 5)
    if link not in (LinkKind.MESSAGES, LinkKind.BULK) or type(link) is not int:
        raise errors.ProtocolError(f"a link of kind {link!r}")
    if type(cluster_id) is not bytes or len(cluster_id) != CLUSTER_ID_BYTES:
        raise errors.ProtocolError("not a cluster id")
    _check_numbers((node_id, process))
    _check_incarnation(incarnation)
    addresses = more[0] if more else ()
    if type(addresses) is not tuple or len(addresses) > PEER_ADDRESSES_MAX:
        raise errors.ProtocolError(f"addresses must be a list of at most {PEER_ADDRESSES_MAX}")
    if not all(type(each) is str and len(each) <= PEER_ADDRESS_BYTES_MAX for each in addresses):
        raise errors.ProtocolError(f"an address is text of at most {PEER_ADDRESS_BYTES_MAX} characters")
    former = _check_former(more[1] if len(more) > 1 else ())
    return Hello(LinkKind(link), cluster_id, node_id, incarnation, process, addresses, former)


def _check_version(versions: Any) -> None:
    if type(versions) is not tuple or not all(type(version) is int for version in versions):
        raise errors.ProtocolError("versions must be a list of numbers")
    if VERSION not in versions:
        raise errors.NotSupported(f"this node speaks version {VERSION} of the peer protocol, the other one "
                                  f"{versions}: bring both to the same release of aspenfs")  # fmt: skip


def decode_welcome(payload: memoryview) -> Welcome:
    value = unpack_greeting(payload)
    if type(value) is not tuple or len(value) < 3:
        raise errors.ProtocolError("not a welcome")
    _check_version(value[:1])
    _check_incarnation(value[1])
    _check_numbers(value[2:3])
    return Welcome(value[1], value[2], _check_former(value[3] if len(value) > 3 else ()))


def decode_question(payload: bytes) -> None:
    _after_magic(payload, 0)


def _after_magic(payload: bytes | memoryview, count: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The `count` values behind magic and versions, which are checked, and what is behind these.
    NotSupported."""
    value = unpack_greeting(payload)
    if type(value) is not tuple or len(value) < 2 + count or value[0] != MAGIC:
        raise errors.ProtocolError("the first frame must be a greeting")
    _check_version(value[1])
    return value[2:2 + count], value[2 + count:]


def decode_join(payload: bytes) -> Join:
    """Of the right types; what they say is for the caller to check."""
    match _after_magic(payload, len(Join._fields))[0]:
        case (bytes(), bytes(), bytes(), bytes(), str(), tuple() as addresses, bool()) as fields:
            if all(type(address) is str for address in addresses):
                return Join(*fields)
    raise errors.ProtocolError("not a request to join")


def read_admitted(value: Any) -> Admitted:
    """Out of an answer. Certificates are checked by who uses them."""
    match value:
        case (int() as node, str(), bytes(), tuple() as bundle, tuple() as members):
            if all(type(each) is bytes for each in bundle) and all(map(_is_contact, members)):
                _check_numbers((node,))
                return Admitted(*value)
    raise errors.ProtocolError("not an admission")


def _is_contact(value: Any) -> bool:
    match value:
        case (int() as node, tuple() as addresses, bytes()):
            return node > 0 and all(type(address) is str for address in addresses)
    return False


def decode_admitted(payload: memoryview) -> Admitted:
    value = unpack(payload)
    if type(value) is not tuple or not value:
        raise errors.ProtocolError("not an admission")
    _check_version(value[:1])
    return read_admitted(value[1:1 + len(Admitted._fields)])


def decode_authorities(payload: memoryview) -> tuple[bytes, tuple[bytes, ...]]:
    """Cluster id and CAs (DER), as anybody may claim them."""
    match unpack_greeting(payload):
        case (int() as version, bytes() as cluster_id, tuple() as bundle, *_):
            _check_version((version,))
            if all(type(each) is bytes for each in bundle):
                return cluster_id, bundle
    raise errors.ProtocolError("not an answer about CAs")


def decode_messages(payload: memoryview) -> tuple[Any, ...]:
    """Messages as they were packed; what is in them is for the core's codec to judge."""
    value = unpack(payload)
    if type(value) is not tuple:
        raise errors.ProtocolError("messages must be an array")
    return value


def decode_request(payload: memoryview) -> Request:
    value = unpack(payload)
    if type(value) is not tuple or len(value) != 3:
        raise errors.ProtocolError("a request is number, kind and body")
    number, kind, body = value
    _check_numbers((number,))
    if type(kind) is not str or not 0 < len(kind) <= _KIND_BYTES_MAX:
        raise errors.ProtocolError("a request has a kind")
    return Request(number, kind, body)


def decode_answer(payload: memoryview) -> tuple[int, Any]:
    value = unpack(payload)
    if type(value) is not tuple or len(value) != 2:
        raise errors.ProtocolError("an answer is number and body")
    _check_numbers(value[:1])
    return value


def decode_failure(payload: memoryview) -> tuple[int, errors.AspenError]:
    number, body = decode_answer(payload)
    return number, _error(body)


def decode_refusal(payload: memoryview) -> errors.AspenError:
    return _error(unpack_greeting(payload))


def _error(body: Any) -> errors.AspenError:
    if type(body) is not dict:
        raise errors.ProtocolError("an error must be a map")
    return decode_error(body)


def decode_numbers(payload: memoryview, count: int) -> tuple[int, ...]:
    """Of CANCEL, PING and PONG."""
    value = unpack_greeting(payload)
    if type(value) is not tuple or len(value) < count:
        raise errors.ProtocolError(f"{count} numbers were expected")
    _check_numbers(value[:count])
    return value[:count]


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if type(value) is not int or not 0 <= value <= _NUMBER_MAX:
            raise errors.ProtocolError(f"{value!r} is not a number from 0 to 2^64 - 1")


def _check_former(value: Any) -> tuple[int, ...]:
    if type(value) is not tuple or len(value) > PEER_FORMER_LIVES_MAX:
        raise errors.ProtocolError(f"former lives must be a list of at most {PEER_FORMER_LIVES_MAX}")
    _check_numbers(value)
    return value


def _check_incarnation(value: Any) -> None:
    if type(value) is not int or not 0 < value <= INCARNATION_MAX:
        raise errors.ProtocolError(f"{value!r} is not an incarnation")
