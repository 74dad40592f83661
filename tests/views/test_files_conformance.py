"""files/ passes the suite of every writable tree."""

from aspenfs.limits import FILE_BYTES_MAX
from aspenfs.vfs.tree import Tree
from tests.filesystem.volumes import Setup
from tests.views.conformance import Capabilities, WritableTree


class TestFilesTree(WritableTree):
    # What is no directory or no file is refused by the kernel, before it asks.
    can = Capabilities(file_bytes_max=FILE_BYTES_MAX, checks_kinds=False)

    async def open_tree(self) -> Tree:
        setup = Setup()
        await setup.volume.format()
        return setup.tree
