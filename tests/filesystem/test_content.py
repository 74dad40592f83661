"""Extents: what was written is read back, sizes and allocation are right, blobs are counted."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aspenfs import errors, limits
from aspenfs.filesystem import layout
from aspenfs.vfs.tree import SetAttr
from tests.filesystem.volumes import CALLER, Setup, run

KIB = 1024


async def new_file(setup: Setup, name: bytes = b"f") -> tuple[int, "object"]:
    attr, handle = await setup.tree.create(1, name, 0o644, 2, CALLER)
    return attr.node, handle


async def read_all(setup: Setup, node: int) -> bytes:
    size = (await setup.tree.getattr(node)).size
    return bytes(setup.tree.content.read(node, 0, size + 10, size))


STEP = st.one_of(
    st.tuples(
        st.just("write"),
        st.sampled_from([0, 1, 100, 4096, 16 * KIB, 64 * KIB - 1, 64 * KIB, 100_000, 1 << 20]),
        st.sampled_from([1, 10, 4096, 16 * KIB - 1, 16 * KIB, 70_000]),
    ),
    st.tuples(st.just("append"), st.just(0), st.sampled_from([1, 5000, 16 * KIB, 40_000])),
    st.tuples(
        st.just("truncate"), st.sampled_from([0, 1, 5000, 64 * KIB, 150_000, (1 << 20) + 7]), st.just(0)
    ),
)


@given(st.lists(STEP, max_size=25), st.integers(0, 1 << 30))
@settings(max_examples=120, deadline=None)
def test_a_file_reads_as_the_bytes_that_were_written(steps: list[tuple[str, int, int]], seed: int) -> None:
    async def test(setup: Setup) -> None:
        node, handle = await new_file(setup)
        model = bytearray()
        noise = random.Random(seed)
        for kind, at, length in steps:
            if kind == "truncate":
                await setup.tree.setattr(node, SetAttr(size=at), CALLER)
                model = model[:at] + bytes(max(0, at - len(model)))
                continue
            at = len(model) if kind == "append" else at
            data = noise.randbytes(length)
            await setup.tree.writer.write(node, None if kind == "append" else at, data)
            model += bytes(max(0, at - len(model)))
            model[at : at + length] = data
        assert await read_all(setup, node) == bytes(model)
        for _ in range(5):
            at, size = noise.randrange(len(model) + 1), noise.randrange(200_000)
            assert bytes(setup.tree.content.read(node, at, size, len(model))) == bytes(model[at : at + size])
        assert setup.problems() == []
        await handle.release()  # type: ignore[attr-defined]
        await setup.tree.unlink(1, b"f")
        await setup.tree.reap()
        while await setup.tree.content.collect():
            pass
        assert setup.blobs.chunks == {}, "a file that is gone leaves no bytes behind"
        assert setup.volume.inode_count() == 1

    run(test)


def test_a_write_over_many_small_extents_is_split_to_fit_transactions() -> None:
    async def test(setup: Setup) -> None:
        node, _ = await new_file(setup)
        await setup.tree.writer.write(node, 0, bytes(1 << 20))
        for at in range(0, 1 << 20, 8 * KIB):
            await setup.tree.writer.write(node, at, b"x" * 4096)
        await setup.tree.writer.write(node, 4096, b"y" * ((1 << 20) - 8192))
        data = await read_all(setup, node)
        assert data == b"x" * 4096 + b"y" * ((1 << 20) - 8192) + bytes(4096)

    run(test)


def test_many_distinct_blob_pieces_under_one_write_fit_transactions() -> None:
    async def test(setup: Setup) -> None:
        node, _ = await new_file(setup)
        expected = bytearray(299 * 4096 + 16 * KIB)
        for index in range(300):
            data = random.Random(index).randbytes(16 * KIB)
            await setup.tree.writer.write(node, index * 4096, data)
            expected[index * 4096 : index * 4096 + 16 * KIB] = data
        assert await read_all(setup, node) == bytes(expected)
        await setup.tree.writer.write(node, 0, b"z" * (1 << 20))
        expected[: 1 << 20] = b"z" * (1 << 20)
        assert await read_all(setup, node) == bytes(expected)

    run(test)


def test_holes_take_no_space_and_read_as_zeros() -> None:
    async def test(setup: Setup) -> None:
        node, _ = await new_file(setup)
        await setup.tree.writer.write(node, 10 << 30, b"end")
        attr = await setup.tree.getattr(node)
        assert (attr.size, attr.blocks) == ((10 << 30) + 3, 1)
        assert bytes(setup.tree.content.read(node, 5 << 30, 10, attr.size)) == bytes(10)

    run(test)


def test_small_appends_are_sealed_into_blobs() -> None:
    async def test(setup: Setup) -> None:
        node, _ = await new_file(setup)
        for _ in range(100):
            await setup.tree.writer.write(node, None, b"a" * 4000)
        assert await read_all(setup, node) == b"a" * 400_000
        extents = list(setup.store.scan(layout.extent_key(node, 0), layout.extent_key(node, 1 << 60)))
        assert len(extents) <= 7
        assert setup.blobs.chunks

    run(test)


def test_the_size_limit_is_EFBIG() -> None:
    async def test(setup: Setup) -> None:
        node, _ = await new_file(setup)
        with pytest.raises(errors.TooLarge):
            await setup.tree.writer.write(node, limits.FILE_BYTES_MAX, b"x")
        with pytest.raises(errors.TooLarge):
            await setup.tree.setattr(node, SetAttr(size=limits.FILE_BYTES_MAX + 1), CALLER)
        await setup.tree.setattr(node, SetAttr(size=limits.FILE_BYTES_MAX), CALLER)

    run(test)


def test_identical_chunks_are_stored_once_and_kept_until_the_last_reference() -> None:
    async def test(setup: Setup) -> None:
        one, _ = await new_file(setup, b"one")
        two, _ = await new_file(setup, b"two")
        data = b"same" * 10_000
        await setup.tree.writer.write(one, 0, data)
        await setup.tree.writer.write(two, 0, data)
        assert len(setup.blobs.chunks) == 1
        await setup.tree.setattr(one, SetAttr(size=0), CALLER)
        await setup.tree.content.collect()
        assert await read_all(setup, two) == data
        await setup.tree.setattr(two, SetAttr(size=0), CALLER)
        await setup.tree.content.collect()
        assert setup.blobs.chunks == {}

    run(test)


def test_a_long_file_is_truncated_in_steps_and_leaves_nothing() -> None:
    async def test(setup: Setup) -> None:
        node, _ = await new_file(setup)
        for index in range(200):
            await setup.tree.writer.write(node, index * 20_000, random.Random(index).randbytes(20_000))
        attr = await setup.tree.setattr(node, SetAttr(size=30_000), CALLER)
        assert (attr.size, attr.blocks) == (30_000, (30_000 + 511) // 512)
        assert await read_all(setup, node) == (
            random.Random(0).randbytes(20_000) + random.Random(1).randbytes(20_000)[:10_000]
        )
        await setup.tree.setattr(node, SetAttr(size=40_000), CALLER)
        assert (await read_all(setup, node))[30_000:] == bytes(10_000)

    run(test)
