"""Letting the kernel doubt every name that it holds, at once: FUSE_NOTIFY_INC_EPOCH, Linux 6.16 and later.

libfuse does not know this notification yet; it is a header of sixteen bytes, written to /dev/fuse.
Names that were given out before it are looked up again before they are used (linux/fuse.h).
"""

import errno
import logging
import os
import struct
from typing import Final

from aspenfs.fuse import mounts

logger = logging.getLogger(__name__)

INC_EPOCH: Final = 8  # enum fuse_notify_code
HEADER: Final = struct.Struct("=IiQ")  # struct fuse_out_header: length, the code in place of an error, 0


def doubt_names() -> bool:
    """Whether the kernel does so from now on; False if it can not. For the one mount of this process."""
    message = HEADER.pack(HEADER.size, INC_EPOCH, 0)
    for descriptor in mounts.dev_fuse_fds():
        try:
            os.write(descriptor, message)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENODEV, errno.ENOENT, errno.ENOTCONN):
                logger.warning("names stay until their timeout: error=%s", error)
            return False
        return True
    return False
