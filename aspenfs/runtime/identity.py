"""Which cluster and node a state directory belongs to: `cluster.json`, written once, durably.

    {"format": 1, "cluster_id": 32 hex digits, "name": the cluster's name, "node_id": 1}
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from aspenfs.errors import Corrupt, InvalidArgument
from aspenfs.seams import Entropy

FILE_NAME = "cluster.json"
FORMAT = 1
CLUSTER_ID_BYTES = 16
CLUSTER_NAME_BYTES_MAX = 64  # it stands in /etc/fstab and in the mount table

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
    size = len(name.encode())
    if not 1 <= size <= CLUSTER_NAME_BYTES_MAX or not name.isprintable() or {*"/: ,"} & {*name}:
        wanted = f"1 to {CLUSTER_NAME_BYTES_MAX} bytes without / : , or space"
        raise InvalidArgument(f"cluster name {name!r}: {wanted}")
    identity = Identity(entropy.random_bytes(CLUSTER_ID_BYTES), name, 1)
    fields = {"format": FORMAT, "cluster_id": identity.cluster_id.hex(), "name": name, "node_id": 1}
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = directory / f"{FILE_NAME}.new"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(json.dumps(fields).encode() + b"\n")
        file.flush()
        os.fsync(descriptor)
    draft.rename(directory / FILE_NAME)
    for path in (directory, directory.parent):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return identity
