"""The real operations over a file system in memory: a daemon to test what is between them and the kernel.

    memoryfs.py MOUNTPOINT [--asked] [--stock]

Says `ready PID` once it is mounted; `requests` on standard input tells how often directories were opened and
read. `--asked`: the kernel is to open directories; `--stock`: pyfuse3 without the event-loop hook.
"""

import argparse
import json
import os
import sys
from typing import Any

import pyfuse3
import trio

from aspenfs.fuse import loop
from aspenfs.fuse.operations import Operations, Presentation
from aspenfs.vfs.filesystem import FileSystem
from tests.filesystem.volumes import Setup


class Counted(Operations):
    """Counts what is asked of it."""

    opendirs = readdirs = 0

    async def opendir(self, inode: int, ctx: Any) -> int:
        self.opendirs += 1
        return await super().opendir(inode, ctx)

    async def readdir(self, fh: int, start_id: int, token: Any) -> None:
        self.readdirs += 1
        await super().readdir(fh, start_id, token)


async def _obey(operations: Counted) -> None:
    async for line in trio.lowlevel.FdStream(os.dup(0)):
        for command in line.decode().splitlines():
            assert command == "requests"
            print(json.dumps({"opened": operations.opendirs, "read": operations.readdirs}), flush=True)


async def _main(options: argparse.Namespace) -> None:
    setup = Setup()
    await setup.volume.format(0o40777)
    operations = Counted(
        FileSystem([setup.tree], setup.clock.time_ns(), breathe=trio.lowlevel.checkpoint),
        Presentation(),
        directories_without_open=not options.asked,
    )
    pyfuse3.init(operations, options.mountpoint, set(pyfuse3.default_options) | {"fsname=memoryfs"})
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_obey, operations)
            print(f"ready {os.getpid()}", flush=True)
            await pyfuse3.main(min_tasks=16, max_tasks=16)
            nursery.cancel_scope.cancel()
    finally:
        pyfuse3.close(unmount=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint")
    parser.add_argument("--asked", action="store_true")
    parser.add_argument("--stock", action="store_true")
    options = parser.parse_args()
    if not options.stock and not loop.install(spin_us=0):
        sys.exit("the hook is not active")
    trio.run(_main, options)


if __name__ == "__main__":
    main()
