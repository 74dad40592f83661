"""Format 1 as written when it was new: read for ever, and written to the same bytes.

`tests/golden/blobs-1` holds a sealed segment with its table and one that its process never sealed.
"""

from pathlib import Path

from aspenfs.blobs.store import BlobStore
from aspenfs.runtime.disk import RealDisk
from aspenfs.sim.disk import SimDisk

GOLDEN = Path(__file__).parents[1] / "golden" / "blobs-1"
CHUNKS = [b"x", b"first chunk " * 20, b"second chunk " * 30, b"third chunk " * 9, b"fourth"]


def write(disk: RealDisk) -> list[bytes]:
    store = BlobStore.open(disk)
    digests = [store.put(data) for data in CHUNKS[:3]]
    store.sync()
    store.delete([digests[1]])
    store.close()
    store = BlobStore.open(disk)
    digests.append(store.put(CHUNKS[3]))
    store.sync()
    digests.append(store.put(CHUNKS[4]))
    store.delete([digests[0]])
    return digests  # not closed: the second segment stays unsealed


def test_format_1_is_read() -> None:
    disk = SimDisk()
    disk.make_directory("blobs")
    for path in sorted(GOLDEN.iterdir()):
        disk.open(f"blobs/{path.name}", create=True).pwrite(path.read_bytes(), 0)
    store = BlobStore.open(disk)
    assert sorted(bytes(store.get(f.digest)) for f in store.verify() if f.digest) == sorted(CHUNKS[2:])
    assert all(finding.problem is None for finding in store.verify())
    stats = store.stats()
    assert (stats.chunks, stats.segments, stats.dropped_bytes) == (3, 2, 0)


def test_format_1_is_written_to_the_same_bytes(tmp_path: Path) -> None:
    write(RealDisk(tmp_path))
    made = {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    kept = {path.name: path.read_bytes() for path in GOLDEN.iterdir()}
    assert sorted(made) == ["00000001.segment", "00000001.table", "00000002.segment"]
    assert made == kept
