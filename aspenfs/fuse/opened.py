"""What the kernel is told of a file that was opened: pyfuse3's FileInfo, and one bit that it lacks.

A handle that cannot write has nothing to tell at close(2). FOPEN_NOFLUSH (linux/fuse.h; Linux 5.16) says so,
and spares a cluster's mount a round trip at each close, half of what open–read–close costs. libfuse has a bit
for it in struct fuse_file_info, `noflush` (3.11); pyfuse3's FileInfo does not.

pyfuse3 has FileInfo fill that struct in by a function of a table, which Cython keeps behind the header of
each object, and names in the class. A FileInfo with a table of ours is filled in by us. All that this takes
is tried first: that the table is where it should be, and that pyfuse3's own function fills the struct in as
we would. If anything is not as expected, the kernel asks at each close, and the log says why.
"""

import ctypes
import functools
import logging
import struct
from collections.abc import Callable
from typing import Any, Final

import pyfuse3

logger = logging.getLogger(__name__)

_COMPILED: Final[Any] = pyfuse3.FileInfo  # `__pyx_vtable__` is Cython's
# fuse_common.h, struct fuse_file_info: flags, bits, padding, handle.
_BITS: Final = struct.Struct("=I8xQ")
_BITS_AT: Final = 4
_BYTES: Final = _BITS_AT + _BITS.size
_DIRECT_IO, _KEEP_CACHE, _NONSEEKABLE, _NOFLUSH = 1 << 1, 1 << 2, 1 << 4, 1 << 7
_LIBFUSE: Final = range(311, 400)  # fuse_version(): 3.11 brought the bit

_Fill = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.c_void_p)
_Struct = ctypes.c_char * _BYTES
_TABLE_AT: Final = object.__basicsize__


class _Unexpected(Exception):
    pass


def read_only(fh: int, *, direct_io: bool, keep_cache: bool) -> pyfuse3.FileInfo:
    """Of a handle that is not for writing."""
    info = pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fh), direct_io=direct_io, keep_cache=keep_cache)
    table = _table()
    if table:
        ctypes.c_void_p.from_address(id(info) + _TABLE_AT).value = table
    return info


@functools.cache
def _table() -> int:
    """The address of a table of functions, 0 if there can be none."""
    try:
        _look()
    except (_Unexpected, AttributeError, OSError, ValueError) as cause:
        logger.info("the kernel asks at each close also of readers: cause=%s", cause)
        return 0
    return ctypes.addressof(_OURS)


def _look() -> None:
    """Tries what `_fill` relies on. _Unexpected."""
    version = ctypes.CDLL("libfuse3.so.3").fuse_version()
    if version not in _LIBFUSE:
        raise _Unexpected(f"libfuse {version}")
    capsule = ctypes.pythonapi.PyCapsule_GetPointer
    capsule.restype, capsule.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    theirs = capsule(_COMPILED.__pyx_vtable__, None)
    info = pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(0x0102030405060708), direct_io=True, nonseekable=True)
    if not theirs or ctypes.c_void_p.from_address(id(info) + _TABLE_AT).value != theirs:
        raise _Unexpected("FileInfo does not have its functions where they should be")
    filled = _Struct()
    function = ctypes.c_void_p.from_address(theirs).value
    if not function:
        raise _Unexpected("FileInfo has no function")
    _Fill(function)(info, ctypes.addressof(filled))
    expected = _Struct()
    _BITS.pack_into(expected, _BITS_AT, _DIRECT_IO | _KEEP_CACHE | _NONSEEKABLE, info.fh)
    if filled.raw != expected.raw:
        raise _Unexpected(f"FileInfo fills in {filled.raw.hex()}")


def _fill(info: Any, address: int) -> None:
    bits = _NOFLUSH | (info.direct_io and _DIRECT_IO) | (info.keep_cache and _KEEP_CACHE)
    _BITS.pack_into(_Struct.from_address(address), _BITS_AT, bits, info.fh)


_callback: Final[Callable[..., Any]] = _Fill(_fill)
_OURS: Final = (ctypes.c_void_p * 1)(ctypes.cast(_callback, ctypes.c_void_p))  # type: ignore[arg-type]
