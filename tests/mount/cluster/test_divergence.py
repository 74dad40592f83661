"""A node whose state is not what the log made of it: found among real mounts, and well again by itself."""

import errno
import os

import pytest

from aspenfs.kv import records
from aspenfs.kv.types import Record
from aspenfs.runtime.statedb import StateDb
from tests.mount.clusters import Cluster, Node
from tests.mount.mounting import BIN, wait_for

pytestmark = pytest.mark.mount
WELL_S = 60.0
REFUSED = os.strerror(errno.EIO)


def spoil(node: Node, old: bytes, new: bytes) -> None:
    """What a disk could do to a node that is not running: other bytes in what it has stored of files."""
    state = StateDb(node.state / "state")
    spoiled = 0
    with state._env.begin(write=True, db=state._root) as txn:
        for key, raw in list(txn.cursor(state._root)):
            if key.startswith(b"f/") and old in raw:
                record = records.unpack(raw)
                txn.put(key, records.pack(Record(record.value.replace(old, new), *record[1:])))
                spoiled += 1
    state.sync()
    state.close()
    assert spoiled == 1


def test_a_node_with_another_state_serves_nothing_and_gets_well(cluster: Cluster) -> None:
    first, second, third = cluster
    first.sh("echo sound and safe > files/spoiled; sync")
    if cluster.wait_leader() is second:
        first.insist("leader", "transfer", "n1")
    third.aspen("check", "--cluster")  # so that the leader's own comparison is not due in the middle of this
    second.stop()
    spoil(second, b"sound and safe", b"round and safe")
    second.start()
    cluster.wait_healthy()
    assert second.sh("cat files/spoiled") == "round and safe\n"  # nobody knows yet

    told = first.run(str(BIN / "aspen"), "check", "--cluster", check=False)
    assert told.returncode == 1, told
    rows = {line.split()[0]: line.split()[-1] for line in told.stdout.decode().splitlines()[1:4]}
    assert rows == {"n1": "same", "n2": "differs", "n3": "same"}
    # A moment later it knows, and answers nothing until it has another state; then it is right.
    answers: list[str] = []

    def well() -> bool:
        done = second.run("cat", str(second.mountpoint / "files/spoiled"), check=False)
        answers.append(done.stdout.decode().strip() or done.stderr.decode().strip().rpartition(": ")[2])
        return answers[-1] == "sound and safe"

    assert wait_for(well, WELL_S), answers
    assert set(answers) <= {"round and safe", REFUSED, "sound and safe"}
    assert answers == sorted(answers, key=["round and safe", REFUSED, "sound and safe"].index)
    log = (second.state / "daemon.log").read_text()
    begun = log.index("quarantine: the state of this node differs")
    assert "the quarantine is over" in log[begun:]
    third.aspen("check", "--cluster")
    cluster.wait_healthy()
    assert second.sh("echo more >> files/spoiled; cat files/spoiled") == "sound and safe\nmore\n"
