"""NodeStore passes the conformance suite of the Store port."""

import shutil
import tempfile
from typing import Any

import trio

from aspenfs.kv.store import Store
from aspenfs.runtime.host import NodeStore
from tests.kv.conformance import Conformance, FakeClock, FakeEntropy, Subject


class TestNodeStore(Conformance):
    async def open(self, nursery: trio.Nursery, clock: FakeClock) -> Subject:
        directory = tempfile.mkdtemp(prefix="aspenfs-test-")
        store = NodeStore.open(directory, clock, FakeEntropy(), segment_bytes=1 << 22)
        port: Store = store
        running = trio.CancelScope()
        ended = trio.Event()

        async def run(task_status: Any) -> None:
            with running:
                await store.run(task_status)
            ended.set()

        await nursery.start(run)

        async def expire() -> None:
            store.expire_leases()

        async def close() -> None:
            running.cancel()
            await ended.wait()
            store.close()
            shutil.rmtree(directory)

        return Subject(port, clock, expire, close)
