"""The number of names that an inode may have."""

import pytest

from aspenfs import errors
from aspenfs.filesystem import layout
from aspenfs.kv.types import merge, patch
from aspenfs.limits import LINKS_MAX
from tests.filesystem.volumes import CALLER, Setup, run


def test_an_inode_has_65000_names_and_no_more() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        node = (await tree.mknod(1, b"file", 0o100644, 0, CALLER)).node
        await tree.link(node, 1, b"second")
        # As if 64,997 more had been made: the count is all that link(2) looks at.
        counted = layout.inode_key(node)
        await setup.volume.txn([], [merge(counted, patch(layout.NLINK, layout.I64(LINKS_MAX - 1)))])
        assert (await tree.link(node, 1, b"last")).nlink == 65_000
        with pytest.raises(errors.TooManyLinks):
            await tree.link(node, 1, b"one more")
        await tree.unlink(1, b"second")
        await tree.link(node, 1, b"one more")
        # The true count again, for the check of every invariant that follows each test.
        await setup.volume.txn([], [merge(counted, patch(layout.NLINK, layout.I64(3)))])

    run(test)
