"""fdatasync by the kernel's own workers, told of by an eventfd: no thread of ours, no interpreter lock.

Belongs here: asking for it and hearing of it. Not here: what is synced and when (`syncer.py`), what that
means (`wal.py`).

A thread that waits for fdatasync(2) must be woken, and then wants the interpreter's lock from the loop,
which has to be woken in its turn: 68 µs of CPU a sync, against 20 µs for this way, and that much later
(docs/performance.md). io_submit(2) with IOCB_CMD_FDSYNC; Linux 4.18 and later.
"""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import trio
from caio import linux_aio

from aspenfs.runtime.disk import RealFile

logger = logging.getLogger(__name__)

_FILES_MAX: Final = 64  # asked for at once
_WAIT_SECONDS: Final = 10  # for one answer; `open` gives up then, `wait` asks again

Done = Callable[[OSError | None], object]


class Descriptor(Protocol):
    def fileno(self) -> int: ...


class KernelSync:
    """One fdatasync of some files at a time. All but `wait` belongs to the loop's thread."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._left = 0
        self._error: OSError | None = None
        self._done: Done = _nobody

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "KernelSync | None":
        """None, and a word in the log, where the kernel can not do it for files in `directory`."""
        try:
            made = cls(linux_aio.Context(max_requests=_FILES_MAX))
            os.set_inheritable(made._context.fileno, False)
            made._try(directory)
        except (OSError, OverflowError, SystemError, ValueError) as error:
            logger.info("syncs are made by a thread: asynchronous ones do not work here: %s", error)
            return None
        return made

    def _try(self, directory: str | os.PathLike[str]) -> None:
        answers: list[OSError | None] = []
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with contextlib.closing(RealFile(descriptor)) as file:
            self.start([file], answers.append)
            self._hear(blocking=True)
        if answers != [None]:
            raise answers[0] if answers and answers[0] else OSError(errno.ETIMEDOUT, "no answer")

    @property
    def under_way(self) -> bool:
        return self._left > 0

    def start(self, files: Sequence[Descriptor], done: Done) -> None:
        """What was written to `files` shall be durable; then `done` is called, in `run`: with None, or
        the first error. They must stay open until then.

        OverflowError, SystemError, ValueError: nothing was begun, `done` is not called."""
        assert self._left == 0
        if not 0 < len(files) <= _FILES_MAX:
            raise OverflowError(f"{len(files)} files at once")
        operations = [linux_aio.Operation.fdsync(file.fileno()) for file in files]
        for operation in operations:
            operation.set_callback(self._ended)
        self._error, self._done = None, done
        self._left = self._context.submit(*operations)
        if self._left < len(operations):
            self._error = OSError(errno.EAGAIN, "the kernel took only some of the files")

    def _ended(self, result: int) -> None:
        # Must not raise: nobody would hear of it. A negative errno comes as an unsigned number.
        self._left -= 1
        if result >> 63 and self._error is None:
            number = (1 << 64) - result
            self._error = OSError(number, os.strerror(number))

    def _hear(self, *, blocking: bool = False) -> None:
        before = self._left
        if blocking:
            self._context.process_events(_FILES_MAX, 1, _WAIT_SECONDS)
        else:
            self._context.process_events(_FILES_MAX)
        if before and not self._left:
            self._done(self._error)

    async def run(self) -> None:
        """Calls what `start` was given, until cancelled."""
        context = self._context
        while True:
            await trio.lowlevel.wait_readable(context.fileno)
            try:
                context.poll()
            except BlockingIOError:
                continue
            self._hear()

    def wait(self) -> None:
        """Blocks until what is under way has ended and its `done` was called. When `run` has ended."""
        while self._left:
            self._hear(blocking=True)


def _nobody(error: OSError | None) -> None:
    raise AssertionError("nobody asked")
