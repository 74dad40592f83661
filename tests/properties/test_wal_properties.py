"""Properties of the log over generated work, crashes and bytes."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspenfs.errors import Corrupt
from aspenfs.limits import WAL_FRAME_BYTES_MAX
from aspenfs.runtime.wal import Kind, Wal
from aspenfs.runtime.wal_format import (
    FIRST_FRAME,
    FRAME_HEADER_BYTES,
    decode_header,
    encode_frame,
    encode_header,
    find_frames,
    read_frame,
    segment_name,
    walk_frames,
)
from aspenfs.sim.disk import SimDisk, SimulatedCrash
from tests.runtime.wal_driver import Driver, open_wal

u16 = st.integers(0, (1 << 16) - 1)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)
payloads = st.one_of(st.binary(max_size=80), st.integers(0, 3000).map(lambda size: b"\xa5" * size))


@given(
    frames=st.lists(st.tuples(st.integers(1, 255), u32, u16, u64, u64, payloads), max_size=8),
    tag=u32,
    seed=u32,
)
def test_what_is_encoded_is_walked_back(
    frames: list[tuple[int, int, int, int, int, bytes]], tag: int, seed: int
) -> None:
    tag = tag or 1
    data, offset, crc = b"", FIRST_FRAME, seed
    for kind, synced, run, term, index, payload in frames:
        frame, crc = encode_frame(offset, tag, crc, synced, run, kind, term, index, payload)
        assert not len(frame) & 7
        offset += len(frame)
        data += frame
    file = SimDisk().open("a", create=True)
    file.pwrite(data + b"\0" * 64, FIRST_FRAME)
    walked = list(walk_frames(file, tag, FIRST_FRAME, seed, file.size()))
    assert [(f.kind, f.synced, f.run, f.term, f.index, bytes(f.payload)) for f in walked] == frames
    assert [f.offset for f in find_frames(file, tag, FIRST_FRAME, file.size())] == [f.offset for f in walked]
    assert list(walk_frames(file, tag, FIRST_FRAME, seed ^ 1, file.size())) == []
    assert list(find_frames(file, tag ^ 1, FIRST_FRAME, file.size())) == []


@given(payload=st.binary(max_size=100), shift=st.integers(1, 50), data=st.data())
def test_a_frame_holds_only_unchanged_and_in_its_place(
    payload: bytes, shift: int, data: st.DataObject
) -> None:
    frame, _ = encode_frame(FIRST_FRAME, 7, 1, 2, 3, 1, 4, 5, payload)
    bit = data.draw(st.integers(0, len(frame) * 8 - 1))
    damaged = bytearray(frame)
    damaged[bit // 8] ^= 1 << bit % 8
    file = SimDisk().open("a", create=True)
    file.pwrite(damaged, FIRST_FRAME)
    assert read_frame(file, 7, FIRST_FRAME) is None
    file.pwrite(frame, FIRST_FRAME + shift * 8)
    assert read_frame(file, 7, FIRST_FRAME + shift * 8) is None


@given(data=st.binary(max_size=600), at=st.integers(0, 20))
def test_hostile_bytes_are_not_a_frame_and_not_a_header(data: bytes, at: int) -> None:
    file = SimDisk().open("a", create=True)
    file.pwrite(data, 8 * at)
    for offset in range(0, 700, 8):
        assert read_frame(file, 1, offset) is None
    assert list(walk_frames(file, 1, 0, 0, file.size())) == []
    with pytest.raises(Corrupt, match=r"^a: corrupt at offset"):
        decode_header(file, "a")


@given(
    cluster=st.binary(min_size=16, max_size=16),
    number=st.integers(1, 1 << 63),
    size=st.integers(4096, 1 << 31),
)
def test_a_header_reads_back(cluster: bytes, number: int, size: int) -> None:
    file = SimDisk().open("a", create=True)
    data = encode_header(cluster, number, size)
    file.pwrite(data, 0)
    assert decode_header(file, "a")[:3] == (cluster, number, size)
    assert len(data) < FIRST_FRAME
    assert WAL_FRAME_BYTES_MAX + FRAME_HEADER_BYTES < 1 << 32


crashes = st.sampled_from([SimDisk.crash, SimDisk.kill])
work = st.lists(st.tuples(st.integers(0, 60), st.one_of(st.none(), st.integers(1, 120)), crashes), max_size=5)


@given(seed=st.integers(0, 1 << 32), lives=work)
def test_any_number_of_lives_and_deaths_keeps_the_promises(
    seed: int, lives: list[tuple[int, int | None, Callable[[SimDisk], None]]]
) -> None:
    disk = SimDisk(seed)
    driver = Driver(disk, random.Random(seed))
    driver.open()
    for actions, operation, end in lives:
        if operation is not None:
            plan = disk.kill_at if end is SimDisk.kill else disk.crash_at
            plan(disk.operations + operation)
        try:
            driver.work(actions)
            end(disk)
        except SimulatedCrash:
            pass
        disk.restart()
        driver.check_found(killed=end is SimDisk.kill)


@given(seed=st.integers(0, 1 << 32), actions=st.integers(1, 50), data=st.data())
def test_a_flipped_bit_is_refused_or_costs_only_what_was_never_synced(
    seed: int, actions: int, data: st.DataObject
) -> None:
    disk = SimDisk(seed)
    driver = Driver(disk, random.Random(seed))
    driver.open()
    driver.work(actions)
    disk.kill()
    disk.restart()
    names = [name for name in disk.list("wal") if name != "spare.wal"]
    name = data.draw(st.sampled_from(names))
    disk.flip(f"wal/{name}", data.draw(st.integers(0, 8191)), data.draw(st.integers(0, 7)))
    before = {name: disk.open(f"wal/{name}").pread(1 << 20, 0) for name in names}
    try:
        driver.check_found(killed=False)
    except Corrupt as error:
        refused_file = error.file
    else:
        return
    assert refused_file in names
    assert {name: disk.open(f"wal/{name}").pread(1 << 20, 0) for name in names} == before


@given(size=st.integers(0, 5000), seed=st.integers(0, 1000))
def test_a_payload_that_looks_like_a_log_is_only_a_payload(size: int, seed: int) -> None:
    """A copy of the log stored in the log must neither be replayed nor speak for durability."""
    disk = SimDisk(seed)
    wal = open_wal(disk)
    for index in range(1, 6):
        wal.append(Kind.ENTRY, 1, index, b"x" * 100)
    wal.sync()
    image = disk.open(f"wal/{segment_name(1)}").pread(5000, FIRST_FRAME)
    wal.append(Kind.ENTRY, 1, 6, image[:size])
    disk.crash()
    disk.restart()
    wal = open_wal(disk)
    assert wal.last_index in (5, 6)
    _check_contiguous(wal)


def _check_contiguous(wal: Wal) -> None:
    assert [frame.index for frame in wal.replay(1)] == list(range(1, wal.last_index + 1))
