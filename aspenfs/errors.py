"""Every error that aspenfs raises on purpose, and the only errno table of the project.

Code below `fuse/` raises the domain's word, never an errno. `fuse/operations.py` turns
`error.errno` into the kernel's answer in one decorator. What is not an `AspenError` is a bug:
it is logged with its traceback and answered with EIO.

    AspenError
    ├── NotFound            ENOENT        ├── TooLarge          EFBIG
    ├── AlreadyExists       EEXIST        ├── NameTooLong       ENAMETOOLONG
    ├── NotADirectory       ENOTDIR       ├── InvalidArgument   EINVAL
    ├── IsADirectory        EISDIR        ├── NotSupported      EOPNOTSUPP
    ├── DirectoryNotEmpty   ENOTEMPTY     ├── NotImplementedHere ENOSYS
    ├── AccessDenied        EACCES        ├── NoAttribute       ENODATA
    ├── NotPermitted        EPERM         ├── OutOfRange        ERANGE
    ├── ReadOnly            EROFS         ├── ArgumentTooLong   E2BIG
    ├── CrossTree           EXDEV         ├── NoSpace           ENOSPC
    ├── TooManyLinks        EMLINK        ├── Stale             ESTALE
    ├── LoopDetected        ELOOP         ├── BadHandle         EBADF
    ├── NoDevice            ENXIO         ├── Busy              EBUSY
    ├── StoreError
    │   ├── Conflict        EAGAIN        ├── Compacted         ESTALE
    │   ├── FutureRevision  EINVAL        ├── LeaseNotFound     ENOENT
    │   ├── TxnTooLarge     E2BIG         ├── Lagged            EOVERFLOW
    │   └── Overloaded      EAGAIN
    ├── ClusterError                      (between the nodes of a cluster)
    │   ├── NoQuorum        ETIMEDOUT     ├── NotLeader         EAGAIN
    │   ├── OutcomeUnknown  EIO           ├── PeerRefused       ECONNREFUSED
    │   ├── PeerUnreachable EHOSTUNREACH  ├── IdentityLost      ESTALE
    │   ├── TicketMalformed EINVAL        ├── TicketExpired     EKEYEXPIRED
    │   ├── TicketUnknown   ENOKEY        ├── TicketUsed        EKEYREVOKED
    │   ├── ForeignCluster  EKEYREJECTED
    │   ├── EntriesLost     EIO           (fatal for the process)
    │   └── Diverged        EIO
    ├── ControlError                      (between a daemon and its clients)
    │   ├── Unreachable     ENOTCONN      ├── ProtocolError     EPROTO
    │   └── RemoteFailure   EREMOTEIO
    └── StorageError        EIO
        ├── Corrupt         EIO     (names file, offset, and what to do)
        ├── SyncFailed      EIO     (fatal for the process)
        ├── Lost            EIO     (accepted work that never became durable)
        ├── Unavailable     EIO     (bytes that no node has that can be reached)
        └── Closed          ESHUTDOWN
"""

import errno as _errno
from typing import ClassVar


class AspenError(Exception):
    """Base of all errors raised on purpose; each leaf has its `errno`."""

    errno: ClassVar[int]


class NotFound(AspenError):
    errno = _errno.ENOENT


class AlreadyExists(AspenError):
    errno = _errno.EEXIST


class NotADirectory(AspenError):
    errno = _errno.ENOTDIR


class IsADirectory(AspenError):
    errno = _errno.EISDIR


class DirectoryNotEmpty(AspenError):
    errno = _errno.ENOTEMPTY


class AccessDenied(AspenError):
    errno = _errno.EACCES


class NotPermitted(AspenError):
    errno = _errno.EPERM


class ReadOnly(AspenError):
    errno = _errno.EROFS


class CrossTree(AspenError):
    errno = _errno.EXDEV


class TooManyLinks(AspenError):
    errno = _errno.EMLINK


class LoopDetected(AspenError):
    errno = _errno.ELOOP


class NoDevice(AspenError):
    errno = _errno.ENXIO


class TooLarge(AspenError):
    errno = _errno.EFBIG


class NameTooLong(AspenError):
    errno = _errno.ENAMETOOLONG


class InvalidArgument(AspenError):
    errno = _errno.EINVAL


class NotSupported(AspenError):
    errno = _errno.EOPNOTSUPP


class NotImplementedHere(AspenError):
    """The kernel remembers ENOSYS and stops asking: raise it only where that is wanted."""

    errno = _errno.ENOSYS


class NoAttribute(AspenError):
    errno = _errno.ENODATA


class OutOfRange(AspenError):
    errno = _errno.ERANGE


class ArgumentTooLong(AspenError):
    errno = _errno.E2BIG


class NoSpace(AspenError):
    errno = _errno.ENOSPC


class Stale(AspenError):
    errno = _errno.ESTALE


class BadHandle(AspenError):
    errno = _errno.EBADF


class Busy(AspenError):
    errno = _errno.EBUSY


class StoreError(AspenError):
    """Errors of the replicated store; every leaf sets its own errno."""


class Conflict(StoreError):
    """A compare of a transaction did not hold, and trying again did not help."""

    errno = _errno.EAGAIN


class FutureRevision(StoreError):
    errno = _errno.EINVAL


class TxnTooLarge(StoreError):
    errno = _errno.E2BIG


class Overloaded(StoreError):
    errno = _errno.EAGAIN


class LeaseNotFound(StoreError):
    errno = _errno.ENOENT


class Lagged(StoreError):
    """A watcher was too slow: events were dropped. Watch again from `revision`."""

    errno = _errno.EOVERFLOW

    def __init__(self, message: str = "the watcher was too slow", revision: int = 0) -> None:
        super().__init__(message)
        self.revision = revision


class Compacted(StoreError):
    """The revision asked for is gone; `oldest` is the oldest one that is left."""

    errno = _errno.ESTALE

    def __init__(self, oldest: int) -> None:
        super().__init__(f"compacted: the oldest revision left is {oldest}")
        self.oldest = oldest


class ClusterError(AspenError):
    """Errors between the nodes of a cluster; every leaf sets its own errno."""


class NoQuorum(ClusterError):
    """A majority of the voters did not answer in time. What was proposed may still happen, or never."""

    errno = _errno.ETIMEDOUT


class NotLeader(ClusterError):
    """Only the leader can do this; `leader` is who that is, as far as this node knows (0: nobody)."""

    errno = _errno.EAGAIN

    def __init__(self, message: str = "this node is not the leader", leader: int = 0) -> None:
        super().__init__(message)
        self.leader = leader


class OutcomeUnknown(ClusterError):
    """Whether the transaction was applied can not be known any more: look at the state."""

    errno = _errno.EIO


class PeerUnreachable(ClusterError):
    """Another node does not answer."""

    errno = _errno.EHOSTUNREACH


class PeerRefused(ClusterError):
    """Another node answers, and says no; the message has its reason."""

    errno = _errno.ECONNREFUSED


class IdentityLost(ClusterError):
    """A state directory is that of a node, but does not have what that node had promised to keep."""

    errno = _errno.ESTALE


class TicketMalformed(ClusterError):
    """The text is not a join ticket, or a part of it is missing."""

    errno = _errno.EINVAL


class TicketExpired(ClusterError):
    errno = _errno.EKEYEXPIRED


class TicketUsed(ClusterError):
    """Another node has joined with this ticket already."""

    errno = _errno.EKEYREVOKED


class TicketUnknown(ClusterError):
    """The cluster knows no such ticket: it was withdrawn, or expired long ago."""

    errno = _errno.ENOKEY


class ForeignCluster(ClusterError):
    """Who answers does not belong to the cluster that was expected."""

    errno = _errno.EKEYREJECTED


class EntriesLost(ClusterError):
    """What was committed, or promised to be kept, is gone on a node: nothing must be built upon that."""

    errno = _errno.EIO


class Diverged(ClusterError):
    """This node's state is not what the log made of it on the other nodes: it answers nothing from it."""

    errno = _errno.EIO


class ControlError(AspenError):
    """Errors of the control socket; every leaf sets its own errno."""


class Unreachable(ControlError):
    """No daemon answers, or it went away before it answered."""

    errno = _errno.ENOTCONN


class ProtocolError(ControlError):
    """The peer sent what the protocol does not allow: the connection is of no use any more."""

    errno = _errno.EPROTO


class RemoteFailure(ControlError):
    """The daemon failed at a request in a way that it did not foresee; its log has the traceback."""

    errno = _errno.EREMOTEIO


class StorageError(AspenError):
    errno = _errno.EIO


class Corrupt(StorageError):
    """Stored bytes are not what was written. Says which file, at which offset, and what to do."""

    errno = _errno.EIO

    def __init__(self, file: str, offset: int, cause: str, advice: str) -> None:
        super().__init__(f"{file}: corrupt at offset {offset}: {cause}; {advice}")
        self.file, self.offset = file, offset


class SyncFailed(StorageError):
    """fsync failed: the kernel may have dropped the pages, so the process must end (no retry)."""

    errno = _errno.EIO


class Lost(StorageError):
    """Accepted work was lost before it was durable, with the leader that had accepted it."""

    errno = _errno.EIO


class Unavailable(StorageError):
    """A chunk can be read neither here nor on any node that answers. Names it, and says what to do."""

    errno = _errno.EIO


class Closed(StorageError):
    errno = _errno.ESHUTDOWN
