"""What it takes to send a state to another node: rows and MiB a second, and how long the loop waits for it.

    tools/bench_snapshot.py [--rows 1000000] [--value-bytes 96] [--json]

Sender and receiver share one process, one loop and the disk of a temporary directory, so the figures are
those of a node that does both; the link is a function call with msgpack at both ends. The loop's wait is
what a task that sleeps 1 ms sees on top of that. Besides: the file of the sender, with a pin and without.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aspenfs.kv.types import NO_ATTRIBUTES, Record
from aspenfs.limits import MIB
from aspenfs.runtime.snapshots.client import SnapshotClient
from aspenfs.runtime.snapshots.server import SnapshotServer, digest_of_state
from aspenfs.runtime.statedb import StateDb
from aspenfs.runtime.system import SystemEntropy
from tests.runtime.snapshot_wire import Wire

BATCH = 16_384
SWITCH_INTERVAL_SECONDS = 0.0005  # as `host.py` has it while a store runs


def fill(path: Path, rows: int, value_bytes: int) -> StateDb:
    state, draw = StateDb(path), random.Random(1)
    for first in range(0, rows, BATCH):
        numbers = range(first, min(rows, first + BATCH))
        state.apply(
            [
                (b"f/i%016x" % n, Record(draw.randbytes(value_bytes), n + 1, n + 1, 1, 0, 0, NO_ATTRIBUTES))
                for n in numbers
            ],
            numbers[-1] + 1,
            {"term": bytes(8)},
        )
    state.sync()
    state.refresh()
    return state


async def stalls(waits: list[float], task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    task_status.started()
    while True:
        before = time.perf_counter()
        await trio.sleep(0.001)
        waits.append(time.perf_counter() - before - 0.001)


async def timed(work: Any) -> tuple[float, list[float]]:
    waits: list[float] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(stalls, waits)
        before = time.perf_counter()
        await work()
        seconds = time.perf_counter() - before
        nursery.cancel_scope.cancel()
    return seconds, sorted(waits)


def figures(what: str, rows: int, size: int, measured: tuple[float, list[float]]) -> dict[str, Any]:
    seconds, waits = measured
    return {
        "what": what,
        "seconds": round(seconds, 2),
        "rows_per_s": round(rows / seconds),
        "mib_per_s": round(size / seconds / MIB, 1),
        "wait_median_ms": round(statistics.median(waits) * 1e3, 2),
        "wait_p99_ms": round(waits[len(waits) * 99 // 100] * 1e3, 2),
        "wait_max_ms": round(waits[-1] * 1e3, 2),
    }


async def measure(place: Path, rows: int, value_bytes: int) -> dict[str, Any]:
    sys.setswitchinterval(SWITCH_INTERVAL_SECONDS)
    state = fill(place / "state", rows, value_bytes)
    ours, wire = place / "ours", Wire()
    ours.mkdir()
    server = SnapshotServer(state, SystemEntropy(), lambda: 1 << 50)
    server.register(wire.end(1))
    client = SnapshotClient(wire.end(2), ours)
    size = 0

    async def idle() -> None:
        await trio.sleep(1)

    async def fetch() -> None:
        nonlocal size
        size = (await client.fetch(lambda: 1, 1)).bytes

    async def digest() -> None:
        await digest_of_state(state)

    async def read() -> None:
        opened = await server.open(3, {"index": 0})
        after, end = b"", False
        while not end:
            block = await server.read(3, {"id": opened["id"], "after": after, "max": MIB})
            after, end = block["last"], block["end"]
        await server.end(3, {"id": opened["id"]})

    nothing = await timed(idle)
    fetched = await timed(fetch)
    results = [
        figures("nothing", 0, 0, nothing),
        figures("read by the sender", rows, size, await timed(read)),
        figures("fetched, checked, synced", rows, size, fetched),
        figures("state digest", rows, size, await timed(digest)),
    ]
    before = state.size_bytes()
    await server.open(3, {"index": 0})
    for turn in range(8):
        items = [(b"f/i%016x" % n, Record(bytes(value_bytes), 1, 1, 1, 0, 0, NO_ATTRIBUTES))
                 for n in range(turn, rows, max(1, rows // 2000))]  # fmt: skip
        state.apply(items, rows + 1 + turn)
        state.refresh()
    pinned = state.size_bytes()
    copy = StateDb(ours / "state.new")
    sizes = {"state": before, "after 8 x 2000 keys under a pin": pinned, "copy": copy.size_bytes()}
    copy.close()
    return {"rows": rows, "bytes": size, "results": results, "file_bytes": sizes}


def show(found: dict[str, Any]) -> None:
    what = f"{found['rows']} rows, {found['bytes'] / MIB:.0f} MiB"
    print(f"{what}; waits of the loop: median, 99 %, longest (ms)")
    for one in found["results"]:
        speed = f"{one['rows_per_s']:>9} rows/s {one['mib_per_s']:6.1f} MiB/s"
        waits = f"{one['wait_median_ms']:.2f} {one['wait_p99_ms']:.2f} {one['wait_max_ms']:.2f}"
        print(f"{one['what']:26} {one['seconds']:6.2f} s {speed}   {waits}")
    for name, size in found["file_bytes"].items():
        print(f"file, {name}: {size / MIB:.0f} MiB")


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--value-bytes", type=int, default=96)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aspen-bench-") as place:
        found = trio.run(measure, Path(place), arguments.rows, arguments.value_bytes)
    if arguments.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
