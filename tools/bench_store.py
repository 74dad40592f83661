"""What the store of one node costs: `tools/bench_store.py [--keys N] [--directory DIR]`.

Prints a table and a line of JSON: microseconds per accepted and per committed transaction, committed
transactions a second from 1, 16 and 128 tasks, how long the loop is held up while many keys are
applied, and memory with many keys.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aspenfs.kv.types import absent, add, exists, merge, patch, put
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.system import SystemClock, SystemEntropy

Figures = dict[str, float]


def memory_mib(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


async def accepted(store: NodeStore, figures: Figures) -> None:
    """As creating a file does: 2 compares, 4 operations on 4 keys."""
    await store.txn([], [put(b"f/dir", b"d" * 100), put(b"f/count", b"")])
    samples = []
    for number in range(8000):
        start = time.perf_counter()
        await store.txn(
            [absent(b"f/d%07d" % number), exists(b"f/dir")],
            [put(b"f/d%07d" % number, b"x" * 40), put(b"f/n%07d" % number, b"y" * 100),
             merge(b"f/dir", patch(0, b"12345678")), merge(b"f/count", add(0, 1))],
        )  # fmt: skip
        samples.append(time.perf_counter() - start)
        if number % 32 == 0:
            await trio.lowlevel.checkpoint()
    await store.committed()
    samples.sort()
    figures["accepted_p50_us"] = round(statistics.median(samples) * 1e6, 1)
    figures["accepted_p99_us"] = round(samples[len(samples) * 99 // 100] * 1e6, 1)


async def committed(store: NodeStore, figures: Figures) -> None:
    total, above = [], []
    for number in range(400):
        await trio.sleep(0.001)
        start = time.perf_counter()
        await store.txn([], [put(b"f/one", b"%d" % number)])
        await store.committed()
        spent = (time.perf_counter() - start) * 1e6
        total.append(spent)
        above.append(spent - store._syncer.last_ns / 1000)
    figures["committed_p50_us"] = round(statistics.median(total))
    figures["above_fdatasync_p50_us"] = round(statistics.median(above))
    figures["above_fdatasync_p90_us"] = round(statistics.quantiles(above, n=10)[8])
    for tasks in (1, 16, 128):
        done = 0

        async def write(task: int, each: int) -> None:
            nonlocal done
            for number in range(each):
                await store.committed((await store.txn([], [put(b"f/%d" % task, b"%d" % number)])).revision)
                done += 1

        start = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for task in range(tasks):
                nursery.start_soon(write, task, 300 if tasks == 1 else 60)
        figures[f"committed_per_s_{tasks}"] = round(done / (time.perf_counter() - start))


async def stall(store: NodeStore, figures: Figures, keys: int = 50_000) -> None:
    """The longest time that a task which only yields does not run, while `keys` keys are applied."""
    for number in range(keys // 100):
        await store.txn([], [put(b"f/s%08d" % (number * 100 + one), b"z" * 100) for one in range(100)])
        if number % 4 == 0:
            await trio.lowlevel.checkpoint()
    gaps = []
    before = store._applier.batches
    last = time.perf_counter()
    while store.status()["overlay_bytes"] or store._to_settle:
        for _ in range(200):
            await trio.lowlevel.checkpoint()
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
    gaps.sort()
    figures["stall_max_ms"] = round(gaps[-1] * 1e3, 2)
    figures["stall_p999_ms"] = round(gaps[len(gaps) * 999 // 1000] * 1e3, 2)
    figures["stall_batches"] = store._applier.batches - before


async def fill(store: NodeStore, figures: Figures, keys: int) -> None:
    start = time.perf_counter()
    for number in range(keys // 100):
        await store.txn([], [put(b"f/m%08d" % (number * 100 + one), b"m" * 100) for one in range(100)])
        await trio.lowlevel.checkpoint()
    await store.committed()
    figures["fill_keys_per_s"] = round(keys / (time.perf_counter() - start))
    while store.status()["overlay_bytes"]:  # noqa: ASYNC110 – a figure, without an event
        await trio.sleep(0.05)
    figures["anonymous_mib"] = memory_mib("RssAnon")
    figures["resident_mib"] = memory_mib("VmRSS")
    figures["state_mib"] = round(int(store.status()["state_bytes"]) / (1 << 20))


async def main(directory: Path, keys: int) -> Figures:
    figures: Figures = {"anonymous_empty_mib": memory_mib("RssAnon")}
    store = NodeStore.open(directory, SystemClock(), SystemEntropy())
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        await accepted(store, figures)
        await committed(store, figures)
        await stall(store, figures)
        if keys:
            await fill(store, figures, keys)
        nursery.cancel_scope.cancel()
    start = time.perf_counter()
    store.close()
    figures["close_ms"] = round((time.perf_counter() - start) * 1e3)
    start = time.perf_counter()
    NodeStore.open(directory, SystemClock(), SystemEntropy()).close()
    figures["open_ms"] = round((time.perf_counter() - start) * 1e3)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk to measure")
    arguments = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="aspen-bench-", dir=arguments.directory))
    try:
        result = trio.run(main, place, arguments.keys)
    finally:
        shutil.rmtree(place)
    for name, value in result.items():
        print(f"{name:28} {value:12}")
    print(json.dumps(result))
