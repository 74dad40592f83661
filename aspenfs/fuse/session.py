"""One FUSE session: mounting, serving, and ending without leaving a dead mountpoint behind."""

import logging
import os
from collections.abc import Callable
from typing import Final

import pyfuse3
import trio

from aspenfs import errors
from aspenfs.fuse import loop, mounts
from aspenfs.fuse.notifier import Notifier
from aspenfs.fuse.operations import Operations

log = logging.getLogger(__name__)

READ_AHEAD_KIB: Final = 1024  # one READ per MiB instead of eight (reference measurement: +30 %)


class MountFailed(errors.AspenError):
    """libfuse refused; its own message is on stderr."""

    errno = 5


async def serve(
    operations: Operations,
    mountpoint: str,
    options: set[str],
    *,
    spin_us: int,
    hush: Callable[[], bool],
    notifier: Notifier,
    ready: Callable[[], None],
    stop: trio.Event,
) -> None:
    """Mounts at `mountpoint`, serves until unmounted or `stop`; not mounted any more when it returns.

    `options` are libfuse's. `ready` is called once the kernel's first question has been answered.
    """
    hooked = loop.install(spin_us=spin_us, hush=hush)
    try:
        pyfuse3.init(operations, mountpoint, options)
    except RuntimeError as error:
        raise MountFailed(f"cannot mount at {mountpoint}: {error}") from error
    try:
        notifier.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_announce, mountpoint, ready)
            nursery.start_soon(_terminate_on, stop)
            log.info("serving mountpoint=%s hook=%s workers=%d", mountpoint, hooked, loop.WORKERS)
            await pyfuse3.main(min_tasks=loop.WORKERS, max_tasks=loop.WORKERS)
            nursery.cancel_scope.cancel()
    finally:
        aborted = not notifier.stop()
        if aborted:
            _abort(notifier)
        # Also when unmounted from outside: then it only cleans up.
        pyfuse3.close(unmount=True)
        if aborted:
            mounts.recover_stale(mountpoint)  # libfuse leaves an aborted mount where it is


def _abort(notifier: Notifier) -> None:
    """The notifier waits in the kernel for an answer that nobody gives any more: end the connection."""
    for descriptor in mounts.dev_fuse_fds():
        mounts.abort(mounts.connection_number(descriptor))
    if not notifier.stop(10.0):
        log.error("the kernel does not let go of the notifier")


async def _terminate_on(stop: trio.Event) -> None:
    await stop.wait()
    pyfuse3.terminate()


async def _announce(mountpoint: str, ready: Callable[[], None]) -> None:
    """Asks the mount a question through the kernel, in a thread; then tells that it answers."""
    await trio.to_thread.run_sync(os.statvfs, mountpoint, abandon_on_cancel=True)
    if os.geteuid() == 0:
        try:
            await trio.to_thread.run_sync(
                mounts.set_read_ahead, mountpoint, READ_AHEAD_KIB, abandon_on_cancel=True
            )
        except OSError as error:
            log.info("read-ahead stays as it is: %s", error)
    ready()
