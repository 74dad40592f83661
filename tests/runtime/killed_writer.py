"""A process that writes the load of `host_driver` into a store until it is killed: `python -m … DIRECTORY`.

On standard output, a line each: `open <revision> <state hash>` first, then `accepted <revision>` and
`committed <revision>` as they come.
"""

import os
import sys
from pathlib import Path

import trio

from tests.runtime.host_driver import hash_of, load, open_store, running


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


async def main(directory: Path) -> None:
    store = open_store(directory)
    say("open", store.revision, hash_of(store).hex())
    async with running(store), trio.open_nursery() as nursery:

        async def commit() -> None:
            while True:
                say("committed", await store.committed())
                await trio.sleep(0.02)

        nursery.start_soon(commit)
        while True:
            result = await store.txn([], load(store.revision + 1))
            say("accepted", result.revision)
            if result.revision % 16 == 0:
                await trio.lowlevel.checkpoint()


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
