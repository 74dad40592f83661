"""How the kernel lays a listing out in its page cache, and where it errs (fs/fuse/readdir.c).

A reader whose position is not among those of a kept listing is to be served by the daemon. But where a
listing fills its last page to the last byte, the kernel (5.1 to 6.18 at least) takes the end of the pages
for the end of the directory, and such a reader misses the rest. So a listing like that must not be kept.
"""

from collections.abc import Iterable
from typing import Final

DIRENT_BYTES: Final = 24  # struct fuse_dirent before the name, which is padded to a multiple of 8
DOTS_BYTES: Final = 2 * 32
PAGE_BYTES: Final = 4096


def used_after(used: int, names: Iterable[bytes], page_bytes: int) -> int:
    """How much of its page a listing uses with `names` behind what used `used` before; never 0, and all of
    `page_bytes` where the page is full. At the start that is DOTS_BYTES. No entry lies in two pages."""
    for name in names:
        size = DIRENT_BYTES + len(name) + 7 & -8
        used = used + size if used + size <= page_bytes else size
    return used
