"""Chunks over the links that nodes really have: TLS on loopback, disks, syncs in threads."""

from pathlib import Path

import trio

from aspenfs.blobs.format import digest_of
from aspenfs.blobs.store import BlobStore
from aspenfs.cluster.types import Configuration, NodeId
from aspenfs.filesystem.volume import Volume
from aspenfs.kv.local import LocalStore
from aspenfs.limits import KIB, MIB
from aspenfs.runtime.blob_replication.durable import GroupSync
from aspenfs.runtime.blob_replication.replicator import BlobReplicator
from aspenfs.runtime.disk import RealDisk
from tests.runtime.blob_cluster import chunk, on_disk
from tests.runtime.peers.nodes import CLOCK, ENTROPY, Node, in_trio, make_nodes, running, until


class Host:
    def __init__(self, directory: Path, node: Node) -> None:
        self.blobs = BlobStore.open(RealDisk(directory))
        store = LocalStore(CLOCK, ENTROPY, trio.Event)
        self.replicator = BlobReplicator(
            self.blobs, store, node.network, lambda: Configuration((1, 2, 3)), NodeId(node.id), CLOCK,
            sync=GroupSync(self.blobs.sync, lambda: self.blobs.dirty), leads=lambda: node.id == 1,
        )  # fmt: skip
        self.replicator.bind(Volume(store, self.replicator, CLOCK))

    def has(self, data: bytes) -> bool:
        return self.blobs.has(digest_of(data))


@in_trio
async def test_chunks_of_all_sizes_are_pushed_and_fetched_over_tls(tmp_path: Path) -> None:
    nodes = make_nodes(tmp_path, 3)
    hosts = [Host(tmp_path / f"b{node.id}", node) for node in nodes]
    sizes = [MIB, 1, MIB, 16 * KIB, 700 * KIB, MIB, MIB, MIB, 4 * KIB, MIB]
    pieces = [chunk(number, size) if size > 4 else b"x" for number, size in enumerate(sizes)]
    try:
        async with running(*nodes) as nursery:
            for host in hosts:
                await nursery.start(host.replicator.run)
            first, second, third = hosts
            digests = [first.replicator.put(piece) for piece in pieces]
            await first.replicator.pusher.ensure(digests)
            for piece in pieces:  # on a majority, not of all the same one
                assert sum(on_disk(host.blobs, piece) for host in hosts) >= 2
            await until(lambda: all(map(second.has, pieces)) and all(map(third.has, pieces)), "pushed")
            third.blobs.delete(digests)
            assert await third.replicator.fetch(digests[0], digests[1:]) == pieces[0]
            await until(lambda: all(map(third.has, pieces)), "fetched ahead")
            assert await first.replicator.lacking(NodeId(3)) == (0, True)
    finally:
        for host in hosts:
            host.blobs.close()
