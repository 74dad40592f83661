"""What a node tells of itself: one mapping for cluster/, `aspen status` and Prometheus.

The keys that `views/cluster.py` and `cli/status.py` know, and below `metrics` the figures.
"""

import os
import resource
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.cli.cluster_status import ClusterFacts, Told, describe_cluster
from aspenfs.cli.options import MountOptions
from aspenfs.filesystem.volume import Volume
from aspenfs.fuse.notifier import Notifier
from aspenfs.runtime.host import NodeStore
from aspenfs.vfs.filesystem import FileSystem

_CONDITIONS: Final = {
    "full": {
        "cause": "the disk of the state directory is full",
        "advice": "free some space there; writes get ENOSPC until then, and work again without a restart",
    },
    "failed": {
        "cause": "the store has stopped: its disk failed, or it found damage",
        "advice": "read daemon.log in the state directory; unmount, check the disk, aspen check --offline",
    },
}
_IDS: Final = ("node", "leader")  # of nodes: no figures
_COUNTERS: Final = {"revision", "committed", "applied", "durable", "syncs", "applied_batches"}


def describe(
    options: MountOptions,
    store: NodeStore,
    blobs: BlobStore,
    volume: Volume,
    filesystem: FileSystem,
    notifier: Notifier,
    cluster: ClusterFacts | None = None,
) -> Mapping[str, Any]:
    """The state of a node with one mount, as plain values."""
    figures = dict(store.status())
    chunks, told = blobs.stats(), notifier.statistics()
    others = describe_cluster(cluster, time.time_ns()) if cluster is not None else Told({}, [], {})
    state = str(figures.pop("state"))
    name = str(figures["cluster"])
    problems = [_CONDITIONS[state]] if state in _CONDITIONS else []
    problems += [problem._asdict() for problem in others.problems]
    numbers: dict[str, int | float] = {
        **{key: value for key, value in figures.items() if isinstance(value, int) and key not in _IDS},
        **_stored(volume),
        "inodes_known": len(filesystem.known),
        "handles": len(filesystem.handles),
        "blob_chunks": chunks.chunks,
        "blob_live_bytes": chunks.live_bytes,
        "blob_total_bytes": chunks.total_bytes,
        "blob_damaged": chunks.damaged,
        "invalidations": told.told,
        "invalidations_pending": told.pending,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **others.figures,
    }
    if chunks.damaged:
        problems.append({
            "cause": f"{chunks.damaged} blobs are damaged on disk",
            "advice": "run `aspen check` to see which files they belong to, and restore those",
        })
    return {
        "name": name,
        "cluster_id": figures["cluster_id"],
        "pid": os.getpid(),
        "mountpoint": options.mountpoint,
        "subtree": options.subtree,
        "health": {"ok": not problems, **(problems[0] if problems else {})},
        "problems": problems,
        "state": state,
        **others.fields,
        "revision": figures["revision"],
        "figures": numbers,
        "metrics": {
            f"aspen_{key}": {"type": "counter" if key in _COUNTERS else "gauge", "value": value}
            for key, value in numbers.items()
        },
    }


def _stored(volume: Volume) -> dict[str, int]:
    """What only the state tells; nothing, if nothing is told from it."""
    with suppress(errors.Diverged):
        return {"inodes": volume.inode_count()}
    return {}
