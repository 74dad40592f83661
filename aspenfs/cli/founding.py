"""Making a node in a state directory: what `aspen init` and `aspen join` do alike.

Belongs here: the mount that is wanted, refusing directories that hold a node, taking back what was made
when it fails. Not here: what the two do (`init.py`, `join.py`), the mount itself (`mount.py`).
"""

import functools
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import click

from aspenfs import errors
from aspenfs.cli import mount
from aspenfs.cli.aspen import Settings
from aspenfs.cli.lock import StateLock
from aspenfs.cli.options import MountOptions, parse_mount
from aspenfs.cli.output import Failure
from aspenfs.cli.paths import StateDirectory
from aspenfs.runtime import identity, peer_settings
from aspenfs.runtime.peer_settings import PeerSettings
from aspenfs.runtime.peers import addresses

# What tells that a directory was a node's, whatever is left of it.
_REMAINS = ("wal", "state", "blobs", identity.NODE_CERTIFICATE_FILE)


class NodeOptions(NamedTuple):
    """What the command line says of a node that shall be made."""

    listen: str | None
    advertise: tuple[str, ...]
    node_name: str | None
    own_state_dir: str | None
    mount_options: tuple[str, ...]


_OPTIONS = (
    click.option("--listen", metavar="HOST:PORT", envvar="ASPEN_LISTEN",
                 help=f"Where other nodes connect to.  [default: {peer_settings.LISTEN}: every interface]"),
    click.option("--advertise", metavar="HOST:PORT", multiple=True, envvar="ASPEN_ADVERTISE",
                 help="Where they find this node, if that is not where it listens; the best one first."),
    click.option("--name", "node_name", metavar="NAME",
                 help="What the node is called.  [default: the host's name]"),
    click.option("--state-dir", "own_state_dir", metavar="DIR",
                 help="Where the node keeps its state, as aspen --state-dir."),
    click.option("-o", "mount_options", metavar="OPTIONS", multiple=True,
                 help="Options of the mount, a list with commas: see mount.aspen(8)."),
)  # fmt: skip


def node_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that makes a node; it gets them as `node`."""

    @functools.wraps(command)
    def collected(*args: Any, **values: Any) -> Any:
        node = NodeOptions(**{name: values.pop(name) for name in NodeOptions._fields})
        return command(*args, node=node, **values)

    for option in reversed(_OPTIONS):
        collected = option(collected)
    return collected


class Wanted:
    """A node that shall be made and mounted; checked as far as that is possible beforehand."""

    def __init__(self, settings: Settings, cluster: str, mountpoint: str, node: NodeOptions, *,
                 joining: bool = False) -> None:  # fmt: skip
        """`joining`: what a join has left that was killed may be there, and is used.

        Failure; AspenErrors for what cannot be understood.
        """
        state_dir = os.path.abspath(node.own_state_dir) if node.own_state_dir else settings.directory.path
        lists = [f"state_dir={state_dir}", *node.mount_options]
        where = os.path.abspath(mountpoint)
        options = parse_mount(cluster, where, lists, environ=os.environ, uid=os.geteuid())
        self.options = _checked(options)
        self.directory = StateDirectory(Path(options.state_dir))
        self.settings = peer_settings.decide(node.node_name or "", node.listen or options.listen or "",
                                             node.advertise or options.advertise)  # fmt: skip
        refuse_inhabited(self.directory, self.options.mountpoint, joining=joining)
        _check_listen(self.settings)

    def mount(self, meanwhile: Callable[[], object] | None = None) -> None:
        """Returns when the mount answers. Failure."""
        try:
            mount.start(self.options, meanwhile)
        except mount.Refused as refusal:
            raise Failure(str(refusal)) from None


def _checked(options: MountOptions) -> MountOptions:
    try:
        return mount.check(options)
    except mount.Refused as refusal:
        raise Failure(str(refusal)) from None


def refuse_inhabited(directory: StateDirectory, mountpoint: str, *, joining: bool) -> None:
    """Failure if there is a node, or what is left of one."""
    path = directory.path
    try:
        found = identity.read(path)
    except errors.Corrupt as error:
        raise Failure(str(error)) from None
    if found is not None:
        raise Failure(
            f"{path} holds node {found.node_id} of the cluster {found.name!r} already: nothing was changed",
            advice=f"`aspen status` tells whether it is mounted; mount -t aspen {found.name} {mountpoint} "
            "mounts it; aspen ticket create lets others join; another node needs another --state-dir",
            name="AlreadyExists",
        )
    remains = [name for name in _REMAINS if (path / name).exists()]
    begun = _is_begun_join(path, remains)
    if remains and not (begun and joining):
        advice = "move them away, or name another --state-dir"
        if begun:
            advice = f"a join was killed here: the same `aspen join` again ends it; else {advice}"
        raise Failure(f"{path} has remains of a node ({', '.join(remains)}), but no identity",
                      advice=advice, name="AlreadyExists")  # fmt: skip


def _is_begun_join(path: Path, remains: Sequence[str]) -> bool:
    """Whether that is all from before it was a node: the birth mark, perhaps a certificate. The cluster
    knows who comes again by the mark and the key."""
    if not {*remains} <= {"wal", identity.NODE_CERTIFICATE_FILE}:
        return False
    mark = (path / identity.BORN_FILE).name
    return "wal" not in remains or {entry.name for entry in (path / "wal").iterdir()} <= {mark, f"{mark}.new"}


def _check_listen(settings: PeerSettings) -> None:
    """The daemon would find out too, but only when all is made."""
    where = addresses.parse(settings.listen, listen=True)
    try:
        found = socket.getaddrinfo(where.host or None, where.port, type=socket.SOCK_STREAM,
                                   flags=socket.AI_PASSIVE)  # fmt: skip
        for family, _, _, _, address in found:
            if family == socket.AF_INET6 and not where.host:
                continue  # every interface: IPv4 tells, and IPv6 may be off
            socket.create_server(address, family=family).close()
    except OSError as error:
        raise Failure(
            f"cannot listen on {settings.listen}: {error.strerror or error}",
            advice="name another address with --listen HOST:PORT; `ss -ltn` shows who listens where",
        ) from None


class Making:
    """A state directory in which a node is being made. A context manager: what was made there is taken
    away again if its block fails, whatever by, unless `keep` was called.

    The lock is held from its beginning until `hand_over`, so that no other node can begin there.
    """

    def __init__(self, directory: StateDirectory) -> None:
        self._path, self._kept = directory.path, False
        self._made = [each for each in (self._path, *self._path.parents) if not each.exists()]
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._before = {entry.name for entry in self._path.iterdir()}
        self._lock = StateLock.acquire(directory)

    def __enter__(self) -> Self:
        return self

    def hand_over(self) -> None:
        """The node is complete: its daemon may take the lock."""
        self._lock.release()

    def keep(self) -> None:
        """From now on it is worth something, even if nothing else succeeds."""
        self._kept = True

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._lock.release()
        if kind is None or self._kept:
            return
        for entry in self._path.iterdir():
            if entry.name not in self._before:
                _remove(entry)
        for directory in self._made:
            directory.rmdir()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
