"""Edges: numbers at the ends of their ranges, files of very many extents, bytes that are lost."""

import pytest

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
