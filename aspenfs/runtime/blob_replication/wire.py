"""The requests that nodes make of each other about chunks, and what they may look like.

Bodies and answers are msgpack values. What a peer sends is not trusted to have any form: it is checked
here, once, on both sides. Whether bytes fit their digest is checked by who takes them in.
"""

from collections.abc import Awaitable, Callable, Set
from enum import IntEnum
from typing import Any, Final, Protocol

from aspenfs.blobs.format import DIGEST_BYTES
from aspenfs.cluster.types import NodeId
from aspenfs.errors import ProtocolError
from aspenfs.limits import BLOB_ASK_MAX, CHUNK_BYTES_MAX, KIB, PEER_REQUEST_BYTES_MAX

PUT: Final = "blob.put"  # [[digest, bytes], ...]; the answer: a Verdict for each
HAVE: Final = "blob.have"  # [digest, ...]; the answer: bytes, one for each: 1 on disk and spared, 0 not here
GET: Final = "blob.get"  # [digest, ...]; the answer: the bytes, or nil, of at least the first, in order
LACKS: Final = "blob.lacks"  # nil; the answer: [chunks known to be missing there, are these all?]

BATCH_BYTES_MAX: Final = PEER_REQUEST_BYTES_MAX - 64 * KIB  # chunks and what comes with them, in one message
CHUNK_OVERHEAD: Final = DIGEST_BYTES + 16  # what comes with a chunk, at most
BATCH_CHUNKS_MAX: Final = BLOB_ASK_MAX


class Verdict(IntEnum):
    """What became of a chunk that was pushed."""

    STORED = 0  # it is on disk, and spared by collection for BLOB_PIN_S
    FULL = 1  # there is no room for it
    DAMAGED = 2  # these are not the bytes of that digest
    BUSY = 3  # more is spared already than may be: later


class Peers(Protocol):
    """The other nodes (docs/design/cluster.md, "Peers")."""

    async def request(self, to: NodeId, kind: str, body: Any, *, timeout_s: float) -> Any:
        """The answer of that node. PeerUnreachable, PeerRefused, ProtocolError."""

    def connected(self) -> Set[int]: ...

    def handle(self, kind: str, handler: Callable[[int, Any], Awaitable[Any]]) -> None: ...


def digests_of(body: Any) -> list[bytes]:
    """The body of HAVE and GET."""
    if type(body) not in (list, tuple) or len(body) > BLOB_ASK_MAX:
        raise ProtocolError("blobs: not a list of digests, or too long a one")
    for digest in body:
        _check_digest(digest)
    return list(body)


def chunks_of(body: Any) -> list[tuple[bytes, bytes]]:
    """The body of PUT."""
    if type(body) not in (list, tuple) or len(body) > BATCH_CHUNKS_MAX:
        raise ProtocolError("blobs: not a list of chunks, or too long a one")
    chunks = []
    for item in body:
        if type(item) not in (list, tuple) or len(item) != 2:
            raise ProtocolError("blobs: a chunk is a digest and bytes")
        digest, data = item
        _check_digest(digest)
        _check_data(data)
        chunks.append((digest, data))
    return chunks


def verdicts_of(answer: Any, count: int) -> list[Verdict]:
    if type(answer) not in (list, tuple) or len(answer) != count:
        raise ProtocolError("blobs: not a verdict for each chunk")
    try:
        return [Verdict(verdict) for verdict in answer]
    except ValueError as error:
        raise ProtocolError(f"blobs: {error}") from error


def flags_of(answer: Any, count: int) -> bytes:
    if type(answer) is not bytes or len(answer) != count:
        raise ProtocolError("blobs: not a flag for each chunk")
    return answer


def found_of(answer: Any, count: int) -> list[bytes | None]:
    """What GET for `count` digests was answered: between one and all of them."""
    if type(answer) not in (list, tuple) or not 1 <= len(answer) <= count:
        raise ProtocolError("blobs: not the bytes of the first chunks")
    for data in answer:
        if data is not None:
            _check_data(data)
    return list(answer)


def lack_of(answer: Any) -> tuple[int, bool]:
    if type(answer) in (list, tuple) and len(answer) >= 2:
        missing, all_known = answer[:2]
        if type(missing) is int and missing >= 0 and type(all_known) is bool:
            return missing, all_known
    raise ProtocolError("blobs: not what a node lacks")


def _check_digest(digest: Any) -> None:
    if type(digest) is not bytes or len(digest) != DIGEST_BYTES:
        raise ProtocolError("blobs: a digest has 32 bytes")


def _check_data(data: Any) -> None:
    if type(data) is not bytes or not 1 <= len(data) <= CHUNK_BYTES_MAX:
        raise ProtocolError("blobs: a chunk has 1 byte to 1 MiB")
