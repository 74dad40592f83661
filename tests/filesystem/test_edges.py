"""Edges: numbers at the ends of their ranges, files of very many extents, bytes that are lost."""

import pytest

from aspenfs import errors
from aspenfs.limits import TXN_DELETED_KEYS_MAX, XATTR_BYTES_MAX, XATTR_VALUE_BYTES_MAX
from aspenfs.vfs.tree import SetAttr
from tests.filesystem.volumes import CALLER, Setup, run


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (-1, -1),
        (-1_500_000_000, -1_500_000_000),
        (1 << 63, (1 << 63) - 1),
        (-(1 << 70), -(1 << 63)),
    ],
)
def test_times_beyond_64_bits_of_ns_are_kept_as_the_nearest(wanted: int, kept: int) -> None:
    async def test(setup: Setup) -> None:
        attr, _ = await setup.tree.create(1, b"f", 0o644, 2, CALLER)
        after = await setup.tree.setattr(attr.node, SetAttr(atime_ns=wanted, mtime_ns=wanted), CALLER)
        assert (after.atime_ns, after.mtime_ns) == (kept, kept)
        assert await setup.tree.getattr(attr.node) == after

    run(test)


async def scattered(setup: Setup, extents: int) -> int:
    """A file of so many extents of one byte, every second byte a hole."""
    attr, _ = await setup.tree.create(1, b"f", 0o644, 2, CALLER)
    for index in range(extents):
        await setup.tree.writer.write(attr.node, 2 * index, b"x")
    return attr.node


def test_a_write_over_more_extents_than_a_transaction_deletes() -> None:
    async def test(setup: Setup) -> None:
        count = TXN_DELETED_KEYS_MAX + 100
        node = await scattered(setup, count)
        await setup.tree.writer.write(node, 0, b"y" * (2 * count))
        assert bytes(setup.tree.content.read(node, 0, 2 * count, 2 * count)) == b"y" * (2 * count)

    run(test)


def test_many_small_extents_are_cut_in_few_transactions_each_below_the_limits() -> None:
    async def test(setup: Setup) -> None:
        node = await scattered(setup, TXN_DELETED_KEYS_MAX + 100)
        before = setup.store.revision
        await setup.tree.setattr(node, SetAttr(size=1), CALLER)
        assert setup.store.revision - before < 25
        assert bytes(setup.tree.content.read(node, 0, 10, 1)) == b"x"

    run(test)


def test_a_long_truncation_lets_others_work_between_its_steps() -> None:
    async def test(setup: Setup) -> None:
        turns = 0

        async def breathe() -> None:
            nonlocal turns
            turns += 1
            assert setup.problems() == []

        setup.volume.breathe = breathe
        attr, _ = await setup.tree.create(1, b"f", 0o644, 2, CALLER)
        for index in range(500):
            await setup.tree.writer.write(attr.node, index * 16384, index.to_bytes(2, "big") * 8192)
        await setup.tree.setattr(attr.node, SetAttr(size=0), CALLER)
        assert turns >= 4

    run(test)


def test_bytes_that_are_lost_are_EIO_not_ENOENT() -> None:
    async def test(setup: Setup) -> None:
        _, handle = await setup.tree.create(1, b"f", 0o644, 2, CALLER)
        await handle.write(0, b"z" * 20_000)
        held = dict(setup.blobs.chunks)
        setup.blobs.chunks.clear()
        with pytest.raises(errors.Corrupt):
            await handle.read(0, 20_000)
        setup.blobs.chunks.update(held)

    run(test)


def test_what_the_memory_of_garbage_cannot_hold_is_found_later() -> None:
    async def test(setup: Setup) -> None:
        setup.volume.garbage_max = 10
        _, handle = await setup.tree.create(1, b"f", 0o644, 2, CALLER)
        for index in range(50):
            await handle.write(index * 16384, index.to_bytes(2, "big") * 8192)
        await handle.release()
        await setup.tree.unlink(1, b"f")
        assert len(setup.volume.unreferenced) == 10
        while setup.volume.overlooked:
            setup.volume.overlooked = False
            setup.tree.content.find_garbage(b"", 1000)
            while await setup.tree.content.collect():
                pass
        assert setup.blobs.chunks == {}

    run(test)


def test_access_times_that_cannot_be_written_now_are_kept() -> None:
    async def test(setup: Setup) -> None:
        attr, handle = await setup.tree.create(1, b"f", 0o644, 2, CALLER)
        await handle.write(0, b"x")
        await handle.read(0, 1)
        read_at = (await setup.tree.getattr(attr.node)).atime_ns
        assert read_at > attr.atime_ns
        txn = setup.store.txn

        async def full(*arguments: object, **named: object) -> None:
            assert (await setup.tree.getattr(attr.node)).atime_ns == read_at, (
                "it goes back while it is written"
            )
            raise errors.NoSpace("full")

        setup.store.txn = full  # type: ignore[method-assign,assignment]
        with pytest.raises(errors.NoSpace):
            await setup.tree.flush_atimes()
        setup.store.txn = txn  # type: ignore[method-assign]
        assert (await setup.tree.getattr(attr.node)).atime_ns == read_at
        await setup.tree.flush_atimes()
        assert setup.tree.atimes == {}
        assert setup.volume.inode(attr.node).atime == read_at

    run(test)


def test_the_attributes_of_an_inode_have_a_common_limit() -> None:
    """One transaction removes them with the inode, so it must not have to hold half a gigabyte."""

    async def test(setup: Setup) -> None:
        attr, handle = await setup.tree.create(1, b"f", 0o644, 2, CALLER)
        count = XATTR_BYTES_MAX // XATTR_VALUE_BYTES_MAX
        for index in range(count):
            await setup.tree.setxattr(attr.node, b"user.%d" % index, bytes(XATTR_VALUE_BYTES_MAX))
        with pytest.raises(errors.NoSpace):
            await setup.tree.setxattr(attr.node, b"user.one-more", b"x")
        await setup.tree.setxattr(attr.node, b"user.0", b"short")
        await setup.tree.setxattr(attr.node, b"user.one-more", b"x")
        await handle.release()

    run(test)
