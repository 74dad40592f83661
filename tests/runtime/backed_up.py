"""What the tests of backups share: a node with some of everything, and a backup of it as bytes."""

import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import trio

from aspenfs.kv.types import put
from aspenfs.runtime import members
from aspenfs.runtime.backup.writing import OnlineBackup
from aspenfs.runtime.control_command import Call
from aspenfs.runtime.members import Member
from aspenfs.runtime.peers import authority, tickets
from tests.filesystem.volumes import CALLER
from tests.kv.subject import FakeClock
from tests.runtime.test_blob_garbage import Node

FILES = {b"small": b"inline", b"one": random.Random(1).randbytes(300_000),
         b"two": random.Random(2).randbytes(100_000), b"twice": random.Random(1).randbytes(300_000),
         b"empty": b""}  # fmt: skip
LEASE_MS = 60_000
OTHER_NODE = 4711


async def write_file(node: Node, name: bytes, data: bytes) -> None:
    _, handle = await node.tree.create(1, name, 0o644, 2, CALLER)
    for at in range(0, len(data), 100_000):
        await handle.write(at, data[at : at + 100_000])
    await handle.release()


async def read_file(node: Node, name: bytes) -> bytes:
    attr = await node.tree.lookup(1, name)
    handle = await node.tree.open(attr.node, 0, CALLER)
    parts = [await handle.read(at, 100_000) for at in range(0, attr.size, 100_000)]
    await handle.release()
    return b"".join(parts)


async def fill(node: Node) -> None:
    """Files, keys with history and a lease, and what a cluster keeps of its members."""
    store = node.store
    await node.volume.format()
    for name, data in FILES.items():
        await write_file(node, name, data)
    await node.make_and_remove(b"gone", bytes(50_000))
    for number in range(5):
        await store.txn([], [put(b"k/app", b"%d" % number)])
    await store.txn([], [put(b"k/long" + b"x" * 900, b"long")])
    await store.lease_grant(LEASE_MS, 7)
    await store.txn([], [put(b"k/leased", b"1", lease=7)])
    await store.lease_grant(LEASE_MS, 8)
    await store.txn([], [put(b"f/s" + OTHER_NODE.to_bytes(8, "big"), bytes(8), lease=8)])
    for number, state in ((1, "member"), (OTHER_NODE, "member"), (4712, "removed")):
        member = Member(number, f"node{number}", ("192.0.2.1:7420",), state, b"born", True)  # type: ignore[arg-type]
        await store.txn([], [put(members.key_of(number), members.pack(member))])
    await store.txn([], [put(authority.ROW_KEY, b"the old CA"), put(tickets.PREFIX + b"x" * 32, b"a ticket")])


async def applied(node: Node) -> None:
    await node.store.committed()
    node.store.apply()


def backup_of(node: Node, directory: Path) -> OnlineBackup:
    return OnlineBackup(node.store, node.volume, node.blobs, FakeClock(), directory, "test")


async def taken(backup: OnlineBackup, meanwhile: Callable[[dict[str, Any]], Awaitable[None]] | None = None,
                **params: Any) -> tuple[bytes, dict[str, Any]]:  # fmt: skip
    """A backup's bytes and its result; `meanwhile` gets each item before it is taken."""
    parts: list[bytes] = []

    async def item(value: Any) -> None:
        await trio.lowlevel.checkpoint()
        if meanwhile is not None:
            await meanwhile(value)
        parts.append(value["data"])

    result = await backup.handle(Call(params, b"", 0, item, lambda: None))
    return b"".join(parts), result


def on_a_node(directory: Path, test: Callable[[Node], Awaitable[None]],
              clock: trio.abc.Clock | None = None) -> None:  # fmt: skip
    """Runs `test` on a filled node in `directory`."""

    async def main() -> None:
        node = Node(directory)
        try:
            await fill(node)
            await test(node)
        finally:
            node.close()

    directory.mkdir(exist_ok=True)
    trio.run(main, clock=clock)


def a_backup(directory: Path) -> bytes:
    """Of a node that is made for it in `directory`."""
    found: list[bytes] = []

    async def take(node: Node) -> None:
        found.append((await taken(backup_of(node, directory)))[0])

    on_a_node(directory, take)
    return found[0]
