"""Views: one module a tree; what a mount can show, by name.

Adding a tree is one module here and one line in VIEWS; `tests/views/conformance.py` runs over it if it
is writable. A tree gets what it stands on from `Resources` and knows nothing of the others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from aspenfs.filesystem.volume import Volume
from aspenfs.kv.store import Store
from aspenfs.seams import Clock
from aspenfs.vfs.tree import Tree, Usage
from aspenfs.views.cluster import ClusterTree
from aspenfs.views.files import FilesTree
from aspenfs.views.kv import KVTree


@dataclass(frozen=True, slots=True)
class Resources:
    """What trees stand on. `uid` and `gid` own what nobody owns; `atime`: reads move access times."""

    store: Store
    volume: Volume
    clock: Clock
    status: Callable[[], Mapping[str, Any]]  # see views/cluster.py
    usage: Callable[[], Usage]
    atime: bool = True
    uid: int = 0
    gid: int = 0


def _files(resources: Resources) -> Tree:
    return FilesTree(resources.volume, resources.usage, atime=resources.atime)


def _kv(resources: Resources) -> Tree:
    return KVTree(resources.store, resources.clock, resources.uid, resources.gid, resources.usage)


def _cluster(resources: Resources) -> Tree:
    return ClusterTree(resources.status, resources.clock.time_ns(), resources.uid, resources.gid)


# In the order in which the root directory lists them.
VIEWS: Mapping[str, Callable[[Resources], Tree]] = {
    "files": _files,
    "kv": _kv,
    "cluster": _cluster,
}
