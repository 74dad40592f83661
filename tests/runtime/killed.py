"""A process that is killed at the n-th change it makes to a file system: for work in several steps."""

import os
import signal
import sys
import traceback
from collections.abc import Callable

# Audit events (docs.python.org/3/library/audit_events.html) of calls that change names or sizes.
_CHANGES = frozenset(("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link"))


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Runs `work` in a forked process that gets SIGKILL before change `number`; whether it came to that.

    Opening a file to be written counts, too. The caller must have no threads and no LMDB environment.
    """
    child = os.fork()
    if not child:
        try:
            _count_down(number)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def _count_down(number: int) -> None:
    left = number

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in _CHANGES or (event == "open" and _writes(arguments)):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _writes(arguments: tuple[object, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
