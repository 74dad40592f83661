"""The attributes of a record that make it a file: their names, defaults and meaning, in one place.

A writer that knows nothing of files (a client of the store) need not set any: every attribute has a
default. One who wants `ls -l` to tell the truth sends `stamp(now)` along with the value. Not here:
which keys are files and which are directories (`kv_space.py`).

    mode, uid, gid    permission bits and owner
    mtime             ns since the epoch; without it: as many ns as the record's revision, so that
                      a change is still seen as a change
    ctime, atime      only where they differ from mtime
    type              "symlink": the value is the target
    x.NAME            the extended attribute user.NAME, one "=" before its value (empty ones are legal,
                      but an empty attribute is none), NAME read as Latin-1, which has a letter for each byte
"""

import stat
from collections.abc import Sequence
from typing import Final

from aspenfs import errors
from aspenfs.kv.types import (
    Attributes,
    Operation,
    Record,
    append,
    cut,
    merge,
    set_attributes,
)
from aspenfs.limits import ATTRIBUTE_BYTES_MAX
from aspenfs.vfs.tree import Attr, SetAttr

MODE: Final = "mode"
UID: Final = "uid"
GID: Final = "gid"
MTIME: Final = "mtime"
ATIME: Final = "atime"
CTIME: Final = "ctime"
TYPE: Final = "type"
SYMLINK: Final = "symlink"
XATTR: Final = "x."

FILE_MODE: Final = 0o644
DIRECTORY_MODE: Final = 0o755
XATTR_NAME_BYTES_MAX: Final = 240  # with "user." and with "x." within the 255 of both sides
XATTR_BYTES_MAX: Final = 16 * 1024  # names and values of one key: a rename carries them in its transaction
XATTRS_MAX: Final = 32

_USER = b"user."
_OWN = b"user.aspen."  # what the tree tells about a key; read-only
_REVISION, _VERSION, _LEASE = b"user.aspen.revision", b"user.aspen.version", b"user.aspen.lease"


def stamp(time_ns: int) -> dict[str, int | bytes | str]:
    """The attributes to send with a changed value: it changed now, whatever touch(1) said before."""
    return {MTIME: time_ns, CTIME: b"", ATIME: b""}


def overwrite(key: bytes, value: bytes, time_ns: int) -> Operation:
    """Sets the whole value, as `put`, keeping lease, owner, mode and extended attributes."""
    return merge(key, cut(0), append(value), set_attributes(stamp(time_ns)))


def is_symlink(record: Record) -> bool:
    return TYPE in record.attributes and record.attributes[TYPE] == SYMLINK


def number(attributes: Attributes, name: str, default: int) -> int:
    """A number that a record carries; one of another type is as good as none."""
    value = attributes.get(name, default)
    return value if isinstance(value, int) else default


def times(record: Record) -> tuple[int, int, int]:
    """atime, mtime and ctime, ns."""
    attributes = record.attributes
    mtime = number(attributes, MTIME, record.mod_revision)
    return number(attributes, ATIME, mtime), mtime, number(attributes, CTIME, mtime)


def file_attr(node: int, record: Record, uid: int, gid: int, nlink: int = 1) -> Attr:
    """stat(2) of a key; `uid` and `gid` of one that has no owner."""
    attributes = record.attributes
    size = len(record.value)
    if TYPE in attributes and attributes[TYPE] == SYMLINK:
        mode = stat.S_IFLNK | 0o777
    else:
        mode = stat.S_IFREG | (number(attributes, MODE, FILE_MODE) & 0o1777)  # lends nobody's identity
    atime, mtime, ctime = times(record)
    return Attr(
        node, mode, nlink, number(attributes, UID, uid), number(attributes, GID, gid), 0,
        size, (size + 511) >> 9, atime, mtime, ctime,
    )


def changed(wanted: SetAttr, now_ns: int) -> dict[str, int | bytes | str]:
    """The attributes that setattr sets (its size is not one)."""
    changes: dict[str, int | bytes | str] = {CTIME: now_ns}
    if wanted.size is not None:
        changes[MTIME] = now_ns
    asked = {UID: wanted.uid, GID: wanted.gid, ATIME: wanted.atime_ns, MTIME: wanted.mtime_ns}
    changes.update((name, value) for name, value in asked.items() if value is not None)
    if wanted.mode is not None:
        changes[MODE] = wanted.mode & 0o7777
    return changes


# --- extended attributes ---


def xattr_names(record: Record) -> list[bytes]:
    names = [_REVISION, _VERSION]
    if record.lease:
        names.append(_LEASE)
    names += [_USER + name[2:].encode("latin-1") for name in record.attributes if name.startswith(XATTR)]
    return names


def xattr_value(record: Record, name: bytes) -> bytes:
    """NoAttribute."""
    if name.startswith(_OWN):
        if name == _REVISION:
            return b"%d" % record.mod_revision
        if name == _VERSION:
            return b"%d" % record.version
        if name == _LEASE and record.lease:
            return b"%d" % record.lease
        raise errors.NoAttribute(name)
    value = record.attributes.get(_attribute(name)) if name.startswith(_USER) else None
    if not isinstance(value, bytes):
        raise errors.NoAttribute(name)
    return value[1:]


def settable(name: bytes) -> str:
    """The attribute that holds an extended attribute. NotSupported: other namespaces, and ours.

    cp and mv, which offer all that they could list, take that word for "not here" and go on.
    """
    if not name.startswith(_USER) or name.startswith(_OWN):
        raise errors.NotSupported(name)
    if len(name) - len(_USER) > XATTR_NAME_BYTES_MAX:
        raise errors.OutOfRange(name)
    return _attribute(name)


def with_xattr(held: Attributes, attribute: str, value: bytes) -> dict[str, int | bytes | str]:
    """The change that sets it. NoSpace if a key would carry too many or too much."""
    others = [(name, held[name]) for name in held if name.startswith(XATTR) and name != attribute]
    if len(value) >= ATTRIBUTE_BYTES_MAX:
        raise errors.NoSpace(f"an extended attribute of a key has at most {ATTRIBUTE_BYTES_MAX - 1} bytes")
    if len(others) >= XATTRS_MAX or _xattr_bytes(others) + len(attribute) + len(value) > XATTR_BYTES_MAX:
        raise errors.NoSpace(f"extended attributes of a key: at most {XATTRS_MAX}, {XATTR_BYTES_MAX} bytes")
    return {attribute: b"=" + value}


def _xattr_bytes(items: Sequence[tuple[str, int | bytes | str]]) -> int:
    return sum(len(name) + len(value) for name, value in items if isinstance(value, bytes))


def _attribute(name: bytes) -> str:
    return XATTR + name[len(_USER):].decode("latin-1")
