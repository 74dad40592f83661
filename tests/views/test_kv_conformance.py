"""The conformance suite over kv/."""

from aspenfs.limits import VALUE_BYTES_MAX
from aspenfs.vfs.tree import Tree
from tests.views.conformance import Capabilities, WritableTree
from tests.views.subject import KVSetup


class TestKVTree(WritableTree):
    can = Capabilities(
        hard_links=False,
        special_files=False,
        file_bytes_max=VALUE_BYTES_MAX,
        lends_identity=False,
        odd_names=(),
    )

    async def open_tree(self) -> Tree:
        return KVSetup().tree
