"""The chunk store against a dict, under any order of calls, kills, power failures and full disks."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from aspenfs.blobs.format import digest_of
from aspenfs.blobs.index import PrefixIndex
from aspenfs.blobs.store import BlobStore
from aspenfs.errors import NoSpace
from aspenfs.sim.disk import SimDisk

CHUNKS = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.builds(lambda seed, size: bytes([seed]) * size, st.integers(0, 30), st.integers(1, 20_000)),
)


class CoarseIndex(PrefixIndex):
    """Three bits of a digest: collisions everywhere."""

    def add(self, prefix: int, location: int) -> None:
        super().add(prefix >> 61, location)

    def find(self, prefix: int):  # type: ignore[no-untyped-def]
        return super().find(prefix >> 61)

    def remove(self, prefix: int, location: int) -> bool:
        return super().remove(prefix >> 61, location)


class Blobs(RuleBasedStateMachine):
    known = Bundle("known")

    @initialize(
        seed=st.integers(0, 1000), coarse=st.booleans(), segment_bytes=st.sampled_from([512, 4096, 1 << 16])
    )
    def begin(self, seed: int, coarse: bool, segment_bytes: int) -> None:
        self.disk = SimDisk(seed)
        self.coarse, self.segment_bytes = coarse, segment_bytes
        self.alive: dict[bytes, bytes] = {}
        self.durable: set[bytes] = set()
        self.deleted: dict[bytes, bytes] = {}
        self.open()

    def open(self) -> None:
        index = CoarseIndex() if self.coarse else PrefixIndex()
        self.store = BlobStore.open(
            self.disk, segment_bytes=self.segment_bytes, index=index, cache_bytes=30_000
        )

    @rule(target=known, data=CHUNKS)
    def put(self, data: bytes) -> bytes:
        digest = self.store.put(data)
        assert digest == digest_of(data)
        self.alive[digest] = data
        self.deleted.pop(digest, None)
        return digest

    @rule(target=known, data=CHUNKS, room=st.integers(0, 3000))
    def put_on_a_full_disk(self, data: bytes, room: int) -> object:
        capacity = self.disk.capacity_bytes
        self.disk.capacity_bytes += room - self.disk.free_bytes()
        try:
            return self.put(data)
        except NoSpace:
            return multiple()
        finally:
            self.disk.capacity_bytes = capacity

    @rule(digest=known, offset=st.integers(0, 300), size=st.none() | st.integers(0, 300))
    def get(self, digest: bytes, offset: int, size: int | None) -> None:
        assert self.store.has(digest) == (digest in self.alive)
        if digest in self.alive:
            stop = None if size is None else offset + size
            assert self.store.get(digest, offset, size) == self.alive[digest][offset:stop]
            assert self.store.length(digest) == len(self.alive[digest])

    @rule(digests=st.lists(known, max_size=5), full=st.booleans())
    def delete(self, digests: list[bytes], full: bool) -> None:
        capacity = self.disk.capacity_bytes
        if full:
            self.disk.capacity_bytes -= self.disk.free_bytes()
        self.store.delete(digests)
        self.disk.capacity_bytes = capacity
        for digest in digests:
            self.durable.discard(digest)
            if digest in self.alive:
                self.deleted[digest] = self.alive.pop(digest)

    @rule()
    def sync(self) -> None:
        self.store.sync()
        self.durable = set(self.alive)

    @rule(steps=st.integers(1, 100), step_bytes=st.integers(1, 5000), sync=st.booleans())
    def collect(self, steps: int, step_bytes: int, sync: bool) -> None:
        for step in self.store.collect(step_bytes):
            if step.needs_sync and sync:
                self.sync()
            steps -= 1
            if not steps:
                break

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()
        self.durable = set(self.alive)
        self.settle_deletions()

    @rule()
    def kill(self) -> None:
        self.disk.kill()
        self.disk.restart()
        self.open()
        self.durable = set(self.alive)
        self.settle_deletions()

    @rule()
    def power_failure(self) -> None:
        self.disk.crash()
        self.disk.restart()
        self.open()
        for digest in set(self.alive) - self.durable:
            if not self.store.has(digest):
                del self.alive[digest]
        self.durable = set(self.alive)
        self.settle_deletions()

    def settle_deletions(self) -> None:
        """A deletion may be lost with power, or on a full disk; then the chunk is whole again."""
        for digest, data in self.deleted.items():
            if self.store.has(digest):
                self.alive[digest] = data
                self.durable.add(digest)
        self.deleted.clear()

    @invariant()
    def the_store_holds_what_the_model_holds(self) -> None:
        if self.coarse:
            assert all(map(self.store.has, self.alive))
        else:
            assert self.store.stats().chunks == len(self.alive)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            findings = list(self.store.verify())
            assert all(finding.problem is None for finding in findings)
            assert {finding.digest for finding in findings} == set(self.alive)


TestBlobs = Blobs.TestCase
TestBlobs.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
