"""The daemon: opens a node's state, puts the floors together, serves the mount until told to stop.

Belongs here: construction, in one place, and the order of start and end. Started by `mount.aspen`
(options in ASPEN_MOUNT_OPTIONS, progress on the pipe in ASPEN_READY_FD) or by systemd in the foreground.
"""

import gc
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any, Final

import trio

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.cli.beside import Beside, Tasks, pause
from aspenfs.cli.checking import OnlineCheck
from aspenfs.cli.cluster_status import BlobFacts, ClusterFacts, StateFacts, describe_cluster
from aspenfs.cli.events import Events
from aspenfs.cli.flood import FloodFilter
from aspenfs.cli.lock import StateLock
from aspenfs.cli.options import MountOptions
from aspenfs.cli.paths import StateDirectory, state_directory
from aspenfs.cli.ready import OPTIONS_VARIABLE, Report, ready_fd, report, sd_notify
from aspenfs.cli.telemetry import describe
from aspenfs.cli.upkeep import Upkeep
from aspenfs.cluster.types import NodeId
from aspenfs.filesystem.layout import BLOB_PREFIX, named_digests
from aspenfs.filesystem.volume import Volume
from aspenfs.fuse.loop import SPIN_US
from aspenfs.fuse.notifier import Notifier
from aspenfs.fuse.operations import Operations, Presentation
from aspenfs.fuse.session import serve
from aspenfs.kv.commands import Command
from aspenfs.kv.types import Event
from aspenfs.runtime import identity, metrics, peer_settings, swap
from aspenfs.runtime.backup.writing import OnlineBackup
from aspenfs.runtime.blob_replication.durable import GroupSync
from aspenfs.runtime.blob_replication.replicator import BlobReplicator
from aspenfs.runtime.catching_up import CatchingUp
from aspenfs.runtime.checkpoints import Checkpoints
from aspenfs.runtime.clock_watch import ClockWatch
from aspenfs.runtime.cluster_view import WAS_REMOVED, name_of
from aspenfs.runtime.control import ControlServer
from aspenfs.runtime.control_cluster import ClusterControl
from aspenfs.runtime.control_command import Call
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.divergence import Divergence
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.lags import Lags
from aspenfs.runtime.members import Members
from aspenfs.runtime.peering import Peering, Switch
from aspenfs.runtime.peers import credentials
from aspenfs.runtime.reserve import Reserve
from aspenfs.runtime.snapshots.server import SnapshotServer
from aspenfs.runtime.system import SystemClock, SystemEntropy
from aspenfs.vfs.coherence import Coherence
from aspenfs.vfs.filesystem import ROOT_INODE, FileSystem
from aspenfs.vfs.tree import Usage
from aspenfs.views import VIEWS, Resources
from aspenfs.views.cluster import metrics as metrics_text
from aspenfs.views.files import FilesTree
from aspenfs.views.kv import KVTree

log = logging.getLogger(__name__)

EXIT_OK: Final = 0
EXIT_SYSTEM: Final = 2
EXIT_MOUNT: Final = 32
GC_THRESHOLDS: Final = (50_000, 20, 100)  # a listing of thousands of entries is not garbage


class Node:
    """Everything of one mounted node. Made inside the trio loop that serves it."""

    def __init__(self, options: MountOptions, directory: StateDirectory) -> None:
        self.options, self.directory = options, directory
        self.clock = clock = SystemClock()
        disk = RealDisk(directory.path)
        swap.recover(disk)  # before anything is read: it may give way to something else
        if credentials.load(directory.path) is None:  # who has lost its log hears that first
            identity.check_kept(directory.path)
            identity.give_birth(directory.path, SystemEntropy())
        life = identity.begin_incarnation(directory.path, SystemEntropy())
        self.blobs = BlobStore.open(disk)
        self.store = NodeStore.open(
            directory.path,
            clock,
            SystemEntropy(),
            name=options.name,
            disk=disk,
            pre_sync=[self._sync_blobs],
            pre_sync_due=lambda: self.blobs.dirty,
            verify_entry=self._names_only_blobs_that_are_there,
            reserve=Reserve(directory.path),
            incarnation=life.incarnation,
        )
        if self.store.identity.name != options.name:
            raise errors.InvalidArgument(
                f"{directory.path} holds the cluster {self.store.identity.name!r}, not {options.name!r}: "
                "mount it by its name, or name another state directory with -o state_dir="
            )
        self._join_in(disk, life)
        self.volume = Volume(self.store, self.replicator, clock)
        self.volume.breathe = trio.lowlevel.checkpoint
        self.volume.is_member = self._is_member
        resources = Resources(
            store=self.store,
            volume=self.volume,
            clock=clock,
            status=self.status,
            usage=self._usage,
            atime=options.atime != "noatime",
            uid=os.geteuid(),
            gid=os.getegid(),
        )
        trees = {name: make(resources) for name, make in VIEWS.items()}
        files, kv = trees["files"], trees["kv"]
        assert isinstance(files, FilesTree)
        assert isinstance(kv, KVTree)
        self.files = files
        files.begins_files = not options.sync
        self.upkeep = Upkeep(files, self.volume, self.blobs, self.store.short_of_room)
        self.origins = (self.volume, kv.origin)
        self.notifier = notifier = Notifier(
            lambda: [ROOT_INODE, *self.filesystem.known], lambda ino: self.filesystem.knows(ino)
        )
        coherence = Coherence(self.store, options.consistency, notifier, pause)
        self.filesystem = filesystem = FileSystem(
            list(trees.values()), clock.time_ns(), coherence, trio.lowlevel.checkpoint
        )
        self.beside = Beside(files, filesystem, notifier)
        self.store.replaced.append(self.filesystem.replaced)
        self.store.suspended.append(self.volume.forget_ids)
        self.store.suspended.append(lambda: coherence.everything(filesystem.known))
        self.stop = trio.Event()
        self.events = Events(self._cluster_view, clock.time_ns)

    def _join_in(self, disk: RealDisk, life: identity.Life) -> None:
        """The parts that deal with other nodes, whether there are any or not."""
        path, store, clock, entropy = self.directory.path, self.store, self.clock, SystemEntropy()
        consensus, options = store.consensus, self.options
        self.switch = switch = Switch()
        self.members, self.lags = Members(store, consensus), Lags(consensus)
        settings = peer_settings.effective(path, options.listen, options.advertise)
        self.peering = Peering(path, store, self.members, self.lags, switch, life, clock, entropy,
                               settings)  # fmt: skip
        self.clocks = ClockWatch(consensus, switch, clock, life.incarnation)
        self.catching_up = CatchingUp(store, switch, path)
        self.snapshots = SnapshotServer(store.state, entropy, disk.free_bytes,
                                        lambda: store.quarantine and store.quarantine.error())  # fmt: skip
        self.snapshots.register(switch)
        store.suspended.append(self.snapshots.look)
        self.checkpoints = Checkpoints(store.state, store.applier, disk.free_bytes)
        self.divergence = Divergence(store, self.checkpoints, switch, clock, self.members.step_down)
        self.blob_sync = GroupSync(self.blobs.sync, lambda: self.blobs.dirty)
        self.replicator = replicator = BlobReplicator(
            self.blobs,
            store,
            switch,
            lambda: consensus.replica.raft.configuration,
            NodeId(store.node_id),
            clock,
            sync=self.blob_sync,
            leads=lambda: consensus.leading,
            refusal=lambda: store.refusal,
        )
        self.members.lacking = lambda node: replicator.lacking(NodeId(node))
        store.before_propose = replicator.before_propose
        store.observe(replicator.observe, (BLOB_PREFIX[:2],))
        store.replaced.append(replicator.state_replaced)

    # --- ports that the floors below are given ---

    def _sync_blobs(self) -> None:
        """In the sync thread, before the log: what an entry names must be durable before the entry."""
        if self.blobs.dirty:
            self.blobs.sync()

    def _names_only_blobs_that_are_there(self, command: Command) -> bool:
        return all(map(self.blobs.has, named_digests(command)))

    def _usage(self) -> Usage:
        disk = os.statvfs(self.directory.path)
        free = disk.f_bavail if self.store.refusal is None else 0  # else it is for what deletes
        return Usage(disk.f_frsize, disk.f_blocks, free, 0, 0)

    def status(self) -> Mapping[str, Any]:
        """What cluster/ and `aspen status` show."""
        told = describe(
            self.options,
            self.store,
            self.blobs,
            self.volume,
            self.filesystem,
            self.notifier,
            self._cluster_facts(),
        )
        return {**told, "events": self.events.told()}

    def _cluster_facts(self) -> ClusterFacts:
        return ClusterFacts(self.store.node_id, self.members, self.lags, self.store.consensus, self.peering,
                            self._blob_facts, lambda: self.catching_up.progress,
                            lambda: StateFacts(self.divergence.latest, self.store.quarantine),
                            self.clocks.rates)  # fmt: skip

    def _cluster_view(self) -> Mapping[str, Any]:
        """Of the status, what events are made of."""
        told = describe_cluster(self._cluster_facts(), self.clock.time_ns())
        return {**told.fields, "problems": [problem._asdict() for problem in told.problems]}

    def _blob_facts(self) -> BlobFacts:
        told = self.replicator.status()
        return BlobFacts(told.missing, told.unavailable, told.waiting_for_room)

    # --- coherence ---

    def _is_member(self, node_id: int) -> bool:
        now = self.store.consensus.replica.raft.configuration
        return any(node_id in some for some in (now.voters, now.outgoing, now.learners, now.learners_next))

    def observe(self, revision: int, events: Sequence[Event], origin: object) -> None:
        """A change that did not come through this mount makes the kernel's caches stale."""
        self.filesystem.noticed(events, own=origin in self.origins)

    # --- life ---

    async def run(self, ready: Callable[[Report], None]) -> None:
        """Serves until unmounted, stopped by a signal, or the store fails. `ready` is called with what
        whoever mounts is told."""
        options = self.options
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.store.run)
                self.replicator.bind(self.volume)
                await nursery.start(self.replicator.run)
                nursery.start_soon(self.clocks.run)
                nursery.start_soon(self.catching_up.run)
                nursery.start_soon(self.snapshots.run)
                nursery.start_soon(self.checkpoints.run)
                nursery.start_soon(self.divergence.run)
                await nursery.start(self.peering.run)
                # Before there is anything to serve: who waits for that wants to know how far it is.
                cluster = ClusterControl(self.store.identity, self.store, self.members, self.lags,
                                         self.peering, self.clock, SystemEntropy())  # fmt: skip
                check = OnlineCheck(self.store, self.blobs, self.replicator)
                backup = OnlineBackup(self.store, self.volume, self.blobs, self.clock, self.directory.path,
                                      _release())  # fmt: skip
                control = ControlServer(
                    self.store,
                    self.status,
                    {"check": check.handle, "backup": backup.handle, "sync": self._sync,
                     "state.digest": self._digest, "state.compare": self._compare, **cluster.handlers},
                    clock=self.clock,
                    release=_release(),
                )
                await nursery.start(partial(control.serve, str(self.directory.control_socket)))
                await self._formatted()
                self.volume.tasks = Tasks(nursery)
                self.store.observe(self.observe, self.filesystem.keyspaces)
                await self.beside.start()
                orphans = self.files.orphans.recover()
                log.info("state is open revision=%d orphans=%d", self.store.revision, orphans)
                if options.subtree != "/":
                    await self.filesystem.use_subtree(os.fsencode(options.subtree))
                if options.metrics is not None:
                    await nursery.start(metrics.serve, options.metrics, lambda: metrics_text(self.status()))
                nursery.start_soon(self.upkeep.run)
                nursery.start_soon(self.beside.run)
                nursery.start_soon(self._signals)
                nursery.start_soon(self.events.run)
                gc.collect()
                gc.freeze()
                gc.set_threshold(*GC_THRESHOLDS)
                await serve(
                    Operations(self.filesystem, self._presentation(), acl=options.acl),
                    options.mountpoint,
                    options.fuse_options(),
                    spin_us=SPIN_US if options.spin_us is None else options.spin_us,
                    hush=lambda: self.store.committing or self.blob_sync.busy,
                    notifier=self.notifier,
                    ready=lambda: ready(self._report()),
                    stop=self.stop,
                )
                sd_notify("STOPPING=1")
                await self.beside.end()
                await self.upkeep.tidy()
                await self.members.step_down()
                nursery.cancel_scope.cancel()
        finally:
            try:
                self.store.close()  # syncs the blobs that its log names
            finally:
                self.blobs.close()

    def _report(self) -> Report:
        if WAS_REMOVED in describe_cluster(self._cluster_facts(), self.clock.time_ns()).problems:
            return {"ready": True, "warning": f"{WAS_REMOVED.cause}: {WAS_REMOVED.advice}"}
        return {"ready": True}

    async def _formatted(self) -> None:
        """There is a file system to serve: made here by the founder, else fetched from the others."""
        await self.store.well()
        if self.store.alone:
            await self.volume.format(uid=os.geteuid(), gid=os.getegid())
            return
        while not self.volume.formatted:  # noqa: ASYNC110 – a state that comes in whole tells nobody
            await trio.sleep(0.05)

    def _presentation(self) -> Presentation:
        options = self.options
        return Presentation(
            options.uid,
            options.gid,
            options.umask or 0,
            options.attr_timeout_s,
            options.entry_timeout_s,
            options.sync,
        )

    async def _sync(self, call: Call) -> int:
        """`aspen sync`: access times too, then all that was accepted is committed; the revision."""
        await self.filesystem.sync()
        return await self.store.committed()

    async def _digest(self, call: Call) -> Mapping[str, Any]:
        """The digest of what is applied, alike on every node at that index: to compare nodes."""
        found = await self.snapshots.digest(self.store.node_id, None)
        return {**found, "digest": found["digest"].hex()}

    async def _compare(self, call: Call) -> Mapping[str, Any]:
        """`aspen check --cluster`: all members compare their states. Items only say that it goes on."""
        verdict = await self.divergence.compare(lambda index: call.item({"index": index}))
        rows = [{"id": node, "name": name_of(self.members, node),
                 "digest": verdict.told[node].hex() if node in verdict.told else None,
                 "differs": node in verdict.differing, "cause": verdict.silent.get(node, "")}
                for node in sorted({*verdict.told, *verdict.silent})]  # fmt: skip
        return {"index": verdict.index, "digest": verdict.digest.hex(), "members": rows}

    async def _signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as received:
            async for number in received:
                log.info("stopping signal=%s", signal.Signals(number).name)
                self.stop.set()


def main() -> int:
    """Runs the daemon; the exit code of mount(8)."""
    options = MountOptions.from_json(os.environ[OPTIONS_VARIABLE])
    logging.basicConfig(
        stream=sys.stderr,
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(FloodFilter())
    channel: int | None = ready_fd(os.environ)
    reported = False

    def ready(message: Report) -> None:
        nonlocal reported
        reported = True
        report(channel, message)

    def failed(error: BaseException, code: int) -> int:
        log.error("%s", error)
        if not reported:
            report(channel, {"error": str(error), "exit": code})
        return code

    directory = state_directory(os.environ, os.geteuid(), options.state_dir)
    os.umask(0o077)
    try:
        with StateLock.acquire(directory):
            trio.run(_run, options, directory, ready)
    except (errors.AspenError, OSError, BaseExceptionGroup) as error:
        cause = _first(error)
        if not isinstance(cause, errors.AspenError | OSError):
            log.exception("the daemon ends because of a bug")
        return failed(cause, EXIT_MOUNT if isinstance(cause, errors.AspenError) else EXIT_SYSTEM)
    return EXIT_OK


async def _run(
    options: MountOptions, directory: StateDirectory, ready: Callable[[Report], None]
) -> None:
    await Node(options, directory).run(ready)


def _release() -> str:
    try:
        return metadata.version("aspenfs")
    except metadata.PackageNotFoundError:
        return ""


def _first(error: BaseException) -> BaseException:
    """The first error in a group of groups: the one to tell a person about."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
