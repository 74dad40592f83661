"""The request under way as the kernel sent it: for the one fact that pyfuse3 keeps to itself.

If OPENDIR is answered with ENOSYS, the kernel (5.1 and later) never sends it again: directories open and
close without us, and their listings stay in its page cache until they change. But READDIRPLUS comes with
handle 0 then, and pyfuse3 gives its handler no more than that. The inode stands in the request, which lies
where it was read: in the buffer of the worker that serves it, one of pyfuse3's `_session_loop`s (`turns.py`).

Where a worker keeps the address of its buffer is pyfuse3's and its compiler's business. So it is looked
for, once, while a request is served of which everything is known; that look goes through
/proc/self/mem, where a wrong address is an error and not the end. What is not found is not used.
"""

import ctypes
import gc
import logging
import os
import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from aspenfs.vfs.tree import Caller

logger = logging.getLogger(__name__)

# linux/fuse.h: struct fuse_in_header, then (READDIR, READDIRPLUS) the start of struct fuse_read_in.
HEADER: Final = struct.Struct("=IIQQIII4x")
READ_IN: Final = struct.Struct("=QQI")
# struct fuse_in_header (length, opcode, unique, inode, user, group, process) and struct fuse_write_in
# (handle, offset, size, flags, lock owner, flags of the open file).
WRITE_REQUEST: Final = struct.Struct("=IIQQIII4xQQIIQI4x")
OPEN, WRITE, OPENDIR, CREATE, READDIRPLUS = 14, 16, 27, 35, 44
# Flags of a WRITE: a page of a mapping, or of the writeback cache; past the pages, without CAP_FSETID.
WRITE_CACHE, WRITE_KILL_SUIDGID = 1, 4
KERNEL_MIN: Final = (5, 1)  # the first that takes ENOSYS from OPENDIR for "never again"

_POINTER_BYTES: Final = ctypes.sizeof(ctypes.c_void_p)


class Header(NamedTuple):
    """struct fuse_in_header."""

    length: int
    opcode: int
    unique: int
    inode: int
    uid: int
    gid: int
    pid: int


class Requests:
    """`serving` gives the coroutine of pyfuse3's worker that serves a request now, if that is known.

    To be asked in a handler before it awaits anything: after that another worker may be serving.
    """

    def __init__(self, serving: Callable[[], object | None]) -> None:
        self._serving = serving
        self._offset: int | None = None  # of the buffer's address in the worker's variables
        self._looked = False

    def readable(self, opcode: int, inode: int, caller: Caller) -> bool:
        """Whether requests can be read; to be called while that one is served. Looks at the first call."""
        if not self._looked:
            self._looked = True
            cause = self._look(opcode, inode, caller)
            if cause is not None:
                logger.info("the kernel does not keep listings: cause=%s", cause)
        return self._offset is not None

    def directory(self, position: int) -> tuple[int, int]:
        """The inode of the READDIRPLUS under way, which begins at `position`, and how many bytes it takes."""
        scope = _variables(self._serving())
        assert self._offset is not None, "no request can be read"
        assert scope is not None, "pyfuse3's worker is not where it was"
        address = ctypes.c_void_p.from_address(id(scope) + self._offset).value
        assert address is not None
        request = ctypes.string_at(address, HEADER.size + READ_IN.size)
        header = Header._make(HEADER.unpack_from(request))
        handle, offset, size = READ_IN.unpack_from(request, HEADER.size)
        assert (header.opcode, handle, offset) == (READDIRPLUS, 0, position), header
        return header.inode, size

    def writing(self, handle: int, offset: int) -> tuple[int, int, int] | None:
        """Of the WRITE under way, which begins at `offset`: its flags, its user, and the flags of the open
        file as of now, with O_DSYNC if that write is to be synced. None if they can not be told."""
        scope = _variables(self._serving()) if self._offset is not None else None
        if self._offset is None or scope is None:
            return None
        address = ctypes.c_void_p.from_address(id(scope) + self._offset).value
        if address is None:
            return None
        request = ctypes.string_at(address, WRITE_REQUEST.size)
        _, opcode, _, _, user, _, _, fh, at, _, flags, _, open_flags = WRITE_REQUEST.unpack(request)
        return (flags, user, open_flags) if (opcode, fh, at) == (WRITE, handle, offset) else None

    def _look(self, opcode: int, inode: int, caller: Caller) -> str | None:
        """Finds `_offset`, or says why not."""
        if not _kernel() >= KERNEL_MIN:
            return f"kernel {os.uname().release} asks for every directory"
        scope = _variables(self._serving())
        if scope is None:
            return "pyfuse3's worker has no variables to be found"
        wanted = (opcode, inode, caller.uid, caller.gid, caller.pid)
        with open("/proc/self/mem", "rb", buffering=0) as memory:

            def read(address: int, size: int) -> bytes:
                try:
                    return os.pread(memory.fileno(), size, address)
                except (OSError, OverflowError):
                    return b""

            variables = read(id(scope), type(scope).__basicsize__)
            for offset in range(object.__basicsize__, len(variables) - _POINTER_BYTES + 1, _POINTER_BYTES):
                (address,) = struct.unpack_from("P", variables, offset)
                found = read(address, HEADER.size)
                if len(found) == HEADER.size:
                    header = Header._make(HEADER.unpack(found))
                    if (header.opcode, *header[3:]) == wanted and header.length >= HEADER.size:
                        self._offset = offset
                        return None
        return "pyfuse3's worker does not hold the request where it could be found"


def _variables(coroutine: object | None) -> Any:
    """What Cython keeps a coroutine's variables in."""
    for referent in gc.get_referents(coroutine) if coroutine is not None else ():
        if "_session_loop" in type(referent).__name__:
            return referent
    return None


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    digits = "".join(character for character in minor if character.isdigit())
    return int(major), int(digits or 0)
