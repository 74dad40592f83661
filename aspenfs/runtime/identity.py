"""Who a state directory is: cluster, node, birth mark, incarnation. Small files, written durably and whole.

    cluster.json   {"format": 1, "cluster_id": 32 hex digits, "name": the cluster's name, "node_id": 1}
    incarnation    {"format": 1, "incarnation": n, "marks": [16 hex digits, ...]}: how often a node started
                   here, and what was drawn at the last starts, the latest last
    wal/born       32 hex digits and a newline: the birth mark
    node.key, node.crt, ca.crt, ca.key   what peers/ca.py makes, PEM

All but the incarnation and what is certified are written once.

The *birth mark* is drawn once for a log and lies beside it, so that it goes when the log goes. The node's
certificate and its row among the members name it too: who lost the log cannot come back under the old id,
because it may have forgotten a vote or entries that it had promised to keep (Raft §5.2, §5.4).

Belongs here: reading and writing these files. Not here: what certificates mean (`peers/ca.py`), and who
compares marks and incarnations of others (`peers/`).
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from aspenfs.errors import Corrupt, IdentityLost, InvalidArgument
from aspenfs.limits import PEER_FORMER_LIVES_MAX
from aspenfs.runtime.disk import sync_directory
from aspenfs.seams import Entropy

FILE_NAME = "cluster.json"
FORMAT = 1
CLUSTER_ID_BYTES = 16
CLUSTER_NAME_BYTES_MAX = 64  # it stands in /etc/fstab and in the mount table

INCARNATION_FILE = "incarnation"
INCARNATION_MAX = (1 << 24) - 1  # proposals are numbered incarnation << 40 | count in 64 bits
MARK_BYTES = 8
BORN_FILE = "wal/born"
BORN_BYTES = 16
NODE_KEY_FILE, NODE_CERTIFICATE_FILE = "node.key", "node.crt"
CA_BUNDLE_FILE, CA_KEY_FILE = "ca.crt", "ca.key"

_PROMISED = ("wal", "state")
_ADVICE = "restore it from a backup; the cluster id also stands in the head of each file in wal/"


class Identity(NamedTuple):
    cluster_id: bytes
    name: str
    node_id: int


def read(directory: Path) -> Identity | None:
    """The identity of a state directory; None if it has none yet. Corrupt if it cannot be understood."""
    path = directory / FILE_NAME
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        fields: Any = json.loads(text)
        if fields["format"] != FORMAT:
            raise Corrupt(str(path), 0, f"format {fields['format']!r}", "use the version that wrote it")
        identity = Identity(bytes.fromhex(fields["cluster_id"]), fields["name"], fields["node_id"])
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(str(path), 0, f"not an identity: {error!r}", _ADVICE) from error
    if (len(identity.cluster_id) != CLUSTER_ID_BYTES or type(identity.name) is not str
            or type(identity.node_id) is not int or identity.node_id < 1):  # fmt: skip
        raise Corrupt(str(path), 0, "an id or the name is out of bounds", _ADVICE)
    return identity


def create(directory: Path, name: str, entropy: Entropy) -> Identity:
    """Makes a new cluster of one node here: all or nothing, durable when this returns."""
    identity = Identity(entropy.random_bytes(CLUSTER_ID_BYTES), name, 1)
    write(directory, identity)
    return identity


def write(directory: Path, identity: Identity) -> None:
    """Makes the directory this node's: all or nothing, durable when this returns."""
    check_name(identity.name)
    fields = {"format": FORMAT, "cluster_id": identity.cluster_id.hex(), "name": identity.name,
              "node_id": identity.node_id}  # fmt: skip
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_file(directory / FILE_NAME, json.dumps(fields).encode() + b"\n")
    sync_directory(directory.parent)


def check_name(name: str) -> None:
    """InvalidArgument for what cannot be a cluster's name."""
    size = len(name.encode())
    if not 1 <= size <= CLUSTER_NAME_BYTES_MAX or not name.isprintable() or {*"/: ,"} & {*name}:
        wanted = f"1 to {CLUSTER_NAME_BYTES_MAX} bytes without / : , or space"
        raise InvalidArgument(f"cluster name {name!r}: {wanted}")


# --- the birth mark ---


def born(directory: Path) -> bytes | None:
    """The birth mark of the log in `directory`; None if it has none. Corrupt if it cannot be understood."""
    path = directory / BORN_FILE
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        mark = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        mark = b""
    if len(mark) != BORN_BYTES:
        raise Corrupt(str(path), 0, "not a birth mark", "join again with an empty state directory")
    return mark


def give_birth(directory: Path, entropy: Entropy) -> bytes:
    """The birth mark, drawn now if there is none. Only for a log that no certificate names yet, and after
    `check_kept`."""
    mark = born(directory)
    if mark is None:
        mark = entropy.random_bytes(BORN_BYTES)
        log = (directory / BORN_FILE).parent
        log.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(directory / BORN_FILE, mark.hex().encode() + b"\n")
        sync_directory(directory)
    return mark


def check_born(directory: Path, expected: bytes) -> None:
    """IdentityLost unless the log here is the one that was there when `expected` was certified."""
    if born(directory) != expected:
        raise IdentityLost(
            f"{directory} has the certificate of a cluster member, but not the log that belongs to it: the "
            "disk was replaced, or the log was removed. A node that has forgotten its votes must not come "
            "back under its old id: remove the old member (`aspen member remove`), empty the directory, and "
            "join again with a new ticket")  # fmt: skip


def check_kept(directory: Path) -> None:
    """IdentityLost if a node has started here, of which neither log nor state is left. Also for a node
    without a certificate: with nothing it would be taken for a new cluster.

    The birth mark is durable before the first incarnation, so who was killed at its first start has it.
    Logs of earlier versions may have none.
    """
    if born(directory) is not None or not incarnation(directory):
        return
    if not any(_has_files(directory / name) for name in _PROMISED):
        raise IdentityLost(
            f"{directory} was a node's, but its log and its state ({', '.join(_PROMISED)}) are not there: a "
            "disk is not mounted, or they were removed. Nothing was changed. Mount the disk that is missing; "
            f"else move {directory} away, and restore a backup (`aspen restore`), join the other members "
            "again (`aspen join`), or begin with an empty cluster (`aspen init`)")  # fmt: skip


# --- the incarnation ---


class Life(NamedTuple):
    """What tells one start of a node from all others, also of a copy of its directory.

    A copy counts on from where it was made, so its numbers come to be those of the original; its marks do
    not. `former`: those of the lives `incarnation` - 1, `incarnation` - 2, ..., as far as they are known.
    """

    incarnation: int
    mark: int
    former: tuple[int, ...] = ()


def incarnation(directory: Path) -> int:
    """How often a node started here so far. Corrupt if the file cannot be understood."""
    return _read_lives(directory)[0]


def _read_lives(directory: Path) -> tuple[int, list[int]]:
    """How many there were, and the marks of the last ones, the latest last."""
    path = directory / INCARNATION_FILE
    number, marks = None, []
    try:
        fields: Any = json.loads(path.read_bytes())
        if fields["format"] == FORMAT:
            marks = [int.from_bytes(bytes.fromhex(mark)) for mark in fields.get("marks", [])]
            number = fields["incarnation"]
    except FileNotFoundError:
        return 0, []
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    if (type(number) is not int or not 0 < number <= INCARNATION_MAX or len(marks) > number
            or not all(mark < 1 << 8 * MARK_BYTES for mark in marks)):  # fmt: skip
        advice = "write the number of the member's row (`aspen member list`), or any greater one, into it"
        raise Corrupt(str(path), 0, "not an incarnation", advice)
    return number, marks


def begin_incarnation(directory: Path, entropy: Entropy) -> Life:
    """The life that begins now, numbered from 1; durable when this returns."""
    number, former = _read_lives(directory)
    number += 1
    if number > INCARNATION_MAX:
        raise InvalidArgument(f"{directory} has seen {INCARNATION_MAX} starts: join again with a new ticket")
    former = former[-PEER_FORMER_LIVES_MAX:]
    life = Life(number, int.from_bytes(entropy.random_bytes(MARK_BYTES)) | 1, tuple(reversed(former)))
    marks = [mark.to_bytes(MARK_BYTES).hex() for mark in (*former, life.mark)]
    fields = {"format": FORMAT, "incarnation": number, "marks": marks}
    write_file(directory / INCARNATION_FILE, json.dumps(fields).encode() + b"\n")
    return life


# --- files ---


def write_file(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`, readable by its owner alone: old or new, never half; durable on return."""
    draft = path.with_name(f"{path.name}.new")
    draft.unlink(missing_ok=True)  # it may have been left with another mode
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    draft.rename(path)
    sync_directory(path.parent)


def _has_files(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())


def remove_file(path: Path) -> None:
    """Durably gone on return; no error if it was not there."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)
