"""How files/ lies in the store: keys and values, byte by byte (docs/design/key-layout.md).

    f/i <id>            inode     struct INODE, then a symbolic link's target
    f/d <parent> name   dirent    child id u64, type u8 (mode >> 12)
    f/x <id> name       xattr     value
    f/e <id> <offset>   extent    kind u8; inline: the bytes; blob: length u32, offset in it u32, digest
    f/o <id>            orphan    inode without a name that may still be open: nothing, or 1 when it goes
    f/h <id> <host>     hold      the host uses this orphan; hangs on the lease of its session
    f/s <host>          session   the host has files/ mounted; the revision up to which it holds what it
                                  holds of orphans by rows, i64
    f/b digest          blob      number of extents that name it, i64
    f/n                 counter   the last inode id handed out to a host, i64
    f/u                 usage     number of inodes, i64

<x> is u64 big-endian, so that byte order is numeric order; numbers inside values are little-endian.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from aspenfs.kv.commands import TXN, Command
from aspenfs.kv.types import PUT, Operation

ROOT: Final = 1
FIRST_ID: Final = 16  # ids below are reserved

INODE_PREFIX: Final = b"f/i"
DIRENT_PREFIX: Final = b"f/d"
XATTR_PREFIX: Final = b"f/x"
EXTENT_PREFIX: Final = b"f/e"
ORPHAN_PREFIX: Final = b"f/o"
HOLD_PREFIX: Final = b"f/h"
SESSION_PREFIX: Final = b"f/s"
BLOB_PREFIX: Final = b"f/b"
COUNTER_KEY: Final = b"f/n"
USAGE_KEY: Final = b"f/u"

FORMAT: Final = 1
INODE: Final = struct.Struct("<7q4IQBB6x")
DIRENT: Final = struct.Struct("<QB")
BLOB_EXTENT: Final = struct.Struct("<BII32s")
EXTENT_INLINE: Final = 0
EXTENT_BLOB: Final = 1

# Offsets of the fields that merges edit.
NLINK, SIZE, ALLOCATED, ENTRIES, ATIME, MTIME, CTIME = range(0, 56, 8)
MODE, UID, GID, RDEV = range(56, 72, 4)
PARENT = 72
FORMAT_AT, FLAGS = 80, 81
TARGET = INODE.size
HAS_XATTRS: Final = 1

ORPHAN_LIVE, ORPHAN_GOING = b"", b"\1"  # may be held yet, or not any more

U32 = struct.Struct("<I").pack
I64 = struct.Struct("<q").pack
TIMES2 = struct.Struct("<qq").pack  # mtime and ctime lie side by side


class Inode(NamedTuple):
    """The fields of an inode. `allocated` and `size` in bytes, times in ns; `entries` of a directory."""

    nlink: int
    size: int
    allocated: int
    entries: int
    atime: int
    mtime: int
    ctime: int
    mode: int
    uid: int
    gid: int
    rdev: int
    parent: int  # of a directory, else 0
    format: int
    flags: int


class Extent(NamedTuple):
    """`length` bytes of a file from `offset`: `data`, or `length` bytes from `start` of a blob."""

    offset: int
    length: int
    data: bytes | None
    start: int
    digest: bytes


def number(identifier: int) -> bytes:
    return identifier.to_bytes(8, "big")


def inode_key(node: int) -> bytes:
    return INODE_PREFIX + node.to_bytes(8, "big")


def dirent_key(parent: int, name: bytes) -> bytes:
    return DIRENT_PREFIX + parent.to_bytes(8, "big") + name


def xattr_key(node: int, name: bytes) -> bytes:
    return XATTR_PREFIX + node.to_bytes(8, "big") + name


def extent_key(node: int, offset: int) -> bytes:
    return EXTENT_PREFIX + node.to_bytes(8, "big") + offset.to_bytes(8, "big")


def orphan_key(node: int) -> bytes:
    return ORPHAN_PREFIX + node.to_bytes(8, "big")


def hold_prefix(node: int) -> bytes:
    return HOLD_PREFIX + node.to_bytes(8, "big")


def hold_key(node: int, host: int) -> bytes:
    return HOLD_PREFIX + node.to_bytes(8, "big") + host.to_bytes(8, "big")


def session_key(host: int) -> bytes:
    return SESSION_PREFIX + host.to_bytes(8, "big")


def unpack_inode(value: bytes) -> Inode:
    return Inode._make(INODE.unpack_from(value))


def unpack_extent(key: bytes, value: bytes) -> Extent:
    offset = int.from_bytes(key[11:19], "big")
    if value[0] == EXTENT_INLINE:
        return Extent(offset, len(value) - 1, value[1:], 0, b"")
    _, length, start, digest = BLOB_EXTENT.unpack(value)
    return Extent(offset, length, None, start, digest)


def pack_extent(extent: Extent) -> bytes:
    if extent.data is not None:
        return b"\0" + extent.data
    return BLOB_EXTENT.pack(EXTENT_BLOB, extent.length, extent.start, extent.digest)


def part(extent: Extent, start: int, stop: int) -> Extent:
    """The piece [start, stop) (file offsets) of an extent."""
    skip = start - extent.offset
    if extent.data is not None:
        data = extent.data[skip : skip + stop - start]
        return Extent(start, len(data), data, 0, b"")
    return Extent(start, stop - start, None, extent.start + skip, extent.digest)


def named_digests(command: Command) -> Iterator[bytes]:
    """The blobs that a logged transaction names: they must be there when it is replayed."""
    if command.kind == TXN:
        for operations in command.body[1:3]:
            yield from named_by(operations)


def named_by(operations: Sequence[Operation]) -> Iterator[bytes]:
    """The blobs of the extents that these operations put, once for each."""
    for operation in operations:
        if operation[0] == PUT and operation[1].startswith(EXTENT_PREFIX):
            value = operation[2]
            if value[0] == EXTENT_BLOB:
                yield BLOB_EXTENT.unpack(value)[3]
