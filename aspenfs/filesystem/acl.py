"""POSIX access control lists (acl(5), POSIX.1e draft 17) as they travel in extended attributes.

The kernel decides access with them; here is what it leaves to the file system: the mode bits that follow
from an ACL, the ACL that follows from a chmod, and what a new inode inherits from a directory's default.
Format: u32 version 2, then entries of tag u16, permissions u16, id u32 (linux/posix_acl_xattr.h).
"""

import struct
from typing import Final, NamedTuple

from aspenfs.errors import InvalidArgument

ACCESS: Final = b"system.posix_acl_access"
DEFAULT: Final = b"system.posix_acl_default"
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32

_VERSION: Final = struct.pack("<I", 2)
_ENTRY: Final = struct.Struct("<HHI")


class AclEntry(NamedTuple):
    tag: int
    permissions: int  # rwx as in one digit of a mode
    id: int


Acl = list[AclEntry]


def parse(value: bytes) -> Acl:
    """The entries of an attribute's value. InvalidArgument unless it is a valid ACL."""
    if not value.startswith(_VERSION) or (len(value) - 4) % _ENTRY.size:
        raise InvalidArgument("not an access control list of version 2")
    acl = [AclEntry(*fields) for fields in _ENTRY.iter_unpack(value[4:])]
    tags = [entry.tag for entry in acl]
    named = USER in tags or GROUP in tags
    valid = (
        all(tags.count(tag) == 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER))
        and tags.count(MASK) in ((1,) if named else (0, 1))
        and set(tags) <= {USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER}
        and all(entry.permissions <= 7 for entry in acl)
    )
    if not valid:
        raise InvalidArgument(
            "an access control list needs one owner, group, other, and a mask if it names others"
        )
    return acl


def pack(acl: Acl) -> bytes:
    return _VERSION + b"".join(_ENTRY.pack(*entry) for entry in acl)


def _group_class(acl: Acl) -> int:
    """The tag of the entry that the group bits of the mode stand for."""
    return MASK if any(entry.tag == MASK for entry in acl) else GROUP_OBJ


def is_minimal(acl: Acl) -> bool:
    """Whether the mode says all that it says."""
    return len(acl) == 3


def mode_bits(acl: Acl) -> int:
    """The nine permission bits that correspond to it."""
    permissions = {entry.tag: entry.permissions for entry in acl}
    return permissions[USER_OBJ] << 6 | permissions[_group_class(acl)] << 3 | permissions[OTHER]


def with_mode(acl: Acl, mode: int) -> Acl:
    """The ACL after chmod(2) to `mode`."""
    bits = {USER_OBJ: mode >> 6 & 7, _group_class(acl): mode >> 3 & 7, OTHER: mode & 7}
    return [entry._replace(permissions=bits.get(entry.tag, entry.permissions)) for entry in acl]


def inherited(default: Acl, mode: int) -> tuple[Acl, int]:
    """The access ACL and the mode of a new inode made with `mode` where `default` holds."""
    bits = {USER_OBJ: mode >> 6 & 7, _group_class(default): mode >> 3 & 7, OTHER: mode & 7}
    acl = [entry._replace(permissions=entry.permissions & bits.get(entry.tag, 7)) for entry in default]
    return acl, mode & ~0o777 | mode_bits(acl)
