"""The figures by which a node's store is judged: `aspen status`, `cluster/status`, tests."""

from aspenfs.kv.engine import Engine
from aspenfs.runtime.applier import Applier
from aspenfs.runtime.identity import Identity
from aspenfs.runtime.statedb import StateDb
from aspenfs.runtime.syncer import Syncer
from aspenfs.runtime.wal import Wal
from aspenfs.seams import Disk

WAL_DIRECTORY = "wal"


def figures(node: Identity, engine: Engine, wal: Wal, disk: Disk, state: StateDb,
            syncer: Syncer, applier: Applier, condition: str) -> dict[str, int | str]:
    """Indices, counts, bytes (`_bytes`) and microseconds (`_us`)."""
    segments = [_size_bytes(disk, f"{WAL_DIRECTORY}/{name}") for name in disk.list(WAL_DIRECTORY)]
    return {
        "cluster": node.name,
        "cluster_id": node.cluster_id.hex(),
        "node": node.node_id,
        "state": condition,  # ok, full, failed
        "revision": engine.revision,
        "committed": engine.committed_revision,
        "applied": state.applied_index,
        "durable": wal.synced_index,
        "state_durable": state.durable_index,
        "wal_first": wal.first_index,
        "wal_last": wal.last_index,
        "wal_segments": len(segments),
        "wal_bytes": sum(segments),
        "overlay_bytes": engine.overlay.bytes,
        "state_bytes": state.size_bytes(),
        "applied_batches": applier.batches,
        "syncs": syncer.syncs,
        "sync_last_us": syncer.last_ns // 1000,
        "sync_mean_us": syncer.total_ns // 1000 // max(1, syncer.syncs),
        "sync_longest_us": syncer.longest_ns // 1000,
    }


def _size_bytes(disk: Disk, path: str) -> int:
    try:
        file = disk.open(path)
    except FileNotFoundError:
        return 0  # trimmed since it was listed
    try:
        return file.size()
    finally:
        file.close()
