"""What chunks cost on three nodes: MiB a second, and CPU a MiB on each, over real TLS links on loopback.

    tools/bench_blobs.py [--mib 512] [--directory DIR] [--json]

Three processes on one disk. Writing: so many tasks put a chunk and wait until a majority has it on disk.
Reading: a node that has nothing reads a file chunk by chunk, with what follows fetched ahead.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aspenfs.blobs.store import BlobStore
from aspenfs.cluster.types import Configuration, NodeId
from aspenfs.filesystem.volume import Volume
from aspenfs.kv.local import LocalStore
from aspenfs.limits import BLOB_FETCH_AHEAD_BYTES, KIB, MIB
from aspenfs.runtime.blob_replication.durable import GroupSync
from aspenfs.runtime.blob_replication.replicator import BlobReplicator
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.peers.credentials import load
from tests.runtime.peers.nodes import CLOCK, ENTROPY, Node, Row, make_authority, make_credentials, until

NODES = (1, 2, 3)
SWITCH_INTERVAL_SECONDS = 0.0005  # as `host.py` has it while a store runs


class Bench:
    """One node: chunks on a disk, links to the others."""

    def __init__(self, directory: Path, number: int, ports: Sequence[int]) -> None:
        shown = load(directory)
        assert shown is not None
        self.node = Node(shown)
        self.number, self.ports = number, ports
        disk = RealDisk(directory)
        self.blobs = BlobStore.open(disk)
        store = LocalStore(CLOCK, ENTROPY, trio.Event)
        self.sync = GroupSync(self.blobs.sync, lambda: self.blobs.dirty)
        self.replicator = BlobReplicator(
            self.blobs, store, self.node.network, lambda: Configuration(NODES), NodeId(number), CLOCK,
            sync=self.sync, leads=lambda: False,
        )  # fmt: skip
        self.replicator.bind(Volume(store, self.replicator, CLOCK))

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
        async with trio.open_nursery() as nursery:
            await nursery.start(self.node.network.run, [f"127.0.0.1:{self.ports[self.number - 1]}"])
            self.node.network.set_members(
                {number: Row((f"127.0.0.1:{port}",)) for number, port in zip(NODES, self.ports, strict=True)}
            )
            await nursery.start(self.replicator.run)
            await until(lambda: len(self.node.network.connected()) == 2, "connected")
            task_status.started()


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Meter:
    """Wall and CPU time of a stretch, on all nodes."""

    def __init__(self, processes: Sequence[int]) -> None:
        self.processes = processes
        self.cpu = list(map(cpu_seconds, processes))
        self.began = time.perf_counter()

    def figures(self, mib: float) -> dict[str, float]:
        took = time.perf_counter() - self.began
        used = [
            cpu_seconds(process) - before for process, before in zip(self.processes, self.cpu, strict=True)
        ]
        figures = {"MiB/s": round(mib / took, 1)}
        for number, seconds in zip(NODES, used, strict=True):
            figures[f"ms/MiB node {number}"] = round(1000 * seconds / mib, 2)
        return figures


async def write(bench: Bench, mib: int, size: int, tasks: int, processes: Sequence[int]) -> dict[str, float]:
    count = mib * MIB // size
    numbers = iter(range(count))
    noise = os.urandom(size)
    seed = os.urandom(8)

    async def writer() -> None:
        for number in numbers:
            digest = bench.replicator.put(seed + number.to_bytes(8, "big") + noise[16:])
            await bench.replicator.pusher.ensure([digest])

    meter, syncs = Meter(processes), bench.sync.syncs
    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(writer)
    figures = meter.figures(mib)
    figures["syncs here"] = bench.sync.syncs - syncs
    figures["ms a chunk"] = round(1000 * tasks * size / MIB / figures["MiB/s"], 2)
    await until(lambda: not bench.replicator.pusher._queues[3].queue, "the last one has it")
    return figures


async def read_all(bench: Bench, mib: int, size: int, processes: Sequence[int]) -> dict[str, float]:
    noise, seed = os.urandom(size), os.urandom(8)
    digests = []
    for number in range(mib * MIB // size):
        digest = bench.replicator.put(seed + number.to_bytes(8, "big") + noise[16:])
        await bench.replicator.pusher.ensure([digest])
        digests.append(digest)
    await until(
        lambda: not any(peer.queue or peer.in_flight for peer in bench.replicator.pusher._queues.values())
    )
    for at in range(0, len(digests), 1000):
        bench.blobs.delete(digests[at : at + 1000])
    meter = Meter(processes)
    for at, digest in enumerate(digests):
        if not bench.blobs.has(digest):
            ahead = digests[at + 1 : at + 1 + BLOB_FETCH_AHEAD_BYTES // size]
            await bench.replicator.fetch(digest, [other for other in ahead if not bench.blobs.has(other)])
        bench.blobs.get(digest)
    return meter.figures(mib)


async def measure(
    directory: Path, ports: Sequence[int], processes: Sequence[int], mib: int
) -> dict[str, Any]:
    results: dict[str, Any] = {}
    bench = Bench(directory / "n1", 1, ports)
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.run)
        for size, tasks in (
            (MIB, 1),
            (MIB, 2),
            (MIB, 4),
            (MIB, 16),
            (64 * KIB, 1),
            (64 * KIB, 16),
            (16 * KIB, 16),
        ):
            share = mib if size == MIB else mib // 8
            name = f"write {size // KIB} KiB × {tasks}"
            results[name] = await write(bench, share, size, tasks, processes)
        for size in (MIB, 64 * KIB):
            results[f"read {size // KIB} KiB"] = await read_all(
                bench, mib // (1 if size == MIB else 8), size, processes
            )
        nursery.cancel_scope.cancel()
    return results


async def serve(directory: Path, number: int, ports: Sequence[int]) -> None:
    bench = Bench(directory / f"n{number}", number, ports)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.run)
        await trio.sleep_forever()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--directory", type=Path, help="on the disk to measure; default: the temporary one")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", nargs=2, metavar=("NODE", "PORTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        number, ports = int(options.serve[0]), list(map(int, options.serve[1].split(",")))
        trio.run(serve, options.directory, number, ports)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory, authority, ports = Path(name), make_authority(), free_ports(len(NODES))
        for number in NODES:
            make_credentials(directory / f"n{number}", authority, number)
        others = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    "--directory",
                    name,
                    "--serve",
                    str(number),
                    ",".join(map(str, ports)),
                ]
            )
            for number in NODES[1:]
        ]
        try:
            processes = [os.getpid(), *(other.pid for other in others)]
            results = trio.run(measure, directory, ports, processes, options.mib)
        finally:
            for other in others:
                other.kill()
                other.wait()
    if options.json:
        print(json.dumps(results))
        return
    for name, figures in results.items():
        print(f"{name:20}", "  ".join(f"{key} {value:g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
